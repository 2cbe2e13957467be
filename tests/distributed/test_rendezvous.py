"""hpcgpt.distributed.rendezvous: how the ranks connect.

Real processes connect over real sockets. The only difference from a cluster is that they are on one host;
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
from types import SimpleNamespace

import pytest

from hpcgpt.distributed import rendezvous
from hpcgpt.distributed.world import discover
from hpcgpt.errors import NodeError
from tests.disks import another_user
from tests.distributed.test_world import srun
from tests.programs import ROOT, clean_env, program


class Rank:
    """A process that is one rank of a job."""

    def __init__(self, folder: Path, rank: int, size: int, timeout_s: float, **env: str) -> None:
        variables = {"SLURM_JOB_ID": "7", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0",
                 "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NODELIST": socket.gethostname()}  # fmt: skip
        self.folder = folder
        descriptor, name = tempfile.mkstemp(prefix="output.", dir=folder)
        self._output = Path(name)
        with os.fdopen(descriptor, "wb") as output:
            self.process = program(
                "tests.distributed.ranks_rendezvous",
                [str(folder), str(timeout_s)],
                clean_env() | variables | env,
                ROOT,
                output,
                output,
            )

    def wait_until_up(self) -> Rank:
        """Wait until it is about to connect."""
        wait_for(self.folder / f"up.{self.process.pid}")
        return self

    def end(self) -> tuple[int, str]:
        """Wait for its end; return exit status and output."""
        status = self.process.wait(60)
        assert status is not None, "it hangs"
        return status, self._output.read_text()


@contextmanager
def kill_at_end(*ranks: Rank) -> Iterator[None]:
    try:
        yield
    finally:
        for rank in ranks:
            rank.process.kill()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.05)


def address_file(folder: Path) -> Path:
    return folder / "rendezvous" / "7_0_0.json"


def assert_error(status: int, output: str, *parts: str, expected: int = 1) -> None:
    """Status 1 by default: a missing rank may be its node's fault, and the job may run again."""
    assert status == expected, output
    assert "Traceback" not in output
    for part in parts:
        assert part in output, output


def assert_connected(*ranks: Rank) -> None:
    """Check that `ranks`, in order, have each received the sum of all ranks."""
    total = sum(range(len(ranks)))
    for number, rank in enumerate(ranks):
        status, output = rank.end()
        assert status == 0, output
        assert f"met {number} {total}\n" in output, output


@pytest.mark.processes
def test_ranks_connect_in_any_order_and_leave_no_address_file(tmp_path: Path) -> None:
    second = Rank(tmp_path, 1, 3, 30).wait_until_up()
    first, third = (Rank(tmp_path, rank, 3, 30) for rank in (0, 2))
    with kill_at_end(first, second, third):
        assert_connected(first, second, third)
    assert not address_file(tmp_path).exists()


def test_a_folder_of_another_user_is_an_error_with_other_ways_to_connect(tmp_path: Path) -> None:
    """As for `srun hpcgpt eval` of a colleague's run."""
    expected = r"where you may not write \(Permission denied\): start them with torchrun, set MASTER_ADDR"
    with another_user(), pytest.raises(NodeError, match=expected):
        rendezvous._publish(tmp_path / "rendezvous" / "7_0_0.json", "n1", 1, "token")


@pytest.mark.processes
def test_a_missing_rank_is_named_by_all_others(tmp_path: Path) -> None:
    """Also by ranks that still wait when rank 0 gives up and exits."""
    second = Rank(tmp_path, 1, 4, 30).wait_until_up()
    first = Rank(tmp_path, 0, 4, 10)
    with kill_at_end(first, second):
        assert_error(*first.end(), "rank 0 of 4", "missing: 2, 3", "Start as many processes")
        assert_error(*second.end(), "rank 1 of 4")


@pytest.mark.processes
def test_a_missing_rank_0_is_named_by_the_others(tmp_path: Path) -> None:
    single = Rank(tmp_path, 1, 2, 2)
    with kill_at_end(single):
        assert_error(*single.end(), "rank 1 of 2", "waited 2 s for rank 0", "never published its address")


def test_slices_of_a_gpu_and_halves_of_a_module_are_different_gpus() -> None:
    def gpu(uuid: str, bus: int) -> str:
        return rendezvous.identity(SimpleNamespace(uuid=uuid, pci_domain_id=0, pci_bus_id=bus, pci_device_id=0))

    assert gpu("GPU-1", 7) == gpu("GPU-1", 7)
    assert gpu("MIG-1", 7) != gpu("MIG-2", 7)
    assert gpu("GPU-1", 7) != gpu("GPU-1", 8)
    assert rendezvous.identity(SimpleNamespace(pci_bus_id=7)) == "//7/"  # a torch that has no UUIDs


