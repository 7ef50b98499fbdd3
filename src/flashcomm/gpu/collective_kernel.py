"""Collectives over the memory of peers: one kernel for all five, which quantizes, sends, reduces and gathers.

A message is cut into *shards*, one per destination. A shard consists of units (a unit is the larger of the two groups).
It is cut into tiles. A launch is a sequence of waves. Wave w has programs with these roles, in this order:

    encode   quantizes tile w of a shard, and stores it in the memory of its destination. two_shot, reduce_scatter
             and all_to_all_single have one such program per shard, and the latter copies the shard that stays on its
             rank. one_shot and all_gather have one for the whole message.
    reduce   sums tile w - stage_lag of the own shard over all ranks, in rank order, into the result. In two_shot it
             quantizes the sum instead, and stores it in the memory of all ranks. One program; none if there is no sum.
    gather   dequantizes tile w - 2 * stage_lag (without sums w - stage_lag) of a shard into the result. two_shot and
             all_gather have one such program per shard, all_to_all_single one per shard of another rank.

A producer stores into its consumers' memory. Each tile has a flag there, which the producer then sets to the epoch,
the number of the call. Flags are never cleared. Small messages use the LL protocol (`low_latency`) instead of flags: a
tile has arrived when all of its words carry the epoch.

| buffer; even and odd epochs have one each   | written by          | read by    | full when       | free when         |
|---------------------------------------------|---------------------|------------|-----------------|-------------------|
| stage 1 of the inbox: a tile of the own     | encode of all ranks | own reduce | its flags carry | this rank has     |
| shard from each rank                        |                     |            | the epoch       | sent in the next  |
| stage 2 of the inbox: all tiles of all      | reduce of all ranks | own gather | its flags carry | epoch             |
| shards                                      | (no sums: encode)   |            | the epoch       |                   |

Why the waiting ends. A program waits only for programs of an earlier wave, or of the same wave and an earlier role, on
this or another rank. GPUs start the programs of a grid in order, as look-back scans also assume. Order all programs of
all ranks by wave and role: the first one that has not finished waits for no other. In Triton's interpreter programs run
one after the other.

Why no buffer is overwritten while it is being read. Even and odd epochs have buffers of their own. A rank starts epoch
e + 2 after it has finished epoch e + 1. In that epoch it waited for a flag (LL: a tile) of every peer. A peer sets such
a flag only after it has finished its own epoch e, all reads included. So the waits of one epoch are the barrier for the
buffers of the epoch before, whichever protocols the two epochs use. No closing barrier is needed.

The epoch is kept in device memory, next to the count of programs that have started. The last program to start advances
it, so that CUDA graphs replay correctly. A wait that times out is reported (`sync.give_up`). Then all later waits end
soon, the result is NaN, and this rank sends nothing more to its peers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashcomm.gpu import low_latency
from flashcomm.gpu.sync import arrive, arrive_and_wait, arrives_at, bytes_at, longs_at, publish, rank_of
from flashcomm.gpu.tile import expand, fetch, from_hadamard, hadamard, put, scalar, store, swap, widen

ONE_SHOT, TWO_SHOT, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL = range(5)
_ONE_SHOT, _TWO_SHOT, _REDUCE_SCATTER, _ALL_GATHER, _ALL_TO_ALL = (tl.constexpr(algorithm) for algorithm in range(5))


class Message(NamedTuple):
    """Run-time values of a kernel: how a message is cut up, and where in a region its tiles go."""

    n_units: Any  # of all shards together
    shard_units: Any  # of a shard; the last ones may have fewer
    shard_stride: Any  # units from one shard to the next
    n_tiles: Any  # of a shard
    inbox: Any  # the offset in bytes at which tiles begin in a region
    epoch_bytes: Any  # bytes from the buffer of even epochs to that of odd ones
    stage2_offset: Any  # bytes from the tiles of the first stage to those of the second
    stage_lag: Any  # waves between roles


class Collective(NamedTuple):
    """Constants of a kernel: what it does, and how a message is cut up."""

    ALGORITHM: int
    UNIT: int  # values of a unit
    UNITS: int  # of a tile
    SUM_IN_HADAMARD: bool  # in two_shot: whether sums are quantized again without leaving the Hadamard domain
    LL: bool  # whether to use the LL protocol instead of flags
    BF16: bool  # whether out points to int16s that hold bfloat16s, see `tile.narrow`


@triton.jit
def values_at(left, UNIT: tl.constexpr, step: tl.constexpr):
    """Return where the values of a tile are in the message.

    Args:
        left: the number of units of the shard from the beginning of the tile on.
        UNIT: values of a unit.
        step: a `tile.Step`.

    Returns:
        Offsets (GROUPS, PIECES, LANES) from the tile's first value, and a mask of the values that exist.
    """
    GROUP: tl.constexpr = step.PIECES * step.LANES
    group = tl.arange(0, step.GROUPS)[:, None, None]
    inside = (tl.arange(0, step.PIECES) * step.LANES)[None, :, None] + tl.arange(0, step.LANES)[None, None, :]
    return group * GROUP + inside, (group // (UNIT // GROUP) < left) & (inside >= 0)


@triton.jit
def tile_at(tile, shard, message, call: tl.constexpr):
    """Return the unit of the message at which a tile of a shard begins, and how many units the shard has from it on."""
    unit = tile.to(tl.int64) * call.UNITS
    first = shard.to(tl.int64) * message.shard_stride
    return first + unit, tl.minimum(message.shard_units - unit, message.n_units - first - unit)


@triton.jit
def inbox_of(epoch, message):
    """Return the offset in bytes at which the tiles of an epoch begin in a region."""
    return message.inbox + (epoch & 1).to(tl.int64) * message.epoch_bytes


@triton.jit
def load_tile(x, tile, shard, message, call: tl.constexpr, step: tl.constexpr):
    """Load a tile of x as float32, with 0 for values that do not exist."""
    unit, left = tile_at(tile, shard, message, call)
    at, keep = values_at(left, call.UNIT, step)
    return widen(swap(tl.load(swap(x + unit * call.UNIT + at), mask=swap(keep), other=0.0)))


@triton.jit
def copy_tile(x, out, tile, shard, message, call: tl.constexpr, step: tl.constexpr):
    """Copy a tile of x to its place in out, bit by bit."""
    WORD: tl.constexpr = tl.int32 if x.dtype.element_ty.primitive_bitwidth == 32 else tl.int16
    unit, left = tile_at(tile, shard, message, call)
    at, keep = values_at(left, call.UNIT, step)
    at += unit * call.UNIT
    tl.store(out.to(tl.pointer_type(WORD)) + at, tl.load(x.to(tl.pointer_type(WORD)) + at, mask=keep), mask=keep)


@triton.jit
def _send(y, out, tile, shard, data, epoch, region, message, call: tl.constexpr, ranks: tl.constexpr,
          step: tl.constexpr, TO_ALL: tl.constexpr):  # fmt: skip
    """Quantize a tile, and store it in the memory of its consumers: rank `shard`, or all ranks if TO_ALL."""
    n = tl.full((step.GROUPS,), step.PIECES * step.LANES, tl.int32)
    for i in tl.static_range(ranks.WORLD_SIZE if TO_ALL else 1):
        base = tl.load(region.peers + (i if TO_ALL else shard)) + data
        base += (region.rank * message.n_tiles + tile).to(tl.int64) * step.BYTES
        if call.LL:
            low_latency.put(longs_at(base), y, n, epoch, out, step, call.BF16)
        else:
            put(bytes_at(base), y, n, out, step, call.BF16)


@triton.jit
def _encode(x, out, tile, shard, region, message, call: tl.constexpr, ranks: tl.constexpr, step: tl.constexpr,
            STAGE: tl.constexpr, TO_ALL: tl.constexpr):  # fmt: skip
    """The role encode: quantize and send a tile of x."""
    y = load_tile(x, tile, shard, message, call, step)  # values and epoch are loaded at the same time
    epoch = arrive(region)
    data = inbox_of(epoch, message)
    if STAGE == 1:
        data += message.stage2_offset
    if step.HADAMARD:
        y = hadamard(y, step)
    _send(y, out, tile, shard, data, epoch, region, message, call, ranks, step, TO_ALL)
    if not call.LL:
        publish(shard, tile, epoch, region, ranks, STAGE, TO_ALL)


@triton.jit
def _fetch_all(x, tile, data, region, message, ranks: tl.constexpr, step: tl.constexpr):
    """Load the tiles of all ranks. All loads are issued before the first result is used."""
    raws = ()
    for i in tl.static_range(ranks.WORLD_SIZE):
        at = arrives_at(i, region) + data + (i * message.n_tiles + tile).to(tl.int64) * step.BYTES
        raws = raws + (fetch(bytes_at(at), x, step),)
    return raws


@triton.jit
def _sum(raws, ok, ranks: tl.constexpr, step: tl.constexpr):
    """Return the float32 sum of all ranks' tiles in rank order, or NaN if not ok.

    Products are exact, so fma changes no bit.
    """
    total = tl.zeros((step.GROUPS, step.PIECES, step.LANES), tl.float32)
    for i in tl.static_range(ranks.WORLD_SIZE):
        steps, scale = expand(raws[i], step)
        scale = tl.where(ok != 0, scale, float("nan"))
        if i == 0:
            total = steps * scale[:, None, None]
        else:
            total = tl.fma(steps, tl.broadcast_to(scale[:, None, None], total.shape), total)
    return total


@triton.jit
def _reduce(x, out, tile, region, message, call: tl.constexpr, ranks: tl.constexpr, reduce: tl.constexpr,
            gather: tl.constexpr):  # fmt: skip
    """The role reduce: sum a tile of the own shard."""
    if call.LL:
        epoch = arrive(region)
    else:
        epoch, ok = arrive_and_wait(scalar(0, like=tile), tile, region, ranks, ranks.WORLD_SIZE, 0)
    shard = scalar(0, like=region.rank) if call.ALGORITHM == _ONE_SHOT else region.rank
    data = inbox_of(epoch, message)
    if call.LL:
        total, ok = low_latency.sum_tiles(x, tile, data, epoch, message, region, ranks, reduce)
    else:
        total = _sum(_fetch_all(x, tile, data, region, message, ranks, reduce), ok, ranks, reduce)
    unit, left = tile_at(tile, shard, message, call)
    at, keep = values_at(left, call.UNIT, reduce)
    if call.ALGORITHM == _TWO_SHOT:  # a load of nothing, which gives the sum the layout of x: it packs best
        never = message.stage_lag < 0
        like_x = swap(tl.load(swap(x + at), mask=swap(keep & never), other=0.0)).to(tl.float32)
        total = tl.where(never, like_x, total)
    if reduce.HADAMARD and not call.SUM_IN_HADAMARD:
        total = from_hadamard(total, reduce)
    if call.ALGORITHM == _TWO_SHOT:
        if reduce.PIECES != gather.PIECES or reduce.LANES != gather.LANES:
            total = tl.reshape(total, (gather.GROUPS, gather.PIECES, gather.LANES))
        if gather.HADAMARD and not call.SUM_IN_HADAMARD:
            total = hadamard(total, gather)
        if ok != 0:  # else peers notice missing LL words, or the missing flag
            _send(total, out, tile, scalar(0, like=region.rank), data + message.stage2_offset, epoch, region,
                  message, call, ranks, gather, True)  # fmt: skip
            if not call.LL:
                publish(region.rank, tile, epoch, region, ranks, 1, True)
    else:
        if call.ALGORITHM == _REDUCE_SCATTER:  # out is the shard alone
            unit -= shard.to(tl.int64) * message.shard_stride
        store(out + unit * call.UNIT, at, keep, total, call.BF16)


@triton.jit
def _gather(x, out, tile, owner, region, message, call: tl.constexpr, ranks: tl.constexpr, step: tl.constexpr):
    """The role gather: decode a tile of rank `owner`'s shard."""
    if call.LL:
        epoch = arrive(region)
    else:
        epoch, came = arrive_and_wait(owner, tile, region, ranks, 1, 1)
    base = arrives_at(owner, region) + inbox_of(epoch, message) + message.stage2_offset
    base += (owner * message.n_tiles + tile).to(tl.int64) * step.BYTES
    if call.LL:
        words = longs_at(base)
        raw = low_latency.fetch(words, epoch, x, step)
        steps, scale, came = low_latency.wait(words, raw, epoch, message.epoch_bytes, owner, x, region, ranks, step, 1)  # fmt: skip
    else:
        steps, scale = expand(fetch(bytes_at(base), x, step), step)
        scale = tl.where(came != 0, scale, float("nan"))
    y = steps * scale[:, None, None]
    unit, left = tile_at(tile, owner, message, call)
    at, keep = values_at(left, call.UNIT, step)
    if step.HADAMARD:
        y = from_hadamard(y, step)
    store(out + unit * call.UNIT, at, keep, y, call.BF16)


