"""`flashcomm bench all_reduce`: nccl-tests columns, wire bytes, error, and speed-up over the best lossless path.

Every case is verified before it is timed: rank 0 compares with `flashcomm.reference` bit for bit (lossless backends:
with the error bound of their own summation), and all ranks compare with each other. Cases of a size take turns, each
turn starts together and counts the slowest rank; a row gives the median of the turns. Two sets of inputs alternate.

The baseline is the fastest of: the backend's all-reduce, and our lossless one-shot and two-shot.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm import reference
from flashcomm.cli.launch import RankContext
from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError
from flashcomm.wire.format import WireFormat

LOSSLESS_PATHS = ("native", "one_shot", "two_shot")
N_INPUTS = 2


@dataclass
class Case:
    """A way to reduce one message: the Communicator that does it, and what it took."""

    format: str
    path: str
    comm: Communicator
    wire_bytes: int
    error: float = 0.0
    seconds: float = 0.0


def all_reduce(
    ctx: RankContext,
    formats: Sequence[str],
    sizes: Sequence[int],
    row: int,
    dtype: torch.dtype,
    turns: int,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """On every rank: a row per size and format, emitted as it is ready and returned in the end. Sizes are bytes."""
    device = ctx.device.type
    lossless = {
        path: Communicator(None, "bf16", device=device, **{**settings, "algorithm": path, "check": False})
        for path in LOSSLESS_PATHS
        if ctx.world > 1
    }
    coded = {str(WireFormat.parse(f)): Communicator(None, f, device=device, **settings) for f in formats if f != "bf16"}
    rows: list[dict[str, Any]] = []
    for size in sizes:
        count = size // dtype.itemsize
        shape = (count // row, row) if count % row == 0 and count > row else (count,)
        inputs = [[_values(shape, dtype, i, rank).to(ctx.device) for rank in range(ctx.world)] for i in range(N_INPUTS)]
        cases = [_case(path, "bf16", comm, shape, dtype) for path, comm in lossless.items()]
        cases += [_case(None, name, comm, shape, dtype) for name, comm in coded.items()]
        for case in cases:
            ctx.emit({"size": size, "format": case.format, "path": case.path})
            _verify(ctx, case, inputs)
        _time(ctx, cases, [x[ctx.rank] for x in inputs], turns)
        baseline = min((c for c in cases if c.format == "bf16"), key=lambda c: c.seconds)
        for case in [baseline, *(c for c in cases if c.format != "bf16")]:
            rows.append(_row(case, baseline, size, count, dtype, ctx.world))
            ctx.emit(rows[-1])
    return rows


def _case(path: str | None, fmt: str, comm: Communicator, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    route = comm.explain(shape, dtype).route
    return Case(fmt, path or route.algorithm, comm, route.wire_bytes)


def _values(shape: tuple[int, ...], dtype: torch.dtype, index: int, rank: int) -> Tensor:
    """Normal values with rows of different size, the same on every rank for the same index and rank."""
    generator = torch.Generator().manual_seed(1000 * index + rank)
    values = torch.randn(shape, generator=generator)
    if len(shape) == 2:
        values *= torch.rand((shape[0], 1), generator=generator) * 4 + 0.1
    return values.to(dtype)


def _verify(ctx: RankContext, case: Case, inputs: list[list[Tensor]]) -> None:
    """Set the case's error; raise FlashcommError on every rank where results are wrong or differ between ranks."""
    fmt = case.comm.format
    for tensors in inputs:
        got = case.comm.all_reduce(tensors[ctx.rank])
        wrong = torch.zeros(1, dtype=torch.int64, device=ctx.device)
        if ctx.rank == 0:
            exact = torch.stack([t.double() for t in tensors]).sum(0)
            if case.path == "native":  # W-1 additions in the backend's order, each rounded to the tensor's dtype
                scale = torch.stack([t.double().abs() for t in tensors]).sum(0)
                wrong += int(((got.double() - exact).abs() > ctx.world * torch.finfo(got.dtype).eps * scale).sum())
            else:
                want = (reference.two_shot if case.path == "two_shot" else reference.one_shot)(tensors, fmt)
                wrong += int((got != want).sum())
            case.error = float((got.double() - exact).norm() / exact.norm())
        first = got.clone()
        dist.broadcast(first, 0)
        wrong += int((got.view(torch.uint8) != first.view(torch.uint8)).sum())
        dist.all_reduce(wrong)
        if wrong.item():
            wrong_of = f"{wrong.item()} of {got.numel()} values"
            raise FlashcommError(f"{case.format} by {case.path}: {wrong_of} differ from the reference or between ranks")


def _time(ctx: RankContext, cases: list[Case], inputs: list[Tensor], turns: int) -> None:
    """Set the seconds of each case: per turn the slowest rank, of the turns the median."""
    synchronise: Callable[[], None] = torch.cuda.synchronize if ctx.device.type == "cuda" else (lambda: None)
    taken = torch.zeros(turns, len(cases), dtype=torch.float64)
    for turn in range(-1, turns):  # turn -1 warms up
        for c, case in enumerate(cases):
            x = inputs[turn % len(inputs)]
            repeats = 1 if turn < 0 else max(1, min(50, int(0.01 / max(1e-5, taken[0, c].item() or 1))))
            agreed = torch.tensor([repeats], device=ctx.device)
            dist.broadcast(agreed, 0)  # counts must not differ between ranks
            dist.barrier()
            synchronise()
            begin = time.perf_counter()
            for _ in range(int(agreed.item())):
                case.comm.all_reduce(x)
            synchronise()
            if turn >= 0:
                taken[turn, c] = (time.perf_counter() - begin) / int(agreed.item())
    slowest = taken.to(ctx.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    for case, column in zip(cases, slowest.cpu().T.tolist(), strict=True):
        case.seconds = statistics.median(column)


def _row(case: Case, baseline: Case, size: int, count: int, dtype: torch.dtype, world: int) -> dict[str, Any]:
    """nccl-tests columns: size in bytes, count, time in us, algbw and busbw in GB/s of uncompressed bytes."""
    algbw = size / case.seconds / 1e9
    return {
        "size": size,
        "count": count,
        "type": str(dtype).removeprefix("torch."),
        "redop": "sum",
        "format": case.format,
        "world": world,
        "path": case.path,
        "time_us": round(case.seconds * 1e6, 1),
        "algbw": float(f"{algbw:.4g}"),
        "busbw": float(f"{algbw * 2 * (world - 1) / world:.4g}"),
        "wire_bytes": case.wire_bytes,
        "error": float(f"{case.error:.3g}"),
        "snr_db": round(-20 * math.log10(case.error), 1) if case.error else None,
        "speedup": round(baseline.seconds / case.seconds, 3),
    }


def sizes_between(begin: int, end: int, factor: int) -> list[int]:
    """begin, begin*factor, ... up to end, in bytes."""
    out = []
    while begin <= end:
        out.append(begin)
        begin *= factor
    return out
