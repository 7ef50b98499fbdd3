"""Quantize a tile of groups: scales, zero points and codes, in the shape that `tile.py` describes.

The bits are those of `torch_codec`, because

* divisions are `div_rn`, and kernels are compiled without fused multiply-adds,
* adding 1.5 * 2^23 rounds to an integer, half to even, and leaves that integer in the low bits,
* integer maxima of the bits of y and -y find the range, and values that are not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcomm.wire import torch_codec
from flashcomm.wire.format import LIMIT

MAGIC = tl.constexpr(1.5 * 2.0**23)
MAGIC_BITS = tl.constexpr(0x4B400000)
LIMIT_BITS = tl.constexpr(0x7E800000)  # of 2^126, see StepFormat.limit; in the Hadamard domain minus log2(n) << 23
SCALE_MIN = tl.constexpr(torch_codec.SCALE_MIN)
SCALE_NAN = tl.constexpr(torch_codec.SCALE_NAN)
assert LIMIT == 2.0**126


@triton.jit
def _grid(low, high, BITS: tl.constexpr):
    """Return the scales of ranges, their inverses, and low in steps of the scale, rounded, plus MAGIC: all float32."""
    MANTISSA: tl.constexpr = 8 - BITS if BITS <= 5 else 7
    BELOW: tl.constexpr = (1 << (23 - MANTISSA)) - 1
    scale = tl.maximum(tl.div_rn(high - low, tl.full(low.shape, (1 << BITS) - 1, tl.float32)), SCALE_MIN)
    scale = ((scale.to(tl.int32, bitcast=True) + BELOW) & ~BELOW).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full(low.shape, 1.0, tl.float32), scale)
    return scale, inverse, low * inverse + MAGIC


@triton.jit
def _square_error(y, scale, inverse, below, unit, LEVELS: tl.constexpr, WHOLE: tl.constexpr):
    """Return the sum of squared errors that chooses the range, int32.

    WHOLE: the whole range needs no clamping. No value is below it. A code is LEVELS + 1, 1 above it, only if both
    extremes are halfway between two codes. There either code is off by half a step: the square is the same.
    """
    kept = y * inverse + MAGIC
    if not WHOLE:
        kept = tl.maximum(tl.minimum(kept, below + LEVELS), below)
    error = tl.fma(0.0 - scale, kept - MAGIC, y)  # the product is exact
    steps = (error * (unit * 16.0) + MAGIC).to(tl.int32, bitcast=True)  # an integer plus MAGIC_BITS
    total = tl.sum(tl.sum(steps * steps, 1, keep_dims=True), 2, keep_dims=True)
    return total & 0x7FFFFF  # what MAGIC_BITS adds to the square is 0 in these bits


@triton.jit
def quantize(y, n, step: tl.constexpr):
    """Quantize a tile.

    Args:
        y: float32 (GROUPS, PIECES, LANES), in the Hadamard domain if HADAMARD, and 0 behind the end of a short group.
        n: int32 (GROUPS,), the number of values in each group.

    Returns:
        Codes: int32 (GROUPS, PIECES, LANES).
        Scale words: int32 (GROUPS, 1, 1), the 16 bits of the section of scales. Up to 5 bits they hold the zero point.
        Zero points: int32 (GROUPS, 1, 1).
    """
    LEVELS: tl.constexpr = (1 << step.BITS) - 1
    n = n[:, None, None]
    bits = y.to(tl.int32, bitcast=True)
    high = tl.maximum(tl.max(tl.max(bits, 1, keep_dims=True), 2, keep_dims=True), 0)
    bits = y.to(tl.uint32, bitcast=True)  # as unsigned numbers negative values are the largest
    low = tl.max(tl.max(bits, 1, keep_dims=True), 2, keep_dims=True).to(tl.int32, bitcast=True)
    low = tl.maximum(low ^ -0x80000000, 0)
    limit = LIMIT_BITS
    if step.HADAMARD:
        power = tl.where((n & (n - 1) == 0) & (n > 0), n, 1).to(tl.float32)
        limit = LIMIT_BITS - (power.to(tl.int32, bitcast=True) - 0x3F800000)
    not_finite = tl.maximum(high, low) >= limit
    high = tl.where(not_finite, 0, high).to(tl.float32, bitcast=True)
    low = 0.0 - tl.where(not_finite, 0, low).to(tl.float32, bitcast=True)
    scale, inverse, below = _grid(low, high, step.BITS)
    if step.CLIP > 0.0:
        ratio = tl.where(n & (n - 1) == 0, step.CLIP, 1.0)
        scale2, inverse2, below2 = _grid(low * ratio, high * ratio, step.BITS)
        error2 = _square_error(y, scale2, inverse2, below2, inverse, LEVELS, False)
        better = error2 < _square_error(y, scale, inverse, below, inverse, LEVELS, True)
        scale, inverse = tl.where(better, scale2, scale), tl.where(better, inverse2, inverse)
        below = tl.where(better, below2, below)
    codes = (y * inverse + MAGIC).to(tl.int32, bitcast=True) - below.to(tl.int32, bitcast=True)
    codes = tl.maximum(tl.minimum(codes, tl.where(not_finite, 0, LEVELS)), 0)
    zero_point = MAGIC_BITS - below.to(tl.int32, bitcast=True)
    word = tl.where(not_finite, SCALE_NAN, scale.to(tl.int32, bitcast=True) >> 16)
    if step.BITS <= 5:
        word = ((word >> (step.BITS - 1)) << step.BITS) | zero_point
    return codes, word, zero_point
