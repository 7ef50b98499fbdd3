"""Bytes over any torch.distributed process group: gloo on CPUs, NCCL on GPUs, across hosts.

There are three exchanges. `all_to_all` and `all_gather` send the same number of bytes to every rank, `exchange` sends
pieces of any size. All are asynchronous. They call the group's own methods rather than `torch.distributed` functions,
so that a group that torch.distributed did not create works, too. The inner group of our c10d backend is one.

On CPUs an exchange is W-1 matched steps: in step k every rank sends to rank+k and receives from rank-k. Each link then
carries one stream in each direction at full rate. If all messages are posted at once, as in gloo's all-to-all, streams
collide at receivers (12.1 ms instead of 8.8 for 52 kB over 100 Mbit/s, 3 ranks: LOG.md). Only messages of up to 2 KiB
are posted at once. A thread of the transport takes the steps, so that the caller can encode the next chunk meanwhile.

Every message on a CPU carries a tag made of the numbers of the Communicator, the call and the exchange within the call
(`Tags`). gloo accepts a shorter message in place of a longer one without an error, so a message of another call must
never match. The consistency check is the one exception: its messages have a fixed size and a fixed tag, and contain
the number of their call.

GPU tensors over a group without NCCL go through the CPU, slowly. Such groups are used by ranks that send their data
over `symmetric` or `host_memory`, and by ranks that share one GPU.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
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

from flashcomm import compat
from flashcomm.errors import ClosedError, CommunicationError

CHECK_TAG = 0xF1A5  # of consistency checks; the same in every version, so that versions can be compared
SMALL_BYTES = 2048  # up to this many bytes per rank, an exchange posts all its messages at once
_OURS = 1 << 30  # the highest bit of a tag: keeps tags apart from those of the program's own messages


class Tags:
    """The message tags of one Communicator: 10 bits for it, 11 for the call, 9 for the exchange in the call.

    Numbers may wrap around: messages between two ranks arrive in order, and a Communicator sends nothing after a call
    that an exception interrupted.
    """

    def __init__(self) -> None:
        self.communicator = self._call = self._exchange = 0

    def begin(self, call_number: int) -> None:
        """Start numbering the exchanges of a call."""
        self._call, self._exchange = call_number, 0

    def next(self) -> int:
        """Return the tag of the next exchange of this call."""
        self._exchange += 1
        return _OURS | self.communicator % 1024 << 20 | self._call % 2048 << 9 | self._exchange % 512


class Pending:
    """An exchange in flight."""

    def __init__(self, finish: Callable[[], object], what: str, transport: ProcessGroupTransport) -> None:
        self._finish, self._what, self._transport, self._begin = finish, what, transport, time.monotonic()

    def wait(self) -> None:
        """Make the result usable (on GPUs: by the current stream).

        Raises:
            CommunicationError: A peer died or did not answer within the time-out.
        """
        try:
            self._finish()
        except (CommunicationError, ClosedError):
            raise
        except RuntimeError as why:
            self._transport.fail(self._what, "a peer", why, self._begin)


def has_nccl(group: dist.ProcessGroup) -> bool:
    """Return whether the group's backend for CUDA tensors is NCCL."""
    on_gpus = [d for d in group._device_types if d.type == "cuda"]
    return any("nccl" in group._get_backend(d).name().lower() for d in on_gpus)


