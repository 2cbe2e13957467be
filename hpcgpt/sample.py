"""``python -m hpcgpt.sample RUN``: text from a run's newest valid checkpoint, printed as it comes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hpcgpt import cli, config_sources, runfolder
from hpcgpt.config import Config, Sample


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    folder = Path(options.RUN)
    runfolder.run_id(folder)
    settings = config_sources.from_file(folder / "config.toml")
    chosen = {}
    for key in ("prompt", "tokens", "temperature", "top_k", "top_p"):
        value = getattr(options, key)
        try:
            chosen[key] = None if value is None else config_sources.checked("sample", key, value)
        except ValueError as error:
            raise ValueError(f"--{key.replace('_', '-')}: {error}") from None
    wanted = dataclasses.replace(settings.sample, **{key: value for key, value in chosen.items() if value is not None})
    _print_samples(folder, settings, wanted, options.samples, options.seed)
    return 0


def _print_samples(folder: Path, settings: Config, wanted: Sample, samples: int, seed: int) -> None:
    from hpcgpt import restore, tokenizer, world
    from hpcgpt.generate import generate
    from hpcgpt.model import GPT

    alone = world.World(0, 0, 1, 1, "alone", "sample")
    ranks = world.Ranks(alone, world.pick_device(alone, "auto"), None)
    newest = restore.newest_valid(folder / "checkpoints", ranks, None)
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint yet")
    model = GPT(settings.model).to(ranks.device)
    state = restore.load(newest, model, None, ranks)
    words = tokenizer.load(folder / "tokenizer")
    print(f"{newest}, step {state.step:,}")
    prompt = [words.end_of_text, *words.encode(wanted.prompt)]
    for number in range(samples):
        print(f"--- sample {number + 1}\n{wanted.prompt}", end="")
        ids = generate(model, prompt, wanted, ranks.device, seed + number)
        for piece in tokenizer.stream(words, ids, after=prompt):
            print(piece, end="", flush=True)
        print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hpcgpt sample", description="Text from a run's newest checkpoint.")
    parser.add_argument("RUN", help="run folder")
    parser.add_argument("--prompt", help="text to start from")
    parser.add_argument("--tokens", type=int, help="tokens to generate")
    parser.add_argument("--temperature", type=float, help="0: greedy")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens with this much mass")
    parser.add_argument("--samples", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (default: 0)")
    return parser


if __name__ == "__main__":
    cli.run(main)
