"""hpcgpt.storage.lease: of all attempts of a run only the newest may publish. Real processes hold, die and continue."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hpcgpt.checkpoint import layout
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FINISHED, SUPERSEDED
from hpcgpt.storage import lease
from tests.disks import fill, small_disk
from tests.programs import ROOT, Running, clean_env, command, run_group
from tests.tiny_run import rows

# Acquires the lease, prints its number, and hangs: its main thread sleeps, as in a collective.
HOLD = """
import sys, time
from pathlib import Path
from hpcgpt.checkpoint import layout
from hpcgpt.storage import lease
print(lease.acquire(Path(sys.argv[1]), sys.argv[2]).number, flush=True)
time.sleep(600)
"""

# Acquires one lease after the other, each at its moment, and reports the numbers, or the error.
RACE = """
import json, sys, threading, time
from pathlib import Path
from hpcgpt.checkpoint import layout
from hpcgpt.storage import lease
root, rounds, starts_at = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
results = [""] * rounds
def acquire(number):
    time.sleep(max(0.0, starts_at + 0.02 * number - time.time()))
    try:
        results[number] = lease.acquire(root / str(number), "").number
    except ValueError as error:
        results[number] = str(error)
threads = [threading.Thread(target=acquire, args=[number]) for number in range(rounds)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(results), file=sys.stderr, flush=True)
sys.stdin.read()  # stay alive until all have reported: a winner must not seem dead to the others
"""


class Holder:
    """A process that holds the lease of a run folder."""

    def __init__(self, folder: Path, attempt: str = "", host: str = "") -> None:
        arguments = [sys.executable, "-c", HOLD, str(folder), attempt]
        if host:
            arguments = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh", *arguments]
        self.process = subprocess.Popen(arguments, cwd=ROOT, env=clean_env(), stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert self.process.stdout is not None
        self.number = self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    """Lease 1, held by the first start of Slurm job 7."""
    holder = Holder(tmp_path, "7_0")
    assert holder.number == "1"
    yield holder
    holder.end()


def test_the_name_of_a_process_may_have_any_bytes() -> None:
    """As that of another user's program with the number of a holder that has ended."""
    own = Path("/proc/self/comm")
    name = own.read_bytes().removesuffix(b"\n")  # which would become a part of the name
    own.write_bytes(b"\xb2) (x")
    try:
        assert lease._process(os.getpid())["began"] > 0
    finally:
        own.write_bytes(name)


def test_numbers_rise_and_the_file_names_the_process(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        held = lease.acquire(tmp_path, f"7_{number}")
        assert held.number == number
        assert held.superseded_by() is None
        held.release()
    reported = json.loads((tmp_path / "generations/000003.json").read_text())
    assert (reported["pid"], reported["attempt"]) == (os.getpid(), "7_3")
    assert sorted(path.name for path in (tmp_path / "generations").iterdir()) == [
        f"00000{number}.{kind}" for number in (1, 2, 3) for kind in ("done", "json")]  # fmt: skip


@pytest.mark.processes
def test_of_processes_that_acquire_at_once_exactly_one_gets_the_lease(tmp_path: Path) -> None:
    rounds, starts_at = 40, time.time() + 1.0
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, tmp_path, str(rounds), str(starts_at)], cwd=ROOT,
                         env=clean_env(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(3)
    ]  # fmt: skip
    reported = [json.loads(racer.stderr.readline()) for racer in racers if racer.stderr]
    for racer in racers:
        racer.communicate()
    for number in range(rounds):
        winners = [each[number] for each in reported if each[number] == 1]
        losers = [each[number] for each in reported if each[number] != 1]
        assert len(winners) == 1, (number, [each[number] for each in reported])
        assert all("has just been taken" in message or "which is alive" in message for message in losers), losers
        assert len(list((tmp_path / str(number) / "generations").glob("*.json"))) == 1


def test_the_heartbeat_file_is_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If each beat truncated it, a full disk would leave it empty, and the holder would seem dead."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.001)
    held = lease.acquire(tmp_path, "")
    path = tmp_path / "generations/000001.alive"
    while not path.exists() or not path.read_text():
        time.sleep(0.001)
    seen = {path.read_text() for _ in range(20_000)}
    held.release()
    assert "" not in seen
    assert len(seen) > 10, "there was no heartbeat"


@pytest.mark.parametrize("content", ['{"host": "h", "pid": 1, "attempt": 5}', "[" * 100_000, "nothing"])
def test_the_holder_of_a_damaged_lease_is_described(tmp_path: Path, content: str) -> None:
    (tmp_path / "generations").mkdir()
    (tmp_path / "generations" / "000001.json").write_text(content)
    assert lease.holder(tmp_path).startswith("attempt 1")