class ProcessGroupTransport:
    """Three exchanges of bytes over a c10d group.

    Args:
        group: The process group.
        device: Where the tensors are.
        timeout_s: Seconds to wait for a peer.
        members: The group ranks that take part, ascending. None: all.
        parent: For a transport of some members: the transport of all, whose byte counter, tags and thread it uses.

    Attributes:
        rank: This rank's index among the members.
        world_size: Number of members.
        n_bytes_sent: Payload bytes that this rank sent to others.
        tags: The tags of messages.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout_s: float,
        members: Sequence[int] | None = None,
        parent: ProcessGroupTransport | None = None,
    ) -> None:
        self.group, self.device, self.timeout_s = group, device, timeout_s
        self._members = range(group.size()) if members is None else members
        self.rank, self.world_size = self._members.index(group.rank()), len(self._members)
        self.n_bytes_sent, self._parent = 0, parent
        self.tags: Tags = parent.tags if parent else Tags()
        self._by_cpu: ProcessGroupTransport | None = None  # carries GPU tensors over a group without NCCL
        if device.type == "cuda" and not has_nccl(group):
            self._by_cpu = ProcessGroupTransport(group, torch.device("cpu"), timeout_s, members)
            self._by_cpu.tags = self.tags
        self._lane: Lane | None = None
        if device.type == "cpu":
            self._lane = parent._lane if parent else Lane()
            compat.let_senders_finish()
        # The works of the latest exchange. gloo hangs if the work of a message in flight is freed, so they must be kept
        # if an exception interrupts the exchange.
        self._in_flight: list[Any] = []

    def among(self, members: Sequence[int]) -> ProcessGroupTransport:
        """Return a transport among some ranks of the group.

        Every rank of the group must be in one such subset, and all must call the same exchanges in the same order.

        Args:
            members: Group ranks, ascending.
        """
        return ProcessGroupTransport(self.group, self.device, self.timeout_s, members, self)

    def all_to_all(self, out: Tensor, inp: Tensor, what: str, overlap: bool = True) -> Pending:
        """Send row j of inp to rank j; row i of out comes from rank i.

        Args:
            out: uint8 (world_size, n), contiguous.
            inp: uint8 (world_size, n), contiguous.
            what: The phase, for error messages.
            overlap: Whether to run on the transport's thread (CPUs only). Pass False if `wait()` follows at once.
        """
        self._count(inp.numel() // self.world_size * (self.world_size - 1))
        if self._by_cpu:
            on_cpu = torch.empty_like(out, device="cpu")
            self._by_cpu.all_to_all(on_cpu, inp.cpu(), what, overlap=False).wait()
            return self._copied_back(on_cpu, out, what)
        if self._lane:
            return self._on_cpu(out.unbind(), inp.unbind(), what, overlap, None)
        return self._pending(self._rows(out, inp), what)

    def all_gather(self, out: Tensor, inp: Tensor, what: str, overlap: bool = True, tag: int | None = None) -> Pending:
        """Send inp to every rank; row i of out comes from rank i.

        Args:
            out: uint8 (world_size, n), contiguous.
            inp: uint8 (n,); may be row `rank` of out.
            what: The phase, for error messages.
            overlap: As for `all_to_all`.
            tag: The tag of the messages on CPUs; None takes the call's next one.
        """
        self._count(inp.numel() * (self.world_size - 1))
        if self._by_cpu:
            on_cpu = torch.empty_like(out, device="cpu")
            self._by_cpu.all_gather(on_cpu, inp.cpu(), what, overlap=False, tag=tag).wait()
            return self._copied_back(on_cpu, out, what)
        if self._lane:
            return self._on_cpu(out.unbind(), [inp] * self.world_size, what, overlap, tag)
        if self.world_size < self.group.size():
            return self._pending(self._rows(out, inp.expand(self.world_size, -1).contiguous()), what)
        return self._pending(self.group._allgather_base(out.view(-1), inp, AllgatherOptions()), what)

    def exchange(self, out: Sequence[Tensor], inp: Sequence[Tensor], what: str, overlap: bool = True) -> Pending:
        """Send inp[j] to rank j; out[i] comes from rank i. Pieces of no bytes are not sent.

        Args:
            out: uint8 (n,) for each rank, contiguous, of the size of the piece that this rank sends.
            inp: uint8 (n,) for each rank, contiguous. Pieces may be the same memory.
            what: The phase, for error messages.
            overlap: As for `all_to_all`.
        """
        self._count(sum(piece.numel() for rank, piece in enumerate(inp) if rank != self.rank))
        if self._by_cpu:
            on_cpu = [torch.empty_like(piece, device="cpu") for piece in out]
            self._by_cpu.exchange(on_cpu, [piece.cpu() for piece in inp], what, overlap=False).wait()
            for piece, received in zip(out, on_cpu, strict=True):
                piece.copy_(received)
            return Pending(lambda: None, what, self)
        if self._lane:
            return self._on_cpu(out, inp, what, overlap, None)
        return self._pending(self.group.alltoall(list(out), list(inp), AllToAllOptions()), what)

    def all_reduce_backend(self, x: Tensor, what: str) -> Pending:
        """Sum x in place with the backend's own all-reduce, which has its own order of additions."""
        self._count(2 * (self.world_size - 1) * x.numel() * x.element_size() // self.world_size)
        if self._by_cpu:
            on_cpu = x.cpu()
            self._by_cpu.all_reduce_backend(on_cpu, what).wait()
            return self._copied_back(on_cpu, x, what)
        options = AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]
        return self._pending(self.group.allreduce([x], options), what)

    def close(self) -> None:
        """End the transport's thread. Exchanges that have not started yet raise ClosedError."""
        if self._lane:
            self._lane.close(self.timeout_s)
        if self._by_cpu:
            self._by_cpu.close()

    def fail(self, what: str, peer: str, why: RuntimeError, begin: float) -> None:
        """Raise a CommunicationError that names the peer and says what happened.

        Args:
            what: The phase.
            peer: The peer that this rank waited for, such as "rank 3".
            why: The backend's error.
            begin: `time.monotonic()` when the wait began.
        """
        seconds, text = time.monotonic() - begin, (str(why).splitlines() or [""])[0]
        if "timed out" in text.lower() or "timeout" in text.lower():
            happened = f"{peer} did not answer within {self.timeout_s:g} s (FLASHCOMM_TIMEOUT_S)"
        else:
            happened = f"the connection to {peer} was lost after {seconds:.2g} s: that process ended or timed out"
        raise CommunicationError(
            f"rank {self.group.rank()} of {self.group.size()}: {what} failed: {happened}. Restart the group; the first "
            f"rank to fail says more. The backend said: {text}"
        ) from why

    def _count(self, n_bytes: int) -> None:
        (self._parent or self).n_bytes_sent += n_bytes

    def _rows(self, out: Tensor, inp: Tensor) -> Any:
        """Start the backend's all-to-all of rows. Ranks that are not members neither send nor receive."""
        n, ranks = inp.shape[1], range(self.group.size())
        sizes = [n if r in self._members else 0 for r in ranks] if self.world_size < len(ranks) else []
        return self.group.alltoall_base(out.view(-1), inp.view(-1), sizes, sizes, AllToAllOptions())

    def _copied_back(self, on_cpu: Tensor, out: Tensor, what: str) -> Pending:
        out.copy_(on_cpu)
        return Pending(lambda: None, what, self)

    def _pending(self, work: Any, what: str) -> Pending:
        if self.device.type == "cpu":
            (self._parent or self)._in_flight = [work]
            return Pending(lambda: work.wait(timedelta(seconds=self.timeout_s)), what, self)
        return Pending(work.wait, what, self)  # makes the stream wait; NCCL's watchdog has the time-out

    def _on_cpu(
        self, out: Sequence[Tensor], inp: Sequence[Tensor], what: str, overlap: bool, tag: int | None
    ) -> Pending:
        assert self._lane
        tag = (
            self.tags.next() if tag is None else tag
        )  # here, not on the thread: in the order of the caller's exchanges
        steps = lambda: self._steps(out, inp, what, tag)  # noqa: E731
        return Pending(self._lane.start(steps) if overlap else steps, what, self)

    def _steps(self, out: Sequence[Tensor], inp: Sequence[Tensor], what: str, tag: int) -> None:
        """Run an exchange as W-1 matched steps, or as one step if it is small. Raises CommunicationError."""
        if out[self.rank].data_ptr() != inp[self.rank].data_ptr():
            out[self.rank].copy_(inp[self.rank])
        steps, largest = range(1, self.world_size), max(piece.numel() for piece in (*out, *inp))
        # Small messages do not collide, and waiting for all peers at once finds the one that does not answer.
        for together in [steps] if largest <= SMALL_BYTES else [range(k, k + 1) for k in steps]:
            if self._lane and self._lane.closed:
                raise ClosedError(f"{what}: the Communicator was closed during the call")
            begin, peer, works = time.monotonic(), 0, []  # type: ignore[var-annotated]
            (self._parent or self)._in_flight = works
            try:
                for k in together:
                    source, target = (self.rank - k) % self.world_size, (self.rank + k) % self.world_size
                    peer = self._members[source]
                    if out[source].numel():
                        works.append((peer, self.group.recv([out[source]], peer, tag)))
                    peer = self._members[target]
                    if inp[target].numel():
                        works.append((peer, self.group.send([inp[target]], peer, tag)))
                for peer, work in works:  # noqa: B007  (the error names it)
                    work.wait(timedelta(seconds=self.timeout_s))
            except RuntimeError as why:
                self.fail(what, f"rank {peer}", why, begin)


