"""Tiles whose data says itself whether it has come: for small messages, where a fence and a flag cost more than bytes.

What `triton_tile.put` would store as a unit (32 bits; 8 where groups are cut very short; the word of a scale) is the
lower half of a 64-bit word here, and the upper half is the call's epoch. A store of 8 aligned bytes is seen as a whole
or not at all, so a tile is there once all of its words carry the epoch. Nobody fences, and reading is waiting.

Such words have an area of their own, a half for even and one for odd epochs: every 8 bytes in it are 0 or such a word,
whatever the calls before cut them for, so that nothing there looks like this call's but what this call's peers wrote.
All words that a call writes are read in that call. Why none is overwritten before is said in `fused_kernel`: a tile
that has come from a rank proves, as a flag would, that the rank's calls before this one have ended.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcomm.gpu.sync import ABORT_AT, clock, give_up, home, long_words, words
from flashcomm.gpu.tile import expand, narrow, pack_plane, plane_units, put_words, quads, quantize
from flashcomm.wire.format import StepFormat


def tile_bytes(step: StepFormat, n_groups: int, itemsize: int, pieces: int) -> int:
    """Bytes of a tile of n_groups groups as `put` writes it."""
    if step.uncompressed:
        return n_groups * step.group * itemsize * 2
    unit = 4 if step.group // pieces % 4 == 0 else 1
    return n_groups * (step.group * step.bits // 8 // unit + 1) * 8


@triton.jit
def _stamped(part, epoch):
    return (part.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)


@triton.jit
def _in_order(P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """Places of words within a tile: threads next to each other write next to each other."""
    return (tl.arange(0, P) * (B * M))[None, :, None] + (tl.arange(0, B) * M)[:, None, None] + tl.arange(0, M)[None, None, :]  # fmt: skip


@triton.jit
def put(base, y, n, epoch, out, BITS: tl.constexpr, SHRUNK: tl.constexpr, HADAMARD: tl.constexpr, P: tl.constexpr,
        B: tl.constexpr, M: tl.constexpr, BF16: tl.constexpr):  # fmt: skip
    """Code y (float32) to the tile at base (int64 pointer, 16-byte aligned); lossless tiles hold out's dtype."""
    if BITS == 16:
        part = narrow(y, out.dtype.element_ty, BF16)
        if part.dtype.primitive_bitwidth == 32:
            tl.store(base + _in_order(P, B, M), _stamped(part.to(tl.int32, bitcast=True), epoch), cache_modifier=".wt")
        else:
            pairs = tl.reshape(part.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, (B, P, M // 2, 2))
            pairs = tl.sum(pairs << (tl.arange(0, 2) * 16)[None, None, None, :], 3)
            tl.store(base + _in_order(P, B, M // 2), _stamped(pairs, epoch), cache_modifier=".wt")
    else:
        U: tl.constexpr = 4 if M % 4 == 0 else 1
        b = tl.arange(0, B)
        codes, word, zero = quantize(y, n, BITS, SHRUNK, HADAMARD, P, B, M)
        if U == 4:
            codes = quads(codes, P, B, M)
        for i in tl.static_range(4):
            if BITS & (8 >> i):
                plane = base + B * P * M * (BITS & (15 ^ ((16 >> i) - 1))) // 8 // U
                part = pack_plane(codes, BITS, 8 >> i, P, B, M, U)
                tl.store(
                    plane + plane_units(b * M, B * M, 8 >> i, P, M, U), _stamped(part, epoch), cache_modifier=".wt"
                )
        if BITS > 5:
            word = (word & 0xFFFF) | (zero << 16)
        put_words(base + B * P * M * BITS // 8 // U, b, b >= 0, _stamped(word, epoch), B, M, True)


@triton.jit
def fetch(base, epoch, x, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """All words of a tile as they are now, past the L1 cache."""
    if BITS == 16:
        W: tl.constexpr = M * x.dtype.element_ty.primitive_bitwidth // 32
        return (tl.load(base + _in_order(P, B, W), volatile=True),)
    else:
        U: tl.constexpr = 4 if M % 4 == 0 else 1
        b = tl.arange(0, B)
        raw = ()
        for i in tl.static_range(4):
            if BITS & (8 >> i):
                plane = base + B * P * M * (BITS & (15 ^ ((16 >> i) - 1))) // 8 // U
                raw = raw + (tl.load(plane + plane_units(b * M, B * M, 8 >> i, P, M, U), volatile=True),)
        # One of the threads of a group loads its word, as in `put_words`. That makes as many pointers as threads: of
        # fewer ones Triton repeats even a volatile load where a second layout is wanted, and what it then finds in the
        # lower half is not what it found in the upper one.
        T: tl.constexpr = M // 8 if M % 8 == 0 else 1
        thread = tl.arange(0, T)[None, :]
        at = base + B * P * M * BITS // 8 // U + (b[:, None] + thread)
        at, here = tl.max_contiguous(at, [1, min(T, 2)]), (b[:, None] >= 0) & (thread == 0)
        return raw + (tl.load(at, mask=here, other=_stamped(epoch * 0, epoch), volatile=True),)


@triton.jit
def _unlike(raw, epoch):
    """Upper halves that are not the epoch, as numbers that are not 0. Not differences: of those and their maximum ptxas
    12.8 makes one instruction which adds (VIADDMNMX), see LOG.md."""
    return ((raw >> 32).to(tl.int32) ^ epoch).to(tl.uint32, bitcast=True)


@triton.jit
def _missing(raw, epoch):
    """0 if all words of a tile carry the epoch, else not: the same for all threads."""
    most = _unlike(raw[len(raw) - 1], epoch)
    for i in tl.static_range(len(raw) - 1):  # planes, of which a thread has all along the middle axis
        late = tl.max(_unlike(raw[i], epoch), 1)
        late = tl.reshape(late, (late.shape[0], most.shape[1], late.shape[1] // most.shape[1]))
        most = tl.maximum(most, tl.max(late, 2))
    return (tl.max(most) != 0).to(tl.int32)


@triton.jit
def _values(raw, ok, x, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """A tile's values as a product: float32 (B, P, M) and what it is to be multiplied with (B,); NaN unless ok."""
    if BITS == 16:
        part = raw[0].to(tl.int32)
        if x.dtype.element_ty.primitive_bitwidth == 32:
            y = part.to(tl.float32, bitcast=True)
        else:
            part = tl.reshape(tl.broadcast_to(part[:, :, :, None], (B, P, M // 2, 2)), (B, P, M))
            odd = (tl.arange(0, M) % 2 == 1)[None, None, :]
            if x.dtype.element_ty == tl.bfloat16:
                y = tl.where(odd, part & -65536, part << 16).to(tl.float32, bitcast=True)
            else:
                y = tl.where(odd, part >> 16, part).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return y, tl.where((tl.arange(0, B) >= 0) & (ok), 1.0, float("nan"))
    else:
        low = ()
        for i in tl.static_range(len(raw) - 1):
            low = low + (raw[i].to(tl.int32),)
        low = low + (tl.sum(raw[len(raw) - 1].to(tl.int32), 1),)  # of one word and zeros
        steps, scale = expand(low, BITS, P, B, M)
        return steps, tl.where(ok, scale, float("nan"))


@triton.jit
def arrived(base, raw, epoch, half, phase, source, local, peers, status, limit, x, WORLD: tl.constexpr,
            REAL: tl.constexpr, MAPPED: tl.constexpr, DELAY: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr,
            B: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """`_values` of the tile at base, of which raw was loaded, once all of it is of the epoch, and 1; NaN and 0 if it
    was not within limit. As in `fused_sync.wait` all threads go by one verdict, and the first to give up reports it.
    """
    late = _missing(raw, epoch)
    abort = words(local + ABORT_AT)
    polls, state = (late * 0).to(tl.int64), late * 0
    begin = polls
    if late != 0:
        begin = clock(polls, REAL)
    while (late != 0) & (state == 0):
        raw = fetch(base, epoch, x, BITS, P, B, M)
        late = _missing(raw, epoch)
        polls += 1
        if (late != 0) & (polls % 32 == 0):
            over = (clock(polls, REAL) - begin >= limit).to(tl.int32)
            state = tl.atomic_or(abort, over, sem="relaxed", scope="gpu")
    if late != 0:  # what did come: words of an earlier call, in this half or, of the one before, in the other
        here = (tl.load(base, volatile=True) >> 32).to(tl.int32)
        other = (tl.load(base + (1 - 2 * (epoch & 1)) * (half // 8), volatile=True) >> 32).to(tl.int32)
        seen = tl.maximum(tl.where(here == epoch, epoch - 1, here), other)
        give_up(phase, source, epoch, seen, local, peers, status, WORLD, REAL)
    for _ in range(DELAY // 16):  # of tests: a slow reader
        raw = fetch(base, epoch, x, BITS, P, B, M)
    steps, scale = _values(raw, late == 0, x, BITS, P, B, M)
    return steps, scale, (late == 0).to(tl.int32)


@triton.jit
def tiles_sum(x, tile, offset, epoch, half, own, local, rank, n_tiles, peers, status, limit, WORLD: tl.constexpr,
              REAL: tl.constexpr, MAPPED: tl.constexpr, DELAY: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr,
              B: tl.constexpr, M: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    """The sum of everybody's y^ of a tile, in rank order, float32, each taken when it has come; whether all have."""
    AHEAD: tl.constexpr = min(WORLD, 2 if BITS * P > 32 else 4)  # tiles under way at once, as registers allow
    bases, raws, total, ok = (), (), tl.zeros((B, P, M), tl.float32), rank * 0 + 1
    for k in tl.static_range(WORLD + AHEAD):
        if k >= AHEAD:
            steps, scale, came = arrived(bases[k - AHEAD], raws[k - AHEAD], epoch, half, 1, k - AHEAD, local, peers, status, limit, x, WORLD, REAL, MAPPED, DELAY, BITS, P, B, M)  # fmt: skip
            ok &= came
            if k == AHEAD:
                total = steps * scale[:, None, None]
            else:
                total = tl.fma(steps, tl.broadcast_to(scale[:, None, None], (B, P, M)), total)
        if k < WORLD:
            at = home(k, rank, own, local) + offset + (k * n_tiles + tile).to(tl.int64) * BYTES
            bases = bases + (long_words(at),)
            raws = raws + (fetch(long_words(at), epoch, x, BITS, P, B, M),)
    return total, ok
