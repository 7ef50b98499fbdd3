"""`flashcomm calibrate`: measures this machine in more detail than creating a Communicator does (`setup.measure`).

For each size it measures the backend's all-reduce, and flashcomm's own, uncompressed and in some low-bit formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flashcomm
from flashcomm.communicator import Communicator
from flashcomm.ranks.launch import RankContext
from flashcomm.routing.timings import Timings, as_dict, from_dict
from flashcomm.setup import discovery, measure
from flashcomm.wire.format import UNCOMPRESSED, WireFormat

FORMATS = ("int8", "int6-had/int7-had", "int4-had", "int4")
LIMIT_S = 3600.0


def calibrate(
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
    with Communicator(None, UNCOMPRESSED, device=ctx.device.type, measure="off") as comm:
        ranks = measure.Ranks(comm.transport, comm.machine, comm._executors)
        fmts = [WireFormat.parse(fmt) for fmt in (UNCOMPRESSED, *formats)]
        kept, us = measure.measured(ranks, fmts, sizes, row, turns, LIMIT_S, lambda *step: ctx.emit(step))
        table = as_dict(Timings(source, kept, us, flashcomm.__version__))
        from_dict(table)  # raises if they could not be read again
        return {"table": table, "machine": discovery.machine_name(ctx.device), "transport": comm.machine.transport}


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
