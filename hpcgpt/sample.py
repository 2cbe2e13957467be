"""``python -m hpcgpt.sample RUN``: generate text from a run's checkpoint, and print it token by token.

    hpcgpt sample RUN --prompt TEXT
    hpcgpt sample RUN --prompts FILE         each prompt of a file, or of standard input (-)
    hpcgpt sample RUN --interactive          prompts that are typed
    hpcgpt sample RUN ... --json             one JSON object for each text, on a line of its own

A text never ends with a part of a character: what the last tokens lack of one is not printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcgpt import cli
from hpcgpt.checkpoint import run_config
from hpcgpt.config import paths, sources
from hpcgpt.config.operation import Sample
from hpcgpt.errors import UserError, cannot_read
from hpcgpt.output import terminal
from hpcgpt.run import which_runs

if TYPE_CHECKING:
    from hpcgpt.checkpoint.load_model import Trained

STDIN = "-"
SEEDS = range(-(1 << 63), 1 << 64)  # that torch takes


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    folder = which_runs.given(options)
    sampling = _sampling(options, folder)
    if options.samples < 1:
        raise UserError(f"--samples: {options.samples} must be at least 1")
    if options.seed not in SEEDS or options.seed + options.samples not in SEEDS:  # each text has the next one
        raise UserError(f"--seed: {options.seed} must be from {SEEDS.start} to {SEEDS.stop - 1 - options.samples}")
    if options.interactive and options.json:
        raise UserError("--interactive and --json cannot be combined: --prompts - reads prompts from another program")
    # A file is read before torch is loaded, standard input while texts are generated.
    prompts = None if options.prompts in (None, STDIN) else list(_of_file(options.prompts))
    # Imported here, since it loads torch.
    from hpcgpt.checkpoint import load_model

    _generate(load_model.load(folder, options.step, options.best), sampling, options, prompts)
    return 0


def _generate(model: Trained, sampling: Sample, options: argparse.Namespace, prompts: Sequence[str] | None) -> None:
    """Print the texts that were asked for; `prompts` are those of a file."""
    writer = _Writer(model, sampling, options.samples, options.seed)
    with model.computing():
        if options.interactive:
            _converse(writer)
            return
        if not options.json:
            print(f"{model.path}, step {model.state.step:,}", flush=True)
        if options.prompts is None:
            writer.write(sampling.prompt, None, options.json)
            return
        for number, prompt in enumerate(_of_stdin() if prompts is None else prompts, start=1):
            writer.write(prompt, number, options.json)


@dataclass(frozen=True)
class _Writer:
    """Generates `samples` texts for a prompt in one batch, with the seeds from `seed` on."""

    model: Trained
    sampling: Sample
    samples: int
    seed: int

    def write(self, prompt: str, number: int | None, as_json: bool) -> None:
        """Print the texts of a prompt, which is the one with this number, if there are several."""
        if as_json:
            self._write_json(prompt)
        else:
            self._write_text(prompt, f"prompt {number}, " if number is not None else "")

    def _write_text(self, prompt: str, before: str) -> None:
        """Print the first text while it is generated, the others after it."""
        for number, pieces in enumerate(self._texts(prompt, self.seed), start=1):
            print(f"--- {before}sample {number}\n{terminal.for_stdout(prompt)}", end="", flush=True)
            self.stream(pieces)

    def _write_json(self, prompt: str) -> None:
        for number, pieces in enumerate(self._texts(prompt, self.seed)):
            found: dict[str, Any] = {
                "prompt": prompt, "text": "".join(pieces), "sample": number + 1, "seed": self.seed + number,
                "tokens": self.sampling.tokens, "step": self.model.state.step, "checkpoint": str(self.model.path),
            }  # fmt: skip
            print(json.dumps(found), flush=True)

    def turn(self, prompt: str, number: int) -> None:
        """Print the texts of a turn of a conversation, each with seeds of its own."""
        for pieces in self._texts(prompt, self.seed + number * self.samples):
            print(terminal.for_stdout(prompt), end="", flush=True)
            self.stream(pieces)

    @staticmethod
    def stream(pieces: Iterator[str]) -> None:
        """Print a text piece by piece, and end its line, also after Ctrl-C."""
        try:
            for piece in pieces:
                print(terminal.for_stdout(piece), end="", flush=True)
        finally:
            print(flush=True)

    def _texts(self, prompt: str, seed: int) -> Iterator[Iterator[str]]:
        """Yield the pieces of each text; those of the first one are generated while they are taken."""
        from hpcgpt.model.generate import generate_several
        from hpcgpt.tokenizer import interface

        tokenizer, device = self.model.tokenizer, self.model.ranks.device
        ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        generated: list[list[int]] = [[] for _ in range(self.samples)]

        def first() -> Iterator[int]:
            seeds = range(seed, seed + self.samples)
            for tokens in generate_several(self.model.model, ids, self.sampling, device, seeds):
                for text, token in zip(generated, tokens, strict=True):
                    text.append(token)
                yield tokens[0]

        for number in range(self.samples):
            yield interface.stream(tokenizer, generated[number] if number else first(), after=ids)


def _converse(writer: _Writer) -> None:
    """Continue each line that is typed, until Ctrl-D. Ctrl-C ends a text, and without one the command."""
    typed = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys, and the lines before
        model = writer.model
        print(f"{model.path}, step {model.state.step:,}. Type the beginning of a text. Ctrl-C: end it; Ctrl-D: quit.")
    if sys.stdin is None:
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    number = 0
    while True:
        try:
            prompt = input("> " if typed else "")
        except EOFError:
            if typed:
                print()
            return
        except KeyboardInterrupt:
            print()
            raise
        try:
            writer.turn(prompt, number)
        except KeyboardInterrupt:
            if not typed:
                raise
        number += 1


def _sampling(options: argparse.Namespace, folder: Path) -> Sample:
    """Return the run's settings for samples, with those that were given instead."""
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
    return sampling


