"""`flashcomm bench all_reduce`: nccl-tests columns, wire bytes, error, and speed-up over the best uncompressed route.

Every case is verified before it is timed. Rank 0 compares the results of flashcomm with `flashcomm.reference` bit for
bit. It compares uncompressed baselines with the error bound of their summation, and only reports the error of low-bit
baselines. All ranks compare their results with each other. Two sets of inputs are verified; above 64 MB, one. The
reference runs in plain torch on the tensors' device, by blocks of rows, so that its memory does not grow with messages.

The column `path` of a row (`timing` says how each is timed):

    backend, symm ..., vllm custom      uncompressed, see `baselines`
    one_shot, two_shot                  uncompressed, by flashcomm
    one_shot, two_shot with a format    the route of its Communicator under the settings given
    auto with a format                  the route of its Communicator by default, without `min_bytes` and `algorithm`
    flashinfer fp8                      low-bit, by FlashInfer

`speedup` is relative to the fastest uncompressed row of that size and mode, `over_backend` relative to the backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm import reference
from flashcomm.bench import timing
from flashcomm.bench.baselines import Backend, Implementation, available, max_sums_in_place, padded
from flashcomm.bench.records import BACKEND
from flashcomm.bench.timing import Timing
from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError
from flashcomm.ranks.launch import RankContext
from flashcomm.routing.route import Route
from flashcomm.setup.measure import MOST_HOST_CALLS, calls_for, sets_for, shape_of
from flashcomm.wire.format import UNCOMPRESSED

BLOCK_NUMEL = 1 << 24  # values that are verified at a time


class Ours(Implementation):
    """A Communicator, with its route for one shape."""

    same_bits = True

    def __init__(self, comm: Communicator, route: Route, path: str | None = None) -> None:
        self.comm, self.route = comm, route
        self.format, self.path = str(comm.format), path or route.algorithm
        self.transport = route.transport

    def run(self, i: int) -> Tensor:
        return self.comm.all_reduce(self.inputs[i])

    def wire_bytes(self, n_bytes: int, world_size: int) -> int:
        return self.route.wire_bytes

    def expected(self, tensors: Sequence[Tensor]) -> Tensor | None:
        if not self.route.low_bit:
            return None
        return reference.all_reduce(self.route.algorithm, tensors, self.comm.format, self.comm.machine.local_world_size)

    def what_runs(self) -> tuple[str, Route]:
        """Return what determines the time of a call. The format does not, if the backend runs it."""
        return self.format if self.route.low_bit else "", replace(self.route, reason="")


@dataclass
class Case:
    """An implementation, its error (relative root mean square), and its times."""

    impl: Implementation
    notes: list[str]
    error: float = 0.0
    ranks_differ: bool = False
    timing: Timing = field(default_factory=Timing)


@dataclass
class Entry:
    """A row: a case under its own name, or as the choice of `auto`."""

    case: Case
    format: str
    path: str
    note: str = ""


def all_reduce(
    ctx: RankContext,
    formats: Sequence[str],
    sizes: Sequence[int],
    row: int,
    dtype: torch.dtype,
    turns: int,
    modes: Sequence[str],
    settings: dict[str, Any],
    only_auto: bool = False,
) -> dict[str, Any]:
    """Verify and time all-reduces by size and format. Collective.

    Args:
        ctx: This rank. It emits progress as (what, done, total).
        formats: Wire formats. Uncompressed routes are always measured.
        sizes: Message sizes in bytes.
        row: Values per row. Messages that are not divisible by it are flat.
        dtype: The dtype of the messages.
        turns: Samples of each case.
        modes: Some of `timing.MODES`.
        settings: Arguments of the Communicators.
        only_auto: Whether to measure only the backend, and for each format what `auto` takes.

    Returns:
        `rows`, one for each size, mode and case, and `unavailable`, the reason for each path that was not measured.

    Raises:
        FlashcommError: On every rank, if a result is wrong.
    """
    device, low_bit = ctx.device.type, [f for f in formats if f != UNCOMPRESSED]
    n_sets = {size: sets_for(size, ctx.device) for size in sizes}
    pool_numel = max(n_sets[size] * padded(size // dtype.itemsize) for size in sizes)
    baselines: list[Implementation] = [Backend()]
    unavailable: dict[str, str] = {}
    if not only_auto:
        baselines, unavailable = available(ctx, dtype, max(sizes), pool_numel)
    ours = (
        []
        if only_auto
        else [
            Communicator(None, UNCOMPRESSED, device=device, **{**settings, "algorithm": algorithm, "check": False})
            for algorithm in ("one_shot", "two_shot")
        ]
    )
    ours += [] if only_auto else [Communicator(None, f, device=device, **settings) for f in low_bit]
    defaults = {k: v for k, v in settings.items() if k not in ("min_bytes", "algorithm")}
    automatic = [Communicator(None, f, device=device, **defaults) for f in low_bit]
    rows: list[dict[str, Any]] = []
    for done, size in enumerate(sizes):
        shape = shape_of(size, row, dtype)
        inputs = [example(shape, dtype, i, ctx.rank).to(ctx.device) for i in range(n_sets[size])]
        refused = {impl.path: impl.refuses(inputs[0], ctx.world_size) for impl in baselines}
        unavailable |= {path: f"at {size} bytes: it {why}" for path, why in refused.items() if why}
        entries = [_entry(impl) for impl in baselines if not refused[impl.path]]
        entries += [_entry(Ours(comm, comm.explain(shape, dtype).route)) for comm in ours]
        entries += _automatic(entries, automatic, shape, dtype)
        cases = list({id(entry.case): entry.case for entry in entries}.values())
        verified = 1 if size > 64 << 20 else 2
        everyone = [
            [inputs[i], *(example(shape, dtype, i, rank).to(ctx.device) for rank in range(1, ctx.world_size))]
            for i in range(verified if ctx.rank == 0 else 0)
        ]
        for case in cases:
            ctx.emit((f"{size} {case.impl.format} {case.impl.path}", done, len(sizes)))
            case.impl.load(inputs)
            for i in range(verified):
                _verify(ctx, case, i, everyone[i] if ctx.rank == 0 else [])
            if not case.impl.same_bits:
                case.notes.append("ranks differ" if case.ranks_differ else "ranks equal")
        del everyone
        most = calls_for(size, n_sets[size]) if device == "cuda" else MOST_HOST_CALLS
        most = min(most, n_sets[size] * max_sums_in_place(dtype, ctx.world_size))
        timings = timing.measure(ctx, [case.impl for case in cases], modes, n_sets[size], most, turns)
        for case, taken in zip(cases, timings, strict=True):
            case.timing = taken
        failed = [e for e in entries if e.case.timing.no_graph]
        unavailable |= {f"{e.format} by {e.path} in a graph": str(e.case.timing.no_graph) for e in failed}
        for mode in modes:
            rows += _rows([e for e in entries if mode in e.case.timing.seconds], mode, size, dtype, ctx.world_size)
    return {"rows": rows, "unavailable": unavailable}


def _entry(impl: Implementation) -> Entry:
    return Entry(Case(impl, [impl.note]), impl.format, impl.path)


def _automatic(
    entries: Sequence[Entry], comms: Sequence[Communicator], shape: tuple[int, ...], dtype: torch.dtype
) -> list[Entry]:
    """Return an entry for each format's default route: an existing case with that route, or a new one."""
    known = {e.case.impl.what_runs(): e.case for e in entries if isinstance(e.case.impl, Ours)}
    out = []
    for comm in comms:
        impl = Ours(comm, comm.explain(shape, dtype).route, "auto")
        case = known.setdefault(impl.what_runs(), Case(impl, [impl.note]))
        out.append(Entry(case, str(comm.format), "auto", f"takes {impl.route.algorithm}"))
    return out


