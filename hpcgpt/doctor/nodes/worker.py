"""The measuring processes of a node: one for each GPU, or one for the CPU.

``python -m hpcgpt.doctor.nodes.worker ADDRESSES PORT`` loads torch once, then forks a worker for each line ``DEVICE``
on stdin: so a worker that was killed is replaced at once. A worker opens its device only when asked to
measure. The token is in HPCGPT_DOCTOR_TOKEN.

Rates: matrix products count 2 n^3 operations; copies count bytes read and written; all-reduce is nccl-tests' bus
bandwidth, bytes / time * 2 (n - 1) / n. GB are 10^9 bytes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from hpcgpt.distributed import routes
from hpcgpt.doctor.nodes import wire
from hpcgpt.doctor.nodes.wire import Message

CONNECT_S = 15.0
GPU_SIZE, CPU_SIZE = 8192, 768  # of the square matrices: at 8192 an A100 is at 98% of its best rate
GPU_COPY, CPU_COPY = 1 << 30, 32 << 20
HOST_COPY = 256 << 20
LATENCY_BYTES, ROUNDS = 4096, 6
SLOW_S = 0.03  # if a sixteenth of the bytes takes so long, all of them, ROUNDS times, would take too long


def main(argv: Sequence[str]) -> int:
    addresses, port = argv[0].split(","), int(argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that have ended leave no zombies
    for line in sys.stdin:
        device = int(line)
        if not os.fork():
            _work(device, addresses, port)
    return 0


def _work(device: int, addresses: Sequence[str], port: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection = wire.connect(addresses, port, CONNECT_S)
        routes.use_interface_towards(*connection.getpeername()[:2])
        worker = Worker(device)
        own = connection.getsockname()[0]
        greeting = {
            "token": os.environ["HPCGPT_DOCTOR_TOKEN"], "kind": "worker", "node": os.environ["HPCGPT_DOCTOR_NODE"],
            "device": device, "pid": os.getpid(), "torch": torch.__version__,
            "visible": torch.cuda.device_count(), "address": own,
            "store": worker.serve_store(own),
        }  # fmt: skip
        wire.serve(connection, greeting, worker.actions())
        status = 0
    finally:
        os._exit(status)


class Worker:
    """Measures one device, alone or with others."""

    def __init__(self, number: int) -> None:
        """`number` is the GPU's, as torch counts; -1 is the CPU. The device is opened at the first measurement."""
        self._on_gpu = number >= 0
        self._device = torch.device("cuda", number) if self._on_gpu else torch.device("cpu")
        self._store: Store | None = None

    def serve_store(self, address: str) -> int:
        """Start the store through which the ranks of a measurement meet if this worker is their rank 0."""
        store = TCPStore(address, 0, None, True, timedelta(seconds=10), wait_for_workers=False)
        self._store = store
        return int(store.port)

    def actions(self) -> dict[str, Callable[[Message], Message]]:
        return {"matmul": self.matmul, "memory": self.memory, "host": self.host_copies, "all_reduce": self.all_reduce}

    def matmul(self, request: Message) -> Message:
        """Multiply random matrices (of zeros a GPU draws less power, and is faster) for `seconds`."""
        size = GPU_SIZE if self._on_gpu else CPU_SIZE
        a, b = (torch.randn(size, size, device=self._device).to(self._dtype()) for _ in range(2))
        product = a @ b
        count, elapsed_s = self._repeat(lambda: torch.matmul(a, b, out=product), float(request["seconds"]))
        return {
            "tflops": count * 2 * size**3 / elapsed_s / 1e12,
            "finite": bool(product.float().isfinite().all()),
            "name": torch.cuda.get_device_name(self._device) if self._on_gpu else "CPU",
        }

    def _dtype(self) -> torch.dtype:
        if not self._on_gpu:
            return torch.float32
        # V100 has no bfloat16 units, and multiplies it many times slower.
        return torch.bfloat16 if torch.cuda.get_device_capability(self._device)[0] >= 8 else torch.float16

    def memory(self, request: Message) -> Message:
        source = torch.randn((GPU_COPY if self._on_gpu else CPU_COPY) // 4, device=self._device)
        target = torch.empty_like(source)
        count, elapsed_s = self._repeat(lambda: target.copy_(source), float(request["seconds"]))
        return {"gbps": count * 2 * 4 * source.numel() / elapsed_s / 1e9, "equal": bool(torch.equal(source, target))}

    def host_copies(self, request: Message) -> Message:
        """Copy from pinned memory of the host to the GPU, and back; one way at a time."""
        if not self._on_gpu:
            return {}
        host = torch.randn(HOST_COPY // 4).pin_memory()
        device = host.to(self._device)
        found = {}
        for name, copy in (("to_device", lambda: device.copy_(host, non_blocking=True)),
                           ("to_host", lambda: host.copy_(device, non_blocking=True))):  # fmt: skip
            count, elapsed_s = self._repeat(copy, float(request["seconds"]))
            found[name] = count * HOST_COPY / elapsed_s / 1e9
        return found

    def _repeat(self, work: Callable[[], object], seconds: float) -> tuple[int, float]:
        """Repeat `work` for about that long, after warming up; return how often, and the seconds that it took.

        The whole time counts, not the best repetition: a limit on CPU time lets short bursts run at full speed.
        """
        for _ in range(3):
            work()
        self._synchronize()
        count, began_at = 0, time.perf_counter()
        while time.perf_counter() - began_at < seconds:
            for _ in range(4 if self._on_gpu else 1):  # launches are queued, and waited for together
                work()
                count += 1
            self._synchronize()
        return count, time.perf_counter() - began_at

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    # --- with others --------------------------------------------------------------------------------

    def all_reduce(self, request: Message) -> Message:
        """Reduce over the ranks of this test: a small tensor for the latency, a large one of `bytes` for the rate.

        The request has the test's name, rank, size, and the host and port of rank 0's store.
        """
        limit = timedelta(seconds=float(request["limit_s"]))
        rank, size = int(request["rank"]), int(request["size"])
        store = self._store if rank == 0 else TCPStore(
            str(request["host"]), int(request["port"]), None, False, limit, wait_for_workers=False
        )  # fmt: skip
        assert store is not None
        if self._on_gpu:
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            "nccl" if self._on_gpu else "gloo", store=PrefixStore(str(request["test"]), store), rank=rank,
            world_size=size, timeout=limit, device_id=self._device if self._on_gpu else None,
        )  # fmt: skip
        try:
            return self._reduce(int(request["bytes"]), size)
        finally:
            dist.destroy_process_group()

    def _reduce(self, most_bytes: int, size: int) -> Message:
        small = torch.ones(LATENCY_BYTES // 4, device=self._device)
        dist.all_reduce(small)  # connects
        latency_s = self._timed(small)
        medium = torch.ones(most_bytes // 16 // 4, device=self._device)
        elapsed_s = self._timed(medium, 2)
        used = 4 * medium.numel()
        if elapsed_s < SLOW_S:
            large = torch.ones(most_bytes // 4, device=self._device)
            used, elapsed_s = most_bytes, self._timed(large)
        sums = float(medium[0]) == size**2
        return {"gbps": used / elapsed_s * 2 * (size - 1) / size / 1e9, "latency_s": latency_s, "sums": sums}

    def _timed(self, tensor: torch.Tensor, rounds: int = ROUNDS) -> float:
        """Reduce `rounds` times; return the seconds of the fastest, in each of which the slowest rank counts.

        The fastest: others may use the network at the same time, which is no fault of these nodes.
        """
        taken = torch.empty(rounds, device=self._device, dtype=torch.float64)
        for number in range(rounds):
            dist.barrier()
            self._synchronize()
            began_at = time.perf_counter()
            dist.all_reduce(tensor)
            self._synchronize()
            taken[number] = time.perf_counter() - began_at
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return float(taken.min())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
