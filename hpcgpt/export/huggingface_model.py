"""The forward pass of an exported folder, as Hugging Face's transformers computes it, for the check of the export.

transformers makes the model from config.json, and its modules get their weights from the files one by one
(``hpcgpt.export.on_demand``): what is computed is theirs, and a model of any size can be checked. Its norms and
softmaxes convert to float32 whatever the dtype of the model is. `_Float64` leaves such conversions out, so that two
models that state the same function agree to the last digits.

The only module that imports transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hpcgpt.errors import UserError
from hpcgpt.export import huggingface_config
from hpcgpt.export.agreement import DisagreementError, Forward
from hpcgpt.export.on_demand import Read, Watch, read_on_demand, watched, without_memory_for_parameters

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def require_transformers() -> str:
    """Return the version of transformers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"--to hf checks the export with Hugging Face's transformers, which is not installed here ({error}): "
            "pip install 'hpcgpt[hf]', or 'transformers>=4.51'"
        ) from None
    return str(transformers.__version__)


class Files:
    """The tensors in the safetensors files of a folder, with or without an index."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        names = json.loads(index.read_bytes())["weight_map"] if index.exists() else None
        if names is None:
            with safe_open(folder / SINGLE, framework="pt") as file:
                names = dict.fromkeys(file.keys(), SINGLE)
        self._files = {name: folder / file for name, file in names.items()}

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]


def forward(folder: Path, names: dict[str, str]) -> Forward:
    """Return the forward pass of the model in `folder`. `names`: of each module of ours, that of theirs.

    Raises:
        DisagreementError: transformers refuses config.json, or the files do not have the tensors of the model.
    """
    files = Files(folder)
    model = make(folder)
    _check_tensors(model, files)
    return computing(model, files.read, names)


def computing(model: Any, read: Read, names: dict[str, str]) -> Forward:
    """Return the forward pass of a model of `make` with the weights that `read` returns, by their names in `model`."""
    read_on_demand(model, read)
    reported = {there: name for name, there in names.items()}

    def run(ids: Tensor, watch: Watch) -> Tensor:
        with _Float64(), watched(model, reported, watch):
            logits: Tensor = model(ids, use_cache=False).logits  # (B, T, V)
        return logits

    return run


def make(folder: Path) -> Any:
    """Make the model of a folder's config.json, without weights.

    The file may be from anywhere, so it is data, and chooses neither code nor other files.

    Raises:
        DisagreementError: transformers refuses config.json.
        UserError: it names code or files.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    classes, models = cast(Any, CONFIG_MAPPING), cast(Any, AutoModelForCausalLM)  # not every version has types
    content = json.loads((folder / "config.json").read_bytes())
    huggingface_config.refuse_code(folder / "config.json", content)
    try:
        with _quiet(), without_memory_for_parameters():
            config = classes[content["model_type"]].from_dict(content)
            return models.from_config(config, trust_remote_code=False, attn_implementation="sdpa").eval()
    except MemoryError:
        raise
    except Exception as error:  # of any type: what its classes raise for a value that they do not expect
        raise DisagreementError(f"transformers cannot make a model from its config.json: {error!r}") from error


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """Return what AutoTokenizer, with the files of `folder`, makes of a text, without special tokens."""
    from transformers import AutoTokenizer

    with _quiet():
        found = cast(Any, AutoTokenizer).from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        with _quiet():  # a text may be longer than the model's context
            ids: list[int] = found(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode


def _check_tensors(model: nn.Module, files: Files) -> None:
    """Check that the files have exactly the tensors of the model, with its shapes; a shared one by its first name."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if missing := [name for name in expected if name not in files.names]:
        raise DisagreementError(f"config.json asks for {_some(missing)}, which no file has")
    if more := sorted(files.names - expected.keys()):
        raise DisagreementError(f"the files have {_some(more)}, which the model of config.json has not")
    for name, shape in expected.items():
        if files.shape(name) != shape:
            raise DisagreementError(f"{name} is {files.shape(name)} in the file, and the model needs {shape}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _Float64(TorchFunctionMode):
    """Leaves out conversions of float64 tensors to float32."""

    def __torch_function__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = dict(keywords or {})
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].dtype == torch.float64:
            if function is Tensor.float or (
                function is Tensor.to and torch.float32 in (*arguments, *keywords.values())
            ):
                return arguments[0]
            if function in (F.softmax, torch.softmax, Tensor.softmax) and keywords.get("dtype") == torch.float32:
                keywords["dtype"] = None
        return function(*arguments, **keywords)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing anything but errors."""
    from transformers.utils import logging as untyped

    logging = cast(Any, untyped)
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
