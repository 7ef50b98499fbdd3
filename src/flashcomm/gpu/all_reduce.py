"""The fused collectives' kernel: one launch quantizes, moves, reduces and gathers over peers' memory.

A message is cut into *slices* of units (a unit is the larger of the two groups), one per destination, and slices into
tiles, RUN of them a block. A launch is a sequence of steps; step s holds a program for each of these roles, in order:

    E   encode block s of a slice, put it where its destination finds it      two_shot, reduce_scatter: one per slice
    S   sum everybody's block s - LAG of the own slice, in rank order, to out; two_shot: encode the sum again, for G
    G   decode block s - 2 * LAG of a slice, from its owner, to out           two_shot, all_gather: one per slice

A producer stores into its consumers' memory; each block has a flag there, which it sets to the call's epoch. Small
messages come without flags: their data carries the epoch (LL, `fused_ll`).

Why it ends. A program waits only for programs of earlier steps, or of its own step and an earlier role, on other GPUs,
and GPUs start the programs of a grid in order, as look-back scans also assume. So the first program anywhere that is
not finished waits for nobody. In Triton's interpreter programs run one after the other.

Why no bytes are overwritten while somebody reads. Data of even and odd epochs lie apart. A rank in epoch e + 2 has
ended epoch e + 1, for which every peer had to set a flag (LL: to send a tile), which it did after its own epoch e,
readers included, had ended. So what one epoch waits for is the barrier for the last but one epoch's data, whichever way
either of them sent it, and flags never need to be cleared.

The epoch lives in device memory, above the count of programs that have started: the last one to start writes the next.
A wait that lasts longer than the time-out is reported (`status`), all later waits end soon, out becomes NaN, and peers
get nothing more from this rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcomm.gpu import low_latency
from flashcomm.gpu.sync import (
    BLOCKS,
    FLAGS_AT,
    STAGE_AT,
    arrive,
    bytes_at,
    home,
    long_words,
    publish,
    wait,
    words,
)
from flashcomm.gpu.tile import expand, fetch, hadamard, put, quantize, store, widen

ONE_SHOT, TWO_SHOT, REDUCE_SCATTER, ALL_GATHER = range(4)
_ONE_SHOT, _TWO_SHOT, _REDUCE_SCATTER, _ALL_GATHER = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def _places(unit, left, row, units_per_row, UNIT: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
            M: tl.constexpr, TAILS: tl.constexpr):  # fmt: skip
    """Where the values of a tile are in the message: offsets from its first (B, P, M), which exist, n of groups (B,).

    unit: of the message, at which the tile begins; left: how many units exist from there on.
    """
    RATIO: tl.constexpr = UNIT // GROUP
    k = tl.arange(0, B)
    inside = (tl.arange(0, P) * M)[None, :, None] + tl.arange(0, M)[None, None, :]
    if TAILS:
        u, part = unit + k // RATIO, (k % RATIO) * GROUP
        column = (u % units_per_row) * UNIT + part
        n = tl.minimum(tl.maximum(row - column, 0), GROUP).to(tl.int32)
        at = (u // units_per_row * row + column)[:, None, None] + inside
        return at, (k // RATIO < left)[:, None, None] & (inside < n[:, None, None]), n
    else:
        at = (k * GROUP)[:, None, None] + inside
        return at, (k // RATIO < left)[:, None, None] & (inside >= 0), k * 0 + GROUP


@triton.jit
def _powers(n, TAILS: tl.constexpr):
    """n where a group of n values is transformed, else 1."""
    if TAILS:
        return tl.where((n & (n - 1) == 0) & (n > 0), n, 1)
    else:
        return n


@triton.jit
def _in_order(P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """Places of lossless values within a tile: threads next to each other write next to each other."""
    return (tl.arange(0, P) * (B * M))[None, :, None] + (tl.arange(0, B) * M)[:, None, None] + tl.arange(0, M)[None, None, :]  # fmt: skip


@triton.jit
def _put(base, y, n, out, BITS: tl.constexpr, SHRUNK: tl.constexpr, HADAMARD: tl.constexpr, P: tl.constexpr,
         B: tl.constexpr, M: tl.constexpr, BF16: tl.constexpr):  # fmt: skip
    """Code y (float32) to the tile at base; lossless tiles hold out's dtype."""
    if BITS == 16:
        at = _in_order(P, B, M)
        store(base.to(tl.pointer_type(out.dtype.element_ty)), at, at >= 0, y, BF16)
    else:
        codes, word, zero = quantize(y, n, BITS, SHRUNK, HADAMARD, P, B, M)
        put(base, codes, word, zero, BITS, P, B, M)


