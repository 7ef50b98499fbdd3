"""`flashcomm bench all_reduce`: nccl-tests columns, wire bytes, error, and speed-up over the best lossless path.

Every case is verified before it is timed: rank 0 compares with `flashcomm.reference` bit for bit (lossless ways of
others: with the error bound of their own summation; low-bit ones of others: the error is only told), and all ranks
compare with each other. Two sets of inputs are verified, above 64 MB one. The reference, in plain torch on the tensors'
device, takes blocks of rows, so that its memory does not grow with the message; its time does, once per format.

Cases, for how each is timed see `timing`:

    native, symm ..., vllm custom       lossless, see `peers`
    one_shot, two_shot                  our own lossless ones
    a format by one_shot or two_shot    the way its Communicator takes under the settings given
    a format by auto                    the way it takes by default: `min_bytes` and `algorithm` are not set
    fp8 by flashinfer                   low-bit, by others

`speedup` is over the fastest lossless row of that size and mode, `over_native` over the backend's.
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
from flashcomm.bench.baselines import Way, growth, padded, peers
from flashcomm.bench.timing import Timing
from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError
from flashcomm.ranks.launch import RankContext
from flashcomm.routing.route import Route

BLOCK_NUMEL = 1 << 24  # values that are verified at a time
HOST_CALLS = 50  # calls in a sample at most, on CPUs


class Ours(Way):
    """A Communicator, by the route it takes for one shape."""

    equal = True

    def __init__(self, comm: Communicator, route: Route, path: str | None = None) -> None:
        self.comm, self.route = comm, route
        self.format, self.path = str(comm.format), path or route.algorithm
        self.transport = str(getattr(route, "transport", ""))

    def run(self, i: int) -> Tensor:
        return self.comm.all_reduce(self.inputs[i])

    def wire_bytes(self, n_bytes: int, world_size: int) -> int:
        return self.route.wire_bytes

    def expected(self, tensors: Sequence[Tensor]) -> Tensor | None:
        if not self.route.low_bit:
            return None
        return reference.all_reduce(self.route.algorithm, tensors, self.comm.format, self.comm.machine.local_world_size)


@dataclass
class Case:
    """A way, how wrong it is (relative, root mean square), and what it took."""

    way: Way
    notes: list[str]
    error: float = 0.0
    unlike: bool = False  # ranks had different bits
    timing: Timing = field(default_factory=Timing)


@dataclass
class Entry:
    """What becomes a row: a case under its own name, or what `auto` does."""

    case: Case
    format: str
    path: str
    note: str


def all_reduce(
    ctx: RankContext,
    formats: Sequence[str],
    sizes: Sequence[int],
    row: int,
    dtype: torch.dtype,
    turns: int,
    modes: Sequence[str],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """On every rank: `rows`, one per size, mode and case, and `unavailable`, why a path has none. Sizes are bytes.

    What is being verified is emitted as it goes. Raises FlashcommError on every rank where a result is wrong.
    """
    device, coded = ctx.device.type, [f for f in formats if f != "bf16"]
    n_sets = {size: timing.sets_for(size, ctx.device) for size in sizes}
    pool_numel = max(n_sets[size] * padded(size // dtype.itemsize) for size in sizes)
    others, unavailable = peers(ctx, dtype, max(sizes), pool_numel)
    ours = [
        Communicator(None, "bf16", device=device, **{**settings, "algorithm": algorithm, "check": False})
        for algorithm in ("one_shot", "two_shot")
    ] + [Communicator(None, f, device=device, **settings) for f in coded]
    defaults = {k: v for k, v in settings.items() if k not in ("min_bytes", "algorithm")}
    automatic = [Communicator(None, f, device=device, **defaults) for f in coded]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        count = size // dtype.itemsize
        shape = (count // row, row) if count % row == 0 and count > row else (count,)
        inputs = [example(shape, dtype, i, ctx.rank).to(ctx.device) for i in range(n_sets[size])]
        refused = {way.path: way.refuses(inputs[0], ctx.world_size) for way in others}
        unavailable |= {path: f"at {size} bytes: it {why}" for path, why in refused.items() if why}
        entries = [_entry(way) for way in others if not refused[way.path]]
        entries += [_entry(Ours(comm, comm.explain(shape, dtype).route)) for comm in ours]
        entries += _automatic(entries, automatic, shape, dtype)
        cases = list({id(entry.case): entry.case for entry in entries}.values())
        verified = 1 if size > 64 << 20 else 2
        everyone = [
            [
                inputs[i] if rank == 0 else example(shape, dtype, i, rank).to(ctx.device)
                for rank in range(ctx.world_size)
            ]
            for i in range(verified if ctx.rank == 0 else 0)
        ]
        for case in cases:
            ctx.emit({"size": size, "format": case.way.format, "path": case.way.path})
            case.way.load(inputs)
            for i in range(verified):
                _verify(ctx, case, i, everyone[i] if ctx.rank == 0 else [])
            if not case.way.equal:
                case.notes.append("ranks differ" if case.unlike else "ranks equal")
        del everyone
        most = timing.calls_for(size, n_sets[size]) if device == "cuda" else HOST_CALLS
        most = min(most, n_sets[size] * growth(dtype, ctx.world_size))
        timings = timing.measure(ctx, [case.way for case in cases], modes, n_sets[size], most, turns)
        for case, taken in zip(cases, timings, strict=True):
            case.timing = taken
        failed = [e for e in entries if e.case.timing.no_graph]
        unavailable |= {f"{e.format} by {e.path} in a graph": str(e.case.timing.no_graph) for e in failed}
        for mode in modes:
            rows += _rows(
                [e for e in entries if mode in e.case.timing.seconds], mode, size, count, dtype, ctx.world_size
            )
    return {"rows": rows, "unavailable": unavailable}


def _entry(way: Way) -> Entry:
    return Entry(Case(way, [way.note]), way.format, way.path, "")


def _automatic(
    entries: Sequence[Entry], comms: Sequence[Communicator], shape: tuple[int, ...], dtype: torch.dtype
) -> list[Entry]:
    """An entry for each format's default: the case that takes the same route already, or a new one."""
    known = {_what_runs(e.case.way): e.case for e in entries if isinstance(e.case.way, Ours)}
    out = []
    for comm in comms:
        way = Ours(comm, comm.explain(shape, dtype).route, "auto")
        case = known.setdefault(_what_runs(way), Case(way, [way.note]))
        out.append(Entry(case, str(comm.format), "auto", f"takes {way.route.algorithm}"))
    return out


