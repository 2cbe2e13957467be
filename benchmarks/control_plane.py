"""Count what the ranks of a job cost each other and the run folder, at many ranks on this machine.

    python benchmarks/control_plane.py [--ranks 8,32,128,512] [--node 8] [--json benchmarks/results/control_plane.json]

Each rank is a forked process that runs hpcgpt's own code: it connects (``hpcgpt.distributed.rendezvous``), makes the
collective calls of a start, of an evaluation, of a save and of a comparison of local times, and watches the lease. The
sockets, the store and the run folder are real; nothing is trained. --node ranks count as one node. Counted are, never
timed:

    descriptors   open in a rank at the end, all of them; of the store's process, where there is one
    looks         opens and lists in the run folder: while rank 0 is WAIT_S late, and in as many checks of the lease as
                  there are in a minute
    messages      TCP segments with data that a rank has sent, from the kernel (TCP_INFO): in the collective calls, and
                  to the store until it is connected
    bytes         the same

For each, `most` is that of the rank with the most, `all` the sum over ranks. The figures are fitted with c + d f(N), f
being 1, log2 N, N, N log2 N or N^2: the first that is within TOLERANCE of all, or the nearest. Descriptors are fitted
from FIT_FROM ranks: rank 0 serves the store of fewer itself.

Older code is counted by putting it first on PYTHONPATH: calls that it does not have are made by the one that it used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import mmap
import os
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.distributed as dist

from hpcgpt.config.operation import Blame
from hpcgpt.distributed import collectives, rendezvous
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.run import run_folder
from hpcgpt.storage import lease
from hpcgpt.training.stragglers import StragglerDetector

WAIT_S = 3.0
CHECKS = 6  # of the lease in a minute
FAST_BEAT_S = 0.1  # instead of lease.HEARTBEAT_S
LIMIT_S = 540.0
SLOT = 4096  # bytes of a rank's figures in shared memory
TOLERANCE = 0.05
FORMS: dict[str, Callable[[float], float]] = {
    "1": lambda _: 0.0,
    "log2 N": math.log2,
    "N": lambda n: n,
    "N log2 N": lambda n: n * math.log2(n),
    "N^2": lambda n: n * n,
}
FIT_FROM = 32
FITTED = (4096, 16384)
LOOKS = ("open", "os.listdir", "os.scandir")


class Board:
    """Shared memory of the ranks and their parent: no descriptor, file or message is needed to coordinate them."""

    def __init__(self, size: int) -> None:
        self._memory, self._size = mmap.mmap(-1, (size + 1) * SLOT), size

    def write(self, rank: int, figures: dict[str, Any]) -> None:
        content = json.dumps(figures).encode()
        assert len(content) < SLOT - 4, "SLOT is too small"
        start = (rank + 1) * SLOT
        self._memory[start + 4 : start + 4 + len(content)] = content
        self._memory[start : start + 4] = struct.pack("i", len(content))

    def read(self, rank: int) -> dict[str, Any] | None:
        start = (rank + 1) * SLOT
        (length,) = struct.unpack("i", self._memory[start : start + 4])
        return json.loads(self._memory[start + 4 : start + 4 + length]) if length else None

    def arrive(self, rank: int, stage: int) -> None:
        """Wait until all ranks have arrived at this stage, counted from 1."""
        self._memory[rank] = stage
        while min(self._memory[: self._size]) < stage:
            time.sleep(max(0.02, self._size / 1000))


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as in hpcgpt.train
    by_size = {}
    for size in (int(word) for word in options.ranks.split(",")):
        assert size <= SLOT, "a stage is a byte of the first slot for each rank"
        by_size[size] = _summary(_run(size, min(options.node, size)))
        print(json.dumps({"ranks": size, **by_size[size]}), flush=True)
    names = next(iter(by_size.values()))
    fitted = {name: _fit({size: found[name] for size, found in by_size.items()}, name) for name in names}
    _show(by_size, fitted)
    if options.json:
        found = {"machine": machine.about(), "ranks_of_a_node": options.node, "counted": by_size, "fitted": fitted}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _run(size: int, of_node: int) -> list[dict[str, Any]]:
    """Run that many ranks; return the figures of each."""
    board = Board(size)
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, size, of_node, Path(folder), board)
            pids.append(pid)
        deadline, left, failed = time.monotonic() + LIMIT_S, set(pids), False
        while left and not failed and time.monotonic() < deadline:
            ended = {pid for pid in left if os.waitpid(pid, os.WNOHANG) != (0, 0)}
            left -= ended
            failed = any(board.read(pids.index(pid)) is None for pid in ended)
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        figures = [board.read(rank) for rank in range(size)]
    if any(found is None for found in figures):
        sys.exit(f"{size} ranks: {'a rank failed' if failed else f'not done after {LIMIT_S:.0f} s'}")
    return [found for found in figures if found is not None]


def _be_rank(rank: int, size: int, of_node: int, folder: Path, board: Board) -> None:
    """Be one rank, from its start to its end."""
    try:
        # On the way to this host rank 0 has the address of loopback, for which torch asks no name server.
        world = World(rank, rank % of_node, size, of_node, "srun", "7_0_0", ("localhost",))
        board.write(rank, _figures_of(world, folder, board))
        board.arrive(rank, 5)  # no rank ends before all have counted
    except BaseException as error:  # the parent sees that this rank has no figures
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def _figures_of(world: World, folder: Path, board: Board) -> dict[str, Any]:
    looks: Counter[str] = Counter()
    sys.addaudithook(lambda event, args: _count_look(looks, event, args, str(folder)))
    lease.HEARTBEAT_S = FAST_BEAT_S
    _separate_nodes()
    board.arrive(world.rank, 1)
    if world.is_first:
        time.sleep(WAIT_S)
    ranks = rendezvous.connect(world, torch.device("cpu"), folder, "gloo", LIMIT_S)
    port = _store_port()
    board.arrive(world.rank, 2)
    figures: dict[str, Any] = {"looks_waiting": looks.total()}
    to_store = _sent(port)
    figures |= {"messages_to_store": to_store["messages_to_store"], "bytes_to_store": to_store["bytes_to_store"]}
    board.arrive(world.rank, 3)  # nothing is sent while others count
    _collective_calls(ranks, folder)
    board.arrive(world.rank, 4)
    before = looks.total()
    time.sleep(CHECKS * 5 * FAST_BEAT_S)
    figures["looks_a_minute"] = looks.total() - before
    sent = _sent(port)
    figures |= {"messages": sent["messages"], "bytes": sent["bytes"]}
    figures["descriptors"] = _descriptors("self") - 1  # less the one that lists them
    server = getattr(ranks, "store_server", None)
    figures["descriptors_of_server"] = _descriptors(str(server.pid)) if server else 0
    return figures


def _collective_calls(ranks: Ranks, folder: Path) -> None:
    """Make the calls of a start, an evaluation, a save and a comparison of local times, with like objects."""
    to_rank0 = getattr(collectives, "gather_to_rank0", collectives.gather_from_all)
    held = collectives.make_on_rank0(ranks, lambda: _acquire(folder))
    number = collectives.run_on_rank0(ranks, lambda: held.number if held else 0)
    if not held:
        _watch(ranks, folder, number)
    stragglers = StragglerDetector(Blame(every=1), ranks)
    to_rank0(ranks, socket.gethostname)
    _distinct(ranks, lambda: "torch.bfloat16")
    _distinct(ranks, lambda: False)
    _distinct(ranks, lambda: ("4", "a processor", "AVX512", "none"))
    collectives.run_on_rank0(ranks, lambda: ["step_000001000", "step_000002000"])
    to_rank0(ranks, lambda: "")
    # An evaluation, a save, the times.
    sums = torch.ones(3, dtype=torch.float64)
    if hasattr(collectives, "merge_on_all"):
        collectives.merge_on_all(ranks, lambda: sums, torch.add)
    else:
        dist.all_reduce(sums, group=ranks.cpu_group)
    to_rank0(ranks, lambda: (f"share_{ranks.world.rank:05d}.safetensors", {"bytes": 10**9, "crc32": "0123abcd"}))
    stragglers.after(1)


def _distinct(ranks: Ranks, work: Callable[[], Any]) -> None:
    getattr(collectives, "distinct_on_all", collectives.gather_from_all)(ranks, work)


def _acquire(folder: Path) -> lease.Lease:
    run_folder.prepare(folder)
    return lease.acquire(folder, "7_0")


def _watch(ranks: Ranks, folder: Path, number: int) -> None:
    if not hasattr(ranks, "channel"):
        lease.exit_when_superseded(folder, number)
        return
    from hpcgpt.distributed import node_channel

    lease.exit_when_superseded(folder, number, instead=lambda: node_channel.wait_for_leader(ranks.channel))


def _separate_nodes() -> None:
    """Give each node a name of its own in the only network namespace that there is here."""
    try:
        from hpcgpt.distributed import node_channel
    except ImportError:
        return
    connect = node_channel.connect

    def connect_on_node(world: World, folder: Path) -> Any:
        return connect(dataclasses.replace(world, attempt=f"{world.attempt} {world.rank // world.local_size}"), folder)

    node_channel.connect = connect_on_node


# --- counting --------------------------------------------------------------------------------------


def _count_look(looks: Counter[str], event: str, args: tuple[Any, ...], folder: str) -> None:
    if event in LOOKS and args and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(folder):
        looks[event] += 1


def _descriptors(pid: str) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _store_port() -> int:
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return int(store.port)


def _sent(store_port: int) -> dict[str, int]:
    """Return the messages and bytes that this process has sent to other ranks, and to the store."""
    found: Counter[str] = Counter(dict.fromkeys(("messages", "bytes", "messages_to_store", "bytes_to_store"), 0))
    for path in Path("/proc/self/fd").iterdir():
        if not (path.is_symlink() and str(path.readlink()).startswith("socket:")):
            continue
        with socket.socket(fileno=os.dup(int(path.name))) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            try:
                remote, local = connection.getpeername()[1], connection.getsockname()[1]
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            except OSError:  # it listens, or the other side has ended
                continue
        if local == store_port:  # the server's side, where rank 0 serves the store
            continue
        ending = "_to_store" if remote == store_port else ""
        # struct tcp_info of linux/tcp.h: tcpi_data_segs_out, tcpi_bytes_sent
        found[f"messages{ending}"] += struct.unpack_from("I", info, 156)[0]
        found[f"bytes{ending}"] += struct.unpack_from("Q", info, 200)[0]
    return dict(found)


# --- figures ---------------------------------------------------------------------------------------


def _summary(ranks: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for name in ("descriptors", "looks_waiting", "looks_a_minute", "messages", "bytes", "messages_to_store",
                 "bytes_to_store"):  # fmt: skip
        summary[f"{name}, most"] = max(found[name] for found in ranks)
        summary[f"{name}, all"] = sum(found[name] for found in ranks)
    summary["descriptors of the store's process"] = max(found["descriptors_of_server"] for found in ranks)
    return summary


def _fit(counted: dict[int, float], name: str) -> dict[str, Any]:
    """Return the form that fits, and its values at FITTED."""
    if name.startswith("descriptors"):
        counted = {size: value for size, value in counted.items() if size >= FIT_FROM} or counted
    sizes, values = np.array(list(counted), dtype=float), np.array(list(counted.values()), dtype=float)
    best: tuple[float, str, float, float] | None = None
    for form, function in FORMS.items():
        at = np.array([function(size) for size in sizes])
        weights = 1 / np.maximum(values, 1)  # relative errors count
        columns = np.stack([np.ones_like(at), at], axis=1) * weights[:, None]
        (constant, slope), *_ = np.linalg.lstsq(columns, values * weights, rcond=None)
        error = float(np.max(np.abs(constant + slope * at - values) * weights))
        if best is None or error < best[0]:
            best = (error, form, float(constant), float(slope))
        if error <= TOLERANCE:
            break
    assert best is not None
    error, form, constant, slope = best
    at_fitted = {str(size): constant + slope * FORMS[form](size) for size in FITTED}
    return {"form": form, "constant": constant, "slope": slope, "error": error, **at_fitted}


def _show(by_size: dict[int, dict[str, float]], fitted: dict[str, dict[str, Any]]) -> None:
    titles = [*(f"N = {size:,}" for size in by_size), "grows as", *(f"fitted {size:,}" for size in FITTED)]
    print("| counted | " + " | ".join(titles) + " |\n|---" + "|---:" * len(titles) + "|")
    for name, fit in fitted.items():
        cells = [f"{found[name]:,.0f}" for found in by_size.values()]
        cells += [f"{fit['form']} ({fit['error']:.0%} off)", *(f"{fit[str(size)]:,.0f}" for size in FITTED)]
        print(f"| {name} | " + " | ".join(cells) + " |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8,32,128,512", help="numbers of ranks (default: 8,32,128,512)")
    parser.add_argument("--node", type=int, default=8, help="ranks of a node (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    main()
