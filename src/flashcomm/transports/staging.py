"""Bytes through host memory that the ranks of one host share: what `process_group` does, for GPUs that see no peers.

A rank's bytes go down into a slot of its own by a copy engine, and up from there to everybody else by theirs. Slots
take turns, so that both directions of a link are busy at once. Who may put and who may fetch is decided on the GPU, by
kernels of one warp (`staging_flags`): nothing waits on the host, and graphs capture it. Each verb is asynchronous:
`wait()` orders the current stream behind it.

On CPU tensors, over `transports.shared`, the same steps run one after the other in Triton's interpreter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import triton
from torch import Tensor

from flashcomm.errors import CommunicationError
from flashcomm.gpu import staging_flags as flags
from flashcomm.gpu.staging_flags import AFTER_FETCH, AFTER_PUT, BEFORE_FETCH, BEFORE_PUT

SLOTS = 4
PLACES = 3  # sets of slots at most: of all ranks, and of two parts of them
POLLS_PER_SECOND = 2000  # of a waiting program in the interpreter, roughly
INTERPRETED = triton.knobs.runtime.interpret


class SharedMemory(Protocol):
    """Zeroed host memory per rank, all of it mapped by every rank."""

    rank: int
    world_size: int
    device: torch.device
    status: Tensor  # int32 (5,) in host memory: what `staging_flags.turn` reports
    mappings: list[int]  # addresses of everybody's memory


def staging_bytes(slot_bytes: int) -> int:
    """What slots of this size and their flags take of a rank's shared memory."""
    return flags.flag_bytes(SLOTS) + SLOTS * slot_bytes


class Pending:
    """An exchange on its way; `wait()` orders the current stream behind it."""

    def __init__(self, *events: torch.cuda.Event) -> None:
        self._events = events

    def wait(self) -> None:
        for event in self._events:
            event.wait()


