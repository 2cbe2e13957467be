"""``python -m hpcgpt.sample RUN``: generate text from a run's checkpoint, and print it token by token."""

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
    given = {}
    for key in ("prompt", "tokens", "temperature", "top_k", "top_p", "slide"):
        value = getattr(options, key)
        try:
            given[key] = None if value is None else sources.checked("sample", key, value)
        except ValueError as error:
            raise UserError(f"--{key.replace('_', '-')}: {error}") from None
    sampling = dataclasses.replace(settings.sample, **{key: value for key, value in given.items() if value is not None})
    if sampling.slide > settings.model.block_size:
        raise UserError(f"--slide: {sampling.slide} is more than the run's block_size of {settings.model.block_size}")
    if options.samples < 1:
        raise UserError(f"--samples: {options.samples} must be at least 1")
    # Imported here, since it loads torch.
    from hpcgpt.checkpoint import load_model

    _print_samples(load_model.load(folder, options.step, options.best), sampling, options.samples, options.seed)
    return 0


def _print_samples(model: Trained, sampling: Sample, samples: int, seed: int) -> None:
    """Generate all texts in one batch: the first is printed while it is generated, the others after it."""
    from hpcgpt.model.generate import generate_several
    from hpcgpt.tokenizer import interface

    tokenizer = model.tokenizer
    print(f"{model.path}, step {model.state.step:,}")
    prompt = [tokenizer.end_of_text, *tokenizer.encode(sampling.prompt)]
    generated: list[list[int]] = [[] for _ in range(samples)]

    def first() -> Iterator[int]:
        seeds = range(seed, seed + samples)
        for tokens in generate_several(model.model, prompt, sampling, model.ranks.device, seeds):
            for text, token in zip(generated, tokens, strict=True):
                text.append(token)
            yield tokens[0]

    with model.computing():
        for number in range(samples):
            print(f"--- sample {number + 1}\n{terminal.for_stdout(sampling.prompt)}", end="")
            for piece in interface.stream(tokenizer, generated[number] if number else first(), after=prompt):
                print(terminal.for_stdout(piece), end="", flush=True)
            print()


def _parser() -> argparse.ArgumentParser:
    about = (
        "Generate text from a run's checkpoint, and print it token by token. On a terminal, control characters are "
        "escaped (\\x1b), so that no text can control the terminal; a file or a pipe gets every byte unchanged."
    )
    parser = argparse.ArgumentParser(prog="hpcgpt sample", description=about)
    parser.add_argument("RUN", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the smallest validation loss")
    parser.add_argument("--prompt", help="text to start from")
    parser.add_argument("--tokens", type=int, help="tokens to generate")
    parser.add_argument("--temperature", type=float, help="sampling temperature; 0: greedy")
    parser.add_argument("--top-k", type=int, help="sample among the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, help="sample among the most likely tokens with this total probability")
    parser.add_argument("--slide", type=int, help="drop this many tokens at a time once the context is full")
    parser.add_argument("--samples", type=int, default=1, help="number of texts, generated in one batch (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first text; then the next ones (default: 0)")
    return parser


if __name__ == "__main__":
    cli.run(main)
