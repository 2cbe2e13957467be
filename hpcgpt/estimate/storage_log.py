"""A log of every allocation of a computation on fake tensors, each with what it holds.

Fake tensors (``torch._subclasses.fake_tensor``) have shapes and no memory. The log is a dispatch mode above them: it
sees each operation's results, and notes when a storage is first seen, resized and freed. What a storage holds is the
current `scope`, until it turns out to be something else: the result of a collective that gathers weights, the gradient
of a parameter (`label`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary, weakref

_GATHERS_WEIGHTS = ("all_gather", "allgather", "split_with_sizes_copy")
_REDUCES_GRADIENTS = ("reduce_scatter", "chunk_cat", "allreduce")
_LARGE = 1 << 16  # bytes; what is reduced below that is a loss or a norm
# What gloo allocates beside the tensors that it is given (torch, ProcessGroupGloo.cpp): a result in one piece for an
# all-gather, freed with the output that FSDP2 allocates for it; a copy of what a reduce-scatter reduces.
_GATHERS_BESIDE, _REDUCES_BESIDE = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_"
_GATHERS_FULL = "_c10d_functional::all_gather_into_tensor"


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return the storage of a tensor, or those of the tensors in a wrapper such as DTensor.

    As ``torch.distributed._tools.common_utils``, which would load torch's compiler.
    """
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return [tensor.untyped_storage()]
    names, _ = wrapper.__tensor_flatten__()
    inner = [getattr(wrapper, name) for name in names]
    return [storage for part in inner if isinstance(part, Tensor) for storage in storages(part)]


class StorageLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Logs allocations while it is active. Make and enter it inside a FakeTensorMode.

    `changes`: number of a storage and the change of its bytes, in order. `holds`: what each storage holds, by number.
    `marks`: where in `changes` each phase begins.
    """

    def __init__(self, gloo: bool = False) -> None:
        """Prepare to log. `gloo`: also what gloo allocates in a collective."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._gloo = gloo
        self._beside: dict[int, list[int]] = {}  # by number of a storage: those that are freed with it
        self.changes: list[tuple[int, int]] = []
        self.holds: list[str] = []
        self.marks: list[tuple[int, str]] = []
        self.scope = "other"
        self._numbers: Any = WeakIdKeyDictionary()  # by storage
        self._bytes: list[int] = []
        self._references: list[Any] = []
        self._resize = torch.UntypedStorage.resize_
        self._fake_mode = active_fake_mode()

    @contextmanager
    def within(self, scope: str) -> Iterator[None]:
        """Note that what is allocated inside holds `scope`."""
        before, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = before

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self.marks.append((len(self.changes), name))

    def label(self, tensor: Tensor | None, holds: str) -> None:
        """Note what a tensor holds."""
        for storage in storages(tensor) if tensor is not None else ():
            self.holds[self._number(storage)] = holds

    def held_by(self, tensor: Tensor) -> str:
        """Return what a tensor holds, '' if it is not known."""
        numbers = [self._numbers.get(storage) for storage in storages(tensor)]
        return self.holds[numbers[0]] if numbers and numbers[0] is not None else ""

    def __enter__(self) -> StorageLog:
        log = self

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            log._resize(storage, size)
            log._number(storage)

        # FSDP2 frees and allocates gathered weights by resizing their storages, which no dispatch mode sees.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *arguments: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*arguments)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # a DTensor dispatches again, on its local tensors
        result = func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            result = args[0]  # in truth it returns the same tensor, in fake mode a new one
        # Not real tensors, such as a mesh of ranks, nor those on which DTensor computes shapes, in a mode of its own.
        if active_fake_mode() is not self._fake_mode:
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                for storage in storages(leaf):
                    self._number(storage)
        self._relabel(func.name(), args, kwargs or {}, result)
        if self._gloo:
            self._allocate_beside(func.name(), args, result)
        return result

    def _relabel(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Label what an operation shows to be weights or gradients."""
        if name == "aten::_to_copy" and self.held_by(args[0]) == "weights":
            self.label(result, "weights")  # autocast keeps it for the backward pass
        elif any(part in name for part in _GATHERS_WEIGHTS):
            self._label_large((args, kwargs, result), "weights")
        elif any(part in name for part in _REDUCES_GRADIENTS):
            self._label_large((args, kwargs, result), "gradients")

    def _allocate_beside(self, name: str, args: Any, result: Any) -> None:
        if name not in (_GATHERS_BESIDE, _REDUCES_BESIDE, _GATHERS_FULL):
            return
        tensor = {_GATHERS_BESIDE: args[0], _REDUCES_BESIDE: args[1], _GATHERS_FULL: result}[name]
        beside = self._new("gradients" if name == _REDUCES_BESIDE else "weights")
        self._set(beside, tensor.numel() * tensor.itemsize)
        if name == _GATHERS_BESIDE:
            (storage,) = storages(tensor)
            self._beside.setdefault(self._number(storage), []).append(beside)
        else:
            self._set(beside, 0)

    def _label_large(self, tree: Any, holds: str) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.numel() * leaf.itemsize >= _LARGE:
                self.label(leaf, holds)

    def _number(self, storage: torch.UntypedStorage) -> int:
        """Return the number of a storage; note that it is new, or has another size."""
        number, size = self._numbers.get(storage), storage.nbytes()
        if number is None:
            number = self._numbers[storage] = self._new(self.scope)
            self._references.append(weakref.ref(storage, partial(self._freed, number)))
        if size != self._bytes[number]:
            self._set(number, size)
        return number  # type: ignore[no-any-return]

    def _new(self, holds: str) -> int:
        self.holds.append(holds)
        self._bytes.append(0)
        return len(self.holds) - 1

    def _freed(self, number: int, _: Any) -> None:
        for freed in (number, *self._beside.pop(number, ())):
            self._set(freed, 0)

    def _set(self, number: int, size: int) -> None:
        if self._bytes[number]:
            self.changes.append((number, -self._bytes[number]))
        self._bytes[number] = size
        if size:
            self.changes.append((number, size))
