"""`flashcomm bench` of collectives of pieces: the backend's and flashcomm's by size, for equal and for skewed pieces.

flashcomm's own is measured uncompressed, too. `speedup` is relative to the faster of both uncompressed ones.

`size` is the bytes of all pieces together: what a rank passes to a reduce-scatter or an all-to-all, and what it gets
from an all-gather. Every case is verified before it is timed, on all ranks: bit for bit against `flashcomm.reference`,
but for the backend's sums. Skewed pieces are those of a busy expert: rank 0 has three quarters of all rows, and the
others share the rest. gloo has no sums and no gathers of unequal pieces: there the backend gets padded ones.
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

OPS = ("reduce_scatter", "all_gather", "all_to_all")
SPLITS = ("equal", "skewed")
# Their names since torch 2.13, and before.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


class BackendPieces(Implementation):
    """torch.distributed's collective into a new output.

    Args:
        op: One of `OPS`.
        sizes: The rows of each rank's piece; in an all-to-all of what each rank sends.
        rank: This rank.
    """

    path = BACKEND
    same_bits = True  # replays give the bits of eager calls

    def __init__(self, op: str, sizes: list[int], rank: int) -> None:
        self.op, self.sizes, self.rank = op, sizes, rank
        self.received = [sizes[rank]] * len(sizes)  # in an all-to-all
        self.equal = len(set(sizes)) == 1

    def input_of(self, message: Tensor) -> Tensor:
        """Return what this rank passes, of a message of all rows."""
        return message[: self.sizes[self.rank]] if self.op == "all_gather" else message

    def run(self, i: int) -> Tensor:
        x, shape = self.inputs[i], self.inputs[i].shape[1:]
        if self.op == "all_to_all":
            out = x.new_empty((sum(self.received), *shape))
            dist.all_to_all_single(out, x, self.received, self.sizes)
            return out
        rows = max(self.sizes) if x.device.type == "cpu" else self.sizes[self.rank]
        if self.op == "all_gather":
            out = x.new_empty((sum(self.sizes), *shape))
            if self.equal:
                _all_gather(out, x)
            elif x.device.type == "cpu":
                gathered = x.new_empty((len(self.sizes) * rows, *shape))
                _all_gather(gathered, _padded([x], rows))
                return torch.cat([p[:n] for p, n in zip(gathered.view(-1, rows, *shape), self.sizes, strict=True)])
            else:
                dist.all_gather(list(out.split_with_sizes(self.sizes)), x)
            return out
        out = x.new_empty((rows, *shape))
        if self.equal:
            _reduce_scatter(out, x)
        elif x.device.type == "cpu":
            _reduce_scatter(out, _padded(x.split_with_sizes(self.sizes), rows))
        else:
            dist.reduce_scatter(out, list(x.split_with_sizes(self.sizes)))
        return out[: self.sizes[self.rank]]

    def sent_bytes(self, message: Tensor) -> int:
        """Return the payload bytes that the busiest rank sends, if none are padded."""
        rows = sum(self.sizes) - min(self.sizes)
        if self.op == "all_gather":
            rows = max(self.sizes) * (len(self.sizes) - 1)
        return rows * message[0].nbytes

    def expected(self, messages: Sequence[Tensor]) -> Tensor | None:
        return None if self.op == "reduce_scatter" else self.exact(messages, messages[0].dtype)

    def exact(self, messages: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return this rank's result without rounding, as dtype."""
        rank, sizes = self.rank, self.sizes
        if self.op == "reduce_scatter":
            return torch.stack([m.split_with_sizes(sizes)[rank].to(dtype) for m in messages]).sum(0)
        if self.op == "all_gather":
            return torch.cat([m[:n] for m, n in zip(messages, sizes, strict=True)]).to(dtype)
        return torch.cat([m.split_with_sizes(sizes)[rank] for m in messages]).to(dtype)


class Pieces(BackendPieces):
    """That of a Communicator. Equal pieces are passed without sizes, as its kernels want them in an all-to-all."""

    def __init__(self, comm: Communicator, op: str, sizes: list[int]) -> None:
        super().__init__(op, sizes, comm.rank)
        self.comm, self.format, self.path = comm, str(comm.format), op

    def route(self, message: Tensor) -> Route:
        x, op = self.input_of(message), "all_to_all_single" if self.op == "all_to_all" else self.op
        return self.comm.explain(x.shape, x.dtype, op=op, sizes=None if self.equal else self.sizes).route

    def sent_bytes(self, message: Tensor) -> int:
        return self.route(message).wire_bytes

    def run(self, i: int) -> Tensor:
        x, sizes = self.inputs[i], None if self.equal else self.sizes
        if self.op == "all_to_all":
            return self.comm.all_to_all_single(x, sizes and self.received, sizes)
        ours = self.comm.reduce_scatter if self.op == "reduce_scatter" else self.comm.all_gather
        return ours(x, sizes=sizes)

    def expected(self, messages: Sequence[Tensor]) -> Tensor:
        fmt, sizes = self.comm.format, self.sizes
        if self.op == "reduce_scatter":
            return reference.reduce_scatter(messages, fmt, sizes)[self.rank]
        if self.op == "all_gather":
            return reference.all_gather([m[:n] for m, n in zip(messages, sizes, strict=True)], fmt)
        return reference.all_to_all_single(messages, fmt, [sizes] * len(sizes))[self.rank]


