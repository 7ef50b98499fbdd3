"""The all-reduce over peers' memory with the epilogue in it: `fused_kernel`, whose last role has whole rows.

Tiles, blocks, regions, flags and epochs are those of `fused_kernel`; so is why it ends and why no bytes are overwritten
while somebody reads. Step s holds a program for each of these roles, in order:

    E   encode block s of a slice, put it where its destination finds it      two_shot: one per slice
    S   two_shot alone: sum everybody's block s - LAG of the own slice, encode the sum for all
    R   rows whose last value is in block s - LAG of the message (one_shot) or s - 2 * LAG of a slice (two_shot, one per
        slice; rows that go on in the next slice belong to the last block of the one where they begin): decode, add the
        residual, store the sum, normalise, store

So a row's tiles were all made in earlier steps or by earlier roles. A row stays in registers from beginning to end, as
CHUNKS chunks of a power of two values each; of shorter rows a few go side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcomm.collectives.fused_kernel import (
    _TWO_SHOT,
    _encode,
    _fetch,
    _fetch_all,
    _message,
    _spread,
    _sum,
    _unturned,
)
from flashcomm.collectives.fused_sync import BLOCKS, FLAGS_AT, STAGE_AT, arrive, bytes_at, home, publish, wait, words
from flashcomm.collectives.norm_kernel import normed, pair_sum, push, rounded, scale_of, value_of
from flashcomm.wire.triton_tile import fetch_plane, hadamard, widen


@triton.jit
def _again(x, out, block, data, second, epoch, own, local, peers, status, rank, n_units, slice_units, stride, n_tiles,
           limit, lag, WORLD: tl.constexpr, RUN: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
           ROTATED: tl.constexpr, BITS1: tl.constexpr, TURNED1: tl.constexpr, GROUP1: tl.constexpr, P1: tl.constexpr,
           BYTES1: tl.constexpr, BITS2: tl.constexpr, SHRUNK2: tl.constexpr, TURNED2: tl.constexpr,
           GROUP2: tl.constexpr, P2: tl.constexpr, BYTES2: tl.constexpr, REAL: tl.constexpr, MAPPED: tl.constexpr,
           DELAY: tl.constexpr, BF16: tl.constexpr):  # fmt: skip
    """Role S: as in `fused_kernel.fused`, of rows of whole units."""
    B1: tl.constexpr = UNITS * UNIT // GROUP1
    M1: tl.constexpr = GROUP1 // P1
    B2: tl.constexpr = UNITS * UNIT // GROUP2
    M2: tl.constexpr = GROUP2 // P2
    ok = rank * 0 + 1
    for i in tl.static_range(WORLD):
        flag = words(home(i, rank, own, local) + FLAGS_AT + 4 * (i * BLOCKS + block))
        ok &= wait(flag, epoch, 1, i, local, peers, status, limit, WORLD, REAL, MAPPED, DELAY)
    last = tl.minimum(block * RUN + RUN, n_tiles) - 1
    after = _fetch_all(x, block * RUN, data, own, local, rank, n_tiles, WORLD, BITS1, P1, B1, M1, BYTES1)
    for k in tl.static_range(RUN):
        tile = block * RUN + k
        raws = after
        if k + 1 < RUN:
            next = tl.minimum(tile + 1, last)
            after = _fetch_all(x, next, data, own, local, rank, n_tiles, WORLD, BITS1, P1, B1, M1, BYTES1)
        if tile <= last:
            total = _sum(raws, ok, WORLD, BITS1, P1, B1, M1)
            unit, left = _message(tile, rank, n_units, slice_units, stride, UNITS)
            # loads nothing; gives the tile the layout of x, which packs best
            at = (tl.arange(0, B1) * GROUP1)[:, None, None] + (tl.arange(0, P1) * M1)[None, :, None] + tl.arange(0, M1)[None, None, :]  # noqa: E501  # fmt: skip
            none = (at < 0) & (lag < 0)
            total = tl.where(lag < 0, tl.load(x + unit * UNIT + at, mask=none, other=0.0).to(tl.float32), total)
            if TURNED1 and not ROTATED:
                total = _unturned(total, tl.arange(0, B1) * 0 + GROUP1, P1, B1, M1, False)
            n = tl.arange(0, B2) * 0 + GROUP2
            if P1 == P2 and M1 == M2:
                again = total
            else:
                again = tl.reshape(total, (B2, P2, M2))
            if TURNED2 and not ROTATED:
                again = hadamard(again, n, P2, B2, M2, False)
            _spread(again, n, tile, rank * 0, data + second, epoch, peers, rank, n_tiles, out, True, WORLD, BITS2,
                    SHRUNK2, TURNED2, P2, B2, M2, BYTES2, BF16, False)  # fmt: skip
    if ok != 0:  # without a flag the peers see that something is missing
        publish(peers, rank, rank, block, epoch, 1, True, WORLD, MAPPED)


@triton.jit
def _first_row(owner, block, n_blocks, stride, n_rows, T: tl.constexpr, PER_ROW: tl.constexpr):
    """The first row that belongs to a block of a slice; past the last block: to the next slice. int32."""
    begin = owner.to(tl.int64) * stride
    first = (begin + PER_ROW - 1) // PER_ROW
    if block < n_blocks:
        first = tl.maximum(first, (begin + block.to(tl.int64) * T) // PER_ROW)
    else:
        first = (begin + stride + PER_ROW - 1) // PER_ROW
    return tl.minimum(first, n_rows).to(tl.int32)


@triton.jit
def _await(first, last, n_blocks, n_tiles, epoch, own, local, rank, peers, status, limit, TWO: tl.constexpr,
           WORLD: tl.constexpr, RUN: tl.constexpr, UNITS: tl.constexpr, PER_ROW: tl.constexpr, REAL: tl.constexpr,
           MAPPED: tl.constexpr, DELAY: tl.constexpr):  # fmt: skip
    """Wait for all blocks that hold rows [first, last); 0 if one did not come."""
    begin, end = (first.to(tl.int64) * PER_ROW // UNITS).to(tl.int32), ((last.to(tl.int64) * PER_ROW - 1) // UNITS).to(tl.int32)  # noqa: E501  # fmt: skip
    ok = rank * 0 + 1
    if TWO:
        begin = begin // n_tiles * n_blocks + begin % n_tiles // RUN
        end = end // n_tiles * n_blocks + end % n_tiles // RUN
        for at in range(begin, end + 1):
            owner = at // n_blocks
            flag = words(home(owner, rank, own, local) + FLAGS_AT + STAGE_AT + 4 * (owner * BLOCKS + at % n_blocks))
            ok &= wait(flag, epoch, 2, owner, local, peers, status, limit, WORLD, REAL, MAPPED, DELAY)
    else:
        for block in range(begin // RUN, end // RUN + 1):
            for i in tl.static_range(WORLD):
                flag1 = words(home(i, rank, own, local) + FLAGS_AT + 4 * (i * BLOCKS + block))
                ok &= wait(flag1, epoch, 1, i, local, peers, status, limit, WORLD, REAL, MAPPED, DELAY)
    return ok


@triton.jit
def _fetch_groups(base, x, tile, b, keep, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr,
                  BYTES: tl.constexpr):  # fmt: skip
    """`_fetch` of groups b (any number of them), each of tile `tile` of those of B groups from base on."""
    U: tl.constexpr = 4 if M % 4 == 0 else 1
    if BITS == 16:
        values = base.to(tl.pointer_type(x.dtype.element_ty))
        begin = tile * (BYTES // (x.dtype.element_ty.primitive_bitwidth // 8)) + b * M
        begin = tl.multiple_of(begin, M)
        at = begin[:, None, None] + (tl.arange(0, P) * (B * M))[None, :, None] + tl.arange(0, M)[None, None, :]
        return tl.load(values + at, mask=keep[:, None, None], other=0.0, cache_modifier=".cg")
    else:
        begin, raw = tl.multiple_of(tile * BYTES + b * M, M), ()
        for i in tl.static_range(4):
            if BITS & (8 >> i):
                plane = base + B * P * M * (BITS & (15 ^ ((16 >> i) - 1))) // 8
                raw = raw + (fetch_plane(plane, begin, keep, B * M, 8 >> i, P, M, U, ".cg"),)
        at = base + B * P * M * BITS // 8
        if BITS > 5:
            word = tl.load(at.to(tl.pointer_type(tl.int32)) + (tile * (BYTES // 4) + b), mask=keep, other=0, cache_modifier=".cg")  # noqa: E501  # fmt: skip
        else:
            word = tl.load(at.to(tl.pointer_type(tl.int16)) + (tile * (BYTES // 2) + b), mask=keep, other=0, cache_modifier=".cg")  # noqa: E501  # fmt: skip
        return raw + (word,)


@triton.jit
def _chunk(x, row, last, c, data, own, local, rank, n_tiles, SOURCES: tl.constexpr, ROW: tl.constexpr,
           CHUNK: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
           P: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    """Every source's part of chunk c of ROWS rows from `row` on, as it lies there."""
    M: tl.constexpr = GROUP // P
    G: tl.constexpr = CHUNK // GROUP
    first = row.to(tl.int64) * (ROW // GROUP) + c * G  # group of the message
    tile = first // B
    raws = ()
    for i in tl.static_range(SOURCES):
        here = local if SOURCES == 1 else home(i, rank, own, local)
        base = bytes_at(here + data + (i * n_tiles + tile) * BYTES)
        if ROWS * CHUNK == B * GROUP and (CHUNK == ROW or ROW % CHUNK == 0):  # it is a tile
            raws = raws + (_fetch(base, x, BITS, P, B, M),)
        else:
            k = tl.arange(0, ROWS * G)
            exists = (row + k // G < last) & (c * G + k % G < ROW // GROUP)
            group = (first - tile * B).to(tl.int32) + (k // G * (ROW // GROUP) + k % G)
            raws = raws + (_fetch_groups(base, x, group // B, group % B, exists, BITS, P, B, M, BYTES),)
    return raws


@triton.jit
def _beside(residual, row, last, c, ROW: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
            P: tl.constexpr):  # fmt: skip
    """The residual's chunk c of ROWS rows from `row` on, 0 where there is none."""
    at, keep = _inside(row, last, c, ROW, CHUNK, ROWS, GROUP, P)
    return tl.load(residual + row.to(tl.int64) * ROW + c * CHUNK + at, mask=keep, other=0.0)


@triton.jit
def _weights(weight, c, ROW: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
             P: tl.constexpr):  # fmt: skip
    """The weight's chunk c, for each of ROWS rows."""
    G: tl.constexpr = CHUNK // GROUP
    inside = (tl.arange(0, P) * (GROUP // P))[None, :, None] + tl.arange(0, GROUP // P)[None, None, :]
    k = tl.arange(0, ROWS * G)
    column = c * CHUNK + (k if ROWS == 1 else k % G)[:, None, None] * GROUP + inside
    return tl.load(weight + column, mask=column < ROW, other=0.0)


@triton.jit
def _inside(row, last, c, ROW: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
            P: tl.constexpr):  # fmt: skip
    """Where the values of chunk c of ROWS rows are, from its first one on, and which exist: (groups, P, GROUP / P)."""
    G: tl.constexpr = CHUNK // GROUP
    k = tl.arange(0, ROWS * G)
    inside = (tl.arange(0, P) * (GROUP // P))[None, :, None] + tl.arange(0, GROUP // P)[None, None, :]
    if CHUNK == ROW or ROWS == 1:
        at = k * GROUP
    else:
        at = k // G * ROW + k % G * GROUP
    exists = (row + k // G < last) & (c * G + k % G < ROW // GROUP)
    return at[:, None, None] + inside, exists[:, None, None] & (inside >= 0)


@triton.jit
def _rows(x, residual, weight, out, summed, eps, first, last, data, ok, mine, w, own, local, rank, n_tiles,
          SOURCES: tl.constexpr, RUN: tl.constexpr, TIMES: tl.constexpr, ROW: tl.constexpr, CHUNK: tl.constexpr,
          CHUNKS: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr, TURNED: tl.constexpr,
          GROUP: tl.constexpr, P: tl.constexpr, BYTES: tl.constexpr, BF16: tl.constexpr):  # fmt: skip
    """Role R for rows [first, last), at most TIMES * ROWS: the next chunk is on its way while one is decoded.

    mine: the first chunk's residuals; w: with RUN 1, the weights of chunk 0.
    """
    M: tl.constexpr = GROUP // P
    G: tl.constexpr = CHUNK // GROUP
    BR: tl.constexpr = ROWS * G
    raws = _chunk(x, first, last, 0, data, own, local, rank, n_tiles, SOURCES, ROW, CHUNK, ROWS, B, BITS, GROUP, P, BYTES)  # noqa: E501  # fmt: skip
    for t in tl.static_range(TIMES):
        row = first + t * ROWS
        if row < last:
            kept, sums = (), ()
            for c in tl.static_range(CHUNKS):
                now, beside = raws, mine
                if c + 1 < CHUNKS:
                    raws = _chunk(x, row, last, c + 1, data, own, local, rank, n_tiles, SOURCES, ROW, CHUNK, ROWS, B, BITS, GROUP, P, BYTES)  # noqa: E501  # fmt: skip
                    mine = _beside(residual, row, last, c + 1, ROW, CHUNK, ROWS, GROUP, P)
                elif t + 1 < TIMES:
                    next = tl.where(row + ROWS < last, row + ROWS, row)
                    raws = _chunk(x, next, last, 0, data, own, local, rank, n_tiles, SOURCES, ROW, CHUNK, ROWS, B, BITS, GROUP, P, BYTES)  # noqa: E501  # fmt: skip
                    mine = _beside(residual, next, last, 0, ROW, CHUNK, ROWS, GROUP, P)
                y = _sum(now, ok, SOURCES, BITS, P, BR, M)
                if TURNED:
                    y = _unturned(y, tl.arange(0, BR) * 0 + GROUP, P, BR, M, False)
                at, keep = _inside(row, last, c, ROW, CHUNK, ROWS, GROUP, P)
                stored = rounded(value_of(rounded(y, out, BF16), BF16) + widen(beside), out, BF16)
                tl.store(summed + row.to(tl.int64) * ROW + c * CHUNK + at, stored, mask=keep)
                y = value_of(stored, BF16)
                kept, sums = kept + (stored,), push(sums, pair_sum(y * y, CHUNK, ROWS), c)
            scale = scale_of(sums, eps, ROW, ROWS)
            if ROWS == 1:
                scale = tl.reshape(scale, (1, 1, 1))
            else:
                scale = tl.reshape(tl.broadcast_to(scale[:, None], (ROWS, G)), (BR,))[:, None, None]
            for c in tl.static_range(CHUNKS):
                at, keep = _inside(row, last, c, ROW, CHUNK, ROWS, GROUP, P)
                weights = w
                if RUN > 1 or c > 0:
                    weights = _weights(weight, c, ROW, CHUNK, ROWS, GROUP, P)
                y = rounded(normed(kept[c], scale, weights, out, BF16), out, BF16)
                tl.store(out + row.to(tl.int64) * ROW + c * CHUNK + at, y, mask=keep)


_RUN_TIME = ("own", "local", "rank", "n_rows", "n_units", "slice_units", "stride", "n_tiles", "area", "half", "second", "limit", "lag")  # fmt: skip  # noqa: E501


@triton.jit(do_not_specialize=list(_RUN_TIME))
def fused_norm(
    x, residual, weight, out, summed, peers, status, own: tl.int64, local: tl.int64, rank: tl.int32, n_rows: tl.int32,
    n_units: tl.int64, slice_units: tl.int64, stride: tl.int64, n_tiles: tl.int32, area: tl.int64, half: tl.int64,
    second: tl.int64, limit: tl.int64, lag: tl.int32, eps: tl.float32,
    KIND: tl.constexpr, WORLD: tl.constexpr, RUN: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    ROTATED: tl.constexpr, ROW: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    BITS1: tl.constexpr, SHRUNK1: tl.constexpr, TURNED1: tl.constexpr, GROUP1: tl.constexpr, P1: tl.constexpr,
    BYTES1: tl.constexpr,
    BITS2: tl.constexpr, SHRUNK2: tl.constexpr, TURNED2: tl.constexpr, GROUP2: tl.constexpr, P2: tl.constexpr,
    BYTES2: tl.constexpr,
    REAL: tl.constexpr, MAPPED: tl.constexpr, DELAY: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """As `fused_kernel.fused`, for n_rows rows of ROW values, ROW a multiple of UNIT, KIND one_shot or two_shot.

    residual: like x; weight: (ROW,); out, summed: the results, like x. A slice begins at a tile, not at a row.
    """
    B1: tl.constexpr = UNITS * UNIT // GROUP1
    M1: tl.constexpr = GROUP1 // P1
    B2: tl.constexpr = UNITS * UNIT // GROUP2
    TWO: tl.constexpr = KIND == _TWO_SHOT
    N_E: tl.constexpr = WORLD if TWO else 1
    N_S: tl.constexpr = 1 if TWO else 0
    N_R: tl.constexpr = WORLD if TWO else 1
    PER_ROW: tl.constexpr = ROW // UNIT
    # rows of a block, at most: all whole; or one that began before; or, at a slice's ends, one at either end
    MOST: tl.constexpr = RUN * UNITS // PER_ROW if UNITS % PER_ROW == 0 else (RUN * UNITS - (2 if TWO else 1)) // PER_ROW + (2 if TWO else 1)  # noqa: E501  # fmt: skip
    TIMES: tl.constexpr = (MOST + ROWS - 1) // ROWS

    n_blocks = (n_tiles + RUN - 1) // RUN
    step, role = tl.program_id(0) // (N_E + N_S + N_R), tl.program_id(0) % (N_E + N_S + N_R)
    if role < N_E:
        if step < n_blocks:
            slice = role if TWO else rank * 0
            _encode(x, out, step, slice, area + second * 0, half, local, peers, rank, n_units * 0 + ROW,
                    n_units * 0 + PER_ROW, n_units, slice_units, stride, n_tiles, 0, not TWO, WORLD, RUN, False, UNIT,
                    UNITS, BITS1, SHRUNK1, TURNED1, GROUP1, P1, B1, M1, BYTES1, MAPPED, BF16, False)  # fmt: skip
        else:
            arrive(local)
    elif role < N_E + N_S:
        epoch = arrive(local)
        if (step >= lag) & (step - lag < n_blocks):
            data = area + (epoch & 1).to(tl.int64) * half
            _again(x, out, step - lag, data, second, epoch, own, local, peers, status, rank, n_units, slice_units,
                   stride, n_tiles, limit, lag, WORLD, RUN, UNIT, UNITS, ROTATED, BITS1, TURNED1, GROUP1, P1, BYTES1,
                   BITS2, SHRUNK2, TURNED2, GROUP2, P2, BYTES2, REAL, MAPPED, DELAY, BF16)  # fmt: skip
    else:
        epoch2 = arrive(local)
        block, owner = step - (2 if TWO else 1) * lag, role - (N_E + N_S)
        if (block >= 0) & (block < n_blocks):
            first = _first_row(owner, block, n_blocks, stride, n_rows, RUN * UNITS, PER_ROW)
            last = _first_row(owner, block + 1, n_blocks, stride, n_rows, RUN * UNITS, PER_ROW)
            if first < last:
                GROUP: tl.constexpr = GROUP2 if TWO else GROUP1
                P: tl.constexpr = P2 if TWO else P1
                mine = _beside(residual, first, last, 0, ROW, CHUNK, ROWS, GROUP, P)  # under way while it waits
                w = mine
                if RUN == 1:
                    w = _weights(weight, 0, ROW, CHUNK, ROWS, GROUP, P)
                ok = _await(first, last, n_blocks, n_tiles, epoch2, own, local, rank, peers, status, limit, TWO, WORLD,
                            RUN, UNITS, PER_ROW, REAL, MAPPED, DELAY)  # fmt: skip
                place = area + (epoch2 & 1).to(tl.int64) * half
                if TWO:
                    _rows(x, residual, weight, out, summed, eps, first, last, place + second, ok, mine, w, own, local,
                          rank, n_tiles, 1, RUN, TIMES, ROW, CHUNK, CHUNKS, ROWS, B2, BITS2, TURNED2, GROUP2, P2,
                          BYTES2, BF16)  # fmt: skip
                else:
                    _rows(x, residual, weight, out, summed, eps, first, last, place, ok, mine, w, own, local, rank,
                          n_tiles, WORLD, RUN, TIMES, ROW, CHUNK, CHUNKS, ROWS, B1, BITS1, TURNED1, GROUP1, P1,
                          BYTES1, BF16)  # fmt: skip
