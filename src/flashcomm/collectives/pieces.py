"""Collectives of pieces along dimension 0, one per rank, over a process group: all but all-reduces.

Each piece is a message of its own, of any number of rows. In reduce_scatter and all_gather all pieces are cut into the
same number of chunks. In an all-to-all the number follows from the piece, because only two ranks know its size. Chunk c
of every piece that has so many travels in exchange c. Stages overlap as in `pipelined`:

                        stage 0                  stage 1
    reduce_scatter      encode, exchange ~       decode_sum of this rank's piece
    all_gather          encode, exchange ~       decode every piece
    all_to_all_single   encode, exchange ~       decode the pieces of other ranks; a rank's own is copied
    ~ in flight until the next stage of that chunk
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flashcomm.collectives.pipelined import Context, Pending, pipeline
from flashcomm.wire.format import Layout, StepFormat, bounds
from flashcomm.wire.split import Split


@dataclass(frozen=True)
class Piece:
    """One rank's piece of a message, cut into chunks.

    Attributes:
        values: The piece, flat.
        layout: How it is encoded.
        spans: (start, stop) of each chunk. Some may be empty, and later ones are.
    """

    values: Tensor
    layout: Layout
    spans: list[tuple[int, int]]

    def span(self, c: int) -> tuple[int, int]:
        """Return (start, stop) of chunk c."""
        return self.spans[c] if c < len(self.spans) else (0, 0)

    def nbytes(self, c: int) -> int:
        """Return the wire bytes of chunk c."""
        return self.layout.nbytes(*self.span(c))

    def encode(self, ctx: Context, c: int, wire: Tensor) -> None:
        """Encode chunk c into a wire buffer."""
        start, stop = self.span(c)
        if start < stop:
            ctx.codec.encode(self.values[start:stop], self.layout, start, stop, wire)

    def decode(self, ctx: Context, c: int, wires: Tensor) -> None:
        """Make chunk c the sum of wire buffers, uint8 (ranks, n)."""
        start, stop = self.span(c)
        if start < stop:
            ctx.codec.decode_sum(wires, self.layout, start, stop, self.values[start:stop], dtype=self.values.dtype)


def cut(x: Tensor, split: Split, step: StepFormat, unit: int, chunks: int | Callable[[Tensor], int]) -> list[Piece]:
    """Cut a contiguous message into pieces, and those into chunks that start at multiples of `unit` in their row.

    Args:
        x: The message.
        split: Its pieces.
        step: The format of the pieces.
        unit: Values; a multiple of the group size.
        chunks: The number of chunks of every piece, or a function of the piece.
    """
    pieces = []
    for piece in x.split_with_sizes(list(split.sizes)):
        n, row = piece.numel(), max(1, piece.shape[-1])
        ends = bounds(0, n, row, unit, chunks if isinstance(chunks, int) else chunks(piece))
        pieces.append(Piece(piece.view(-1), Layout(step, row, x.element_size()), list(pairwise(ends))))
    return pieces


def chunks_of(ctx: Context, split: Split, row_bytes: int) -> int:
    """Return how many chunks the pieces are cut into, by the largest: equal on all ranks."""
    return max(1, split.largest * row_bytes // ctx.chunk_bytes)


def reduce_scatter(x: Tensor, out: Tensor, ctx: Context) -> None:
    """Sum x over the ranks. Rank j's out is piece j along dimension 0."""
    split = ctx.split or Split.even(x.shape[0], ctx.world_size)
    n_chunks = chunks_of(ctx, split, x[0].nbytes)
    pieces = cut(x, split, ctx.fmt.reduce, ctx.fmt.unit, n_chunks)
    (mine,) = cut(out, Split(out.shape[:1]), ctx.fmt.reduce, ctx.fmt.unit, n_chunks)
    in_flight: dict[int, tuple[Pending, Tensor]] = {}

    def send(c: int) -> None:
        sent = buffers(ctx, "send", c, [piece.nbytes(c) for piece in pieces])
        for piece, wire in zip(pieces, sent, strict=True):
            piece.encode(ctx, c, wire)
        size = mine.nbytes(c)
        received = ctx.workspace.take("recv", c, ctx.world_size * size).view(ctx.world_size, size)
        what = f"reduce-scatter, chunk {c + 1}/{n_chunks}"
        in_flight[c] = ctx.transport.exchange(received.unbind(), sent, what, overlap=n_chunks > 1), received

    def reduce(c: int) -> None:
        pending, wires = in_flight.pop(c)
        pending.wait()
        mine.decode(ctx, c, wires)

    pipeline(n_chunks, send, reduce)