def _padded(pieces: Sequence[Tensor], rows: int) -> Tensor:
    """Return pieces behind each other, each padded to so many rows."""
    whole = pieces[0].new_zeros((len(pieces) * rows, *pieces[0].shape[1:]))
    for place, piece in zip(whole.view(len(pieces), rows, *whole.shape[1:]), pieces, strict=True):
        place[: len(piece)] = piece
    return whole


def splits_of(rows: int, world_size: int, kind: str) -> list[int]:
    """Return the rows of each rank's piece."""
    sizes = [rows // world_size] * world_size
    if kind == "skewed":
        sizes = [rows // 4 // (world_size - 1)] * world_size
        sizes[0] = rows - sum(sizes[1:])
    return sizes


def pieces(
    ctx: RankContext,
    op: str,
    formats: Sequence[str],
    sizes: Sequence[int],
    row: int,
    dtype: torch.dtype,
    turns: int,
    modes: Sequence[str],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Verify and time a collective by size, format and kind of pieces. Collective.

    Args:
        ctx: This rank. It emits progress as (what, done, total).
        op: One of `OPS`.
        formats: Wire formats. Uncompressed ones are always measured.
        sizes: Bytes of all pieces together, rounded down to the same number of rows for each rank.
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
        shape = (max(1, size // dtype.itemsize // row // n) * n, row)
        n_sets = sets_for(size, ctx.device)
        inputs = [example(shape, dtype, i, ctx.rank).to(ctx.device) for i in range(n_sets)]
        everyone = [example(shape, dtype, 0, rank).to(ctx.device) for rank in range(n)]
        for kind in SPLITS:
            split = splits_of(shape[0], n, kind)
            cases: list[BackendPieces] = [BackendPieces(op, split, ctx.rank)]
            cases += [Pieces(comm, op, split) for comm in comms]
            errors = []
            for case in cases:
                ctx.emit((f"{size} {kind} {case.format}", done, len(sizes)))
                case.load([case.input_of(message).contiguous() for message in inputs])
                errors.append(_verify(ctx, case, everyone))
            most = calls_for(size, n_sets) if device == "cuda" else MOST_HOST_CALLS
            timings = timing.measure(ctx, cases, modes, n_sets, most, turns)
            for mode in modes:
                backend, ours = (timings[i].seconds.get(mode) for i in (0, 1))  # both uncompressed
                best = min(filter(None, (backend, ours)), default=None)
                for case, error, taken in zip(cases, errors, timings, strict=True):
                    if mode in taken.seconds:
                        columns = _row(case, taken.seconds[mode], everyone[ctx.rank], error)
                        columns["speedup"] = round(best / taken.seconds[mode], 3) if best else None
                        columns["over_backend"] = round(backend / taken.seconds[mode], 3) if backend else None
                        rows.append({"split": kind, "mode": mode, "world": n, **columns})
    return rows


def _verify(ctx: RankContext, case: BackendPieces, everyone: Sequence[Tensor]) -> float:
    """Compare a case with the reference. Return its relative error over all ranks.

    Raises:
        FlashcommError: On every rank, if the result is wrong on any.
    """
    got, want, exact = case.run(0), case.expected(everyone), case.exact(everyone, torch.float64)
    off = (got.double() - exact).square().sum()
    wrong = (got != want).sum() if want is not None else off > exact.square().sum() * torch.finfo(got.dtype).eps ** 2
    found = torch.stack([wrong.double(), off, exact.square().sum()])
    dist.all_reduce(found)
    wrong_all, off_all, exact_all = found.tolist()
    if wrong_all:
        raise FlashcommError(f"{case.op} as {case.format} by {case.path}: a result differs from the reference")
    return math.sqrt(off_all / exact_all)


def _row(case: BackendPieces, seconds: float, message: Tensor, error: float) -> dict[str, Any]:
    """Return the columns of one case: bytes, microseconds, and GB/s of uncompressed bytes, as in nccl-tests."""
    size, n = message.nbytes, len(case.sizes)
    algbw = size / seconds / 1e9
    return {
        "op": case.op,
        "size": size,
        "type": str(message.dtype).removeprefix("torch."),
        "format": case.format,
        "path": case.path,
        "transport": case.route(message).transport if isinstance(case, Pieces) else "",
        "time_us": round(seconds * 1e6, 1),
        "algbw": float(f"{algbw:.4g}"),
        "busbw": float(f"{algbw * (n - 1) / n:.4g}"),
        "wire_bytes": case.sent_bytes(message),
        "error": float(f"{error:.3g}"),
    }