@triton.jit
def place(program, message, N_FIRST: tl.constexpr, N_SECOND: tl.constexpr, N_THIRD: tl.constexpr):
    """Return what a program does: the number of its role, its index among the programs of that role and wave, its tile.

    Of n tiles and a lag of l <= n waves, the first role has programs in the waves 0 to n - 1, the second one in l to
    l + n - 1, and the third one in 2l to 2l + n - 1. A program's number is thus cut into stretches of waves that have
    the same number of programs.
    """
    n, lag = message.n_tiles, message.stage_lag
    wave, index = program // N_FIRST, program % N_FIRST
    begin, programs = lag, lag * N_FIRST  # of the next stretch: its first wave, and how many programs come before it
    if program >= programs:
        wave, index = begin + (program - programs) // (N_FIRST + N_SECOND), (program - programs) % (N_FIRST + N_SECOND)
    end = tl.minimum(2 * lag, n) if N_THIRD > 0 else n
    programs += (end - begin) * (N_FIRST + N_SECOND)
    if N_THIRD > 0:
        begin, end = end, tl.maximum(2 * lag, n)
        width = tl.where(begin < n, N_FIRST + N_SECOND + N_THIRD, N_SECOND)
        if program >= programs:
            wave, index = begin + (program - programs) // width, (program - programs) % width
        programs += (end - begin) * width
    if program >= programs:
        wave, index = end + (program - programs) // (N_SECOND + N_THIRD), (program - programs) % (N_SECOND + N_THIRD)
    if N_THIRD > 0:
        programs += (n + lag - end) * (N_SECOND + N_THIRD)
        if program >= programs:
            wave, index = n + lag + (program - programs) // N_THIRD, (program - programs) % N_THIRD

    role = scalar(0, like=wave)
    if (wave >= n) | (index >= N_FIRST):  # not the first role
        index -= tl.where(wave < n, N_FIRST, 0)
        role += 1
        if (wave >= n + lag) | (index >= N_SECOND):
            index -= tl.where(wave < n + lag, N_SECOND, 0)
            role += 1
    return role, index, wave - role * lag


