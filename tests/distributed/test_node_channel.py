"""hpcgpt.distributed.node_channel, open_files and store_server: what ranks of a node share, what a process may open."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from hpcgpt.distributed import node_channel, open_files, store_server
from hpcgpt.distributed.node_channel import Follower, Leader
from hpcgpt.distributed.world import World
from tests.programs import ROOT

# --- the channel -----------------------------------------------------------------------------------


def of_node(local_rank: int, attempt: str = "7_0_0", local_size: int = 3) -> World:
    return World(local_rank, local_rank, local_size, local_size, "srun", attempt)


_made: list[Leader | Follower] = []


@pytest.fixture(autouse=True)
def close_channels() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


def leader_of(folder: Path, attempt: str = "7_0_0") -> Leader:
    found = node_channel.connect(of_node(0, attempt), folder)
    assert isinstance(found, Leader)
    _made.append(found)
    return found


def follower_of(folder: Path, attempt: str = "7_0_0") -> Follower:
    found = node_channel.connect(of_node(1, attempt), folder)
    assert isinstance(found, Follower)
    _made.append(found)
    return found


def follows(follower: Follower) -> bool:
    return follower.has_leader


def test_a_follower_hears_the_leader_whichever_is_first(tmp_path: Path) -> None:
    early = follower_of(tmp_path)
    assert early.hear(0.05) == ""
    assert not follows(early)
    leader = leader_of(tmp_path)
    assert early.hear(0.2) == ""
    assert follows(early), "it has no message yet"
    leader.tell("an address")
    assert early.hear(30) == "an address"
    assert follower_of(tmp_path).hear(30) == "an address"
    assert early.hear(0) == "an address", "also when it is asked again"


def test_other_attempts_and_other_folders_have_channels_of_their_own(tmp_path: Path) -> None:
    leader_of(tmp_path).tell("an address")
    assert follower_of(tmp_path, "7_1_0").hear(0.05) == ""
    assert follower_of(tmp_path / "other").hear(0.05) == ""


def test_a_second_leader_of_one_name_reads_the_run_folder_itself(tmp_path: Path) -> None:
    leader = leader_of(tmp_path)
    assert node_channel.connect(of_node(0), tmp_path) is None
    assert leader
    assert node_channel.connect(of_node(0, local_size=1), tmp_path) is None, "alone on its node"


@pytest.mark.processes
def test_a_follower_waits_until_its_leader_has_ended(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.distributed.test_node_channel import leader_of; "
        "leader_of(Path(sys.argv[1])).tell('an address'); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        follower, ended = follower_of(tmp_path), threading.Event()
        assert follower.hear(30) == "an address"

        def wait() -> None:
            node_channel.wait_for_leader(follower)
            ended.set()

        threading.Thread(target=wait, daemon=True).start()
        assert not ended.wait(0.2)
        process.kill()
        assert ended.wait(30)
    node_channel.wait_for_leader(follower_of(tmp_path))  # returns: there is no leader
    node_channel.wait_for_leader(None)


def test_a_process_of_another_user_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader_of(tmp_path).tell("an address")
    follower = follower_of(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # only the kernel's word on the other side stays the same
    assert follower.hear(0.05) == ""


# --- the limit of open files -----------------------------------------------------------------------


@pytest.mark.processes
def test_the_limit_is_raised_to_the_highest_one_and_too_low_a_one_is_named() -> None:
    code = (
        "import resource; from hpcgpt.distributed import open_files; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000)); open_files.raise_limit(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)); print(repr(open_files.why_too_few(900))); "
        "print(open_files.why_too_few(1000))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    limits, enough, too_few = done.stdout.splitlines()
    assert (limits, enough) == ("(1000, 1000)", "''")
    assert "at most 1,000 open files are allowed here, and 1,064 are needed" in too_few


def test_an_unlimited_number_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert open_files.why_too_few(10**9) == ""


# --- the store's process ---------------------------------------------------------------------------


@pytest.mark.processes
def test_the_stores_process_serves_and_ends_with_its_standard_input() -> None:
    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = store_server.start(listener, 120)
    stores = [TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60), wait_for_workers=False) for _ in range(3)]
    stores[0].set("name", "value")
    assert stores[2].get("name") == b"value"
    server.communicate(timeout=60)
    assert server.returncode == 0


@pytest.mark.processes
def test_a_stores_process_that_cannot_serve_is_an_error() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as wrong, pytest.raises(OSError, match=r"did not start .*status 1"):
        store_server.start(wrong, 120)
