"""Measuring the times of all-reduces, so that `auto` chooses by them: when a Communicator is created, or on request.

A group of GPUs without timings measures itself once, within `LIMIT_S` besides compiling: the backend's all-reduce and
flashcomm's own, uncompressed and in the format of the Communicator. A Communicator of another format adds that one. All
ranks get the same table, in which the slowest rank counts, and rank 0 stores it (`routing.timings`).

On GPUs the calls of a sample are enqueued behind a sleeping kernel, so that launch times are not included. CUDA graphs
take as long, or up to some us less where our kernels are faster than the backend.
"""

from __future__ import annotations

import datetime
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcomm.collectives.executors import Base
from flashcomm.routing import policy, timings
from flashcomm.routing.route import Executor, Machine, Message, Route
from flashcomm.routing.timings import BACKEND, Timings
from flashcomm.settings import Settings
from flashcomm.setup import consistency
from flashcomm.transports.process_group import ProcessGroupTransport, has_nccl
from flashcomm.wire.format import UNCOMPRESSED, WireFormat

SIZES = tuple(2048 * 4**k for k in range(8))  # message bytes: 2 KB to 32 MB
LIMIT_S = 3.0  # for all samples together
TURNS = 9
ROW = 4096  # values
MOST_SETS = 16
MOST_HOST_CALLS = 50  # per sample on CPUs
CYCLES_PER_S = 2e9  # approximate rate of the cycles that torch.cuda._sleep counts

Report = Callable[[str, int, int], None]  # what is measured, steps done, all steps

log = logging.getLogger("flashcomm")
_measured_anew: set[str] = set()


@dataclass(frozen=True)
class Ranks:
    """The ranks that measure together, and what they can run.

    Attributes:
        transport: The transport among them.
        machine: What they found.
        executors: The executors of that machine.
    """

    transport: ProcessGroupTransport
    machine: Machine
    executors: Mapping[Executor, Base]

    def elapsed(self, begin: float) -> float:
        """Return the seconds since `time.monotonic()` was `begin` on the slowest rank. Collective."""
        seconds: float = max(consistency.exchange(self.transport, time.monotonic() - begin, "measuring times"))
        return seconds

    def start_together(self) -> None:
        """All-reduce one value: no rank gets past it before all ranks have come. On GPUs only the stream waits."""
        self.transport.all_reduce_backend(torch.zeros(1, device=self.transport.device), "measuring times").wait()


def timings_of(ranks: Ranks, settings: Settings, machine_name: str) -> Timings | None:
    """Return the timings of this machine, equal on all ranks; None if there are none. Collective. May measure them.

    Args:
        ranks: The ranks.
        settings: Their settings.
        machine_name: The kind of machine, for the file's name.
    """
    from flashcomm import __version__  # not at the top, because the package imports this module

    transport, fmt = ranks.transport, str(settings.format)
    where = machine_name, transport.world_size, ranks.machine.transport
    automatic = settings.measure == "auto" and transport.device.type == "cuda" and has_nccl(transport.group)
    wanted = transport.world_size > 1 and settings.algorithm == policy.AUTO
    mine: Any = None
    if transport.rank == 0:
        name, found = timings.file_name(*where), None
        if settings.measure != "anew" or name in _measured_anew:
            found = timings.find(*where, __version__)
        measure = found is None or (found.at_setup and not any(key.split()[0] == fmt for key in found.us))
        mine = timings.as_dict(found) if found else None, measure
    known, measure = consistency.exchange(transport, mine, "sharing measured times")[0]
    old = timings.from_dict(known) if known else None
    if not (wanted and measure and (automatic or settings.measure == "anew")):
        return old
    sizes, us = measured(ranks, [WireFormat.parse(UNCOMPRESSED), settings.format], SIZES)
    if not sizes:
        return old
    if old is not None and old.sizes == sizes:
        us = {**old.us, **us}
    source = f"measured at set-up on {transport.world_size} x {machine_name}, torch {torch.__version__}"
    new = Timings(f"{source}, {datetime.date.today().isoformat()}", sizes, us, __version__, at_setup=True)
    if transport.rank == 0:
        _measured_anew.add(timings.file_name(*where))
        path = timings.own_directory() / timings.file_name(*where)
        try:
            timings.save(path, new)
        except OSError as why:
            log.warning("%s cannot be written, so these times are measured at every start: %s", path, why)
    return timings.from_dict(timings.as_dict(new))