@triton.jit
def _fetch(base, x, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """Everything loaded of the tile at base: `_expand` makes values of it."""
    if BITS == 16:
        return tl.load(base.to(tl.pointer_type(x.dtype.element_ty)) + _in_order(P, B, M), cache_modifier=".cg")
    else:
        return fetch(base, BITS, P, B, M)


@triton.jit
def _expand(raw, ok, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """A tile's values as a product: float32 (B, P, M) and what it is to be multiplied with (B,); NaN unless ok."""
    if BITS == 16:
        return widen(raw), tl.where((tl.arange(0, B) >= 0) & (ok != 0), 1.0, float("nan"))
    else:
        steps, scale = expand(raw, BITS, P, B, M)
        return steps, tl.where(ok != 0, scale, float("nan"))


@triton.jit
def _message(tile, slice, n_units, slice_units, stride, UNITS: tl.constexpr):
    """The unit of the message at which a tile of a slice begins, and how many units of it exist."""
    unit = tile.to(tl.int64) * UNITS
    first = slice.to(tl.int64) * stride
    return first + unit, tl.minimum(slice_units - unit, n_units - first - unit)


@triton.jit
def _load(x, tile, slice, row, units_per_row, n_units, slice_units, stride, UNIT: tl.constexpr, UNITS: tl.constexpr,
          GROUP: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, TAILS: tl.constexpr):  # fmt: skip
    """A tile of x, float32 (B, P, M), 0 where there are no values, and n of its groups."""
    unit, left = _message(tile, slice, n_units, slice_units, stride, UNITS)
    at, keep, n = _places(unit, left, row, units_per_row, UNIT, GROUP, P, B, M, TAILS)
    return widen(tl.load(x + at if TAILS else x + unit * UNIT + at, mask=keep, other=0.0)), n


@triton.jit
def _spread(y, n, tile, slice, offset, epoch, peers, rank, n_tiles, out, TO_ALL: tl.constexpr, WORLD: tl.constexpr,
            BITS: tl.constexpr, SHRUNK: tl.constexpr, TURNED: tl.constexpr, P: tl.constexpr,
            B: tl.constexpr, M: tl.constexpr, BYTES: tl.constexpr, BF16: tl.constexpr, LL: tl.constexpr):  # fmt: skip
    """Code a tile to where its consumers, all or rank `slice`, look for it."""
    for i in tl.static_range(WORLD if TO_ALL else 1):
        base = tl.load(peers + (i if TO_ALL else slice)) + offset + (rank * n_tiles + tile).to(tl.int64) * BYTES
        if LL:
            low_latency.put(long_words(base), y, n, epoch, out, BITS, SHRUNK, TURNED, P, B, M, BF16)
        else:
            _put(bytes_at(base), y, n, out, BITS, SHRUNK, TURNED, P, B, M, BF16)


@triton.jit
def _encode(x, out, block, slice, offset, half, local, peers, rank, row, units_per_row, n_units, slice_units, stride,
            n_tiles, STAGE: tl.constexpr, TO_ALL: tl.constexpr, WORLD: tl.constexpr,
            RUN: tl.constexpr, TAILS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr,
            SHRUNK: tl.constexpr, TURNED: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
            M: tl.constexpr, BYTES: tl.constexpr, MAPPED: tl.constexpr, BF16: tl.constexpr,
            LL: tl.constexpr):  # fmt: skip
    """Role E: code a block of x to where its consumers look for it, and publish it."""
    if RUN == 1:  # of small messages: the values are on their way while the epoch is
        y, n = _load(x, block, slice, row, units_per_row, n_units, slice_units, stride, UNIT, UNITS, GROUP, P, B, M, TAILS)  # fmt: skip
        epoch = arrive(local)
        offset += (epoch & 1).to(tl.int64) * half
        if TURNED:
            y = hadamard(y, _powers(n, TAILS), P, B, M, TAILS)
        _spread(y, n, block, slice, offset, epoch, peers, rank, n_tiles, out, TO_ALL, WORLD, BITS, SHRUNK, TURNED, P, B, M, BYTES, BF16, LL)  # fmt: skip
    else:
        epoch = arrive(local)
        offset += (epoch & 1).to(tl.int64) * half
        last = tl.minimum(block * RUN + RUN, n_tiles) - 1
        after, n_after = _load(x, block * RUN, slice, row, units_per_row, n_units, slice_units, stride, UNIT, UNITS, GROUP, P, B, M, TAILS)  # fmt: skip
        for k in tl.static_range(RUN):  # the next tile is on its way while this one is coded
            tile = block * RUN + k
            y, n = after, n_after
            if k + 1 < RUN:
                after, n_after = _load(x, tl.minimum(tile + 1, last), slice, row, units_per_row, n_units, slice_units, stride, UNIT, UNITS, GROUP, P, B, M, TAILS)  # fmt: skip
            if tile <= last:
                if TURNED:
                    y = hadamard(y, _powers(n, TAILS), P, B, M, TAILS)
                _spread(y, n, tile, slice, offset, epoch, peers, rank, n_tiles, out, TO_ALL, WORLD, BITS, SHRUNK, TURNED, P, B, M, BYTES, BF16, LL)  # fmt: skip
    if not LL:
        publish(peers, rank, slice, block, epoch, STAGE, TO_ALL, WORLD, MAPPED)


@triton.jit
def _fetch_all(x, tile, offset, own, local, rank, n_tiles, WORLD: tl.constexpr,
               BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    """Everybody's tile, all loads under way before one is used."""
    raws = ()
    for i in tl.static_range(WORLD):
        at = home(i, rank, own, local) + offset + (i * n_tiles + tile).to(tl.int64) * BYTES
        raws = raws + (_fetch(bytes_at(at), x, BITS, P, B, M),)
    return raws


@triton.jit
def _sum(raws, ok, WORLD: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
         M: tl.constexpr):  # fmt: skip
    """The sum of everybody's y^ of a tile, in rank order, float32; products are exact, so that fma changes no bit."""
    steps, scale = _expand(raws[0], ok, BITS, P, B, M)
    total = steps * scale[:, None, None]
    for i in tl.static_range(1, WORLD):
        steps, scale = _expand(raws[i], ok, BITS, P, B, M)
        total = tl.fma(steps, tl.broadcast_to(scale[:, None, None], (B, P, M)), total)
    return total


@triton.jit
def _unturned(y, n, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, TAILS: tl.constexpr):
    powers = _powers(n, TAILS)
    return hadamard(y, powers, P, B, M, TAILS) * (1.0 / powers.to(tl.float32))[:, None, None]


_RUN_TIME = ("rank", "row", "units_per_row", "n_units", "slice_units", "stride", "n_tiles", "half", "second", "limit", "lag", "own", "local", "area")  # fmt: skip


@triton.jit(do_not_specialize=list(_RUN_TIME))
def fused(
    x, out, peers, status, own: tl.int64, local: tl.int64, rank: tl.int32, row: tl.int64, units_per_row: tl.int64,
    n_units: tl.int64, slice_units: tl.int64, stride: tl.int64, n_tiles: tl.int32, area: tl.int64, half: tl.int64,
    second: tl.int64, limit: tl.int64, lag: tl.int32,
    KIND: tl.constexpr, WORLD: tl.constexpr, RUN: tl.constexpr, TAILS: tl.constexpr,
    UNIT: tl.constexpr, UNITS: tl.constexpr, ROTATED: tl.constexpr,
    BITS1: tl.constexpr, SHRUNK1: tl.constexpr, TURNED1: tl.constexpr, GROUP1: tl.constexpr, P1: tl.constexpr,
    BYTES1: tl.constexpr,
    BITS2: tl.constexpr, SHRUNK2: tl.constexpr, TURNED2: tl.constexpr, GROUP2: tl.constexpr, P2: tl.constexpr,
    BYTES2: tl.constexpr,
    REAL: tl.constexpr, MAPPED: tl.constexpr, DELAY: tl.constexpr, BF16: tl.constexpr, LL: tl.constexpr,
):  # fmt: skip
    """x, out: the message of this rank. peers: int64 (WORLD,), where this rank writes for each rank; own: where others
    write for this one; local: where it writes for itself, GPU memory, which also holds the epoch. own and local are one
    but where own is mapped host memory.

    status: int32 (5,), host memory. Slices begin stride units apart and have slice_units units (the last ones may have
    fewer, of n_units in all) and n_tiles tiles of UNITS units; area: where in a region data begins; half: bytes of an
    epoch's data; second: bytes into it at which stage 2 lies. *1 is the reduce step (E to S), *2 the gather step (S or
    E to G). limit: of a wait, in ns (REAL) or polls. LL: no flags, data carries the epoch (`fused_ll`).
    """
    B1: tl.constexpr = UNITS * UNIT // GROUP1
    M1: tl.constexpr = GROUP1 // P1
    B2: tl.constexpr = UNITS * UNIT // GROUP2
    M2: tl.constexpr = GROUP2 // P2
    SLICED: tl.constexpr = KIND == _TWO_SHOT or KIND == _REDUCE_SCATTER  # E by destination
    N_E: tl.constexpr = WORLD if SLICED else 1
    N_S: tl.constexpr = 0 if KIND == _ALL_GATHER else 1
    N_G: tl.constexpr = WORLD if KIND == _TWO_SHOT or KIND == _ALL_GATHER else 0
    LAGS: tl.constexpr = 2 if KIND == _TWO_SHOT else 1

    n_blocks = (n_tiles + RUN - 1) // RUN
    step, role = tl.program_id(0) // (N_E + N_S + N_G), tl.program_id(0) % (N_E + N_S + N_G)
    if role < N_E:
        if step < n_blocks:
            slice = role if SLICED else rank * 0
            if KIND == _ALL_GATHER:
                _encode(x, out, step, slice, area + second, half, local, peers, rank, row, units_per_row, n_units,
                        slice_units, stride, n_tiles, 1, True, WORLD, RUN, TAILS, UNIT, UNITS, BITS2, SHRUNK2,
                        TURNED2, GROUP2, P2, B2, M2, BYTES2, MAPPED, BF16, LL)  # fmt: skip
            else:
                _encode(x, out, step, slice, area + second * 0, half, local, peers, rank, row, units_per_row,
                        n_units, slice_units, stride, n_tiles, 0, not SLICED, WORLD, RUN, TAILS, UNIT, UNITS, BITS1,
                        SHRUNK1, TURNED1, GROUP1, P1, B1, M1, BYTES1, MAPPED, BF16, LL)  # fmt: skip
        else:
            arrive(local)
    elif role < N_E + N_S:
        epoch = arrive(local)
        data = area + (epoch & 1).to(tl.int64) * half
        block = step - lag
        if (block >= 0) & (block < n_blocks):
            slice = rank if SLICED else rank * 0
            ok = rank * 0 + 1
            last = tl.minimum(block * RUN + RUN, n_tiles) - 1
            if not LL:
                for i in tl.static_range(WORLD):
                    flag = words(home(i, rank, own, local) + FLAGS_AT + 4 * (i * BLOCKS + block))
                    ok &= wait(flag, epoch, 1, i, local, peers, status, limit, WORLD, REAL, MAPPED, DELAY)
                after = _fetch_all(x, block * RUN, data, own, local, rank, n_tiles, WORLD, BITS1, P1, B1, M1, BYTES1)
            for k in tl.static_range(RUN):
                tile = block * RUN + k
                if not LL:
                    raws = after
                    if k + 1 < RUN:
                        after = _fetch_all(x, tl.minimum(tile + 1, last), data, own, local, rank, n_tiles, WORLD, BITS1, P1, B1, M1, BYTES1)  # fmt: skip
                if tile <= last:
                    if LL:
                        total, came = low_latency.tiles_sum(x, tile, data, epoch, half, own, local, rank, n_tiles, peers, status, limit, WORLD, REAL, MAPPED, DELAY, BITS1, P1, B1, M1, BYTES1)  # fmt: skip
                        ok &= came
                    else:
                        total = _sum(raws, ok, WORLD, BITS1, P1, B1, M1)
                    unit, left = _message(tile, slice, n_units, slice_units, stride, UNITS)
                    at1, keep1, n1 = _places(unit, left, row, units_per_row, UNIT, GROUP1, P1, B1, M1, TAILS)
                    # loads nothing; gives the tile the layout of x, which packs best
                    if KIND == _TWO_SHOT and not TAILS:
                        total = tl.where(
                            lag < 0, tl.load(x + at1, mask=keep1 & (lag < 0), other=0.0).to(tl.float32), total
                        )
                    if TURNED1 and not ROTATED:
                        total = _unturned(total, n1, P1, B1, M1, TAILS)
                    if KIND == _TWO_SHOT:
                        _, _, n2 = _places(unit, left, row, units_per_row, UNIT, GROUP2, P2, B2, M2, TAILS)
                        if P1 == P2 and M1 == M2:
                            again = total
                        else:
                            again = tl.reshape(total, (B2, P2, M2))
                        if TURNED2 and not ROTATED:
                            again = hadamard(again, _powers(n2, TAILS), P2, B2, M2, TAILS)
                        if (ok != 0) if LL else True:  # a gap in the data, or a flag that stays out, tells the peers
                            _spread(again, n2, tile, rank * 0, data + second, epoch, peers, rank, n_tiles, out, True,
                                    WORLD, BITS2, SHRUNK2, TURNED2, P2, B2, M2, BYTES2, BF16, LL)  # fmt: skip
                    else:
                        if KIND == _REDUCE_SCATTER:  # out is the slice alone
                            unit -= slice.to(tl.int64) * stride
                            at1, keep1, n1 = _places(unit, left, row, units_per_row, UNIT, GROUP1, P1, B1, M1, TAILS)
                        store(out if TAILS else out + unit * UNIT, at1, keep1, total, BF16)
            if KIND == _TWO_SHOT and not LL:
                if ok != 0:
                    publish(peers, rank, rank, block, epoch, 1, True, WORLD, MAPPED)
    else:
        epoch2 = arrive(local)
        offset = area + (epoch2 & 1).to(tl.int64) * half + second
        block2, owner = step - LAGS * lag, role - (N_E + N_S)
        if (block2 >= 0) & (block2 < n_blocks):
            here = home(owner, rank, own, local)
            if not LL:
                flag2 = words(here + FLAGS_AT + STAGE_AT + 4 * (owner * BLOCKS + block2))
                came2 = wait(flag2, epoch2, 2, owner, local, peers, status, limit, WORLD, REAL, MAPPED, DELAY)
            for k2 in range(RUN):
                tile2 = block2 * RUN + k2
                if tile2 < n_tiles:
                    place = here + offset + (owner * n_tiles + tile2).to(tl.int64) * BYTES2
                    if LL:
                        at2 = long_words(place)
                        raw2 = low_latency.fetch(at2, epoch2, x, BITS2, P2, B2, M2)
                        steps, scale, came2 = low_latency.arrived(at2, raw2, epoch2, half, 2, owner, local, peers, status, limit, x, WORLD, REAL, MAPPED, DELAY, BITS2, P2, B2, M2)  # fmt: skip
                    else:
                        steps, scale = _expand(_fetch(bytes_at(place), x, BITS2, P2, B2, M2), came2, BITS2, P2, B2, M2)
                    y = steps * scale[:, None, None]
                    begin, remain = _message(tile2, owner, n_units, slice_units, stride, UNITS)
                    at3, keep3, n3 = _places(begin, remain, row, units_per_row, UNIT, GROUP2, P2, B2, M2, TAILS)
                    if TURNED2:
                        y = _unturned(y, n3, P2, B2, M2, TAILS)
                    store(out if TAILS else out + begin * UNIT, at3, keep3, y, BF16)