def all_gather(x: Tensor, out: Tensor, ctx: Context) -> None:
    """Concatenate every rank's x along dimension 0 of out. All are decoded from wire bytes, this rank's own, too."""
    split = ctx.split or Split.even(out.shape[0], ctx.world_size)
    n_chunks = chunks_of(ctx, split, out[0].nbytes)
    pieces = cut(out, split, ctx.fmt.gather, ctx.fmt.unit, n_chunks)
    (mine,) = cut(x, Split(x.shape[:1]), ctx.fmt.gather, ctx.fmt.unit, n_chunks)
    in_flight: dict[int, tuple[Pending, Sequence[Tensor]]] = {}

    def send(c: int) -> None:
        wires = buffers(ctx, "recv", c, [piece.nbytes(c) for piece in pieces])
        wire, what = wires[ctx.transport.rank], f"all-gather, chunk {c + 1}/{n_chunks}"
        mine.encode(ctx, c, wire)
        if ctx.split is None:  # the backend gathers equal pieces faster
            size = wire.numel()
            rows = ctx.workspace.take("recv", c, ctx.world_size * size).view(ctx.world_size, size)
            pending = ctx.transport.all_gather(rows, wire, what, overlap=n_chunks > 1)
        else:
            pending = ctx.transport.exchange(wires, [wire] * ctx.world_size, what, overlap=n_chunks > 1)
        in_flight[c] = pending, wires

    def finish(c: int) -> None:
        pending, wires = in_flight.pop(c)
        pending.wait()
        for piece, wire in zip(pieces, wires, strict=True):
            piece.decode(ctx, c, wire.view(1, -1))

    pipeline(n_chunks, send, finish)


def all_to_all_single(x: Tensor, out: Tensor, ctx: Context) -> None:
    """Send piece j of x along dimension 0 to rank j. Piece i of out comes from rank i."""
    assert ctx.exchange is not None
    rank, splits, step, unit = ctx.transport.rank, ctx.exchange, ctx.fmt.gather, ctx.fmt.unit

    def chunks(piece: Tensor) -> int:  # on GPUs one, because the backend's exchanges are collective
        return max(1, piece.nbytes // ctx.chunk_bytes) if x.device.type == "cpu" else 1

    sent, received = cut(x, splits.sent, step, unit, chunks), cut(out, splits.received, step, unit, chunks)
    if step.uncompressed:
        inp, outs = ([piece.values.view(torch.uint8) for piece in pieces] for pieces in (sent, received))
        ctx.transport.exchange(outs, inp, "all-to-all", overlap=False).wait()
        return
    received[rank].values.copy_(sent[rank].values)
    sent[rank], received[rank] = (Piece(p[rank].values, p[rank].layout, []) for p in (sent, received))
    n_chunks = max(1, *(len(piece.spans) for piece in (*sent, *received)))
    in_flight: dict[int, tuple[Pending, Sequence[Tensor]]] = {}

    def send(c: int) -> None:
        wires = buffers(ctx, "send", c, [piece.nbytes(c) for piece in sent])
        for piece, wire in zip(sent, wires, strict=True):
            piece.encode(ctx, c, wire)
        arriving = buffers(ctx, "recv", c, [piece.nbytes(c) for piece in received])
        what = f"all-to-all, chunk {c + 1}/{n_chunks}"
        in_flight[c] = ctx.transport.exchange(arriving, wires, what, overlap=n_chunks > 1), arriving

    def finish(c: int) -> None:
        pending, wires = in_flight.pop(c)
        pending.wait()
        for piece, wire in zip(received, wires, strict=True):
            piece.decode(ctx, c, wire.view(1, -1))

    pipeline(n_chunks, send, finish)


def buffers(ctx: Context, name: str, c: int, sizes: Sequence[int]) -> list[Tensor]:
    """Return wire buffers of these sizes in bytes, behind each other in one buffer of the workspace."""
    whole = ctx.workspace.take(name, c, sum(sizes))
    return [whole[a:b] for a, b in pairwise(accumulate(sizes, initial=0))]


@dataclass(frozen=True)
class Padded:
    """Tensors of a collective whose pieces are padded to the largest, for kernels that take equal ones."""

    x: Tensor
    out: Tensor
    split: Split
    op: str

    def copy_back(self, out: Tensor) -> None:
        """Copy the result without its padding."""
        if self.op == "reduce_scatter":
            out.copy_(self.out[: out.shape[0]])
        else:
            _copy_pieces(out, self.out, self.split, back=True)


def padded(x: Tensor, out: Tensor, split: Split, op: str) -> Padded:
    """Return padded tensors for reduce_scatter or all_gather of x (rows, ...) into out."""
    most, rest = split.largest, x.shape[1:]
    n_sent, n_received = (len(split.sizes), 1) if op == "reduce_scatter" else (1, len(split.sizes))
    larger = x.new_zeros((n_sent * most, *rest))
    if op == "reduce_scatter":
        _copy_pieces(x, larger, split)
    else:
        larger[: x.shape[0]] = x
    return Padded(larger, out.new_empty((n_received * most, *rest)), split, op)


def _copy_pieces(dense: Tensor, larger: Tensor, split: Split, back: bool = False) -> None:
    """Copy each piece of `dense` to the start of its place in `larger`, or back."""
    places = larger.view(len(split.sizes), split.largest, *larger.shape[1:])
    for piece, place in zip(dense.split_with_sizes(list(split.sizes)), places, strict=True):
        piece.copy_(place[: piece.shape[0]]) if back else place[: piece.shape[0]].copy_(piece)
