"""All-reduces composed of a codec and two exchanges of bytes, pipelined over chunks of the message.

Stages of neighboring chunks overlap: while chunk c is on the wire, chunk c+1 is quantized and chunk c-1 is reduced.
Every function returns when all work is done (on GPUs: enqueued). Input and output are contiguous.

                  stage 0                 stage 1                                     stage 2
    one_shot      encode, all-gather ~    decode_sum
    two_shot      encode, all-to-all ~    decode_sum, encode own shard, all-gather ~  decode all shards
    ~ in flight until the next stage of that chunk

    buffer      written by             read by             free when
    send[c%3]   encode                 the exchange of c   that exchange has ended, one stage later
    recv[c%3]   the exchange of c, in  decode_sum of c     that decode has returned (on GPUs: is enqueued on the
                a gather also encode                       same stream)
    Three slots are enough: stage s of chunk c and stage s' of chunk c' run at the same time only if |c - c'| <= 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from flashcomm.wire.format import Layout, StepFormat, WireFormat, bounds
from flashcomm.wire.split import Exchange, Split

SLOTS = 3


@dataclass
class Workspace:
    """Wire buffers that are kept between calls and grow when a call needs more. All sizes are in bytes."""

    device: torch.device
    _kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def take(self, name: str, slot: int, n_bytes: int) -> Tensor:
        """Return a uint8 buffer (n_bytes,): the same memory for a name and slot, until a larger one is requested."""
        kept = self._kept.get((name, slot % SLOTS))
        if kept is None or kept.numel() < n_bytes:
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
                kept = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
            self._kept[name, slot % SLOTS] = kept
        return kept[:n_bytes]

    def buffers(self) -> list[Tensor]:
        """Return all current buffers. A reference keeps them valid, even after the workspace grows."""
        return list(self._kept.values())


class Pending(Protocol):
    def wait(self) -> None: ...


class Transport(Protocol):
    """Exchanges rows of bytes; see `transports.process_group`."""

    rank: int
    world_size: int

    def all_to_all(self, out: Tensor, inp: Tensor, what: str, overlap: bool = True) -> Pending: ...

    def all_gather(self, out: Tensor, inp: Tensor, what: str, overlap: bool = True) -> Pending: ...

    def exchange(self, out: Sequence[Tensor], inp: Sequence[Tensor], what: str, overlap: bool = True) -> Pending: ...


@dataclass
class Context:
    """Format, codec, transport, buffers and chunk size of a collective.

    Attributes:
        split: For collectives of pieces: the rows of each rank's piece. None: equal pieces.
        exchange: For all-to-all: the rows that this rank sends and receives.
        nodes: For `hierarchical`, two transports: among the ranks of this node, and among the ranks that have the same
            place in their nodes.
    """

    fmt: WireFormat
    codec: ModuleType
    transport: Transport
    workspace: Workspace
    chunk_bytes: int
    split: Split | None = None
    exchange: Exchange | None = None
    nodes: tuple[Transport, Transport] | None = None

    @property
    def world_size(self) -> int:
        return self.transport.world_size

    def layout(self, step: StepFormat, message: Tensor) -> Layout:
        return Layout(step, message.shape[-1] if message.dim() else 1, message.element_size())

    def chunks(self, message: Tensor, unit: int) -> list[tuple[int, int]]:
        """Return (start, stop) of chunks of about `chunk_bytes`. They start at multiples of `unit` in their row."""
        count = max(1, message.numel() * message.element_size() // self.chunk_bytes)
        ends = bounds(0, message.numel(), message.shape[-1] if message.dim() else 1, unit, count)
        return [(a, b) for a, b in pairwise(ends) if a < b]


def one_shot(x: Tensor, out: Tensor, ctx: Context) -> None:
    """All-reduce x into out (same shape and dtype; out may be x): every rank sends its message to every other."""
    layout, world_size = ctx.layout(ctx.fmt.reduce, x), ctx.world_size
    chunks = ctx.chunks(x, ctx.fmt.unit)
    flat_x, flat_out = x.view(-1), out.view(-1)
    received: dict[int, tuple[Pending, Tensor]] = {}

    def send(c: int) -> None:
        start, stop = chunks[c]
        size = layout.nbytes(start, stop)
        wires = ctx.workspace.take("recv", c, world_size * size).view(world_size, size)
        wire = wires[ctx.transport.rank]
        ctx.codec.encode(flat_x[start:stop], layout, start, stop, wire)
        what = f"one-shot all-gather, chunk {c + 1}/{len(chunks)}"
        received[c] = ctx.transport.all_gather(wires, wire, what, overlap=len(chunks) > 1), wires

    def reduce(c: int) -> None:
        start, stop = chunks[c]
        pending, wires = received.pop(c)
        pending.wait()
        ctx.codec.decode_sum(wires, layout, start, stop, flat_out[start:stop], x.dtype)

    pipeline(len(chunks), send, reduce)


def two_shot(x: Tensor, out: Tensor, ctx: Context) -> None:
    """All-reduce x into out (same shape and dtype; out may be x): reduce-scatter, then all-gather.

    The owner of a shard decodes it from its own wire bytes, so that all ranks hold the same bits.
    """
    reduce_layout, gather_layout = ctx.layout(ctx.fmt.reduce, x), ctx.layout(ctx.fmt.gather, x)
    sum_layout, resend_layout = (ctx.layout(step, x) for step in ctx.fmt.between_steps)
    world_size, rank = ctx.world_size, ctx.transport.rank
    chunks = ctx.chunks(x, ctx.fmt.unit)
    shards = [bounds(start, stop, reduce_layout.row, ctx.fmt.unit, world_size) for start, stop in chunks]
    flat_x, flat_out = x.view(-1), out.view(-1)
    scattered: dict[int, tuple[Pending, Tensor]] = {}
    gathered: dict[int, tuple[Pending, Tensor]] = {}
    sum_dtype = x.dtype if ctx.fmt.gather.uncompressed else torch.float32

    def scatter(c: int) -> None:
        mine = [(i, shards[c][i], shards[c][i + 1]) for i in range(world_size)]
        scattered[c] = scatter_shards(ctx, reduce_layout, flat_x, mine, (c, len(chunks)), "two-shot reduce")

    def reduce(c: int) -> None:
        start, stop = shards[c][rank : rank + 2]
        pending, wires = scattered.pop(c)
        pending.wait()
        total = ctx.workspace.take("sum", 0, (stop - start) * sum_dtype.itemsize).view(sum_dtype)
        size = max(gather_layout.nbytes(a, b) for a, b in pairwise(shards[c]))
        gathering = ctx.workspace.take("gather-recv", c, world_size * size).view(world_size, size)
        wire = gathering[rank]
        if stop > start:
            ctx.codec.decode_sum(wires, sum_layout, start, stop, total, x.dtype)
            ctx.codec.encode(total, resend_layout, start, stop, wire)
        what = f"two-shot gather, chunk {c + 1}/{len(chunks)}"
        gathered[c] = ctx.transport.all_gather(gathering, wire, what, overlap=len(chunks) > 1), gathering

    def finish(c: int) -> None:
        pending, wires = gathered.pop(c)
        pending.wait()
        for i, (start, stop) in enumerate(pairwise(shards[c])):
            if stop > start:
                wire = wires[i : i + 1]
                ctx.codec.decode_sum(wire, gather_layout, start, stop, flat_out[start:stop], x.dtype)

    pipeline(len(chunks), scatter, reduce, finish)


def scatter_shards(
    ctx: Context,
    layout: Layout,
    values: Tensor,
    shards: list[tuple[int, int, int]],
    chunk: tuple[int, int],
    what: str,
) -> tuple[Pending, Tensor]:
    """Encode each rank's shard of a chunk and start the all-to-all.

    Args:
        ctx: Format, codec, transport and buffers.
        layout: How to encode.
        values: The message, flat.
        shards: (rank, start, stop) of each shard.
        chunk: The number of the chunk, and the number of chunks.
        what: The phase, for error messages.

    Returns:
        The exchange in flight, and its buffer, uint8 (world_size, n).
    """
    slot, n_chunks = chunk
    size = max(layout.nbytes(start, stop) for _, start, stop in shards)
    wires = ctx.workspace.take("send", slot, ctx.world_size * size).view(ctx.world_size, size)
    for i, start, stop in shards:
        if stop > start:
            ctx.codec.encode(values[start:stop], layout, start, stop, wires[i])
    received = ctx.workspace.take("recv", slot, ctx.world_size * size).view(ctx.world_size, size)
    phase = f"{what}, chunk {slot + 1}/{n_chunks}"
    return ctx.transport.all_to_all(received, wires, phase, overlap=n_chunks > 1), received


def pipeline(n_chunks: int, *stages: Callable[[int], None]) -> None:
    """Run stage s of chunk c at step c + s, so that later chunks start before earlier ones end."""
    for step in range(n_chunks + len(stages) - 1):
        for s, stage in enumerate(stages):
            if 0 <= step - s < n_chunks:
                stage(step - s)