def _of_file(name: str) -> Iterator[str]:
    """Yield the prompts of a file: of a .jsonl the texts `prompt` of its objects, of any other its lines."""
    path = Path(paths.expand(name, "--prompts"))
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise cannot_read(error, f"--prompts {terminal.printable(name)}: {error.strerror}") from None
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text = _decoded(line.rstrip(b"\r"), name, number)
        found = True
        yield _of_json(text, name, number) if path.suffix == ".jsonl" else text
    if not found:
        raise UserError(f"--prompts {terminal.printable(name)} has no prompt: expected one a line")


def _of_stdin() -> Iterator[str]:
    """Yield the lines of standard input as they arrive."""
    with open(0, "rb", closefd=False) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _decoded(line.rstrip(b"\r\n"), STDIN, number)


def _decoded(line: bytes, name: str, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {terminal.printable(name)}, line {number} is not UTF-8: {error.reason}") from None


def _of_json(text: str, name: str, number: int) -> str:
    try:
        prompt = json.loads(text)["prompt"]
        if isinstance(prompt, str):
            return prompt
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f'--prompts {terminal.printable(name)}, line {number}: expected a JSON object with a text "prompt"')


def _parser() -> argparse.ArgumentParser:
    about = (
        "Generate text from a run's checkpoint, and print it token by token. On a terminal, control characters are "
        "escaped (\\x1b), so that no text can control the terminal; a file or a pipe gets every byte unchanged."
    )
    parser = argparse.ArgumentParser(prog="hpcgpt sample", description=about)
    which_runs.add_to(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the smallest validation loss")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--prompt", help="text to start from (default: the run's sample.prompt)")
    start.add_argument(
        "--prompts", metavar="FILE",
        help='a prompt from each line of a file or of standard input (-), or from "prompt" of each object of a .jsonl',
    )  # fmt: skip
    start.add_argument("--interactive", action="store_true", help="continue the lines that you type")
    parser.add_argument("--json", action="store_true", help="one JSON object for each text (docs/reference.md)")
    parser.add_argument("--tokens", type=int, help="tokens to generate (default: the run's sample.tokens)")
    parser.add_argument("--temperature", type=float, help="sampling temperature; 0: greedy (default: the run's)")
    parser.add_argument("--top-k", type=int, help="sample among the k most likely tokens; 0: all (default: the run's)")
    parser.add_argument(
        "--top-p",
        type=float,
        help="sample among the most likely tokens with this total probability (default: the run's)",
    )
    parser.add_argument(
        "--slide", type=int, help="drop this many tokens at a time once the context is full (default: the run's)"
    )
    parser.add_argument("--samples", type=int, default=1, help="number of texts, generated in one batch (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first text; then the next ones (default: 0)")
    return parser


if __name__ == "__main__":
    cli.run(main)
