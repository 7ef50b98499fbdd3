"""`flashcomm bench all_to_all`: the backend's exchange and flashcomm's by size, for equal and for skewed pieces.

flashcomm's own is measured uncompressed, too. `speedup` is relative to the faster of both uncompressed exchanges.

Each rank sends `size` bytes, its own piece included. Every case is verified before it is timed: on all ranks, bit for
bit, against the backend's exchange or `flashcomm.reference`. Skewed pieces are those of a busy expert: rank 0 receives
three quarters of all rows, and the others share the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm import reference
from flashcomm.bench import timing
from flashcomm.bench.all_reduce import example
from flashcomm.bench.baselines import Implementation
from flashcomm.bench.records import BACKEND
from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError
from flashcomm.ranks.launch import RankContext
from flashcomm.routing.route import Route
from flashcomm.setup.measure import MOST_HOST_CALLS, calls_for, sets_for
from flashcomm.wire.format import UNCOMPRESSED

SPLITS = ("equal", "skewed")


class BackendExchange(Implementation):
    """torch.distributed.all_to_all_single into a new output."""

    path = BACKEND
    same_bits = True  # replays give the bits of eager calls

    def __init__(self, sent: list[int], received: list[int]) -> None:
        self.sent, self.received = sent, received

    def run(self, i: int) -> Tensor:
        x = self.inputs[i]
        out = x.new_empty((sum(self.received), *x.shape[1:]))
        dist.all_to_all_single(out, x, self.received, self.sent)
        return out


class Exchange(BackendExchange):
    """That of a Communicator. Equal pieces are exchanged without sizes, as its kernels want them."""

    def __init__(self, comm: Communicator, sent: list[int], received: list[int]) -> None:
        super().__init__(sent, received)
        self.comm, self.format, self.path = comm, str(comm.format), "all_to_all"
        self.sizes = (received, sent) if len({*sent, *received}) > 1 else (None, None)

    def route(self, shape: tuple[int, int], dtype: torch.dtype) -> Route:
        return self.comm.explain(shape, dtype, op="all_to_all_single", sizes=self.sizes[1]).route

    def run(self, i: int) -> Tensor:
        return self.comm.all_to_all_single(self.inputs[i], *self.sizes)


def splits_of(rows: int, world_size: int, kind: str) -> list[int]:
    """Return the rows that a rank sends to each rank."""
    sizes = [rows // world_size] * world_size
    if kind == "skewed":
        sizes = [rows // 4 // (world_size - 1)] * world_size
    sizes[0] = rows - sum(sizes[1:])
    return sizes


def all_to_all(
    ctx: RankContext,
    formats: Sequence[str],
    sizes: Sequence[int],
    row: int,
    dtype: torch.dtype,
    turns: int,
    modes: Sequence[str],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Verify and time all-to-alls by size, format and kind of pieces. Collective.

    Args:
        ctx: This rank. It emits progress as (what, done, total).
        formats: Wire formats. Uncompressed exchanges are always measured.
        sizes: Bytes that each rank sends, rounded down to rows.
        row: Values per row.
        dtype: The dtype of the messages.
        turns: Samples of each case.
        modes: Some of `timing.MODES`.
        settings: Arguments of the Communicators.

    Returns:
        A row for each size, kind of pieces, mode and case.

    Raises:
        FlashcommError: On every rank, if a result is wrong.
    """
    device, n = ctx.device.type, ctx.world_size
    names = dict.fromkeys((UNCOMPRESSED, *formats))
    comms = [Communicator(None, f, device=device, **settings) for f in names]
    rows: list[dict[str, Any]] = []
    for done, size in enumerate(sizes):
        shape = (max(n, size // dtype.itemsize // row), row)
        n_sets = sets_for(size, ctx.device)
        inputs = [example(shape, dtype, i, ctx.rank).to(ctx.device) for i in range(n_sets)]
        everyone = [example(shape, dtype, 0, rank).to(ctx.device) for rank in range(n)]
        for kind in SPLITS:
            sent = splits_of(shape[0], n, kind)
            received = [sent[ctx.rank]] * n
            cases: list[BackendExchange] = [BackendExchange(sent, received)]
            cases += [Exchange(comm, sent, received) for comm in comms]
            errors = []
            for case in cases:
                ctx.emit((f"{size} {kind} {case.format}", done, len(sizes)))
                case.load(inputs)
                errors.append(_verify(ctx, case, everyone))
            most = calls_for(size, n_sets) if device == "cuda" else MOST_HOST_CALLS
            timings = timing.measure(ctx, cases, modes, n_sets, most, turns)
            for mode in modes:
                backend, ours = (timings[i].seconds.get(mode) for i in (0, 1))  # both uncompressed
                best = min(filter(None, (backend, ours)), default=None)
                for case, error, taken in zip(cases, errors, timings, strict=True):
                    if mode in taken.seconds:
                        columns = _row(case, taken.seconds[mode], shape, dtype, error)
                        columns["speedup"] = round(best / taken.seconds[mode], 3) if best else None
                        columns["over_backend"] = round(backend / taken.seconds[mode], 3) if backend else None
                        rows.append({"split": kind, "mode": mode, "world": n, **columns})
    return rows


def _verify(ctx: RankContext, case: BackendExchange, everyone: Sequence[Tensor]) -> float:
    """Compare a case with the reference. Return its relative error over all ranks.

    Raises:
        FlashcommError: On every rank, if the result is wrong on any.
    """
    got, splits = case.run(0), [case.sent] * ctx.world_size
    exact = torch.cat([x.split_with_sizes(case.sent)[ctx.rank] for x in everyone])
    want = exact
    if isinstance(case, Exchange):
        want = reference.all_to_all_single(everyone, case.comm.format, splits)[ctx.rank]
    off = (got.double() - exact.double()).square().sum()
    found = torch.stack([(got != want).sum().double(), off, exact.double().square().sum()])
    dist.all_reduce(found)
    wrong, off_all, exact_all = found.tolist()
    if wrong:
        raise FlashcommError(f"{case.format} by {case.path}: {int(wrong)} values differ from the reference")
    return math.sqrt(off_all / exact_all)


def _row(
    case: BackendExchange, seconds: float, shape: tuple[int, int], dtype: torch.dtype, error: float
) -> dict[str, Any]:
    """Return the columns of one case: bytes, microseconds, and GB/s of uncompressed bytes, as in nccl-tests."""
    size, n = math.prod(shape) * dtype.itemsize, len(case.sent)
    sent = size - min(case.sent) * shape[1] * dtype.itemsize
    transport = ""
    if isinstance(case, Exchange):
        route = case.route(shape, dtype)
        sent, transport = route.wire_bytes, route.transport
    algbw = size / seconds / 1e9
    return {
        "op": "all_to_all",
        "size": size,
        "type": str(dtype).removeprefix("torch."),
        "format": case.format,
        "path": case.path,
        "transport": transport,
        "time_us": round(seconds * 1e6, 1),
        "algbw": float(f"{algbw:.4g}"),
        "busbw": float(f"{algbw * (n - 1) / n:.4g}"),
        "wire_bytes": sent,
        "error": float(f"{error:.3g}"),
    }
