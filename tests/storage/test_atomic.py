"""hpcgpt.storage.atomic: files that are complete or absent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcgpt.storage import atomic
from tests.disks import fill, small_disk
from tests.programs import ROOT, clean_env


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, env=clean_env(),
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


def test_a_file_appears_when_it_is_complete_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic.writing(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_everything_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(error), atomic.writing(path) as file:
        file.write(b"after")
        raise error
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.processes
def test_a_process_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    code = """
import sys
from pathlib import Path
from hpcgpt.storage import atomic
for n in range(10**9):
    atomic.write(Path(sys.argv[1]), bytes([n % 256]) * 1_000_000)
"""
    for attempt in range(8):
        writer = python(code, str(path))
        started_at = time.monotonic()
        before = path.read_bytes()[:1] if path.exists() else None
        while not path.exists() or path.read_bytes()[:1] == before:
            assert time.monotonic() - started_at < 30
            time.sleep(0.003)
        time.sleep(attempt * 0.001)
        writer.kill()
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        found = path.read_bytes()
        assert len(found) == 1_000_000
        assert len(set(found)) == 1


@pytest.mark.processes
def test_of_many_processes_exactly_one_creates_a_file(tmp_path: Path) -> None:
    """Six processes compete for each file in turn; its content is complete, and the winner's."""
    code = """
import os, sys
from pathlib import Path
from hpcgpt.storage import atomic
folder, name = Path(sys.argv[1]), sys.argv[2]
sys.stdout.write(" ".join(str(n) for n in range(60) if atomic.create(folder / f"{n}", name.encode() * 10_000)))
"""
    competitors = [python(code, str(tmp_path), str(n)) for n in range(6)]
    won = [(str(name), n) for name, each in enumerate(competitors) for n in each.communicate(timeout=60)[0].split()]
    assert sorted(n for _, n in won) == sorted(str(n) for n in range(60))
    assert {n: (tmp_path / n).read_text() for _, n in won} == {n: name * 10_000 for name, n in won}
    assert sorted(os.listdir(tmp_path)) == sorted(str(n) for n in range(60))


def test_creating_a_file_that_exists_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert atomic.create(path, b"first")
    assert not atomic.create(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_that_exists_already_with_the_own_content_counts_as_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS when an answer is lost and the request repeated; here the test repeats it."""
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    assert atomic.create(tmp_path / "a.json", b"mine")
    assert (tmp_path / "a.json").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "a.bin", Path("/proc/self/a.bin")):
        with pytest.raises(OSError, match="No such file or directory") as caught:
            atomic.write(path, b"x")
        assert path.name in str(caught.value)
        with pytest.raises(OSError, match=f"cannot write {path}: No such file or directory"):
            atomic.create(path, b"x")


@pytest.mark.processes
def test_a_refused_write_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes: it needs neither root nor a full disk."""
    code = """
import resource, signal, sys
from pathlib import Path
from hpcgpt.storage import atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for call, path in ((atomic.write, sys.argv[1]), (atomic.create, sys.argv[2])):
    try:
        call(Path(path), bytes(1_000_000))
    except OSError as error:
        print(type(error).__name__, error)
"""
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    new = tmp_path / "new.bin"
    output = python(code, str(path), str(new)).communicate(timeout=60)[0].splitlines()
    assert len(output) == 2
    for line, target in zip(output, (path, new), strict=True):
        assert f"cannot write {target}: File too large; " in line
        assert "MB free there" in line
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.processes
def test_files_are_flushed_before_they_get_their_name_and_the_folder_after(tmp_path: Path) -> None:
    """A power cut cannot be tested here, so the order of the system calls is checked."""
    code = """
import os, sys
from pathlib import Path
from hpcgpt.storage import atomic
calls = []
for name in ("fsync", "replace", "link"):
    real = getattr(os, name)
    def recorded(*arguments, name=name, real=real):
        target = arguments[0]
        calls.append(name + (" folder" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{target}") else ""))
        return real(*arguments)
    setattr(os, name, recorded)
atomic.write(Path(sys.argv[1], "a"), b"x")
atomic.create(Path(sys.argv[1], "b"), b"x")
print(",".join(calls))
"""
    output = python(code, str(tmp_path)).communicate(timeout=60)[0].strip()
    assert output == "fsync,replace,fsync folder,fsync,link,fsync folder"


# --- file systems without links, containers --------------------------------------------------------

COMPETITOR = """
import os, sys
from pathlib import Path
from hpcgpt.storage import atomic
folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
won = [n for n in range(count) if atomic.create(folder / str(n), (name * 5000).encode())]
print(*won)
"""


def compete(folder: Path, count: int, competitors: list[list[str]], env: dict[str, str]) -> None:
    """Let all compete for each file; exactly one may win it, and its content is complete, and the winner's."""
    folder.mkdir()
    running = [
        subprocess.Popen([*prefix, sys.executable, "-c", COMPETITOR, folder, str(name), str(count)], cwd=ROOT,
                         env=clean_env() | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, prefix in enumerate(competitors)
    ]  # fmt: skip
    for each in running:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in running:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    won = [(str(name), n) for name, each in enumerate(running) for n in each.communicate(timeout=60)[0].split()]
    assert sorted(n for _, n in won) == sorted(str(n) for n in range(count))
    assert {n: (folder / n).read_text() for _, n in won} == {n: name * 5000 for name, n in won}
    assert sorted(os.listdir(folder)) == sorted(str(n) for n in range(count))


@pytest.mark.processes
@pytest.mark.parametrize("answer", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links_still_exactly_one_process_creates_a_file(
    answer: int, tmp_path: Path, faulty_calls: Path
) -> None:
    """gcsfuse, exFAT and others have none: here a preloaded library makes link(2) fail."""
    env = {"LD_PRELOAD": str(faulty_calls), "FAULTY_ROOTS": str(tmp_path), "FAULTY_CALL": "link", "FAULTY_PATH": "*",
           "FAULTY_NTH": "1", "FAULTY_LATER": "call", "FAULTY_ERRNO": str(answer),
           "FAULTY_LOG": str(tmp_path / "calls.log")}  # fmt: skip
    compete(tmp_path / "files", 40, [[]] * 4, env)
    calls = [line.split("\t") for line in (tmp_path / "calls.log").read_text().splitlines()]
    assert {fired for call, _, fired in calls if call == "link"} == {"1"}, "there were links"


@pytest.mark.processes
def test_in_containers_with_equal_host_name_and_pids_exactly_one_process_creates_a_file(tmp_path: Path) -> None:
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0 or subprocess.run([*container, "true"], check=False).returncode:
        pytest.skip("another pid namespace needs root")
    compete(tmp_path / "files", 300, [container] * 3, {})


def test_an_unchanged_file_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.keep(path, b"x")
    before = path.stat().st_ino
    atomic.keep(path, b"x")
    assert path.stat().st_ino == before
    atomic.keep(path, b"y")
    assert path.read_bytes() == b"y"


def test_a_claim_needs_no_space_for_its_content(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as folder:
        fill(folder)
        with pytest.raises(OSError, match="No space left"):
            atomic.create(folder / "a", b"content")
        assert atomic.claim(folder / "a", b"content")
        assert not atomic.claim(folder / "a", b"content")
        assert sorted(os.listdir(folder)) == ["a", "filler"]
