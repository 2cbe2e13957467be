"""hpcgpt.distributed.rendezvous: how the ranks find each other.

Real processes meet over real sockets. What differs from a cluster is only that they are on one host;
tests/slurm/test_run_on_slurm.py has several.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hpcgpt.distributed import rendezvous
from hpcgpt.distributed.world import discover
from tests.distributed.test_world import srun
from tests.programs import ROOT, clean_env, program


class Rank:
    """A process that is one rank of a job."""

    def __init__(self, folder: Path, rank: int, size: int, timeout_s: float, **env: str) -> None:
        place = {"SLURM_JOB_ID": "7", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0",
                 "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NODELIST": socket.gethostname()}  # fmt: skip
        self.folder = folder
        descriptor, name = tempfile.mkstemp(prefix="said.", dir=folder)
        self._said = Path(name)
        with os.fdopen(descriptor, "wb") as said:
            self.process = program(
                "tests.distributed.ranks_rendezvous",
                [str(folder), str(timeout_s)],
                clean_env() | place | env,
                ROOT,
                said,
                said,
            )

    def wait_until_up(self) -> Rank:
        """Until it is about to meet the others."""
        wait_for(self.folder / f"up.{self.process.pid}")
        return self

    def end(self) -> tuple[int, str]:
        """Its exit status and all that it said."""
        status = self.process.wait(60)
        assert status is not None, "it hangs"
        return status, self._said.read_text()


@contextmanager
def ended(*ranks: Rank) -> Iterator[None]:
    try:
        yield
    finally:
        for rank in ranks:
            rank.process.kill()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)


def card(folder: Path) -> Path:
    return folder / "rendezvous" / "7_0_0.json"


def assert_a_sentence(status: int, said: str, *words: str, expected: int = 1) -> None:
    """Status 1 by default: a rank that does not come may be its node's fault, and the job may run again."""
    assert status == expected, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said


def assert_they_met(*ranks: Rank) -> None:
    """`ranks` are in order, and each of them knows the sum of all ranks."""
    total = sum(range(len(ranks)))
    for number, rank in enumerate(ranks):
        status, said = rank.end()
        assert status == 0, said
        assert f"met {number} {total}\n" in said, said


def test_ranks_meet_whoever_comes_first_and_leave_no_card(tmp_path: Path) -> None:
    second = Rank(tmp_path, 1, 3, 30).wait_until_up()
    first, third = (Rank(tmp_path, rank, 3, 30) for rank in (0, 2))
    with ended(first, second, third):
        assert_they_met(first, second, third)
    assert not card(tmp_path).exists()


def test_a_missing_rank_is_named_by_all_that_are_there(tmp_path: Path) -> None:
    """Also by those who are still waiting when rank 0 gives up and leaves."""
    second = Rank(tmp_path, 1, 4, 30).wait_until_up()
    first = Rank(tmp_path, 0, 4, 3)
    with ended(first, second):
        assert_a_sentence(*first.end(), "rank 0 of 4", "missing: 2, 3", "Start as many processes")
        assert_a_sentence(*second.end(), "rank 1 of 4")


def test_a_rank_0_that_never_comes_is_missed_by_the_others(tmp_path: Path) -> None:
    lonely = Rank(tmp_path, 1, 2, 2)
    with ended(lonely):
        assert_a_sentence(*lonely.end(), "rank 1 of 2", "waited 2 s for rank 0", "never published its address")


def test_a_rank_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    others = [Rank(tmp_path, rank, 3, 60) for rank in (0, 1, 1)]
    with ended(*others):
        while all(rank.process.wait(0) is None for rank in others):
            time.sleep(0.1)
        (second,) = (rank for rank in others if rank.process.returncode is not None)
        assert_a_sentence(*second.end(), "rank 1 of 3", "another process has this rank already", expected=2)


def test_processes_with_different_world_sizes_do_not_hang(tmp_path: Path) -> None:
    large = Rank(tmp_path, 2, 3, 30).wait_until_up()
    small = Rank(tmp_path, 0, 2, 3)
    with ended(small, large):
        assert_a_sentence(*small.end(), "rank 0 of 2", "missing: 1")
        assert_a_sentence(*large.end(), "rank 2 of 3")