def measured(
    ranks: Ranks,
    formats: Sequence[WireFormat],
    sizes: Sequence[int],
    row: int = ROW,
    turns: int = TURNS,
    limit_s: float = LIMIT_S,
    report: Report | None = None,
) -> tuple[tuple[int, ...], dict[str, tuple[float, ...]]]:
    """Time all-reduces of bfloat16 by size, format and algorithm. Collective. Results are not verified.

    Args:
        ranks: The ranks.
        formats: The formats of flashcomm's own all-reduces; the backend's is always measured.
        sizes: Message sizes in bytes, ascending.
        row: Values per row. Messages that are not divisible by it are flat.
        turns: The most samples of each case.
        limit_s: Seconds after which no turn begins. Sizes that would take too long are left out.
        report: Called on each rank before each step.

    Returns:
        The sizes that were measured, and the microseconds for each of them by key of `Timings`; the same on all ranks.
        No sizes if a rank has too little memory.
    """
    transport, sent = ranks.transport, ranks.transport.n_bytes_sent
    report = report or (lambda what, done, total: None)
    problem, buffers = "", None
    try:
        buffers = _Buffers(sizes, transport.device)
    except RuntimeError as why:  # exchanged with all ranks
        problem = str(why).splitlines()[0]
    problems = [p for p in consistency.exchange(transport, problem, "allocating memory to measure times") if p]
    if problems or buffers is None:
        log.warning("times are not measured: %s", problems[0])
        return (), {}
    cases = {size: _cases(ranks, formats, size, row, buffers) for size in sizes}
    for case in [case for of_size in cases.values() for case in of_size]:
        case.prepare()
    for case in cases[sizes[0]]:  # a first call compiles the codec on CPUs, and lets NCCL connect on GPUs
        case.warm_up()
    consistency.exchange(transport, None, "compiling kernels to measure times")
    begin, kept = time.monotonic(), []
    order = [*sizes[::2], *sizes[1::2]]  # so that large messages are measured even if the time is short
    for done, size in enumerate(order):
        report(f"preparing {size} bytes", done, len(sizes) * (turns + 1))
        for case in cases[size]:
            case.warm_up()
        taken = consistency.exchange(transport, [case.n_calls for case in cases[size]], "measuring times")
        for case, n_calls in zip(cases[size], zip(*taken, strict=True), strict=True):
            case.n_calls = min(n_calls)
        kept.append(size)
        if ranks.elapsed(begin) > limit_s / 3:
            break
    kept.sort()
    spent = ranks.elapsed(begin)
    for turn in range(turns):
        for done, size in enumerate(kept):
            report(f"measuring {size} bytes", len(sizes) + turn * len(kept) + done, len(sizes) * (turns + 1))
            for case in cases[size]:
                case.sample()
        before, spent = spent, ranks.elapsed(begin)
        if spent + (spent - before) > limit_s:
            break
    mine = [[case.samples for case in cases[size]] for size in kept]
    everyone = consistency.exchange(transport, mine, "comparing times")
    us: dict[str, list[float]] = {case.key: [] for case in cases[kept[0]]}
    for i in range(len(kept)):
        for k, times in enumerate(us.values()):
            slowest = [max(of_turn) for of_turn in zip(*(rank[i][k] for rank in everyone), strict=True)]
            times.append(max(0.01, round(1e6 * statistics.median(slowest), 2)))
    transport.n_bytes_sent = sent  # the counter does not include measuring
    return tuple(kept), {key: tuple(times) for key, times in us.items()}


