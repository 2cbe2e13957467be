"""What every encoder can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

# The ids of all texts, concatenated (n,), and how many each text has (k,).
EncodedBatch: TypeAlias = tuple[NDArray[np.uint32], NDArray[np.int64]]


class Encoder(Protocol):
    """Encodes batches of texts. `fallback_reason` says why "auto" is not the fastest encoder; "" if it is."""

    name: str
    fallback_reason: str

    def batch(self, texts: Sequence[str]) -> EncodedBatch:
        """Encode texts without lone surrogates."""
        ...
