"""Hierarchical all-reduce: fewer bytes cross the slow link between hosts, or between NUMA nodes.

Nodes consist of equally many consecutive ranks. The message is reduce-scattered within each node of L ranks. Each rank
exchanges the sum of its shard with the ranks that own that shard in the other nodes. The sum is gathered within nodes:

    stage 0                stage 1                                   stage 2                            stage 3
    encode, all-to-all ~   decode_sum, encode, all-gather across ~   decode_sum, encode, all-gather ~   decode shards
    ~ in flight until the next stage of that chunk. Buffers are reused as in `pipelined`.

With N nodes, a rank sends (N-1)/L of the message to other nodes, once. In two-shot it sends (N-1)/N of it, twice. The
price is a third rounding, of the nodes' sums (`reference.hierarchical`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from flashcomm.collectives.pipelined import Context, Pending, Transport, pipeline, scatter_shards
from flashcomm.wire.format import Layout, bounds


def hierarchical(x: Tensor, out: Tensor, ctx: Context) -> None:
    """All-reduce x into out (same shape and dtype; out may be x) over the context's nodes."""
    assert ctx.nodes is not None
    inner, across = ctx.nodes
    reduce_layout, gather_layout = ctx.layout(ctx.fmt.reduce, x), ctx.layout(ctx.fmt.gather, x)
    part_layout, across_layout = (ctx.layout(step, x) for step in ctx.fmt.twice_reduced.between_steps)
    sum_layout, resend_layout = (ctx.layout(step, x) for step in ctx.fmt.between_steps)
    chunks = ctx.chunks(x, ctx.fmt.unit)
    shards = [bounds(start, stop, reduce_layout.row, ctx.fmt.unit, inner.world_size) for start, stop in chunks]
    flat_x, flat_out, within = x.view(-1), out.view(-1), replace(ctx, transport=inner)
    in_flight: dict[int, tuple[Pending, Tensor]] = {}  # the last exchange of each chunk

    def arrived(c: int) -> Tensor:
        pending, wires = in_flight.pop(c)
        pending.wait()
        return wires

    def scatter(c: int) -> None:
        mine = [(i, *span) for i, span in enumerate(pairwise(shards[c]))]
        what = "hierarchical reduce within nodes"
        in_flight[c] = scatter_shards(within, reduce_layout, flat_x, mine, (c, len(chunks)), what)

    def pass_on(c: int, via: Transport, received: Layout, sent: Layout, name: str) -> None:
        """Decode and sum what arrived for this rank's shard, encode the sum as `sent`, and gather it over `via`."""
        start, stop = shards[c][inner.rank : inner.rank + 2]
        dtype = x.dtype if sent.step.uncompressed else torch.float32
        total = ctx.workspace.take("sum", 0, (stop - start) * dtype.itemsize).view(dtype)
        size, wires = max(sent.nbytes(*span) for span in pairwise(shards[c])), arrived(c)
        gathering = ctx.workspace.take(name, c, via.world_size * size).view(via.world_size, size)
        if stop > start:
            ctx.codec.decode_sum(wires, received, start, stop, total, x.dtype)
            ctx.codec.encode(total, sent, start, stop, gathering[via.rank])
        what = f"hierarchical {name}, chunk {c + 1}/{len(chunks)}"
        in_flight[c] = via.all_gather(gathering, gathering[via.rank], what, overlap=len(chunks) > 1), gathering

    def cross(c: int) -> None:
        pass_on(c, across, part_layout, across_layout, "exchange across nodes")

    def gather(c: int) -> None:
        pass_on(c, inner, sum_layout, resend_layout, "gather within nodes")

    def finish(c: int) -> None:
        wires = arrived(c)
        for i, (start, stop) in enumerate(pairwise(shards[c])):
            if stop > start:
                ctx.codec.decode_sum(wires[i : i + 1], gather_layout, start, stop, flat_out[start:stop], x.dtype)

    pipeline(len(chunks), scatter, cross, gather, finish)
