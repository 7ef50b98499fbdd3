"""The self-test of memory that ranks share: drivers exist with which peers read stale data or NaN, without any error.

Our kernels only write to peers and read their own memory, which is what most hardware does best, but that must work,
too. So the kernels themselves run on random data when a Communicator is created: by the LL protocol and with flags, all
ranks at once, so that every pair sends in both directions, and replayed from a CUDA graph. Every rank compares what it
got with `reference`. If one finds a difference, or waits in vain, no rank uses this memory.

The verdict is kept for the life of the process. Without compiling, the test takes some ten milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcomm import reference
from flashcomm.collectives.executors import on_device
from flashcomm.errors import CommunicationError
from flashcomm.setup import consistency
from flashcomm.transports.cpu_shared import host_name
from flashcomm.transports.process_group import ProcessGroupTransport
from flashcomm.wire.format import WireFormat

if TYPE_CHECKING:
    from flashcomm.gpu.launch import KernelCollectives

TIMEOUT_S = 5.0  # of a wait; ranks begin together, so that a healthy peer answers within milliseconds
ROUNDS = 2  # of calls, and as many replays: buffers of even and odd calls both hold stale data by then
ROW = 4096  # values; a multiple of all groups
BLOCK_ROWS = 256  # rows that are compared at a time
WAITED = "waited"
Pair = tuple[int, int, str]  # the rank that found a fault, the peer whose data it was, and what is wrong

_verdicts: dict[tuple[str, ...], str] = {}


def why_not(transport: ProcessGroupTransport, kernels: KernelCollectives, fmt: WireFormat, name: str) -> str:
    """Return why the ranks must not use this memory; "" if all results were right. Collective.

    Args:
        transport: The transport that the ranks talk over.
        kernels: The kernels over the memory to test. Do not use them if the test failed.
        fmt: The format in which to send: the one whose kernels will be needed first.
        name: The name of the memory's transport.
    """
    places = consistency.exchange(transport, _place(transport.device), "looking for self-tests")
    key = (name, *places)
    known = consistency.exchange(transport, _verdicts.get(key), "comparing self-tests")
    if known[0] is None or any(verdict != known[0] for verdict in known):
        timeout_s, kernels.timeout_s = kernels.timeout_s, min(TIMEOUT_S, kernels.timeout_s)
        with on_device(torch.empty(0, device=transport.device)):
            _verdicts[key] = _SelfTest(transport, kernels, fmt).verdict()
        kernels.timeout_s = timeout_s
    return _verdicts[key]


def message(seed: int, first: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return random bf16 from -1 to 1, which depend only on seed and place: equal on every device.

    Args:
        seed: The seed.
        first: The place of the first value in the whole message.
        shape: The shape.
        device: Where to make them.
    """
    n = math.prod(shape)
    place = torch.arange(first, first + n, device=device) + (0x9E3779B97F4A7C1 * (seed + 1) & ~(-1 << 62))
    mixed = (place ^ (place >> 29)) * 0x3F58476D1CE4E5B9  # wraps around
    mixed = (mixed ^ (mixed >> 32)) * 0x14D049BB133111EB
    return ((mixed >> 40 & 0xFFFF).to(torch.float32) / 32768 - 1).to(torch.bfloat16).view(*shape)


