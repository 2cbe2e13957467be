"""``python -m hpcgpt.sample RUN``: generates text from a run's checkpoint, and prints it token by token."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcgpt import cli
from hpcgpt.checkpoint import run_config
from hpcgpt.config import paths, sources
from hpcgpt.config.options import Sample
from hpcgpt.errors import UserError
from hpcgpt.output import terminal

if TYPE_CHECKING:
    from hpcgpt.checkpoint.load_model import Trained


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    folder = Path(paths.expand(options.RUN, "RUN"))
    settings = run_config.config(folder)
    chosen = {}
    for key in ("prompt", "tokens", "temperature", "top_k", "top_p", "slide"):
        value = getattr(options, key)
        try:
            chosen[key] = None if value is None else sources.checked("sample", key, value)
        except ValueError as error:
            raise UserError(f"--{key.replace('_', '-')}: {error}") from None
    wanted = dataclasses.replace(settings.sample, **{key: value for key, value in chosen.items() if value is not None})
    if wanted.slide > settings.model.block_size:
        raise UserError(f"--slide: {wanted.slide} is more than the run's block_size of {settings.model.block_size}")
    if options.samples < 1:
        raise UserError(f"--samples: {options.samples} must be at least 1")
    # Imported here, since it loads torch.
    from hpcgpt.checkpoint import load_model

    _print_samples(load_model.load(folder, options.step, options.best), wanted, options.samples, options.seed)
    return 0


def _print_samples(model: Trained, wanted: Sample, samples: int, seed: int) -> None:
    """Generate all texts at once: the first is printed while it is generated, the others after it."""
    from hpcgpt.model.generate import generate_several
    from hpcgpt.tokenizer import interface

    tokenizer = model.tokenizer
    print(f"{model.path}, step {model.state.step:,}")
    prompt = [tokenizer.end_of_text, *tokenizer.encode(wanted.prompt)]
    later: list[list[int]] = [[] for _ in range(samples)]

    def first() -> Iterator[int]:
        seeds = range(seed, seed + samples)
        for chosen in generate_several(model.model, prompt, wanted, model.ranks.device, seeds):
            for text, number in zip(later, chosen, strict=True):
                text.append(number)
            yield chosen[0]

    with model.computing():
        for number in range(samples):
            print(f"--- sample {number + 1}\n{terminal.for_stdout(wanted.prompt)}", end="")
            for piece in interface.stream(tokenizer, later[number] if number else first(), after=prompt):
                print(terminal.for_stdout(piece), end="", flush=True)
            print()


def _parser() -> argparse.ArgumentParser:
    about = (
        "Text from a run's checkpoint, printed as it comes. On a terminal control characters in it are shown as "
        "\\x1b, so that no text can give the terminal orders; into a file or a pipe goes every byte as it is."
    )
    parser = argparse.ArgumentParser(prog="hpcgpt sample", description=about)
    parser.add_argument("RUN", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the smallest validation loss")
    parser.add_argument("--prompt", help="text to start from")
    parser.add_argument("--tokens", type=int, help="tokens to generate")
    parser.add_argument("--temperature", type=float, help="0: greedy")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens with this much mass")
    parser.add_argument("--slide", type=int, help="tokens that leave a full window at a time; more is faster")
    parser.add_argument("--samples", type=int, default=1, help="how many, all made at once (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (default: 0)")
    return parser


if __name__ == "__main__":
    cli.run(main)
