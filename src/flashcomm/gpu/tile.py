"""What a Triton program does to a tile of groups, on the codec's way and inside the fused collectives.

A tile is float32 or int32 (B, P, M): B groups of N = P * M values, value i of a group at [group, i div M, i mod M], so
that the values which share a byte of a plane differ only in the middle index. Triton spreads the last and then the
first index over threads and keeps the middle one within a thread: packing, unpacking and the rounds of the transform
over it move no data between threads.

What keeps the bits of `torch_codec`: divisions are `div_rn`; kernels are launched with `enable_fp_fusion=False`;
rounding to an integer is adding 1.5 * 2^23 (half to even; the integer is then in the low bits); integer maxima of the
bits of y and -y find the range and whatever is not finite; sums over ranks run in rank order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcomm.wire import torch_codec
from flashcomm.wire.format import LIMIT, StepFormat

MAGIC = tl.constexpr(1.5 * 2.0**23)
MAGIC_BITS = tl.constexpr(0x4B400000)
TWO_23_BITS = tl.constexpr(0x4B000000)  # of 2^23: adding a code to it gives the float 2^23 + code
LIMIT_BITS = tl.constexpr(0x7E800000)  # of 2^126, see StepFormat.limit; smaller by log2(n) << 23 where transformed
SCALE_MIN = tl.constexpr(torch_codec.SCALE_MIN)
SCALE_NAN = tl.constexpr(torch_codec.SCALE_NAN)
assert LIMIT == 2.0**126


def pieces(step: StepFormat) -> int:
    """P for a format: the values in a byte of its narrowest plane, or more."""
    return 1 if step.uncompressed else max(2, 8 // min(width for width, _ in step.planes))


def warps(b: int, m: int) -> int:
    """Warps for a tile (b, any, m) such that 16 bytes of bfloat16 a thread fill them without the middle index."""
    return max(1, min(4, b * m // 256))


def tile_bytes(step: StepFormat, n_groups: int, itemsize: int) -> int:
    """Bytes of a tile of n_groups groups as `put` writes it; a multiple of 16 for n_groups a multiple of 16."""
    if step.uncompressed:
        return n_groups * step.group * itemsize
    return n_groups * (step.group * step.bits // 8 + (2 if step.packed else 4))


@triton.jit
def integer(x):
    """x rounded to an integer, int32; |x| < 2^22."""
    return (x + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS


@triton.jit
def widen(x):
    """x as float32; a bfloat16 by its bits, which is one instruction less for every other one."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _round(y, n, H: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, TAILS: tl.constexpr):
    """One round of the transform: sums and differences of values H apart, in groups of more than H values.

    A value's partner is the sum of both, as integers, less the value, of which the compiler leaves a register or a
    shuffle: a reduction works in any layout, without moving the tile, as `tl.split` would.
    """
    second = tl.arange(0, 2)[None, None, None, :, None] == 1
    if H < M:
        pairs = tl.reshape(y, (B, P, M // (2 * H), 2, H))
    else:
        pairs = tl.reshape(y, (B, P * M // (2 * H), 1, 2, H))
    bits = pairs.to(tl.int32, bitcast=True)
    partner = tl.sum(bits, 3, keep_dims=True) - bits
    partner = partner.to(tl.int64).to(tl.int32).to(tl.float32, bitcast=True)  # the interpreter's sums have 64 bits
    turned = tl.reshape(tl.fma(pairs, tl.where(second, -1.0, 1.0), partner), (B, P, M))
    if TAILS:
        turned = tl.where((H < n)[:, None, None], turned, y)
    return turned


@triton.jit
def hadamard(y, n, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, TAILS: tl.constexpr):
    """The transform of each group, rounds in the order of the definition. n (B,): values to transform, if TAILS."""
    for i in tl.static_range(8):
        if (1 << i) < P * M:
            y = _round(y, n, 1 << i, P, B, M, TAILS)
    return y


@triton.jit
def _grid(low, high, LEVELS: tl.constexpr, MANTISSA: tl.constexpr):
    """Scale, its inverse (float32) and zero (int32) of ranges."""
    BELOW: tl.constexpr = (1 << (23 - MANTISSA)) - 1
    scale = tl.maximum(tl.div_rn(high - low, tl.full(low.shape, LEVELS, tl.float32)), SCALE_MIN)
    scale = ((scale.to(tl.int32, bitcast=True) + BELOW) & ~BELOW).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full(low.shape, 1.0, tl.float32), scale)
    return scale, inverse, 0 - integer(low * inverse)


@triton.jit
def _square_error(y, scale, inverse, zero, unit, LEVELS: tl.constexpr, WHOLE: tl.constexpr):
    """The sum of squares that chooses between ranges, int32. WHOLE: of the range of y, below which there is nothing."""
    below = MAGIC - zero.to(tl.float32)
    kept = tl.minimum(y * inverse + MAGIC, below + LEVELS)
    if not WHOLE:
        kept = tl.maximum(kept, below)
    error = tl.fma(0.0 - scale, kept - MAGIC, y)  # the product is exact
    steps = (error * (unit * 16.0) + MAGIC).to(tl.int32, bitcast=True)  # low bits of an integer, MAGIC_BITS above them
    total = tl.sum(tl.sum(steps * steps, 1, keep_dims=True), 2, keep_dims=True)
    return total & 0x7FFFFF  # in these bits the square of MAGIC_BITS and the double of it are 0


@triton.jit
def quantize(y, n, BITS: tl.constexpr, SHRUNK: tl.constexpr, TURNED: tl.constexpr, P: tl.constexpr,
             B: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Codes (B, P, M), the 16-bit word of the scale and the zero (B, 1, 1), all int32, of y (float32, 0 past a group).

    TURNED: y are the transforms of groups whose n, int32 (B,), is a power of two.
    """
    LEVELS: tl.constexpr = (1 << BITS) - 1
    n = n[:, None, None]
    bits = y.to(tl.int32, bitcast=True)
    high = tl.maximum(tl.max(tl.max(bits, 1, keep_dims=True), 2, keep_dims=True), 0)
    bits = y.to(tl.uint32, bitcast=True)  # of which those below zero are the largest
    low = tl.max(tl.max(bits, 1, keep_dims=True), 2, keep_dims=True).to(tl.int32, bitcast=True)
    low = tl.maximum(low ^ -0x80000000, 0)
    limit = LIMIT_BITS
    if TURNED:
        power = tl.where((n & (n - 1) == 0) & (n > 0), n, 1).to(tl.float32)
        limit = LIMIT_BITS - (power.to(tl.int32, bitcast=True) - 0x3F800000)
    bad = tl.maximum(high, low) >= limit
    high = tl.where(bad, 0, high).to(tl.float32, bitcast=True)
    low = 0.0 - tl.where(bad, 0, low).to(tl.float32, bitcast=True)
    scale, inverse, zero = _grid(low, high, LEVELS, 8 - BITS if BITS <= 5 else 7)
    if SHRUNK > 0.0:
        part = tl.where(n & (n - 1) == 0, SHRUNK, 1.0)
        scale2, inverse2, zero2 = _grid(low * part, high * part, LEVELS, 8 - BITS if BITS <= 5 else 7)
        error = _square_error(y, scale, inverse, zero, inverse, LEVELS, True)
        better = _square_error(y, scale2, inverse2, zero2, inverse, LEVELS, False) < error
        scale, inverse, zero = tl.where(better, scale2, scale), tl.where(better, inverse2, inverse), tl.where(better, zero2, zero)  # fmt: skip
    codes = (y * inverse + MAGIC).to(tl.int32, bitcast=True) + (zero - MAGIC_BITS)
    codes = tl.maximum(tl.minimum(codes, tl.where(bad, 0, LEVELS)), 0)
    word = tl.where(bad, SCALE_NAN, scale.to(tl.int32, bitcast=True) >> 16)
    if BITS <= 5:
        word = ((word >> (BITS - 1)) << BITS) | zero
    return codes, word, zero


@triton.jit
def quads(codes, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """Four neighboring codes to a word, int32 (B, P, M / 4), as their bytes are in memory."""
    four = tl.reshape(codes, (B, P, M // 4, 4))
    return tl.sum(four << (tl.arange(0, 4) * 8)[None, None, None, :], 3)


@triton.jit
def plane_units(begin, RUN: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, M: tl.constexpr, U: tl.constexpr):
    """Places (B, WIDTH * P / 8, M / U) of the plane's units, of U bytes, of groups that begin at bytes begin (B,)."""
    SUB: tl.constexpr = WIDTH * P // 8
    sub = (tl.arange(0, SUB) * (RUN // U))[None, :, None]
    return (begin // U)[:, None, None] + sub + tl.arange(0, M // U)[None, None, :]


@triton.jit
def plane_at(plane, begin, RUN: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, M: tl.constexpr, U: tl.constexpr):
    """Pointers to `plane_units`. The hint gives a thread the units of 8 values, or of all M: what it has of 16 bytes of
    bfloat16.
    """
    at = plane_units(begin, RUN, WIDTH, P, M, U)
    if U == 4:
        return tl.max_contiguous(plane.to(tl.pointer_type(tl.int32)) + at, [1, 1, 2 if M > U else 1])
    else:
        return plane + at


@triton.jit
def pack_plane(codes, BITS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr,
               U: tl.constexpr):  # fmt: skip
    """The plane of WIDTH bits of codes (U 1) or of their `quads` (U 4)."""
    SHIFT: tl.constexpr = BITS & (15 ^ (2 * WIDTH - 1))  # the bits in wider planes
    SUB: tl.constexpr = WIDTH * P // 8  # bytes of a group are SUB runs of M
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * (0x01010101 if U == 4 else 1)
    part = codes
    if BITS != WIDTH:
        part = (codes >> SHIFT) & MASK
    if WIDTH < 8:
        part = tl.reshape(part, (B, 8 // WIDTH, SUB, M // U))
        part = tl.sum(part << (tl.arange(0, 8 // WIDTH) * WIDTH)[None, :, None, None], 1)
    return part


@triton.jit
def put_plane(plane, begin, keep, codes, RUN: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
              M: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """The plane of WIDTH bits to the bytes from plane + begin (B,) on, of the groups in keep (B,).

    U 4: codes are `quads`, plane and begin multiples of 4. U 1: codes themselves.
    """
    part = pack_plane(codes, BITS, WIDTH, P, B, M, U)
    at = plane_at(plane, begin, RUN, WIDTH, P, M, U)
    tl.store(at, part.to(at.dtype.element_ty), mask=keep[:, None, None])


@triton.jit
def fetch_plane(plane, begin, keep, RUN: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, M: tl.constexpr, U: tl.constexpr,
                CACHE: tl.constexpr):  # fmt: skip
    """What `put_plane` wrote."""
    at = plane_at(plane, begin, RUN, WIDTH, P, M, U)
    return tl.load(at, mask=keep[:, None, None], other=0, cache_modifier=CACHE)


@triton.jit
def spread_plane(packed, BITS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr,
                 U: tl.constexpr):  # fmt: skip
    """The bits of one plane, in their places in codes (B, P, M) or, U 4, in `quads`, of twice the code up to 7 bits."""
    SHIFT: tl.constexpr = (BITS & (15 ^ (2 * WIDTH - 1))) + (1 if U == 4 and BITS < 8 else 0)
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * (0x01010101 if U == 4 else 1)
    packed = packed.to(tl.int32)
    if WIDTH == 8:
        return packed
    else:
        places = (tl.arange(0, 8 // WIDTH) * WIDTH)[None, :, None, None]
        return tl.reshape((packed[:, None, :, :] >> places) & MASK, (B, P, M // U)) << SHIFT


@triton.jit
def put(base, codes, word, zero, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """A whole tile to base (uint8 pointer, 16-byte aligned), not as on the wire but so that threads next to each other
    write bytes next to each other: of each plane the first runs of all groups, then the second ones; then words, with the
    zeros, if they have any, in the upper half of 32 bits.
    """
    U: tl.constexpr = 4 if M % 4 == 0 else 1
    b = tl.arange(0, B)
    if U == 4:
        codes = quads(codes, P, B, M)
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            plane = base + B * P * M * (BITS & (15 ^ ((16 >> i) - 1))) // 8
            put_plane(plane, b * M, b >= 0, codes, B * M, BITS, 8 >> i, P, B, M, U)
    words = base + B * P * M * BITS // 8
    if BITS > 5:
        put_words(words.to(tl.pointer_type(tl.int32)), b, b >= 0, (word & 0xFFFF) | (zero << 16), B, M)
    else:
        put_words(words.to(tl.pointer_type(tl.int16)), b, b >= 0, word, B, M)


@triton.jit
def put_words(out, at, keep, word, B: tl.constexpr, M: tl.constexpr, THROUGH: tl.constexpr = False):
    """word (B, 1, 1) to out + at (B,), THROUGH the caches or not. One of the threads that know a word writes it: none goes through shared memory.

    That takes the layout of a plane's pointers.
    """
    at = at[:, None, None]
    if M % 8 == 0:
        thread = tl.arange(0, M // 8)[None, None, :]
        to = tl.max_contiguous(out + (at + thread), [1, 1, min(M // 8, 2)])
        word = tl.broadcast_to(word, (B, 1, M // 8)).to(out.dtype.element_ty)
        tl.store(to, word, mask=keep[:, None, None] & (thread == 0), cache_modifier=".wt" if THROUGH else "")
    else:
        tl.store(
            out + at, word.to(out.dtype.element_ty), mask=keep[:, None, None], cache_modifier=".wt" if THROUGH else ""
        )


@triton.jit
def values(codes, word, zero, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, U: tl.constexpr):
    """code - zero, float32 (B, P, M), and scale, float32 (B,): of codes or `spread_plane`'s quads, words and zeros."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    word = word.to(tl.int32) & 0xFFFF
    if BITS <= 5:
        zero = word & ((1 << BITS) - 1)
        word = (word >> BITS) << (BITS - 1)
    zero = zero.to(tl.int32)[:, None, None]
    if U == 4:
        # Each code becomes bits 1 or 9 and up of 2^23 + 2^17 * (part of zero): a shift for two, then a mask and an
        # or, one instruction because that number is no constant; at bit 0 the compiler would take two to cut it out.
        above = TWO_23_BITS | ((zero & 63) << 17)
        origin, base = zero.to(tl.float32), above.to(tl.float32, bitcast=True)
        odd = (tl.arange(0, M) % 2 == 1)[None, None, :]
        codes = tl.reshape(tl.broadcast_to(codes[:, :, :, None], (B, P, M // 4, 4)), (B, P, M))
        if BITS < 8:
            codes = tl.where((tl.arange(0, M) % 4 >= 2)[None, None, :], codes >> 16, codes)
        else:
            codes = tl.where((tl.arange(0, M) % 4 >= 2)[None, None, :], codes >> 15, codes << 1)
        codes = ((codes & tl.where(odd, LEVELS << 9, LEVELS << 1)) | above).to(tl.float32, bitcast=True)
        below = tl.where(odd, base * (-1.0 / 512) - origin, base * (-1.0 / 2) - origin)
        d = tl.fma(codes, tl.where(odd, 1.0 / 512, 1.0 / 2), below)
    else:
        d = (codes | TWO_23_BITS).to(tl.float32, bitcast=True) - (zero | TWO_23_BITS).to(tl.float32, bitcast=True)
    return d, (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def fetch(base, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """All of a tile that `put` wrote, as it lies there: for `expand`, maybe after more loads."""
    U: tl.constexpr = 4 if M % 4 == 0 else 1
    b = tl.arange(0, B)
    raw = ()
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            plane = base + B * P * M * (BITS & (15 ^ ((16 >> i) - 1))) // 8
            raw = raw + (fetch_plane(plane, b * M, b >= 0, B * M, 8 >> i, P, M, U, ".cg"),)
    words = (base + B * P * M * BITS // 8).to(tl.pointer_type(tl.int32 if BITS > 5 else tl.int16))
    return raw + (tl.load(words + b, cache_modifier=".cg"),)


@triton.jit
def expand(raw, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, U: tl.constexpr = 0):
    """Of a tile as `fetch` has it (or with the zeros behind the words, apart): code - zero, float32 (B, P, M), exact, and the scale, float32 (B,).

    Their product is exact too, so that adding it with `tl.fma` is adding it.
    """
    V: tl.constexpr = U if U > 0 else (4 if M % 4 == 0 else 1)
    codes = tl.zeros((B, P, M // V), tl.int32)
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            codes |= spread_plane(raw[0], BITS, 8 >> i, P, B, M, V)
            raw = raw[1:]
    if len(raw) > 1:
        return values(codes, raw[0], raw[1], BITS, P, B, M, V)
    else:
        return values(codes, raw[0], (raw[0].to(tl.int32) >> 16) & 0xFF, BITS, P, B, M, V)


@triton.jit
def narrow(y, dtype: tl.constexpr, BF16: tl.constexpr):
    """y (float32) rounded once, half to even; with BF16 to bfloat16 as int16: not every backend of Triton rounds."""
    if BF16:
        bits = y.to(tl.int32, bitcast=True)
        bits = tl.where(y == y, bits + 0x7FFF + ((bits >> 16) & 1), SCALE_NAN << 16) >> 16
        return bits.to(tl.int16)
    else:
        return y.to(dtype)


@triton.jit
def store(out, at, keep, y, BF16: tl.constexpr):
    """y (float32) to out + at, rounded; with BF16 out is an int16 pointer to bfloat16s."""
    tl.store(out + at, narrow(y, out.dtype.element_ty, BF16), mask=keep)
