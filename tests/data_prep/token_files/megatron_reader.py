"""Megatron's own ``megatron/core/datasets/indexed_dataset.py``, and nothing else of Megatron.

It is from the wheel of megatron-core on PyPI, which pip downloads (2.6 MB) but does not install: importing the package
takes seconds and warns. The reader needs numpy, torch, two small files beside it, and one function of
``megatron.core.utils`` that is defined in ``_rank_utils``. The wheel is the same on every machine: only its Python
files are read, and they are checked by their SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron-core==0.16.1"
SHA256 = "38f6bef63cd4ebc4c39c1eccbaf578596accba5c47d012faffa0670913aec131"


@pytest.fixture(scope="session")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """The module, whose IndexedDataset reads and whose IndexedDatasetBuilder writes."""
    wheel = download(tmp_path_factory.mktemp("megatron"))
    before = set(sys.modules)
    for name in ("megatron", "megatron.core", "megatron.core.datasets"):
        package = types.ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]  # their __init__.py do not run
        sys.modules[name] = package
    try:
        sys.modules["megatron.core.utils"] = importlib.import_module("megatron.core._rank_utils")
        yield importlib.import_module("megatron.core.datasets.indexed_dataset")
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "megatron":
                del sys.modules[name]


def download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    of_one_kind = ["--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
    done = subprocess.run([*pip, *of_one_kind, "--dest", str(folder), PACKAGE], capture_output=True, text=True,
                          timeout=200, check=False)  # fmt: skip
    assert done.returncode == 0, f"pip could not download {PACKAGE}: {done.stderr}"
    (wheel,) = folder.glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256, f"{wheel.name} has another checksum than expected"
    return wheel