@pytest.mark.processes
@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_acquiring_from_a_living_holder_is_refused_and_names_it(tmp_path: Path, host: str) -> None:
    if host and os.geteuid() != 0:
        pytest.skip("another host name needs root")
    holder = Holder(tmp_path, "7_0", host)
    try:
        with pytest.raises(ValueError, match=r"attempt 1 \(Slurm job 7, host .*, which is alive: end it") as error:
            lease.acquire(tmp_path, "8_0")
        assert f"pid {holder.process.pid})" in str(error.value)
        assert host in str(error.value)
        assert not list((tmp_path / "generations").glob("000002*"))
        assert holder.process.poll() is None
    finally:
        holder.end()


@pytest.mark.processes
def test_a_dead_holder_is_replaced_at_once(tmp_path: Path, holder: Holder, capfd: pytest.CaptureFixture[str]) -> None:
    holder.end()
    held = lease.acquire(tmp_path, "")
    assert held.number == 2
    assert "watching" not in capfd.readouterr().out
    held.release()


@pytest.mark.processes
def test_a_living_holder_in_another_container_is_not_considered_dead(tmp_path: Path, holder: Holder) -> None:
    """Two containers on one host: same host name, and the holder's pid does not exist in the second container."""
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0 or subprocess.run([*container, "true"], check=False).returncode:
        pytest.skip("another pid namespace needs root")
    second = subprocess.run([*container, sys.executable, "-c", HOLD, tmp_path, "8_0"], cwd=ROOT, env=clean_env(),
                              capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert "which is alive: end it first" in second.stderr
    assert holder.process.poll() is None
    assert not list((tmp_path / "generations").glob("000002*"))


@pytest.mark.processes
def test_without_the_kernels_boot_id_a_dead_holder_is_watched_first(
    tmp_path: Path, holder: Holder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same host name and pid may then be those of another machine. (A start used to fail here.)"""
    holder.end()
    monkeypatch.setattr(lease, "BOOT_ID", tmp_path / "hidden")
    held = lease.acquire(tmp_path, "")
    assert held.number == 2
    assert "watching it" in capfd.readouterr().out
    held.release()


@pytest.mark.processes
def test_a_process_that_reuses_a_dead_holders_pid_is_not_mistaken_for_it(
    tmp_path: Path, holder: Holder, capfd: pytest.CaptureFixture[str]
) -> None:
    holder.end()
    path = tmp_path / "generations/000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getpid()}))
    held = lease.acquire(tmp_path, "")
    assert held.number == 2
    assert "watching" not in capfd.readouterr().out
    held.release()


@pytest.mark.processes
def test_a_full_disk_does_not_prevent_acquiring_and_its_holder_is_recognized_as_alive(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "generations").mkdir()
        fill(disk)
        holder = Holder(disk, "7_0")
        try:
            assert holder.number == "1"
            assert (disk / "generations/000001.json").read_bytes() == b"", (
                "the disk was not full, so this proves nothing"
            )
            with pytest.raises(UserError, match="attempt 1, which is alive"):
                lease.acquire(disk, "8_0")
        finally:
            holder.end()
        held = lease.acquire(disk, "8_0")
        assert held.number == 2
        held.release()


@pytest.mark.processes
def test_the_next_start_of_the_same_job_does_not_wait_and_the_old_ranks_exit_even_if_they_hang(
    tmp_path: Path, holder: Holder, capfd: pytest.CaptureFixture[str]
) -> None:
    held = lease.acquire(tmp_path, "7_1")
    assert held.number == 2
    assert "watching" not in capfd.readouterr().out
    assert holder.process.wait(30) == SUPERSEDED
    assert holder.process.stderr is not None
    assert holder.process.stderr.read().startswith(f"error: attempt 2 has taken over {tmp_path}")
    held.release()


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("7_0", "7_1", True),
        ("7_9", "7_10", True),
        ("7_0", "7_0", False),
        ("7_1", "7_0", False),
        ("7_0", "8_1", False),
        ("7_0", "77_1", False),
        ("7_0", "", False),
        ("", "7_1", False),
        ("", "", False),
    ],
)
def test_only_a_higher_restart_count_of_the_same_job_is_its_next_start(before: str, now: str, expected: bool) -> None:
    assert lease._is_next_start(before, now) == expected


@pytest.mark.processes
def test_a_rank_looks_for_a_newer_attempt_once_the_process_that_looks_instead_has_ended(tmp_path: Path) -> None:
    (tmp_path / "generations").mkdir()
    (tmp_path / "generations" / "000002.json").touch()
    code = (
        "import os, sys, threading; from pathlib import Path; from hpcgpt.storage import lease; "
        "sys.addaudithook(lambda event, args: event == 'os.listdir' and os.write(1, b'looked\\n')); "
        "lease.exit_when_superseded(Path(sys.argv[1]), 1, instead=sys.stdin.read); os.write(1, b'starts\\n'); "
        "threading.Event().wait()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as rank:
        assert rank.stdout
        assert rank.stdout.readline() == "starts\n"
        out, _ = rank.communicate(timeout=60)  # closes its standard input
    assert out.startswith("looked\n")
    assert rank.returncode == SUPERSEDED


@pytest.mark.processes
def test_a_superseded_holder_exits_at_its_check(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from hpcgpt.checkpoint import layout
from hpcgpt.storage import lease
held = lease.acquire(Path(sys.argv[1]), "7_0")
held.check()
os.link(held.folder / "000001.json", held.folder / "000002.json")
held.check()
print("has continued", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=clean_env(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (SUPERSEDED, "")
    assert "exits without writing anything more" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("has_successor", [False, True])
def test_an_error_of_a_superseded_attempt_is_that_it_was_superseded(tmp_path: Path, has_successor: bool) -> None:
    """A newer attempt removes what this one was writing, and this one then finds that a file is missing."""
    code = f"""
import os, sys
from pathlib import Path
from hpcgpt.storage import lease
lease.HEARTBEAT_S = 1000
with lease.acquire(Path(sys.argv[1]), "7_0") as held:
    if {has_successor}:
        os.link(held.folder / "000001.json", held.folder / "000002.json")
    raise FileNotFoundError("a part of a file")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=clean_env(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    expected = (SUPERSEDED, "has taken over") if has_successor else (1, "FileNotFoundError: a part of a file")
    assert (done.returncode, expected[1] in done.stderr) == (expected[0], True), done.stderr
    assert len(list(tmp_path.rglob("000001.done"))) == (not has_successor)


def test_a_lease_can_be_released_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m,nr_inodes=20") as disk:
        held = lease.acquire(disk, "")
        with suppress(OSError):
            for number in range(20):
                (disk / str(number)).touch()
        held.release()
        assert not (disk / "generations/000001.done").exists(), "the disk was not full, so this proves nothing"


@pytest.mark.processes
def test_a_stopped_holder_that_was_superseded_exits_on_continuing_and_changes_nothing(
    tiny: Path, tmp_path: Path
) -> None:
    """The real program: a process that was stopped in mid-training, as by a suspended node, and its successor."""
    folder = tmp_path / "runs" / "tiny"
    endless = ("--train.steps", "100000", "--checkpoint.every", "0", "--eval.every", "0")
    with Running("hpcgpt.train", str(tiny), *endless) as sleeper:
        while not (folder / "metrics.jsonl").exists() or len(rows(folder / "metrics.jsonl")) < 20:
            assert sleeper.poll() is None
            time.sleep(0.02)
        sleeper.send_signal(signal.SIGSTOP)
        successor = command("hpcgpt.train", str(tiny))
        assert successor.returncode == FINISHED, successor.stderr
        assert f"pid {sleeper.pid}) has not released its lease: watching it" in successor.stdout
        before = content(folder)
        assert [row["step"] for row in rows(folder / "metrics.jsonl")] == list(range(1, 13))
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(30) == SUPERSEDED
        assert content(folder) == before
        assert "attempt 2 has taken over" in sleeper.errors


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- one writer ------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=[pytest.mark.long, pytest.mark.alone])])
def test_of_competing_jobs_no_step_is_committed_twice_or_by_an_older_attempt(tmp_path: Path, rounds: int) -> None:
    """The holder is killed in one round; in the next it is stopped, and continues after the next one has committed."""
    seed, run = random.randrange(10_000), tmp_path / "run"
    writers = [sys.executable, "-m", "tests.storage.ranks_writers", str(run), str(rounds), str(seed)]
    done = run_group(writers, clean_env() | {"PYTHONPATH": str(ROOT)}, ROOT, timeout_s=200 + 5 * rounds)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    reported = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reported) == rounds
    superseded = [each["superseded_status"] for each in reported]
    assert superseded == [None, SUPERSEDED] * (rounds // 2), f"one survived (seed {seed})"
    assert all(each["loser"] == 2 for each in reported), f"two jobs had the folder (seed {seed}): {reported}"
    assert [each["number"] for each in reported] == list(range(2, rounds + 2))

    log = [line.split() for line in (run / "log").read_text().splitlines()]
    committed = [(int(number), int(step)) for number, step, did in log if did == "committed"]
    steps = [step for _, step in committed]
    assert len(set(steps)) == len(steps), f"a step was committed twice (seed {seed})"
    # Checkpoints on the disk may be missing in the log: their manifests have the attempt.
    paths = (run / "checkpoints").glob("step_*")
    found = sorted((layout.step_of(path), layout._json(path / "manifest.json")["generation"]) for path in paths)
    assert {(step, number) for number, step in committed} <= set(found), f"a checkpoint is missing (seed {seed})"
    numbers = [number for _, number in found]
    assert numbers == sorted(numbers), f"an older attempt's after a newer one's (seed {seed})"
    chosen = {int(number): int(step) for number, step, did in log if did == "chose"}
    for number, first in chosen.items():
        assert all(step <= first for step, author in found if author < number), (
            f"it came after the choice (seed {seed})"
        )
    assert not list((run / "checkpoints").glob("damaged_*"))
