"""Bytes over any torch.distributed process group: gloo on CPUs, NCCL on GPUs, across hosts.

Two verbs, both with equal pieces and both asynchronous: `all_to_all` and `all_gather`. They call the group's own
methods rather than `torch.distributed` functions, so that a group which is not registered by name (the inner one of
our c10d backend) serves as well.

On CPUs the verbs are W-1 matched steps: in step k every rank sends to rank+k and receives from rank-k. Each link then
carries one stream at a time in each direction, and carries it at full rate; posting all messages at once, as gloo's
all-to-all does, makes streams collide at receivers (12.1 ms against 8.8 for 52 kB over 100 Mbit/s, 3 ranks: LOG.md).
A thread of the transport's own takes the steps, so that the caller can code the next chunk meanwhile.

GPU tensors over a group without NCCL go by way of the CPU, slowly: such a group is for ranks that find a faster way
through `symmetric` or `host`, and is all that ranks which share a GPU can have.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
)

from flashcomm.errors import CommunicationError

_TAG = 0xF1A5  # of our point-to-point messages, out of the way of the program's own


class Pending:
    """An exchange in flight; `wait()` makes its result usable (on GPUs: by the current stream)."""

    def __init__(self, finish: Callable[[], object], what: str, transport: ProcessGroupTransport) -> None:
        self._finish, self._what, self._transport = finish, what, transport

    def wait(self) -> None:
        """Raises CommunicationError naming the phase when a peer died or did not answer within the time-out."""
        transport, group = self._transport, self._transport.group
        try:
            self._finish()
        except RuntimeError as why:
            raise CommunicationError(
                f"rank {group.rank()} of {group.size()}: {self._what} failed: a peer died or did not answer "
                f"within {transport.timeout_s:g} s (FLASHCOMM_TIMEOUT_S). Restart the group; the first to fail says "
                f"more. The backend said: {str(why).splitlines()[0]}"
            ) from why


def has_nccl(group: dist.ProcessGroup) -> bool:
    """Whether the group itself takes CUDA tensors, by NCCL."""
    on_gpus = [d for d in group._device_types if d.type == "cuda"]
    return any("nccl" in group._get_backend(d).name().lower() for d in on_gpus)


class ProcessGroupTransport:
    """The two byte verbs over a c10d group. `n_bytes_sent` counts what this rank sent to others, payload only.

    rank, world: among those that take part: all of the group, or the `members` that `among` names.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout_s: float,
        members: Sequence[int] | None = None,
        whole: ProcessGroupTransport | None = None,
    ) -> None:
        self.group, self.device, self.timeout_s = group, device, timeout_s
        self._members = range(group.size()) if members is None else members
        self.rank, self.world_size = self._members.index(group.rank()), len(self._members)
        self.n_bytes_sent, self._whole = 0, whole  # which counts for its parts, and whose thread they use
        self._by_cpu: ProcessGroupTransport | None = None  # what takes GPU tensors over a group without NCCL
        if device.type == "cuda" and not has_nccl(group):
            self._by_cpu = ProcessGroupTransport(group, torch.device("cpu"), timeout_s, members)
        self._lane: _Lane | None = None
        if device.type == "cpu":
            self._lane = whole._lane if whole else _Lane()

    def among(self, members: Sequence[int]) -> ProcessGroupTransport:
        """The verbs among some ranks, in ascending order. All ranks of the group are to be in such a part, and to call
        the same verb at the same time."""
        return ProcessGroupTransport(self.group, self.device, self.timeout_s, members, self)

    def all_to_all(self, out: Tensor, inp: Tensor, what: str, overlap: bool = True) -> Pending:
        """Row j of inp goes to rank j; row i of out comes from rank i. Both uint8 (world, n), contiguous.

        overlap=False, where nothing is to be done before `wait()`, spares CPUs the way over another thread.
        """
        self._count(inp.numel() // self.world_size * (self.world_size - 1))
        if self._by_cpu:
            there = torch.empty_like(out, device="cpu")
            self._by_cpu.all_to_all(there, inp.cpu(), what, overlap=False).wait()
            return self._brought(there, out, what)
        if self._lane:
            return self._on_cpu(lambda: self._steps(out, lambda rank: inp[rank]), what, overlap)
        return self._pending(self._rows(out, inp), what)

    def all_gather(self, out: Tensor, inp: Tensor, what: str, overlap: bool = True) -> Pending:
        """inp, uint8 (n,), goes to everybody; row i of out, uint8 (world, n), comes from rank i. inp may be row `rank`
        of out. overlap: see above."""
        self._count(inp.numel() * (self.world_size - 1))
        if self._by_cpu:
            there = torch.empty_like(out, device="cpu")
            self._by_cpu.all_gather(there, inp.cpu(), what, overlap=False).wait()
            return self._brought(there, out, what)
        if self._lane:
            return self._on_cpu(lambda: self._steps(out, lambda rank: inp), what, overlap)
        if self.world_size < self.group.size():
            return self._pending(self._rows(out, inp.expand(self.world_size, -1).contiguous()), what)
        return self._pending(self.group._allgather_base(out.view(-1), inp, AllgatherOptions()), what)

    def all_reduce_native(self, x: Tensor, what: str) -> Pending:
        """The backend's own sum of x, in place; its algorithm and its order of additions."""
        self._count(2 * (self.world_size - 1) * x.numel() * x.element_size() // self.world_size)
        if self._by_cpu:
            there = x.cpu()
            self._by_cpu.all_reduce_native(there, what).wait()
            return self._brought(there, x, what)
        options = AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]
        return self._pending(self.group.allreduce([x], options), what)

    def close(self) -> None:
        """End the transport's thread; exchanges must be over."""
        if self._lane:
            self._lane.close()
        if self._by_cpu:
            self._by_cpu.close()

    def _count(self, n_bytes: int) -> None:
        (self._whole or self).n_bytes_sent += n_bytes

    def _rows(self, out: Tensor, inp: Tensor) -> Any:
        """The all-to-all of rows by the backend's own; ranks that are no members get and give nothing."""
        n, everybody = inp.shape[1], range(self.group.size())
        sizes = [n if r in self._members else 0 for r in everybody] if self.world_size < len(everybody) else []
        return self.group.alltoall_base(out.view(-1), inp.view(-1), sizes, sizes, AllToAllOptions())

    def _brought(self, there: Tensor, out: Tensor, what: str) -> Pending:
        out.copy_(there)
        return Pending(lambda: None, what, self)

    def _pending(self, work: Any, what: str) -> Pending:
        if self.device.type == "cpu":
            return Pending(lambda: work.wait(timedelta(seconds=self.timeout_s)), what, self)
        return Pending(work.wait, what, self)  # orders the stream behind it; NCCL's watchdog keeps the group's time-out

    def _on_cpu(self, steps: Callable[[], None], what: str, overlap: bool) -> Pending:
        assert self._lane
        return Pending(self._lane.start(steps) if overlap else steps, what, self)

    def _steps(self, out: Tensor, piece_for: Callable[[int], Tensor]) -> None:
        """The exchange as W-1 matched steps. Raises RuntimeError, from the backend."""
        limit, ranks = timedelta(seconds=self.timeout_s), self._members
        if out[self.rank].data_ptr() != piece_for(self.rank).data_ptr():
            out[self.rank].copy_(piece_for(self.rank))
        for k in range(1, self.world_size):
            source, target = (self.rank - k) % self.world_size, (self.rank + k) % self.world_size
            received = self.group.recv([out[source]], ranks[source], _TAG)
            sent = self.group.send([piece_for(target)], ranks[target], _TAG)
            received.wait(limit)
            sent.wait(limit)


class _Lane:
    """One daemon thread that runs what it is given, in order; it starts with the first job and ends with its owner."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.close = weakref.finalize(self, self._jobs.put, None)

    def start(self, job: Callable[[], None]) -> Callable[[], object]:
        """Queue job; the function returned waits for it and raises what it raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="flashcomm-exchange", daemon=True)
            self._thread.start()
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return future.result


def _work(jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None]) -> None:
    while (item := jobs.get()) is not None:
        job, future = item
        try:
            with torch.inference_mode():  # modes are per thread, and the caller's tensors may be of inference mode
                job()
            future.set_result(None)
        except BaseException as why:  # handed to whoever waits
            future.set_exception(why)
        del item, job, future  # hold no buffers while waiting for the next
