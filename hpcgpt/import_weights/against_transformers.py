"""Compares imported weights with what transformers computes from the source: the check of an export, reversed.

Ours are read back from the checkpoint that was written, theirs from the files of the source. If vocabulary or context
were fitted, what both have is compared.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from hpcgpt.checkpoint.weights import Weights
from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export import agreement, tensor_names
from hpcgpt.export.agreement import DisagreementError, Forward
from hpcgpt.export.on_demand import Watch
from hpcgpt.import_weights.assemble import Source

WINDOWS, LONGEST = 2, 64  # random ids: every position of longer windows is computed in the same way


def compare(folder: Path, checkpoint: Path, source: Source, model: Model) -> str:
    """Compare a `source` from this folder with what was written as `model`; return a sentence on it.

    Raises:
        UserError: they do not compute the same.
    """
    if find_spec("transformers") is None:
        return "logits were not compared: transformers is not installed (pip install 'hpcgpt[hf]')"
    # Imported here, since it may not be there.
    from hpcgpt.export import huggingface_model

    ids, vocabulary = _ids(source.model, model)
    weights = Weights(checkpoint)
    own = _first(agreement.ours(model, lambda name: weights.read(name).double()), vocabulary)
    names = tensor_names.modules(model, tensor_names.architecture(model))
    try:
        theirs = huggingface_model.computing(huggingface_model.make(folder), source.read, names)
        found = agreement.compare(own, _first(theirs, vocabulary), ids, model)
    except DisagreementError as error:
        raise UserError(
            f"{folder}: the imported weights do not compute what transformers computes from them: {error}. This is a "
            "mistake of hpcgpt, or a key of config.json that it does not know; --no-check imports them nevertheless"
        ) from error
    return (
        f"logits agree with transformers' in float64, on {ids.numel():,} random ids: they differ by "
        f"{found.difference:.1e} at most, and the largest is {found.largest:.3g}"
    )


def _ids(source: Model, model: Model) -> tuple[Tensor, int]:
    """Return random ids (B, T) that both have, and the number of ids that both have."""
    vocabulary = min(source.vocab_size, model.vocab_size)
    length = min(source.block_size, model.block_size, LONGEST)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (WINDOWS, length), generator=generator), vocabulary


def _first(forward: Forward, vocabulary: int) -> Forward:
    """Return `forward` with the logits of the first ids only."""

    def logits(ids: Tensor, watch: Watch) -> Tensor:
        return forward(ids, watch)[..., :vocabulary].contiguous()

    return logits