def sets_for(n_bytes: int, device: torch.device) -> int:
    """Return the number of sets of inputs, of n_bytes each: up to 16, which exceed three times the L2 cache."""
    if device.type != "cuda":
        return 2
    return max(2, min(MOST_SETS, 3 * torch.cuda.get_device_properties(device).L2_cache_size // n_bytes + 1))


def calls_for(n_bytes: int, n_sets: int) -> int:
    """Return the number of calls per sample on a GPU: 10, or fewer above 64 MB, but at least the number of sets."""
    return max(n_sets, min(10, (640 << 20) // n_bytes))


def shape_of(n_bytes: int, row: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of a message of n_bytes: (rows, row) if it is divisible by row, else flat."""
    count = n_bytes // dtype.itemsize
    return (count // row, row) if count % row == 0 and count > row else (count,)


def device_seconds(
    work: Callable[[], object], lead_s: float, start_together: Callable[[], object] | None = None
) -> float:
    """Return the seconds between CUDA events around the kernels that `work` launches on the current stream.

    Args:
        work: Launches kernels.
        lead_s: Seconds that the GPU sleeps first, at most 0.2, so that the host can fill the queue.
        start_together: Enqueues an all-reduce of one value. Ranks start within microseconds after it. None: only this
            rank runs.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    if start_together is not None:
        start_together()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(0.2, lead_s + 2e-4) * CYCLES_PER_S))  # type: ignore[no-untyped-call]
    if start_together is not None:
        start_together()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3  # from ms


class _Buffers:
    """Inputs for messages of all sizes, a copy that the backend reduces in place, and space for a result."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        largest = max(sizes)
        self.n_sets = {size: max(2, min(sets_for(size, device), 2 * largest // size)) for size in sizes}
        most = max(n * -(-size // 16) * 8 for size, n in self.n_sets.items())
        own = torch.Generator(device).manual_seed(0)  # leaves the program's random numbers as they are
        self.inputs = torch.randn(most, dtype=torch.bfloat16, device=device, generator=own) * 2.0**-8
        self.sums, self.result = self.inputs.clone(), torch.empty(most, dtype=torch.bfloat16, device=device)

    def of(self, pool: Tensor, size: int, row: int) -> list[Tensor]:
        """Return the sets of messages of this size in a pool, each aligned to 16 bytes."""
        shape, step = shape_of(size, row, torch.bfloat16), -(-size // 16) * 8
        return [pool[i * step :][: size // 2].view(shape) for i in range(self.n_sets[size])]


class _Case:
    """The backend's all-reduce, or a route of ours, for messages of one size.

    Attributes:
        n_calls: Calls per sample.
        samples: Seconds per call of each sample.
    """

    def __init__(
        self, ranks: Ranks, key: str, route: Route | None, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        self.ranks, self.key, self.route, self.inputs, self.outputs = ranks, key, route, inputs, outputs
        self.device, self._lead_s = inputs[0].device, 0.0
        self.n_calls, self.samples = calls_for(inputs[0].nbytes, len(inputs)), list[float]()
        self._launch: Callable[[int, int], None] | None = None

    def prepare(self) -> None:
        """Compile what a call needs."""
        if self.route is not None:
            self.ranks.executors[self.route.executor].prepare(self.route, self.inputs[0])

    def warm_up(self) -> None:
        """Run once, then find out how long the host takes."""
        self._run(0)
        self._synchronize()
        self._refill()
        self.ranks.start_together()
        self._synchronize()
        begin = time.perf_counter()
        n_calls = self.n_calls if self.device.type == "cuda" else 1
        for i in range(n_calls):
            self._run(i)
        host_s = time.perf_counter() - begin
        self._synchronize()
        self._lead_s = 2 * host_s
        if self.device.type != "cuda":
            self.n_calls = max(1, min(MOST_HOST_CALLS, int(0.01 / max(1e-5, host_s))))

    def sample(self) -> None:
        """Measure one sample."""
        self._refill()
        if self.device.type == "cuda":
            seconds = device_seconds(self._calls, self._lead_s, self.ranks.start_together)
        else:
            self.ranks.start_together()
            begin = time.perf_counter()
            self._calls()
            seconds = time.perf_counter() - begin
        self.samples.append(seconds / self.n_calls)

    def _calls(self) -> None:
        for i in range(self.n_calls):
            self._run(i)

    def _run(self, i: int) -> None:
        x, out = self.inputs[i % len(self.inputs)], self.outputs[i % len(self.outputs)]
        if self.route is None:
            self.ranks.transport.all_reduce_backend(out, "measuring times").wait()
        elif self._launch is not None:
            self._launch(x.data_ptr(), out.data_ptr())
        else:
            self._launch = self.ranks.executors[self.route.executor].run(self.route, x, out)

    def _refill(self) -> None:
        if self.route is None:  # so that repeated sums in place stay finite
            for x, out in zip(self.inputs, self.outputs, strict=True):
                out.copy_(x)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _cases(ranks: Ranks, formats: Sequence[WireFormat], size: int, row: int, buffers: _Buffers) -> list[_Case]:
    """Return the cases of one size. Over two ranks, two-shot sends as much as one-shot, in two hops: it is left out."""
    inputs = buffers.of(buffers.inputs, size, row)
    world_size, device = ranks.transport.world_size, ranks.transport.device
    message = Message.of("all_reduce", inputs[0].shape, torch.bfloat16, (world_size, device.type, 0))
    cases = [_Case(ranks, BACKEND, None, inputs, buffers.of(buffers.sums, size, row))]
    machine = replace(ranks.machine, timings=None)
    for algorithm in ("one_shot", "two_shot")[: min(2, world_size - 1)]:
        for fmt in dict.fromkeys(formats):
            route = policy.choose(message, fmt, algorithm, 0, machine).route
            result = buffers.of(buffers.result, size, row)[:1]
            cases.append(_Case(ranks, f"{fmt} {algorithm}", route, inputs, result))
    return cases
