"""Collectives through pinned host memory, for GPUs without peer access: one kernel, one launch of few programs.

Every rank has an *outbox*: host memory that all ranks map. A rank stores its quantized tiles into its own outbox, and
loads the tiles of its peers from theirs. All programs of the grid stay on the GPU until the call is done:

| programs            | role        | what it does                                                                        |
|---------------------|-------------|-------------------------------------------------------------------------------------|
| 0                   | publisher   | sets this rank's flag in host memory once all workers have stored a wave of tiles   |
| 1 to WORLD_SIZE - 1 | relay       | polls the flag of one peer, and copies it to GPU memory                             |
| all others          | worker      | quantizes, stores, loads and sums tile i * n_workers + worker of every wave i       |

In step i a worker does this, in this order:

 1. It issues its loads of the peers' tiles of wave i - stage_lag.
 2. It quantizes and stores its own tile of wave i, and counts it.
 3. It sums the tiles that it loaded.

The same threads load and store, and loads come first: this keeps both directions of a PCIe link busy. Separate programs
for reading and writing would not, because reads queue behind writes. Two-shot has a second stage, in which workers load
the quantized sums after another stage_lag waves. A rank decodes its own contribution from its wire bytes, as its peers
do. It keeps a copy of these bytes in GPU memory.

`host_sync` has the words by which publisher, relays and workers tell each other what has been stored. No worker waits
for a system-scope fence, and no worker polls over PCIe.

Why the waiting ends. In step i a worker waits only for waves that its peers store in earlier steps. So the earliest
step that some rank has not finished waits for no other step. A relay ends when its peer has published all waves. If
nothing new comes within the limit, it gives up and writes GAVE_UP to `seen`, which ends the waiting of all workers.
The publisher waits only for workers. All this needs the whole grid on the GPU at once. It is a few dozen programs, and
the first to start, publisher and relays, are those that the others wait for. Programs that do not fit yet start when
kernels of other streams end. The exception is a kernel that itself waits for other ranks: Communicators that run at the
same time on different streams must fit on the GPU together.

Why no outbox is overwritten while a peer reads it. Even and odd epochs use different halves of an outbox. A rank starts
epoch e + 2 after it has finished epoch e + 1, in which it saw every peer publish its waves. A peer publishes waves of
epoch e + 1 only after it has finished its own epoch e, all loads included. So a peer may be late by one call, and no
closing barrier is needed. A rank that has given up stops publishing at once. From the next launch on it stores into
its own GPU memory: it may be ahead of a late peer, which must not take its bytes for those of a call that it missed.

Triton's interpreter runs programs one after the other. There the grid is one worker, which also publishes and relays.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from flashcomm.gpu.collective_kernel import (
    ALL_GATHER,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    TWO_SHOT,
    copy_tile,
    inbox_of,
    load_tile,
    tile_at,
    values_at,
)
from flashcomm.gpu.host_sync import GAVE_UP, MAX_WAVES, count, publish_all, wait, watch
from flashcomm.gpu.sync import ABORT, arrive, bytes_at, ints_at, rank_of
from flashcomm.gpu.tile import (
    Step,
    expand,
    fetch_plane,
    from_hadamard,
    hadamard,
    in_order,
    plane_offset,
    put,
    scalar,
    store,
    swap,
)

_MAX_WAVES, _ABORT = tl.constexpr(MAX_WAVES), tl.constexpr(ABORT)
_ALL_GATHER, _ALL_TO_ALL = tl.constexpr(ALL_GATHER), tl.constexpr(ALL_TO_ALL)
_REDUCE_SCATTER, _TWO_SHOT = tl.constexpr(REDUCE_SCATTER), tl.constexpr(TWO_SHOT)


class Steps(NamedTuple):
    """Constants of a kernel: the `tile.Step` of the tiles of either stage. Without sums there is only the second."""

    reduce: Step
    gather: Step


@triton.jit
def _fetch(source, place, x, here, region, outbox, step: tl.constexpr):
    """Load the raw words of rank `source`'s tile, for `tile.expand` to decode later.

    Args:
        source: the rank.
        place: the offset of the tile in a peer's shared memory, in bytes, and the address of this rank's own copy.
        x: a pointer to the message's dtype.
        here: whether there is such a tile. If not, nothing is loaded.
    """
    base = bytes_at(tl.where(region.rank == source, place[1], tl.load(outbox.table + source) + place[0]))
    if step.BITS == 16:
        at = in_order(step, step.LANES)
        values = base.to(tl.pointer_type(x.dtype.element_ty)) + at
        return (swap(tl.load(swap(values), mask=swap((at >= 0) & here), other=0.0, cache_modifier=".cg")),)
    else:
        b = tl.arange(0, step.GROUPS)
        keep = (b >= 0) & here
        raw = ()
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                plane = base + plane_offset(8 >> i, step)
                raw = raw + (fetch_plane(plane, b * step.LANES, keep, step.GROUPS * step.LANES, 8 >> i, ".cg", step),)
        words = (base + plane_offset(0, step)).to(tl.pointer_type(tl.int32 if step.BITS > 5 else tl.int16))
        return raw + (tl.load(words + b, mask=keep, other=0, cache_modifier=".cg"),)


@triton.jit
def _source(i, region, call: tl.constexpr):
    """Return the rank of the i-th tile that a worker loads. An all-to-all loads none of this rank."""
    return rank_of(i, region) if call.ALGORITHM == _ALL_TO_ALL else scalar(0, like=region.rank) + i


@triton.jit
def _fetch_first(place, x, here, region, outbox, call: tl.constexpr, ranks: tl.constexpr, step: tl.constexpr):
    """Load the first tiles ahead of their use: at most 4, which is what registers allow."""
    N: tl.constexpr = ranks.WORLD_SIZE - 1 if call.ALGORITHM == _ALL_TO_ALL else ranks.WORLD_SIZE
    raws = ()
    for i in tl.static_range(min(N, 4)):
        raws = raws + (_fetch(_source(i, region, call), place, x, here, region, outbox, step),)
    return raws


@triton.jit
def _sum(raws, reached, place, x, region, outbox, ranks: tl.constexpr, step: tl.constexpr):
    """Return the float32 sum of all ranks' tiles in rank order, or NaN if a peer was given up.

    Products are exact, so fma changes no bit.
    """
    total = tl.zeros((step.GROUPS, step.PIECES, step.LANES), tl.float32)
    for i in tl.static_range(ranks.WORLD_SIZE):
        raw = raws[i] if i < len(raws) else _fetch(i, place, x, reached >= 0, region, outbox, step)
        steps, scale = expand(raw, step)
        scale = tl.where(reached < GAVE_UP // 2, scale, float("nan"))
        if i == 0:
            total = steps * scale[:, None, None]
        else:
            total = tl.fma(steps, tl.broadcast_to(scale[:, None, None], total.shape), total)
    return total


@triton.jit
def _send(y, at, base, own, out, call: tl.constexpr, step: tl.constexpr, COPY: tl.constexpr):
    """Quantize a tile and store it at base + at and, if COPY, also at own + at. All three are in bytes."""
    n = tl.full((step.GROUPS,), step.PIECES * step.LANES, tl.int32)
    put(bytes_at(base + at), y, n, out, step, call.BF16)
    if COPY:
        put(bytes_at(own + at), y, n, out, step, call.BF16)


@triton.jit
def _encode(x, out, y, tile, outbox_address, region, outbox, message, call: tl.constexpr, ranks: tl.constexpr,
            step: tl.constexpr):  # fmt: skip
    """Quantize and store this rank's tiles of a wave.

    In one_shot and all_gather that is the tile y, which is already loaded. In the others it is one tile of each shard
    of x. An all-to-all copies the tile that stays on this rank.
    """
    if call.ALGORITHM == _TWO_SHOT or call.ALGORITHM == _REDUCE_SCATTER or call.ALGORITHM == _ALL_TO_ALL:
        for target in range(ranks.WORLD_SIZE):
            shard = scalar(0, like=region.rank) + target
            stays = False
            if call.ALGORITHM == _ALL_TO_ALL:
                stays = shard == region.rank
            if stays:
                copy_tile(x, out, tile, shard, message, call, step)
            else:
                y = load_tile(x, tile, shard, message, call, step)
                if step.HADAMARD:
                    y = hadamard(y, step)
                sent = outbox_address + (shard * message.n_tiles + tile).to(tl.int64) * step.BYTES
                base = tl.where(shard == region.rank, outbox.own + tile.to(tl.int64) * step.BYTES, sent)
                _send(y, scalar(0, like=sent), base, base, out, call, step, False)
    else:
        if step.HADAMARD:
            y = hadamard(y, step)
        _send(y, tile.to(tl.int64) * step.BYTES, outbox_address, outbox.own, out, call, step, True)


@triton.jit
def _work(x, out, worker, n_waves, bases, epoch, region, outbox, message, call: tl.constexpr, ranks: tl.constexpr,
          steps: tl.constexpr):  # fmt: skip
    """The role worker: see the module docstring for the order of a step."""
    EXCHANGES: tl.constexpr = call.ALGORITHM == _ALL_TO_ALL
    SHARDED: tl.constexpr = EXCHANGES or call.ALGORITHM == _TWO_SHOT or call.ALGORITHM == _REDUCE_SCATTER
    GATHERS_FIRST: tl.constexpr = EXCHANGES or call.ALGORITHM == _ALL_GATHER
    STAGES: tl.constexpr = 2 if call.ALGORITHM == _TWO_SHOT else 1
    reduce: tl.constexpr = steps.reduce
    gather: tl.constexpr = steps.gather
    first: tl.constexpr = gather if GATHERS_FIRST else reduce
    lag = message.stage_lag
    data = inbox_of(epoch, message)
    given_up = tl.atomic_or(ints_at(region.local + _ABORT), 0, sem="relaxed", scope="gpu") != 0
    sent = tl.where(given_up, outbox.own, tl.load(outbox.table + region.rank) + data)
    none = scalar(0, like=region.rank)
    reached1, reached2 = none, none
    for i in range(n_waves + lag * STAGES):
        tile = i * outbox.n_workers + worker
        tile1, tile2 = tile - lag * outbox.n_workers, tile - 2 * lag * outbox.n_workers
        has1, has2 = (i >= lag) & (tile1 < message.n_tiles), (i >= 2 * lag) & (tile2 < message.n_tiles)
        y = tl.zeros((first.GROUPS, first.PIECES, first.LANES), tl.float32)
        if not SHARDED:
            y = load_tile(x, tl.minimum(tile, message.n_tiles - 1), none, message, call, first)

        if has1:
            reached1 = wait(reached1, i - lag + 1, bases, epoch, region, outbox, ranks, 0)
        shard_tile = (region.rank * message.n_tiles if SHARDED else none) + tile1
        place1 = (data + shard_tile.to(tl.int64) * first.BYTES, outbox.own + tile1.to(tl.int64) * first.BYTES)
        raws1 = _fetch_first(place1, x, has1, region, outbox, call, ranks, first)
        if STAGES == 2:
            if has2:
                reached2 = wait(reached2, i - 2 * lag + 1, bases, epoch, region, outbox, ranks, 1)
            offset2 = message.stage2_offset + tile2.to(tl.int64) * gather.BYTES
            place2 = (data + offset2, outbox.own + offset2)
            raws2 = _fetch_first(place2, x, has2, region, outbox, call, ranks, gather)

        if tile < message.n_tiles:
            _encode(x, out, y, tile, sent, region, outbox, message, call, ranks, first)
        if i < n_waves:
            count(worker, bases[0] + i + 1, region, outbox, ranks, 0)

        if has1:
            if GATHERS_FIRST:
                _store_all(out, raws1, reached1, tile1, place1, x, region, outbox, message, call, ranks, gather)
            else:
                total = _sum(raws1, reached1, place1, x, region, outbox, ranks, reduce)
                if reduce.HADAMARD and not call.SUM_IN_HADAMARD:
                    total = from_hadamard(total, reduce)
                if STAGES == 2:
                    if reduce.PIECES != gather.PIECES or reduce.LANES != gather.LANES:
                        total = tl.reshape(total, (gather.GROUPS, gather.PIECES, gather.LANES))
                    if gather.HADAMARD and not call.SUM_IN_HADAMARD:
                        total = hadamard(total, gather)
                    at = message.stage2_offset + tile1.to(tl.int64) * gather.BYTES
                    _send(total, at, sent, outbox.own, out, call, gather, True)
                else:
                    unit, left = tile_at(tile1, region.rank if SHARDED else none, message, call)
                    at, keep = values_at(left, call.UNIT, reduce)
                    if SHARDED:  # out is the shard alone
                        unit -= region.rank.to(tl.int64) * message.shard_stride
                    store(out + unit * call.UNIT, at, keep, total, call.BF16)
        if STAGES == 2:
            if (i >= lag) & (i < n_waves + lag):
                count(worker, bases[1] + i - lag + 1, region, outbox, ranks, 1)
            if has2:
                _store_all(out, raws2, reached2, tile2, place2, x, region, outbox, message, call, ranks, gather)


@triton.jit
def _store_all(out, raws, reached, tile, place, x, region, outbox, message, call: tl.constexpr,
               ranks: tl.constexpr, step: tl.constexpr):  # fmt: skip
    """Decode one tile of each rank's shard (see `_source`) and store it in its place in out."""
    N: tl.constexpr = ranks.WORLD_SIZE - 1 if call.ALGORITHM == _ALL_TO_ALL else ranks.WORLD_SIZE
    for i in tl.static_range(N):
        source = _source(i, region, call)
        raw = raws[i] if i < len(raws) else _fetch(source, place, x, reached >= 0, region, outbox, step)
        steps, scale = expand(raw, step)
        y = steps * tl.where(reached < GAVE_UP // 2, scale, float("nan"))[:, None, None]
        if step.HADAMARD:
            y = from_hadamard(y, step)
        unit, left = tile_at(tile, source, message, call)
        at, keep = values_at(left, call.UNIT, step)
        store(out + unit * call.UNIT, at, keep, y, call.BF16)


@triton.jit
def host_collective(x, out, region, outbox, message, call: tl.constexpr, ranks: tl.constexpr, steps: tl.constexpr):
    """Run one program of a collective.

    Args:
        x: pointer to this rank's message, 16-byte aligned.
        out: pointer to this rank's result, 16-byte aligned. In an all-reduce it may be x.
        region: a `sync.Region`; its `own` is not used.
        outbox: a `host_sync.Outbox`.
        message: a `collective_kernel.Message` with a stage_lag of at least 1.
        call: a `collective_kernel.Collective`.
        ranks: a `sync.Ranks`.
        steps: a `Steps`.
    """
    STAGES: tl.constexpr = 2 if call.ALGORITHM == _TWO_SHOT else 1
    role = tl.program_id(0)
    if not ranks.CLOCK:
        role += ranks.WORLD_SIZE
    epoch = arrive(outbox.calls)
    bases = (epoch * _MAX_WAVES, epoch * _MAX_WAVES)
    if STAGES == 2:
        bases = (epoch * _MAX_WAVES, arrive(outbox.two_stage_calls) * _MAX_WAVES)
    n_waves = (message.n_tiles + outbox.n_workers - 1) // outbox.n_workers
    if role == 0:
        publish_all(n_waves, bases, region, outbox, ranks, STAGES)
    elif role < ranks.WORLD_SIZE:
        watch(role - 1, bases, n_waves, n_waves * (STAGES - 1), epoch, region, outbox, ranks, STAGES)
    else:
        _work(x, out, role - ranks.WORLD_SIZE, n_waves, bases, epoch, region, outbox, message, call, ranks, steps)
