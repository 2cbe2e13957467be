"""The steps of an import: read, fit, assemble, write, check."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hpcgpt.checkpoint import layout, safetensors_writer
from hpcgpt.config import paths
from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export import new_folder
from hpcgpt.import_weights import against_transformers, checkpoints, huggingface, weights_folder
from hpcgpt.import_weights.assemble import Source, assemble
from hpcgpt.import_weights.weights_folder import Origin
from hpcgpt.output.counted import counted
from hpcgpt.tokenizer import find_tokenizer
from hpcgpt.tokenizer.interface import Tokenizer


def run(options: argparse.Namespace) -> Iterator[str]:
    """Import options.PATH; yield what a person should know, one line at a time.

    Raises:
        UserError: something does not fit; nothing is written then.
    """
    path, out = Path(paths.expand(options.PATH, "PATH")), Path(paths.expand(options.out, "--out"))
    new_folder.check(out)
    if problem := paths.problem_of_text(str(out.resolve())):
        raise UserError(f"--out: {problem}, and its config.toml names it: choose another one")
    if not path.exists():
        raise UserError(f"no file or folder {path}")
    of_hugging_face = path.is_dir()
    _check_options(options, of_hugging_face)
    source = huggingface.read(path) if of_hugging_face else _read_file(path, options)
    model = source.model
    yield f"{path}: {source.format}, {_shape(model)}"
    tokenizer = _tokenizer(path, options)
    fitted, fitting = _fit(model, tokenizer, options.vocab_size, options.block_size)
    assembled = assemble(source, fitted)
    notes = [*assembled.notes, *fitting]
    for note in notes:
        yield f"note: {note}"
    with new_folder.making(out) as folder:
        origin = Origin(str(path.resolve()), source.format, _sizes(path), dataclasses.asdict(model), notes)
        weights_folder.write(folder, out, assembled, tokenizer, origin)
        if of_hugging_face and not options.no_check:
            yield against_transformers.compare(path, layout.path_of(folder / "checkpoints", 0), source, fitted)
        else:
            yield "logits were not compared with another program's"
    size = sum(map(safetensors_writer.byte_count, assembled.about.values())) / 1e6
    yield f"{out}: {size:,.1f} MB of weights, tokenizer {tokenizer.name}"
    yield f"to train on from it: hpcgpt train {out / 'config.toml'} --data.dir SHARDS"


def _read_file(path: Path, options: argparse.Namespace) -> Source:
    return checkpoints.read(path, checkpoints.Unsaid(options.heads, options.gelu))


def _check_options(options: argparse.Namespace, of_hugging_face: bool) -> None:
    """Raise UserError if an option has no effect, or no meaning."""
    if options.heads < 0:
        raise UserError(f"--heads {options.heads} must be at least 1")
    for name, given in (("--heads", options.heads), ("--gelu", options.gelu)):
        if of_hugging_face and given:
            raise UserError(f"{name} has no effect on a folder, whose config.json says it: leave it out")


def _tokenizer(path: Path, options: argparse.Namespace) -> Tokenizer:
    """Find the tokenizer that was named, or the one in the folder."""
    if options.tokenizer:
        return find_tokenizer.find(options.tokenizer, options.end_of_text)
    if not path.is_dir() or not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has no tokenizer.json: name the tokenizer of these weights, as --tokenizer gpt2, or a folder with "
            "a tokenizer.json"
        )
    # As a path that begins with /: the name of a folder may also be that of a tokenizer, such as gpt2.
    return find_tokenizer.find(str(path.absolute()), options.end_of_text)


def _fit(model: Model, tokenizer: Tokenizer, vocab_size: int, block_size: int) -> tuple[Model, list[str]]:
    """Return the model with the vocabulary and context that were asked for, and what that does to its tables.

    Raises:
        UserError: they do not fit its weights, or its tokenizer.
    """
    notes = []
    if min(vocab_size, block_size) < 0:
        raise UserError(f"--vocab-size {vocab_size} and --block-size {block_size} must be at least 1")
    vocabulary, context = vocab_size or model.vocab_size, block_size or model.block_size
    if vocabulary < tokenizer.vocab_size:
        advice = f"leave --vocab-size out, or give at least {tokenizer.vocab_size}" if vocab_size else (
            f"is it the tokenizer of these weights? If it is, --vocab-size {tokenizer.vocab_size} adds the ids"
        )  # fmt: skip
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids, and the model {vocabulary:,}: {advice}"
        )
    if vocabulary < model.vocab_size:
        notes.append(f"the last {model.vocab_size - vocabulary:,} of {model.vocab_size:,} ids are cut off")
    if vocabulary > model.vocab_size:
        notes.append(f"{vocabulary - model.vocab_size:,} ids are new; their embedding is the mean of the others")
    if context > model.block_size and model.kind == "gpt2":
        raise UserError(
            f"--block-size {context:,}: these weights have {model.block_size:,} position embeddings, and no more can "
            "be made of them"
        )
    if context < model.block_size:
        what = "position embeddings after it are cut off" if model.kind == "gpt2" else "no weight depends on it"
        notes.append(f"the context is {context:,} of {model.block_size:,} tokens; {what}")
    if context > model.block_size:
        notes.append(f"the context is {context:,} tokens, and the weights were trained with {model.block_size:,}")
    return replace(model, vocab_size=vocabulary, block_size=context), notes


def _sizes(path: Path) -> dict[str, int]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def _shape(model: Model) -> str:
    groups = f" in {model.kv_heads} groups" if model.kv_heads != model.n_head else ""
    return (
        f"{counted(model.n_layer, 'layer')} of {model.n_embd}, {counted(model.n_head, 'head')} of "
        f"{model.head_width}{groups}, "
        f"{model.block_size:,} tokens of context, {model.vocab_size:,} ids, head {'' if model.tied else 'not '}tied"
    )