@triton.jit
def collective(x, out, region, message, call: tl.constexpr, ranks: tl.constexpr, reduce: tl.constexpr,
               gather: tl.constexpr):  # fmt: skip
    """Run one program of a collective.

    Args:
        x: pointer to this rank's message, 16-byte aligned.
        out: pointer to this rank's result, 16-byte aligned. In an all-reduce it may be x.
        region: a `sync.Region`.
        message: a `Message`.
        call: a `Collective`.
        ranks: a `sync.Ranks`.
        reduce: the `tile.Step` of tiles that go from encode to reduce.
        gather: the `tile.Step` of tiles that go from reduce (all_gather: from encode) to gather.
    """
    EXCHANGES: tl.constexpr = call.ALGORITHM == _ALL_TO_ALL
    SUMS: tl.constexpr = not (EXCHANGES or call.ALGORITHM == _ALL_GATHER)
    # Whether a tile goes to one rank, and not to all.
    SHARDED: tl.constexpr = EXCHANGES or call.ALGORITHM == _TWO_SHOT or call.ALGORITHM == _REDUCE_SCATTER
    N_ENCODE: tl.constexpr = ranks.WORLD_SIZE if SHARDED else 1
    N_SECOND: tl.constexpr = 1 if SUMS else ranks.WORLD_SIZE - 1 if EXCHANGES else ranks.WORLD_SIZE
    N_THIRD: tl.constexpr = ranks.WORLD_SIZE if call.ALGORITHM == _TWO_SHOT else 0

    role, index, tile = place(tl.program_id(0), message, N_ENCODE, N_SECOND, N_THIRD)
    if role == 0:
        shard = index if SHARDED else scalar(0, like=region.rank)
        if SUMS:
            _encode(x, out, tile, shard, region, message, call, ranks, reduce, 0, not SHARDED)
        elif not EXCHANGES:
            _encode(x, out, tile, shard, region, message, call, ranks, gather, 1, True)
        elif shard == region.rank:
            copy_tile(x, out, tile, shard, message, call, gather)
            arrive(region)
        else:
            _encode(x, out, tile, shard, region, message, call, ranks, gather, 1, False)
    elif not SUMS:
        owner = rank_of(index, region) if EXCHANGES else index
        _gather(x, out, tile, owner, region, message, call, ranks, gather)
    elif role == 1:
        _reduce(x, out, tile, region, message, call, ranks, reduce, gather)
    elif N_THIRD > 0:
        _gather(x, out, tile, index, region, message, call, ranks, gather)
