"""Scales, zero points and codes of a block of groups, as vector code: `torch_codec.quantize`, bit for bit.

A block is some 16 to 64 groups. Stages of two kinds alternate. Some go through the groups one by one, with a lane per
value. Others have a lane per *group*, so that one vector division serves many groups:

    put_extremes    each group    the largest and the smallest value
    compute         all groups    scale, its inverse and the zero point
    put_errors      each group    how much worse the clipped range would be     } only where there are two ranges
    choose          all groups    scale, inverse and zero point of the better   } (see `StepFormat.clip_ratio`)
    quantized       each group    the codes

Extremes are found as maxima of *integers*, the bit patterns of the values. The largest signed integer belongs to the
largest value. The largest unsigned integer belongs to the smallest value, if any value is negative. NaN and infinity
have larger bit patterns than all finite values of their sign, so they are found, too. No floating-point operation is
reordered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir

from flashcomm.cpu.groups import INTEGER, MAGIC, MAGIC_BITS, floats, join
from flashcomm.cpu.lanes import REGISTER_BITS, fold, halve, reduce
from flashcomm.cpu.vector import F32, I8, I16, I32, Function, Vec, width
from flashcomm.wire import torch_codec
from flashcomm.wire.format import StepFormat


def _limit(dtype: torch.dtype, step: StepFormat, n: int) -> int:
    """The bit pattern in dtype of the smallest magnitude that counts as not finite."""
    bits = int(np.float32(step.limit(n)).view(np.int32))
    infinity = 0x7C00  # of float16, whose finite values are all below the limit
    return {torch.bfloat16: bits >> 16, torch.float16: infinity, torch.float32: bits}[dtype]


_RESULTS = ("inverse", "zero points", "scale bits")  # for `quantized`
_NAMES = (*_RESULTS, "minus scale", "bottom", "top")  # for the comparison of two ranges, too
_TWO_INT16 = 0x10001  # an int16 times this is an int32 that holds it twice


class Quantized(NamedTuple):
    """The wire data of a group: codes (int16 lanes), 16 bits of the section of scales, and the zero point (a byte)."""

    codes: Vec
    scale_bits: Vec
    zero_point: Vec


class BlockQuantizer:
    """Quantizes a block of groups. Intermediate results are in the function's own memory, 32 bits each.

    Args:
        f: The function.
        dtype: The dtype of the bit patterns whose extremes are found.
        step: The format.
        n: The number of values in a group.
        most: The largest number of groups in a block. With fewer groups the other lanes are undefined, and never read.
    """

    def __init__(self, f: Function, dtype: torch.dtype, step: StepFormat, n: int, most: int) -> None:
        self._f, self._dtype, self._step, self._most = f, dtype, step, most
        self._limit = _limit(dtype, step, n)
        self.clip_ratio = step.clip_ratio(n)
        slots = [("", "largest"), *((range_, name) for range_ in ("whole", "clipped") for name in _NAMES)]
        self._slots = {slot: f.scratch(ir.VectorType(I32, most)) for slot in slots}
        self._rows = f.scratch(ir.ArrayType(I8, most * REGISTER_BITS // 8))  # a register for each group
        self._lanes = 0  # how many lanes of each such register are used

    def put_extremes(self, j: Vec, bits: list[Vec]) -> None:
        """Find the extremes of group j. bits: the bit patterns of its values in any order, and any number of zeros."""
        high, low = (fold(bits, name) for name in ("smax", "umax"))
        both = high.shuffle(range(2 * high.lanes), low ^ _sign(low.element))  # from here on both are signed maxima
        self._put_row(j, halve([both], high.lanes, "smax"))

    def compute(self) -> None:
        """Compute scales and zero points by the formula of `torch_codec`, a lane per group."""
        kind, limit = INTEGER[self._dtype], self._limit
        both, sign = self._reduce(kind, 2, "smax"), _sign(kind)
        high = both.shuffle(range(0, both.lanes, 2)).maximum(0)
        low = (both.shuffle(range(1, both.lanes, 2)) ^ sign).minimum(0)
        bad = high.compare(">", limit - 1) | (low & (sign - 1)).compare(">", limit - 1)
        self._set("", "largest", bad.choose(0, self._f.vector(I32, self._most, self._step.levels * _TWO_INT16)))
        low, high = floats(low, self._dtype), floats(high, self._dtype)
        self._set_range("whole", low, high, bad)
        if self.clip_ratio:
            self._set_range("clipped", low * self.clip_ratio, high * self.clip_ratio, bad)

    def _set_range(self, range_: str, low: Vec, high: Vec, bad: Vec) -> None:
        cut = (1 << (23 - self._step.mantissa)) - 1
        scale = ((high - low) / self._step.levels).maximum(torch_codec.SCALE_MIN).view(I32)
        scale = (scale + cut) & ~cut
        inverse = 1.0 / scale.view(F32)
        zero_point = bad.choose(0, scale.like(MAGIC_BITS) - (low * inverse + MAGIC).view(I32))
        sent = bad.choose(torch_codec.SCALE_NAN << 16, scale)
        scale_bits = (sent >> 15) | zero_point if self._step.packed else sent >> 16
        bottom = inverse.like(MAGIC) - (zero_point | MAGIC_BITS).view(F32)
        minus_scale, top = scale ^ _sign(I32), bottom + self._step.levels
        values = inverse, zero_point * _TWO_INT16, scale_bits, minus_scale, bottom, top
        for name, value in zip(_NAMES, values, strict=True):
            self._set(range_, name, value)

    def put_errors(self, j: Vec, vectors: list[Vec]) -> None:
        """Compare the square errors of group j in both ranges. vectors: its padded values, as `spread` returns them."""
        worse = None  # by how much "clipped" is worse: integers far below 2^24, whose order does not matter
        for range_ in ("clipped", "whole"):
            for error in self._errors(j, range_, vectors):
                factor = error if range_ == "clipped" else error.like(-0.0) - error
                worse = factor.intrinsic("fmuladd", error, worse) if worse else error * error
        assert worse
        self._put_row(j, fold([worse], "+"))

    def _errors(self, j: Vec, range_: str, vectors: list[Vec]) -> list[Vec]:
        """The errors of each vector in sixteenths of a step of the whole range, rounded.

        The whole range needs no clamping. No value is below it. A code is 1 above it only if both extremes are halfway
        between two codes. There either code is off by half a step: the square is the same.
        """
        inverse, minus_scale, bottom, top, whole_inverse = (
            self._get(j, *name).view(F32).splat(vectors[0].lanes)
            for name in [*((range_, n) for n in ("inverse", "minus scale", "bottom", "top")), ("whole", "inverse")]
        )
        errors = []
        for x in vectors:
            steps = (x * inverse).intrinsic("rint")
            steps = steps.minimum(top).maximum(bottom) if range_ == "clipped" else steps
            errors.append((minus_scale.intrinsic("fmuladd", steps, x) * (whole_inverse * 16.0)).intrinsic("rint"))
        return errors

    def choose(self) -> None:
        """Make "whole" the better of the two ranges."""
        better = self._reduce(F32, 1, "+").compare("<", 0.0)
        for name in _RESULTS:
            clipped, whole = (self._f.load(self._slots[r, name], I32, self._most) for r in ("clipped", "whole"))
            self._set("whole", name, better.choose(clipped, whole))

    def quantized(self, j: Vec, vectors: list[Vec]) -> Quantized:
        """Return the wire data of group j. vectors: its values as for `put_errors`."""
        inverse, zero_points, scale_bits = (self._get(j, "whole", name) for name in _RESULTS)
        inverse = inverse.view(F32).splat(vectors[0].lanes)
        codes = join([(x * inverse + MAGIC).view(I32) for x in vectors])
        codes = codes + zero_points.splat(codes.lanes // 2).view(I16)
        # In a group that is not finite the codes are arbitrary, but `largest` is 0 and clamps them to 0. In the whole
        # range no code is below 0, because rounding is monotonic.
        largest = self._get(j, "", "largest").splat(codes.lanes // 2).view(I16)
        codes = codes.maximum(0).minimum(largest) if self.clip_ratio else codes.intrinsic("umin", largest)
        return Quantized(codes, scale_bits.to(I16), zero_points.to(I8))

    def _get(self, j: Vec, range_: str, name: str) -> Vec:
        return self._f.load(self._slots[range_, name] + j * 4, I32)

    def _set(self, range_: str, name: str, values: Vec) -> None:
        self._f.store(self._slots[range_, name], values)

    def _put_row(self, j: Vec, row: Vec) -> None:
        self._lanes = row.lanes
        self._f.store(self._rows + j * (REGISTER_BITS // 8), row)

    def _reduce(self, kind: Any, each: int, op: str) -> Vec:
        """Reduce the row of every group to `each` numbers, each from an equal part of the row."""
        rows = [self._rows + j * (REGISTER_BITS // 8) for j in range(self._most)]
        return reduce([self._f.load(row, kind, self._lanes) for row in rows], self._lanes // each, op)


def _sign(kind: Any) -> int:
    return 1 << (width(kind) - 1)
