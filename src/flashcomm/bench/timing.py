"""The time of an all-reduce: ranks start together, the slowest rank counts, and the median of the turns is given.

    eager    N calls in sequence. On GPUs between two CUDA events: a sleeping kernel before them keeps the queue full,
             so that launch times are not included. They are measured separately. On CPUs by the host's clock.
    graph    N calls in one CUDA graph, with CUDA events around one replay.

Implementations take turns, and each turn starts with fresh inputs. On GPUs an all-reduce of one value, after the sleep
and before the first event, makes ranks start within microseconds of each other. Inputs rotate over up to 16 sets, which
together exceed three times the L2 cache if possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.bench.baselines import SMALL, Implementation, first_line, first_reason
from flashcomm.errors import FlashcommError
from flashcomm.ranks.launch import RankContext
from flashcomm.setup.measure import device_seconds

MODES = ("eager", "graph")


@dataclass
class Timing:
    """The times of an implementation.

    Attributes:
        seconds: Seconds per call, by mode.
        host_s: On GPUs, the host's seconds per eager call.
        no_graph: Why there is no graph; None if there is one.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    host_s: float | None = None
    no_graph: str | None = None


def measure(
    ctx: RankContext, impls: Sequence[Implementation], modes: Sequence[str], n_sets: int, n_calls: int, turns: int
) -> list[Timing]:
    """Time implementations that have been loaded and have run once. Collective.

    Args:
        ctx: This rank.
        impls: The implementations.
        modes: "eager", "graph" or both. On CPUs only eager is measured.
        n_sets: Number of sets of inputs that were loaded.
        n_calls: The most calls per sample. On CPUs it is as many as run in 10 ms.
        turns: Samples of each implementation.

    Returns:
        A Timing for each, equal on all ranks.

    Raises:
        FlashcommError: On every rank, if replays give other bits than eager calls though they must not.
    """
    if ctx.device.type == "cuda":
        return by_events(ctx, impls, modes, n_sets, n_calls, turns)
    slowest = _slowest(ctx, _by_host_clock(impls, n_sets, n_calls, turns))
    return [Timing({"eager": seconds}) for seconds in slowest]


def by_events(
    ctx: RankContext, impls: Sequence[Implementation], modes: Sequence[str], n_sets: int, n_calls: int, turns: int
) -> list[Timing]:
    """Run `measure` on GPUs. All graphs exist at the same time, each with its own memory for results."""
    timings = [Timing() for _ in impls]
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    for k, impl in enumerate(impls if "graph" in modes else ()):
        graph, timings[k].no_graph = _captured(ctx, impl, n_sets, n_calls)
        if graph is not None:
            graphs[k] = graph
    taken = {name: torch.zeros(turns + 1, len(impls), dtype=torch.float64) for name in (*modes, "host")}
    one_value = torch.zeros(1, device=ctx.device)

    def together() -> None:
        dist.all_reduce(one_value)

    for turn in range(turns + 1):  # the first warms up
        for k, impl in enumerate(impls):
            if "eager" in modes:
                host = taken["host"][turn, k] = _host_seconds(impl, n_sets, n_calls)
                impl.refill(SMALL)
                calls = _calls(impl, n_sets, n_calls)
                taken["eager"][turn, k] = device_seconds(calls, 2 * float(host), together) / n_calls
            if k in graphs:
                impl.refill(SMALL)
                taken["graph"][turn, k] = device_seconds(graphs[k].replay, 1e-3, together) / n_calls
    for name, seconds in taken.items():
        for k, (timing, value) in enumerate(zip(timings, _slowest(ctx, seconds[1:]), strict=True)):
            if name == "host":
                timing.host_s = value / n_calls if "eager" in modes else None
            elif name == "eager" or k in graphs:
                timing.seconds[name] = value
    return timings


def _calls(impl: Implementation, n_sets: int, n_calls: int) -> Callable[[], None]:
    def calls() -> None:
        for i in range(n_calls):
            impl.run(i % n_sets)

    return calls


def _host_seconds(impl: Implementation, n_sets: int, n_calls: int) -> float:
    """Return the seconds that the host takes to enqueue n_calls. The GPU is idle before, and is not waited for."""
    impl.refill(SMALL)
    dist.barrier()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    _calls(impl, n_sets, n_calls)()
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return seconds


def _captured(
    ctx: RankContext, impl: Implementation, n_sets: int, n_calls: int
) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
    """Capture a graph of n_calls and verify its last result. Return it, or why there is none; equal on all ranks."""
    graph, problem = torch.cuda.CUDAGraph(), None
    try:
        # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
        with impl.capture(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for k in range(n_calls):
                last = impl.run(k % n_sets)
    except RuntimeError as error:  # left out, and the reason reported
        problem = first_line(error)
    if (problem := first_reason(problem)) is not None:
        return None, problem
    i = (n_calls - 1) % n_sets
    times = 1 + (n_calls - 1) // n_sets if impl.in_place else 1
    impl.refill(SMALL)
    once = impl.run(i).clone()
    impl.refill(SMALL)
    dist.barrier()
    graph.replay()
    torch.cuda.synchronize()
    if impl.in_place or not impl.same_bits:
        # The first sum is equal on all ranks, and each further one multiplies it by the number of ranks.
        want = once.double() * float(ctx.world_size) ** (times - 1)
        right = bool((last.double() - want).norm() <= 0.05 * want.norm())
    else:
        right = torch.equal(last, once)
    wrong = first_reason(None if right else "a replay gives other values than an eager call")
    if wrong and impl.same_bits:
        raise FlashcommError(f"{impl.format} by {impl.path}: {wrong}")
    return (None, wrong) if wrong else (graph, None)


def _by_host_clock(impls: Sequence[Implementation], n_sets: int, most: int, turns: int) -> Tensor:
    """Return the seconds per call on this rank: (turns, implementations)."""
    taken = torch.zeros(turns, len(impls), dtype=torch.float64)
    for turn in range(-1, turns):  # turn -1 warms up
        for k, impl in enumerate(impls):
            n_calls = 1 if turn < 1 else max(1, min(most, int(0.01 / max(1e-5, taken[0, k].item()))))
            count = torch.tensor([n_calls])
            dist.broadcast(count, 0)  # counts must be equal on all ranks
            n_calls = int(count.item())
            calls = _calls(impl, n_sets, n_calls)
            impl.refill(SMALL)
            dist.barrier()
            begin = time.perf_counter()
            calls()
            if turn >= 0:
                taken[turn, k] = (time.perf_counter() - begin) / n_calls
    return taken


def _slowest(ctx: RankContext, taken: Tensor) -> list[float]:
    """Return, for each column of `taken` (turns, implementations), the median of the slowest ranks. Collective."""
    slowest = taken.to(ctx.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return [float(v) for v in slowest.cpu().quantile(0.5, dim=0)]