class StagedTransport:
    """The two byte verbs over shared host memory, which begins at byte `at` of everybody's. `ranks`: those that take
    part, if not all.

    A slot carries up to slot_bytes at a time; exchanges of more go in pieces. Use it from one stream at a time.
    """

    def __init__(
        self,
        memory: SharedMemory,
        at: int,
        slot_bytes: int,
        timeout_s: float,
        ranks: Sequence[int] | None = None,
        whole: StagedTransport | None = None,
        place: int = 0,
    ) -> None:
        ranks = range(memory.world_size) if ranks is None else ranks
        self.rank, self.world_size, self.device = ranks.index(memory.rank), len(ranks), memory.device
        self.slot_bytes = slot_bytes
        self._memory, self._at, self._timeout_s, self._place, self._next = memory, at, timeout_s, place, 0
        begins = [memory.mappings[rank] + at + place * staging_bytes(slot_bytes) for rank in ranks]
        self._slots = [
            [begin + flags.flag_bytes(SLOTS) + slot * slot_bytes for slot in range(SLOTS)] for begin in begins
        ]
        if whole is None:
            self._counts = torch.zeros(1 + 2 * SLOTS * PLACES, dtype=torch.int32, device=self.device)
        else:  # a wait in vain in one place ends all of them
            self._counts = whole._counts
        self._flags = torch.tensor([*begins, *ranks], dtype=torch.int64).to(self.device)
        self._limit = int(timeout_s * (POLLS_PER_SECOND if INTERPRETED else 1e9))
        self._lanes = [_lane(self.device) for _ in range(SLOTS)]
        self._copy = _copier(self.device)
        self._turns = {step: self._launcher(step) for step in (BEFORE_PUT, AFTER_PUT, BEFORE_FETCH, AFTER_FETCH)}

    def among(self, ranks: Sequence[int], place: int) -> StagedTransport:
        """The verbs among some ranks, in ascending order, through slots of their own: `place`, 1 or 2, times
        `staging_bytes` behind those of all."""
        return StagedTransport(self._memory, self._at, self.slot_bytes, self._timeout_s, ranks, self, place)

    def all_gather(self, out: Tensor, inp: Tensor, what: str, overlap: bool = True) -> Pending:
        """inp, uint8 (n,), goes to everybody; row i of out, uint8 (world, n), comes from rank i. inp may be row `rank`
        of out. what, overlap: as for `ProcessGroupTransport`, of no use here."""
        n, source, target = inp.numel(), inp.data_ptr(), out.data_ptr()
        if source != target + self.rank * n:
            out[self.rank].copy_(inp)

        def put(slot: int, start: int, size: int, stream: int) -> None:
            self._copy(slot, source + start, size, stream)

        def fetch(slot: int, peer: int, start: int, size: int, stream: int) -> None:
            self._copy(target + peer * n + start, slot, size, stream)

        return self._exchange(n, self.slot_bytes, put, fetch, out)

    def all_to_all(self, out: Tensor, inp: Tensor, what: str, overlap: bool = True) -> Pending:
        """Row j of inp goes to rank j; row i of out comes from rank i. Both uint8 (world, n), contiguous."""
        n, source, target = inp.shape[1], inp.data_ptr(), out.data_ptr()
        out[self.rank].copy_(inp[self.rank])

        def put(slot: int, start: int, size: int, stream: int) -> None:
            if size == n:  # rows lie one after the other, in both
                for first, last in ((0, self.rank), (self.rank + 1, self.world_size)):
                    self._copy(slot + first * n, source + first * n, (last - first) * n, stream)
                return
            for peer in range(self.world_size):
                self._copy(slot + peer * size, source + peer * n + start, size if peer != self.rank else 0, stream)

        def fetch(slot: int, peer: int, start: int, size: int, stream: int) -> None:
            self._copy(target + peer * n + start, slot + self.rank * size, size, stream)

        return self._exchange(n, self.slot_bytes // self.world_size, put, fetch, out)

    def close(self) -> None:
        """Wait for this rank's exchanges."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._slots = []

    def _exchange(
        self,
        n: int,
        most: int,
        put: Callable[[int, int, int, int], None],
        fetch: Callable[[int, int, int, int, int], None],
        out: Tensor,
    ) -> Pending:
        """put(slot, start, size, stream) and fetch(slot, peer, start, size, stream) for n bytes, `most` at a time."""
        events: list[torch.cuda.Event] = []
        for start in range(0, n, most):
            slot, size = self._next % SLOTS, min(most, n - start)
            lane, self._next = self._lanes[slot], self._next + 1
            lane.begin()
            self._turns[BEFORE_PUT](slot, out, lane.down)
            put(self._slots[self.rank][slot], start, size, lane.down)
            self._turns[AFTER_PUT](slot, out, lane.down)
            self._turns[BEFORE_FETCH](slot, out, lane.up)
            for k in range(1, self.world_size):
                peer = (self.rank + k) % self.world_size
                fetch(self._slots[peer][slot], peer, start, size, lane.up)
            self._turns[AFTER_FETCH](slot, out, lane.up)
            events += lane.end()
        return Pending(*events)

    def _launcher(self, step: int) -> Callable[[int, Tensor, int], None]:
        """Launch one step of a slot's turn on a stream; out is what the exchange writes."""
        first = (self._counts, self._flags, self._memory.status)
        numbers = (SLOTS, self._place, self.rank, self._limit)
        constants = {"STEP": step, "WORLD": self.world_size, "REAL": not INTERPRETED}
        if INTERPRETED:

            def interpret(slot: int, out: Tensor, stream: int) -> None:
                flags.turn[(1,)](*first, out, slot, *numbers, out.numel(), **constants)

            return interpret
        like = torch.empty(16, dtype=torch.uint8, device=self.device)
        options = {"num_warps": 1, "enable_fp_fusion": False}
        compiled = flags.turn.warmup(*first, like, 0, *numbers, 0, **constants, **options, grid=(1,))
        start, values = compiled[(1, 1, 1)], tuple(constants.values())
        addresses = tuple(t.data_ptr() for t in first)

        def launch(slot: int, out: Tensor, stream: int) -> None:
            start(*addresses, out.data_ptr(), slot, *numbers, out.numel(), *values, stream=stream)

        return launch


class _GpuLane:
    """The two streams of a slot, and when they begin and end; two slots' copies keep an engine busy between flags."""

    def __init__(self, device: torch.device) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]
        self.down, self.up = (stream.cuda_stream for stream in self._streams)
        self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ends = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        self._ready.record()
        for stream in self._streams:
            self._ready.wait(stream)

    def end(self) -> list[torch.cuda.Event]:
        for stream, event in zip(self._streams, self._ends, strict=True):
            event.record(stream)
        return self._ends


class _CpuLane:
    down = up = 0

    def begin(self) -> None: ...

    def end(self) -> list[torch.cuda.Event]:
        return []


def _lane(device: torch.device) -> _GpuLane | _CpuLane:
    return _GpuLane(device) if device.type == "cuda" else _CpuLane()


def _copier(device: torch.device) -> Callable[[int, int, int, int], None]:
    """copy(target, source, n_bytes, stream) between addresses of GPU or pinned memory; on CPUs at once."""
    if device.type != "cuda":

        def move(target: int, source: int, n_bytes: int, stream: int) -> None:
            ctypes.memmove(target, source, n_bytes)

        return move
    enqueue = ctypes.CDLL("libcuda.so.1").cuMemcpyAsync  # by address and stream: a fifth of the time of Tensor.copy_
    enqueue.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]

    def copy(target: int, source: int, n_bytes: int, stream: int) -> None:
        if n_bytes and (code := enqueue(target, source, n_bytes, stream)):
            raise CommunicationError(f"copying {n_bytes} bytes through host memory failed: CUDA error {code}")

    return copy
