"""The encoder of one format, as vector code: `torch_codec.quantise` and `pack`, bit for bit.

A block of groups goes through three stages while it is in the first-level cache: the extremes of each group; the
grids of all groups, a lane per group, because one division after another would take longer than everything else;
then the codes of each group, which leave as bytes.

Extremes are those of *integers*, bit patterns mapped so that their order is that of the values: NaN and infinities
come out on top and show themselves, and no floating-point operation is reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from llvmlite import ir

from flashcomm.wire import torch_codec
from flashcomm.wire.cpu_groups import INTEGER, MAGIC, At, floats, for_blocks, padded, plane_bytes
from flashcomm.wire.cpu_vector import F32, I8, I16, I32, Function, Vec
from flashcomm.wire.format import StepFormat

_LIMIT_BITS = int(np.float32(torch_codec.LIMIT).view(np.int32))
_LIMIT = {
    torch.bfloat16: _LIMIT_BITS >> 16,
    torch.float16: 0x7C00,  # infinity: every finite float16 is below 2^126
    torch.float32: _LIMIT_BITS,
}
"""Per dtype: the key of the smallest magnitude that counts as not finite."""


@cache
def encoder(dtype: torch.dtype, step: StepFormat, tail: int) -> Callable[..., None]:
    """kernel(values, scale, zero, plane, plane, plane, groups to the end of the row, per row, in all).

    Addresses of the first group; planes and zero that the format lacks are not looked at. tail: row % group.
    """
    f, most = Function("encode", pointers=6, integers=3), _block(step.group)
    grid = _Grid(f, dtype, step, most)

    def block(n: int, count: Vec, at: At) -> None:
        stride = n * dtype.itemsize
        with f.loop(count) as j:
            grid.put_extremes(j, _load(f, at.values + j * stride, dtype, n))
        grid.compute()
        with f.loop(count) as j:
            codes = grid.codes(j, _load(f, at.values + j * stride, dtype, n))
            for plane, (width, shift) in zip(at.planes, step.planes, strict=True):
                f.store(plane + j * plane_bytes(n, width), _pack(codes, n, width, shift, step.bits))
            f.store(at.scale + j * 2, f.load(grid.scale + j * 2, I16))
            if not step.symmetric:
                f.store(at.zero + j * 2, f.load(grid.zero + j * 2, I16))

    for_blocks(f, step, dtype, tail, block, most)
    return f.compile()


def _block(group: int) -> int:
    """Groups in a block: enough to fill vectors, few enough to stay in the cache."""
    return min(64, max(16, 2048 // group))


def _load(f: Function, address: Vec, dtype: torch.dtype, n: int) -> Vec:
    """The bit patterns of n values, the first one repeated as padding: that changes no extreme."""
    bits = f.load(address, INTEGER[dtype], n)
    return bits if n == padded(n) else bits.shuffle([i if i < n else 0 for i in range(padded(n))])


def _key(bits: Vec) -> Vec:
    """Bit patterns -> integers in the order of the values, NaN beyond the infinities. Its own inverse."""
    top: int = bits.element.width - 1
    return bits ^ (bits.sign_shift(top) & ((1 << top) - 1))


class _Grid:
    """Scale, its inverse, zero and largest code of a block of groups, in the function's own memory."""

    def __init__(self, f: Function, dtype: torch.dtype, step: StepFormat, most: int) -> None:
        self._f, self._dtype, self._step, self._most = f, dtype, step, most
        kinds = INTEGER[dtype], INTEGER[dtype], F32, I16, I16, I16
        slots = [f.scratch(ir.VectorType(kind, most)) for kind in kinds]
        self._low, self._high, self._inverse, self._largest, self.scale, self.zero = slots
        for slot in slots[:2]:  # blocks may be short, and what was on the stack must not matter
            f.store(slot, f.vector(INTEGER[dtype], most, 0))

    def put_extremes(self, j: Vec, bits: Vec) -> None:
        """Stage 1, of group j."""
        keys, size = _key(bits), self._dtype.itemsize
        for slot, name in ((self._low, "smin"), (self._high, "smax")):
            self._f.store(slot + j * size, keys.intrinsic(f"vector.reduce.{name}", result=keys.element))

    def compute(self) -> None:
        """Stage 2: the formula of `torch_codec`, a lane per group."""
        f, step, limit = self._f, self._step, _LIMIT[self._dtype]
        low, high = (f.load(slot, INTEGER[self._dtype], self._most) for slot in (self._low, self._high))
        bad = high.compare(">", limit - 1) | low.compare("<", -limit)
        minimum, maximum = floats(_key(low), self._dtype), floats(_key(high), self._dtype)
        magnitude = minimum.intrinsic("fabs").maximum(maximum.intrinsic("fabs"))
        if step.symmetric:
            scale = magnitude / ((1 << (step.bits - 1)) - 1)
        else:
            reach = magnitude * torch_codec.ZERO_REACH
            scale = ((maximum - minimum) / step.levels).maximum(reach)
        scale_bits = (scale.maximum(torch_codec.SCALE_MIN).view(I32) + 0xFFFF) >> 16
        inverse = 1.0 / (scale_bits << 16).view(F32)
        zero = (minimum * inverse + MAGIC).view(I32).to(I16)
        if step.symmetric:
            zero = zero.like(-(1 << (step.bits - 1)))
        f.store(self._inverse, inverse)
        f.store(self._largest, bad.choose(0, zero.like(step.levels)))
        f.store(self.scale, bad.choose(torch_codec.SCALE_NAN, scale_bits.to(I16)))
        f.store(self.zero, bad.choose(0, zero))

    def codes(self, j: Vec, bits: Vec) -> Vec:
        """Stage 3, of group j: int16 codes.

        Codes are never below 0, since rounding keeps order. In a bad group anything comes out, and is cut to 0.
        """
        inverse = self._f.load(self._inverse + j * 4, F32)
        zero, largest = (self._f.load(slot + j * 2, I16).splat(bits.lanes) for slot in (self.zero, self._largest))
        return (self._integers(bits, inverse) - zero).intrinsic("umin", largest)

    def _integers(self, bits: Vec, inverse: Vec) -> Vec:
        """round(x * inverse) as int16."""
        if self._dtype != torch.bfloat16:
            x = floats(bits, self._dtype)
            return (x * inverse.splat(x.lanes) + MAGIC).view(I32).to(I16)
        # Two bfloat16 are one int32: taking the halves apart and joining them moves no value to another lane.
        pairs = bits.view(I32)
        inverses = inverse.splat(pairs.lanes)
        even, odd = (pairs << 16).view(F32), (pairs & 0xFFFF0000).view(F32)
        even, odd = ((x * inverses + MAGIC).view(I32) for x in (even, odd))
        return ((odd << 16) | (even & 0xFFFF)).view(I16)


def _pack(codes: Vec, n: int, width: int, shift: int, bits: int) -> Vec:
    """The bytes of a plane: value i at bit width * (i div m) of byte i mod m.

    Every code is shifted to its place in its byte; then the vector is folded in half until m lanes are left.
    """
    m = plane_bytes(n, width)
    lanes = m * 8 // width
    part = codes.shuffle([i if i < n else codes.lanes for i in range(lanes)], codes.like(0))
    if shift:
        part = part >> shift
    if shift + width < bits:
        part = part & ((1 << width) - 1)
    part = part << [width * (i // m) for i in range(lanes)]
    while part.lanes > m:
        half = part.lanes // 2
        part = part.shuffle(range(half)) | part.shuffle(range(half, 2 * half))
    return part.to(I8)