class Lane:
    """One daemon thread that runs jobs in order. It starts with the first job and ends with its owner."""

    def __init__(self) -> None:
        self._state = _LaneState()
        weakref.finalize(self, self._state.stop).atexit = False  # at exit `_join_all` stops it

    @property
    def closed(self) -> bool:
        return self._state.stopped

    def start(self, job: Callable[[], None]) -> Callable[[], object]:
        """Queue a job. Return a function that waits for it and raises its exception, if any."""
        state = self._state
        if state.stopped:
            raise ClosedError("the Communicator was closed during the call")
        if state.thread is None:
            state.thread = threading.Thread(target=_work, args=(state,), name="flashcomm-exchange", daemon=True)
            _running.add(state)
            state.thread.start()
        future: Future[None] = Future()
        state.jobs.put((job, future))
        if self.closed:  # by another thread: the worker may have ended without this job
            state.drain()
        return future.result

    def close(self, timeout_s: float) -> None:
        """Stop after the running job. Wait for it, at most timeout_s seconds."""
        self._state.stop()
        self._state.join(timeout_s)


class _LaneState:
    """The state that a `Lane` shares with its thread. The Lane may be garbage-collected while the thread runs."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.stopped, self.pid = False, os.getpid()

    def stop(self) -> None:
        self.stopped = True
        self.jobs.put(None)

    def drain(self) -> None:
        """Fail all queued jobs with ClosedError."""
        while True:
            try:
                item = self.jobs.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                item[1].set_exception(ClosedError("the Communicator was closed during the call"))

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, unless it is the calling thread or belongs to the parent of a fork."""
        if self.thread is not None and self.pid == os.getpid() and self.thread is not threading.current_thread():
            self.thread.join(timeout_s)


_running: weakref.WeakSet[_LaneState] = weakref.WeakSet()


@atexit.register
def _join_all() -> None:
    """End all threads. One that waited inside gloo while Python finalizes would abort the process (SIGABRT)."""
    states = [state for state in _running if state.pid == os.getpid()]
    for state in states:
        state.stop()
    for state in states:
        state.join(timeout_s=3600)  # the running job ends within the time-out of its Communicator


def _work(state: _LaneState) -> None:
    while (item := state.jobs.get()) is not None:
        job, future = item
        try:
            if state.stopped:
                raise ClosedError("the Communicator was closed during the call")
            with torch.inference_mode():  # modes are per thread, and the caller's tensors may be inference tensors
                job()
            future.set_result(None)
        except BaseException as why:  # raised in the thread that waits
            future.set_exception(why)
        del item, job, future  # hold no buffers while waiting for the next job
    state.drain()