def example(shape: tuple[int, ...], dtype: torch.dtype, index: int, rank: int) -> Tensor:
    """Return normal values below 32 in rows of different scale. They depend only on index and rank.

    In large messages the rows repeat after `BLOCK_NUMEL` values, because drawing more takes long.
    """
    generator = torch.Generator().manual_seed(1000 * index + rank)
    if len(shape) == 1:
        return torch.randn(shape, generator=generator).to(dtype)
    n_rows = min(shape[0], -(-BLOCK_NUMEL // shape[1]))
    values = torch.randn((n_rows, shape[1]), generator=generator)
    values *= torch.rand((n_rows, 1), generator=generator) * 4 + 0.1
    return values.to(dtype).repeat(-(-shape[0] // n_rows), 1)[: shape[0]]


def _verify(ctx: RankContext, case: Case, i: int, tensors: Sequence[Tensor]) -> None:
    """Verify a case on input set i, and set its error.

    Args:
        ctx: This rank.
        case: The case, loaded.
        i: The input set.
        tensors: Every rank's input, on rank 0 only.

    Raises:
        FlashcommError: On every rank, if results are wrong, or differ between ranks though they must not.
    """
    impl = case.impl
    impl.refill()
    got = impl.run(i)
    found = torch.zeros(2, dtype=torch.int64, device=ctx.device)  # wrong values, bytes that differ from rank 0's
    if ctx.rank == 0:
        error, wrong = _compared(impl, tensors, got)
        case.error = max(case.error, error)
        found[0] = wrong
    first = got.clone()
    dist.broadcast(first, 0)
    found[1] = (got.view(torch.uint8) != first.view(torch.uint8)).sum()
    dist.all_reduce(found)
    wrong, differ = found.tolist()
    if wrong or (differ and impl.same_bits):
        raise FlashcommError(
            f"{impl.format} by {impl.path}: {wrong + differ} of {got.numel()} values differ from the reference or "
            "between ranks"
        )
    case.ranks_differ = case.ranks_differ or bool(differ)


def _compared(impl: Implementation, tensors: Sequence[Tensor], got: Tensor) -> tuple[float, int]:
    """Return the relative error of `got` and the number of wrong values. Works by blocks of rows, to save memory."""
    n_rows = max(1, BLOCK_NUMEL // got.shape[-1]) if got.dim() == 2 else got.numel()
    squares = torch.zeros(2, dtype=torch.float64, device=got.device)
    wrong = 0
    for begin in range(0, got.shape[0], n_rows):
        parts, part = [t[begin : begin + n_rows] for t in tensors], got[begin : begin + n_rows]
        exact = torch.zeros_like(part, dtype=torch.float64)
        scale = torch.zeros_like(exact)
        for t in parts:
            exact += t
            scale += t.abs()
        off = part.double() - exact
        squares += torch.stack([off.square().sum(), exact.square().sum()])
        want = impl.expected(parts)
        if want is not None:
            wrong += int((part != want).sum())
        elif (
            isinstance(impl, Ours) or impl.format == UNCOMPRESSED
        ):  # W-1 additions in some order, each rounded to the dtype
            wrong += int((~(off.abs() <= len(parts) * torch.finfo(part.dtype).eps * scale)).sum())
    return math.sqrt(float(squares[0] / squares[1])), wrong


def _rows(entries: Sequence[Entry], mode: str, size: int, dtype: torch.dtype, world_size: int) -> list[dict[str, Any]]:
    """Return the rows of one size and mode: uncompressed (slowest first), low-bit baselines, auto, flashcomm."""

    def seconds(entry: Entry) -> float:
        return entry.case.timing.seconds[mode]

    uncompressed = sorted((e for e in entries if e.format == UNCOMPRESSED), key=seconds, reverse=True)
    rest = [e for e in entries if e.format != UNCOMPRESSED]
    rest.sort(key=lambda e: 1 if e.path == "auto" else 2 * isinstance(e.case.impl, Ours))
    best = min(map(seconds, uncompressed), default=None)
    backend = min((seconds(e) for e in uncompressed if e.path == BACKEND), default=None)
    rows = []
    for entry in (*uncompressed, *rest):
        row = _row(entry, mode, size, dtype, world_size)
        row["speedup"] = round(best / seconds(entry), 3) if best else None
        row["over_backend"] = round(backend / seconds(entry), 3) if backend else None
        no_graph = entry.case.timing.no_graph
        row["note"] = "; ".join(filter(None, (entry.note, *entry.case.notes, no_graph and f"no graph: {no_graph}")))
        rows.append(row)
    return rows


def _row(entry: Entry, mode: str, size: int, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """Return a row with nccl-tests columns: bytes, microseconds, algbw and busbw in GB/s of uncompressed bytes."""
    case, impl = entry.case, entry.case.impl
    seconds, host_s = case.timing.seconds[mode], case.timing.host_s
    algbw = size / seconds / 1e9
    return {
        "size": size,
        "count": size // dtype.itemsize,
        "type": str(dtype).removeprefix("torch."),
        "redop": "sum",
        "format": entry.format,
        "world": world_size,
        "path": entry.path,
        "mode": mode,
        "transport": impl.transport,
        "time_us": round(seconds * 1e6, 1),
        "host_us": round(host_s * 1e6, 1) if host_s is not None and mode == "eager" else None,
        "algbw": float(f"{algbw:.4g}"),
        "busbw": float(f"{algbw * 2 * (world_size - 1) / world_size:.4g}"),
        "wire_bytes": impl.wire_bytes(size, world_size),
        "error": float(f"{case.error:.3g}"),
        "snr_db": round(-20 * math.log10(case.error), 1) if case.error else None,
    }