@pytest.mark.processes
def test_a_duplicate_rank_is_refused(tmp_path: Path) -> None:
    others = [Rank(tmp_path, rank, 3, 60) for rank in (0, 1, 1)]
    with kill_at_end(*others):
        while all(rank.process.wait(0) is None for rank in others):
            time.sleep(0.1)
        (second,) = (rank for rank in others if rank.process.returncode is not None)
        assert_error(*second.end(), "rank 1 of 3", "another process has this rank already", expected=2)


@pytest.mark.processes
def test_processes_with_different_world_sizes_do_not_hang(tmp_path: Path) -> None:
    large = Rank(tmp_path, 2, 3, 30).wait_until_up()
    small = Rank(tmp_path, 0, 2, 3)
    with kill_at_end(small, large):
        assert_error(*small.end(), "rank 0 of 2", "missing: 1")
        assert_error(*large.end(), "rank 2 of 3")


def stale(folder: Path, port: int) -> None:
    """Write what a job of the same number left: after a power cut Slurm may count from 1 again."""
    address_file(folder).parent.mkdir()
    address_file(folder).write_text(json.dumps({"address": "127.0.0.1", "port": port, "token": "of another job"}))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        return int(closing.getsockname()[1])


@pytest.mark.processes
def test_a_stale_address_file_without_a_server_is_ignored(tmp_path: Path) -> None:
    stale(tmp_path, free_port())
    second = Rank(tmp_path, 1, 2, 30).wait_until_up()
    time.sleep(1)
    first = Rank(tmp_path, 0, 2, 30)
    with kill_at_end(first, second):
        assert_connected(first, second)


@pytest.mark.processes
def test_a_stale_address_file_without_rank_0_is_an_error(tmp_path: Path) -> None:
    stale(tmp_path, free_port())
    single = Rank(tmp_path, 1, 2, 3)
    with kill_at_end(single):
        assert_error(*single.end(), "waited 3 s for rank 0", "does not answer")


@pytest.mark.processes
@pytest.mark.parametrize("foreign", ["a store", "a silent server"])
def test_a_stale_address_file_with_a_foreign_server_is_ignored(foreign: str, tmp_path: Path) -> None:
    """The port may now belong to another job's store, or to a server of another kind that never answers.

    A rank that reads the file before rank 0 has replaced it must read it again, and not wait for that server.
    """
    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []
        if foreign == "a store":
            store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            port = store.port
        else:
            threading.Thread(target=_accept_and_say_nothing, args=(listener, held), daemon=True).start()
            port = listener.getsockname()[1]
        stale(tmp_path, port)
        second = Rank(tmp_path, 1, 2, 40).wait_until_up()
        time.sleep(1)
        first = Rank(tmp_path, 0, 2, 40)
        with kill_at_end(first, second):
            assert_connected(first, second)
        for connection in held:
            connection.close()


def _accept_and_say_nothing(listener: socket.socket, held: list[socket.socket]) -> None:
    with suppress(OSError):
        while True:
            held.append(listener.accept()[0])


@pytest.mark.processes
def test_a_torn_address_file_is_read_again(tmp_path: Path) -> None:
    address_file(tmp_path).parent.mkdir()
    address_file(tmp_path).write_text('{"address": "127.')
    second = Rank(tmp_path, 1, 2, 30).wait_until_up()
    first = Rank(tmp_path, 0, 2, 30)
    with kill_at_end(first, second):
        assert_connected(first, second)


@pytest.mark.processes
def test_master_addr_and_master_port_take_precedence(tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Rank(tmp_path, n, 2, 30, **address) for n in (0, 1)]
    with kill_at_end(*ranks):
        assert_connected(*ranks)
    assert not address_file(tmp_path).parent.exists()


@pytest.mark.processes
def test_a_master_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    port = free_port()
    single = Rank(tmp_path, 1, 2, 3, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with kill_at_end(single):
        assert_error(*single.end(), "rank 1 of 2", f"could not reach rank 0 at 127.0.0.1:{port}")


@pytest.mark.processes
def test_a_master_whose_name_does_not_resolve_is_an_error_without_fallback(tmp_path: Path) -> None:
    single = Rank(tmp_path, 0, 2, 3, MASTER_ADDR="no-such-host.invalid", MASTER_PORT="29500")
    with kill_at_end(single):
        assert_error(*single.end(), "cannot resolve the host name 'no-such-host.invalid'")


def test_a_single_rank_opens_no_connection(tmp_path: Path) -> None:
    import torch

    alone = discover({})
    assert rendezvous.connect(alone, torch.device("cpu"), tmp_path, "auto", 1).cpu_group is None
    assert list(tmp_path.iterdir()) == []


def test_nccl_on_cpus_is_refused_before_any_waiting(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ValueError, match=r"run\.backend nccl needs GPUs"):
        rendezvous.connect(discover(srun(1, 1, 0)), torch.device("cpu"), tmp_path, "nccl", 1000)