def stale(folder: Path, port: int) -> None:
    """What a job of the same number left: a power cut, then a Slurm that counts from 1 again."""
    card(folder).parent.mkdir()
    card(folder).write_text(json.dumps({"address": "127.0.0.1", "port": port, "token": "of another job"}))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        return int(closing.getsockname()[1])


def test_a_stale_card_where_nobody_answers_fools_nobody(tmp_path: Path) -> None:
    stale(tmp_path, free_port())
    second = Rank(tmp_path, 1, 2, 30).wait_until_up()
    time.sleep(1)
    first = Rank(tmp_path, 0, 2, 30)
    with ended(first, second):
        assert_they_met(first, second)


def test_a_stale_card_alone_ends_in_a_sentence(tmp_path: Path) -> None:
    stale(tmp_path, free_port())
    lonely = Rank(tmp_path, 1, 2, 3)
    with ended(lonely):
        assert_a_sentence(*lonely.end(), "waited 3 s for rank 0", "does not answer")


@pytest.mark.parametrize("stranger", ["a store", "a silent server"])
def test_a_stale_card_where_a_stranger_answers_fools_nobody(stranger: str, tmp_path: Path) -> None:
    """The port may belong to another job's store by now, or to a server of another kind that never speaks.

    Whoever reads the card before rank 0 has replaced it must look again, and not wait for the stranger.
    """
    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []
        if stranger == "a store":
            store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            port = store.port
        else:
            threading.Thread(target=_accept_and_say_nothing, args=(listener, held), daemon=True).start()
            port = listener.getsockname()[1]
        stale(tmp_path, port)
        second = Rank(tmp_path, 1, 2, 40).wait_until_up()
        time.sleep(1)
        first = Rank(tmp_path, 0, 2, 40)
        with ended(first, second):
            assert_they_met(first, second)
        for connection in held:
            connection.close()


def _accept_and_say_nothing(listener: socket.socket, held: list[socket.socket]) -> None:
    with suppress(OSError):
        while True:
            held.append(listener.accept()[0])


def test_a_torn_card_is_read_again(tmp_path: Path) -> None:
    card(tmp_path).parent.mkdir()
    card(tmp_path).write_text('{"address": "127.')
    second = Rank(tmp_path, 1, 2, 30).wait_until_up()
    first = Rank(tmp_path, 0, 2, 30)
    with ended(first, second):
        assert_they_met(first, second)


def test_master_addr_and_master_port_win(tmp_path: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Rank(tmp_path, n, 2, 30, **where) for n in (0, 1)]
    with ended(*ranks):
        assert_they_met(*ranks)
    assert not card(tmp_path).parent.exists()


def test_a_master_that_does_not_answer_ends_in_a_sentence(tmp_path: Path) -> None:
    port = free_port()
    lonely = Rank(tmp_path, 1, 2, 3, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with ended(lonely):
        assert_a_sentence(*lonely.end(), "rank 1 of 2", f"could not reach rank 0 at 127.0.0.1:{port}")


def test_a_master_whose_name_does_not_resolve_ends_in_a_sentence_and_no_fallback(tmp_path: Path) -> None:
    lonely = Rank(tmp_path, 0, 2, 3, MASTER_ADDR="no-such-host.invalid", MASTER_PORT="29500")
    with ended(lonely):
        assert_a_sentence(*lonely.end(), "cannot resolve the host name 'no-such-host.invalid'")


def test_one_rank_meets_nobody_and_opens_nothing(tmp_path: Path) -> None:
    import torch

    alone = discover({})
    assert rendezvous.connect(alone, torch.device("cpu"), tmp_path, "auto", 1).cpu_group is None
    assert list(tmp_path.iterdir()) == []


def test_nccl_on_cpus_is_refused_before_anybody_is_waited_for(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ValueError, match=r"run\.backend nccl needs GPUs"):
        rendezvous.connect(discover(srun(1, 1, 0)), torch.device("cpu"), tmp_path, "nccl", 1000)