class _SelfTest:
    """The calls of a self-test: three, so that each buffer of even and odd calls gets messages of both protocols."""

    def __init__(self, transport: ProcessGroupTransport, kernels: KernelCollectives, fmt: WireFormat) -> None:
        from flashcomm.gpu.compat import INTERPRETED
        from flashcomm.gpu.tuning import FLAGS, LL

        self.transport, self.kernels, self.fmt, self.device = transport, kernels, fmt, transport.device
        self.rank, self.world_size, self._n = transport.rank, transport.world_size, 0
        # Values and tuning. On GPUs the size decides: 8 KB go by LL, 8 MB are cut up as large messages are.
        small, large = ((1, LL), (1, FLAGS)) if INTERPRETED else ((1, None), (1024, None))
        self._kinds: list[tuple[int, Any]] = [small, large, small]
        self._row = fmt.unit if INTERPRETED else ROW

    def verdict(self) -> str:
        """Return why the memory must not be used, or "". Collective."""
        try:
            self._inputs = [torch.zeros(n, self._row, dtype=torch.bfloat16, device=self.device) for n, _ in self._kinds]
            self._results = [torch.empty_like(x) for x in self._inputs]
            calls, problem = self._planned("one_shot"), ""
        except Exception as why:  # of Triton or CUDA, perhaps only on this rank: exchanged below
            calls, problem = None, f"{type(why).__name__}: {why}".splitlines()[0]
        problems = self._exchange(problem)
        if any(problems):
            return "; ".join(f"rank {r}: the self-test cannot run: {text}" for r, text in enumerate(problems) if text)
        assert calls is not None
        found = self._rounds(calls)
        if not found and self.device.type == "cuda":
            graph = _captured(calls, self.device)
            if all(self._exchange(graph is not None)):
                found = self._rounds(graph.replay)  # type: ignore[union-attr]
        if found and self.world_size > 2 and not any(WAITED in what for *_, what in found):
            found = self._by_source() or found
        first = {(rank, peer): what for rank, peer, what in reversed(found)}
        pairs = [f"rank {rank} {what} rank {peer}" for (rank, peer), what in reversed(first.items())]
        return f"the self-test failed: {'; '.join(pairs)}" if pairs else ""

    def _rounds(self, calls: Callable[[], object]) -> list[Pair]:
        """Run the calls with new data each time. Return what any rank found. Collective.

        A rank that found wrong values goes on, because its peers wait for it. One that waited in vain does not.
        """
        mine: list[Pair] = []
        for _ in range(ROUNDS):
            if not any(WAITED in what for *_, what in mine):
                mine = self._round(calls) or mine
        return [tuple(pair) for pairs in self._exchange(mine) for pair in pairs]

    def _round(self, calls: Callable[[], object]) -> list[Pair]:
        self._n += 1
        for k, (x, result) in enumerate(zip(self._inputs, self._results, strict=True)):
            x.copy_(message(self._seed(k, self.rank), 0, x.shape, self.device))
            result.fill_(float("nan"))
        calls()
        if found := self._waited():
            return found
        wrong = sum(int((part != want).sum()) for k in range(3) for part, want in self._compared(k))
        peer = 1 - self.rank if self.world_size == 2 else self.rank
        return [(self.rank, peer, f"got {wrong} wrong values from")] if wrong else []

    def _compared(self, k: int) -> Any:
        """Yield the result of call k and the reference, by blocks of rows."""
        for begin in range(0, len(self._results[k]), BLOCK_ROWS):
            part = self._results[k][begin : begin + BLOCK_ROWS]
            first = begin * self._row
            everyone = [message(self._seed(k, r), first, part.shape, self.device) for r in range(self.world_size)]
            yield part, reference.one_shot(everyone, self.fmt)

    def _by_source(self) -> list[Pair]:
        """Find out whose data is wrong, by an all-gather, which keeps them apart. Collective."""
        inputs, self._results = self._inputs, [x.new_empty(self.world_size * len(x), self._row) for x in self._inputs]
        mine: list[Pair] = []
        for _ in range(ROUNDS):
            self._n += 1
            for k, x in enumerate(inputs):
                x.copy_(message(self._seed(k, self.rank), 0, x.shape, self.device))
            self._planned("all_gather")()
            if waited := self._waited():
                mine = waited
                break
            for k, (x, result) in enumerate(zip(inputs, self._results, strict=True)):
                everyone = [message(self._seed(k, rank), 0, x.shape, self.device) for rank in range(self.world_size)]
                want = reference.all_gather(everyone, self.fmt)
                parts = zip(torch.split(result, len(x)), torch.split(want, len(x)), strict=True)
                for rank, (part, right) in enumerate(parts):
                    if wrong := int((part != right).sum()):
                        mine.append((self.rank, rank, f"got {wrong} wrong values from"))
        return [tuple(pair) for pairs in self._exchange(mine) for pair in pairs]

    def _waited(self) -> list[Pair]:
        """Wait for this rank's launches. Return the peer that one of them waited for in vain."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        try:
            self.kernels.check()
        except CommunicationError:
            return [(self.rank, int(self.kernels.region.status[2]), f"{WAITED} {self.kernels.timeout_s:g} s for")]
        return []

    def _planned(self, algorithm: str) -> Callable[[], None]:
        launches = [
            self.kernels.plan(algorithm, x, self._row, self.fmt, tuning)
            for x, (_, tuning) in zip(self._inputs, self._kinds, strict=True)
        ]

        def calls() -> None:
            for launch, x, result in zip(launches, self._inputs, self._results, strict=True):
                launch(x.data_ptr(), result.data_ptr())

        return calls

    def _seed(self, k: int, rank: int) -> int:
        return (3 * self._n + k) * 1024 + rank

    def _exchange(self, mine: Any) -> Sequence[Any]:
        return consistency.exchange(self.transport, mine, "the self-test")


def _captured(calls: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """Return a graph of the calls, or None if the process does not allow one now."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="thread_local")
            calls()
            graph.capture_end()
    except RuntimeError:
        return None
    return graph


def _place(device: torch.device) -> str:
    """Return the host and the GPU of this rank."""
    if device.type != "cuda":
        return host_name()
    return f"{host_name()} {getattr(torch.cuda.get_device_properties(device), 'uuid', device.index)}"
