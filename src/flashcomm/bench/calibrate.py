"""`flashcomm calibrate`: measure this machine once, so that `auto` decides by its times instead of by rules of thumb.

Per size: the backend's all-reduce, and one-shot and two-shot of the lossless and of some coded formats, in CUDA graphs
on GPUs. Nothing is verified here: that is for tests and for `bench`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashcomm.bench import timing
from flashcomm.bench.all_reduce import Ours, example
from flashcomm.bench.baselines import Native, Way
from flashcomm.communicator import Communicator
from flashcomm.ranks.launch import RankContext
from flashcomm.routing import timings
from flashcomm.setup import discovery

FORMATS = ("int8", "int6-had/int7-had", "int4-had", "int4")


def measure(
    ctx: RankContext, formats: Sequence[str], sizes: Sequence[int], row: int, turns: int, source: str
) -> dict[str, Any]:
    """On every rank: the table as JSON holds it, with the machine and transport it is for. Sizes are bytes of bf16."""
    device, dtype = ctx.device.type, torch.bfloat16
    comms = {
        f"{fmt} {algorithm}": Communicator(None, fmt, device=device, algorithm=algorithm, check=False)
        for algorithm in ("one_shot", "two_shot")
        for fmt in ("bf16", *formats)
    }
    us: dict[str, list[float]] = {"backend": [], **{name: [] for name in comms}}
    mode = "graph" if device == "cuda" else "eager"
    for size in sizes:
        ctx.emit(size)
        count = size // dtype.itemsize
        shape = (count // row, row) if count % row == 0 and count > row else (count,)
        n_sets = timing.sets_for(size, ctx.device)
        inputs = [example(shape, dtype, i, ctx.rank).to(ctx.device) for i in range(n_sets)]
        ways: list[Way] = [Native(), *(Ours(comm, comm.explain(shape, dtype).route) for comm in comms.values())]
        for way in ways:
            way.load(inputs)
            way.refill(2.0**-8)
            way.run(0)
        calls = timing.calls_for(size, n_sets) if device == "cuda" else 50
        taken = timing.measure(ctx, ways, (mode,), n_sets, min(calls, 60), turns)
        for name, timed in zip(us, taken, strict=True):
            us[name].append(round(timed.seconds.get(mode, timed.seconds.get("eager", 0.0)) * 1e6, 2))
    machine = next(iter(comms.values())).machine.transport
    for comm in comms.values():
        comm.close()
    table = {"source": source, "sizes": list(sizes), "us": us}
    timings.from_dict(table)  # what cannot be read is not written
    return {"table": table, "machine": discovery.machine_name(ctx.device), "transport": machine}


def fastest(table: dict[str, Any]) -> list[dict[str, Any]]:
    """For the terminal: per size the faster way of each format, and what it took in us."""
    rows = []
    for i, size in enumerate(table["sizes"]):
        best: dict[str, Any] = {"size": size}
        for way, times in table["us"].items():
            name, _, algorithm = way.partition(" ")
            said = f"{times[i]} {algorithm}".strip()
            if name not in best or times[i] < float(str(best[name]).split()[0]):
                best[name] = said
        rows.append(best)
    return rows
