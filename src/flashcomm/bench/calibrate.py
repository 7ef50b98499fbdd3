"""`flashcomm calibrate`: measures this machine once, so that `auto` uses its times instead of rules of thumb.

For each size it measures the backend's all-reduce, and one-shot and two-shot, uncompressed and in some low-bit formats.
On GPUs it measures CUDA graphs. It does not verify results, which tests and `bench` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashcomm.bench import timing
from flashcomm.bench.all_reduce import HOST_CALLS, Ours, example, shape_of
from flashcomm.bench.baselines import SMALL, Backend, Implementation
from flashcomm.bench.records import BACKEND
from flashcomm.communicator import Communicator
from flashcomm.ranks.launch import RankContext
from flashcomm.routing import timings
from flashcomm.setup import discovery
from flashcomm.wire.format import UNCOMPRESSED

FORMATS = ("int8", "int6-had/int7-had", "int4-had", "int4")


def measure(
    ctx: RankContext, formats: Sequence[str], sizes: Sequence[int], row: int, turns: int, source: str
) -> dict[str, Any]:
    """Time all-reduces of bfloat16 by size, format and algorithm. Collective.

    Args:
        ctx: This rank. It emits progress as (what, done, total).
        formats: Low-bit formats. Uncompressed routes are always measured.
        sizes: Message sizes in bytes.
        row: Values per row. Messages that are not divisible by it are flat.
        turns: Samples of each case.
        source: The machine and date, to save with the timings.

    Returns:
        `table`, the timings as JSON, and the `machine` and `transport` that they are for.
    """
    device, dtype = ctx.device.type, torch.bfloat16
    comms = {
        f"{fmt} {algorithm}": Communicator(None, fmt, device=device, algorithm=algorithm, check=False)
        for algorithm in ("one_shot", "two_shot")
        for fmt in (UNCOMPRESSED, *formats)
    }
    us: dict[str, list[float]] = {BACKEND: [], **{name: [] for name in comms}}
    mode = "graph" if device == "cuda" else "eager"
    for done, size in enumerate(sizes):
        ctx.emit((f"measuring {size} bytes", done, len(sizes)))
        shape, n_sets = shape_of(size, row, dtype), timing.sets_for(size, ctx.device)
        inputs = [example(shape, dtype, i, ctx.rank).to(ctx.device) for i in range(n_sets)]
        ours = [Ours(comm, comm.explain(shape, dtype).route) for comm in comms.values()]
        impls: list[Implementation] = [Backend(), *ours]
        for impl in impls:
            impl.load(inputs)
            impl.refill(SMALL)
            impl.run(0)
        calls = timing.calls_for(size, n_sets) if device == "cuda" else HOST_CALLS
        for times, timed in zip(us.values(), timing.measure(ctx, impls, (mode,), n_sets, calls, turns), strict=True):
            times.append(round(timed.seconds.get(mode, timed.seconds.get("eager", 0.0)) * 1e6, 2))
    transport = next(iter(comms.values())).machine.transport
    for comm in comms.values():
        comm.close()
    table = {"source": source, "sizes": list(sizes), "us": us}
    timings.from_dict(table)  # raises if they could not be read again
    return {"table": table, "machine": discovery.machine_name(ctx.device), "transport": transport}


def fastest(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows by size with the time in us of each format's faster algorithm, and its name."""
    rows = []
    for i, size in enumerate(table["sizes"]):
        best: dict[str, tuple[float, str]] = {}
        for name, times in table["us"].items():
            fmt, _, algorithm = name.partition(" ")
            best[fmt] = min(best.get(fmt, (float("inf"), "")), (times[i], algorithm))
        rows.append({"size": size, **{fmt: f"{us} {algorithm}".strip() for fmt, (us, algorithm) in best.items()}})
    return rows