def _what_runs(way: Ours) -> tuple[str, Route]:
    """What decides how long a call takes: `native` sends the same whatever the format."""
    return way.format if way.route.low_bit else "", replace(way.route, reason="")


def example(shape: tuple[int, ...], dtype: torch.dtype, index: int, rank: int) -> Tensor:
    """Normal values with rows of different size, below 32, the same on every rank for the same index and rank."""
    generator = torch.Generator().manual_seed(1000 * index + rank)
    values = torch.randn(shape, generator=generator)
    if len(shape) == 2:
        values *= torch.rand((shape[0], 1), generator=generator) * 4 + 0.1
    return values.to(dtype)


def _verify(ctx: RankContext, case: Case, i: int, tensors: Sequence[Tensor]) -> None:
    """Set the case's error on input set i; raise FlashcommError on every rank where results are wrong, or differ
    between ranks though they should not. tensors: every rank's input, on rank 0 only."""
    way = case.way
    way.refill()
    got = way.run(i)
    found = torch.zeros(2, dtype=torch.int64, device=ctx.device)  # wrong values, bytes unlike rank 0's
    if ctx.rank == 0:
        error, wrong = _compared(way, tensors, got)
        case.error = max(case.error, error)
        found[0] = wrong
    first = got.clone()
    dist.broadcast(first, 0)
    found[1] = (got.view(torch.uint8) != first.view(torch.uint8)).sum()
    dist.all_reduce(found)
    wrong, unlike = found.tolist()
    if wrong or (unlike and way.equal):
        wrong_of = f"{wrong + unlike} of {got.numel()} values"
        raise FlashcommError(f"{way.format} by {way.path}: {wrong_of} differ from the reference or between ranks")
    case.unlike = case.unlike or bool(unlike)


def _compared(way: Way, tensors: Sequence[Tensor], got: Tensor) -> tuple[float, int]:
    """The relative error of got, and how many of its values are not as they must be. A row's sum does not depend on the
    other rows, so blocks of rows do."""
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
        want = way.expected(parts)
        if want is not None:
            wrong += int((part != want).sum())
        elif isinstance(way, Ours) or way.format == "bf16":  # W-1 additions in some order, each rounded to the dtype
            wrong += int((~(off.abs() <= len(parts) * torch.finfo(part.dtype).eps * scale)).sum())
    return math.sqrt(float(squares[0] / squares[1])), wrong


def _rows(
    entries: Sequence[Entry], mode: str, size: int, count: int, dtype: torch.dtype, world_size: int
) -> list[dict[str, Any]]:
    """Rows of one size and mode: lossless ones from the slowest to the baseline, others' low-bit, auto, ours."""

    def seconds(entry: Entry) -> float:
        return entry.case.timing.seconds[mode]

    uncompressed = sorted((e for e in entries if e.format == "bf16"), key=seconds, reverse=True)
    best = min(map(seconds, uncompressed), default=None)
    native = min((seconds(e) for e in uncompressed if e.path == "native"), default=None)
    rest = [e for e in entries if e.format != "bf16"]
    rest.sort(key=lambda e: 1 if e.path == "auto" else 2 * isinstance(e.case.way, Ours))
    return [_row(entry, mode, best, native, size, count, dtype, world_size) for entry in (*uncompressed, *rest)]


def _row(
    entry: Entry,
    mode: str,
    best_s: float | None,
    native_s: float | None,
    size: int,
    count: int,
    dtype: torch.dtype,
    world_size: int,
) -> dict[str, Any]:
    """nccl-tests columns: size in bytes, count, time in us, algbw and busbw in GB/s of uncompressed bytes."""
    case, way = entry.case, entry.case.way
    seconds, host_s = case.timing.seconds[mode], case.timing.host_s
    no_graph = f"no graph: {case.timing.no_graph}" if case.timing.no_graph else ""
    algbw = size / seconds / 1e9
    return {
        "size": size,
        "count": count,
        "type": str(dtype).removeprefix("torch."),
        "redop": "sum",
        "format": entry.format,
        "world": world_size,
        "path": entry.path,
        "mode": mode,
        "transport": way.transport,
        "time_us": round(seconds * 1e6, 1),
        "host_us": round(host_s * 1e6, 1) if host_s is not None and mode == "eager" else None,
        "algbw": float(f"{algbw:.4g}"),
        "busbw": float(f"{algbw * 2 * (world_size - 1) / world_size:.4g}"),
        "wire_bytes": way.wire_bytes(size, world_size),
        "error": float(f"{case.error:.3g}"),
        "snr_db": round(-20 * math.log10(case.error), 1) if case.error else None,
        "speedup": round(best_s / seconds, 3) if best_s else None,
        "over_native": round(native_s / seconds, 3) if native_s else None,
        "note": "; ".join(filter(None, (entry.note, *case.notes, no_graph))),
    }


def sizes_between(begin: int, end: int, factor: int) -> list[int]:
    """begin, begin*factor, ... up to end, in bytes."""
    out = []
    while begin <= end:
        out.append(begin)
        begin *= factor
    return out
