"""The grids of a block of groups as vector code: `torch_codec.quantize`, bit for bit.

Stages that see all values of a group, one group after another, take turns with stages that have a lane per group,
because one division after another would take longer than everything else:

    put_extremes    each group    its largest and its smallest value
    compute         all groups    scale, inverse and zero
    put_errors      each group    how much worse a part of its range would be    } only where groups may choose
    choose          all groups    scale, inverse and zero of the better range    } (see `StepFormat.shrunk`)
    coded           each group    its codes

Extremes are those of *integers*. As signed numbers the bit patterns of floats have the largest value on top; as
unsigned numbers they have the smallest there, if any is negative. NaN and infinities come out above all else and
show themselves, and no floating-point operation is reordered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir

from flashcomm.cpu.groups import INTEGER, MAGIC, MAGIC_BITS, floats, join
from flashcomm.cpu.reduce import REGISTER, folded, halved, reduced
from flashcomm.cpu.vector import F32, I8, I16, I32, Function, Vec, width
from flashcomm.wire import torch_codec
from flashcomm.wire.format import StepFormat


def _limit(dtype: torch.dtype, step: StepFormat, n: int) -> int:
    """The bits, as dtype, of the smallest magnitude that counts as not finite."""
    bits = int(np.float32(step.limit(n)).view(np.int32))
    infinity = 0x7C00  # of float16, whose finite values are all below the limit
    return {torch.bfloat16: bits >> 16, torch.float16: infinity, torch.float32: bits}[dtype]


_NAMES = ("inverse", "zeros", "word", "minus scale", "bottom", "top")
_TWICE = 0x10001  # an int16 times this is an int32 of two of them


class Coded(NamedTuple):
    """What is sent of a group: its codes (int16 lanes, in order), the scale's int16 and the zero's byte (numbers)."""

    codes: Vec
    word: Vec
    zero: Vec


class Grid:
    """The grids of at most `most` groups of n values, in the function's own memory, 32 bits a name.

    dtype: of the bit patterns that extremes are taken of. Blocks may be short: then the lanes beyond hold whatever
    was in memory, and nothing reads them.
    """

    def __init__(self, f: Function, dtype: torch.dtype, step: StepFormat, n: int, most: int) -> None:
        self._f, self._dtype, self._step, self._most = f, dtype, step, most
        self._limit = _limit(dtype, step, n)
        self.part = step.clip_ratio(n)
        slots = [("", "largest"), *((grid, name) for grid in ("whole", "part") for name in _NAMES)]
        self._slots = {slot: f.scratch(ir.VectorType(I32, most)) for slot in slots}
        self._rows = f.scratch(ir.ArrayType(I8, most * REGISTER // 8))  # a register for each group
        self._lanes = 0  # of such a register, those that are used

    def put_extremes(self, j: Vec, bits: list[Vec]) -> None:
        """Of group j: the bit patterns of its values, in any order and with zeros among them."""
        high, low = (folded(bits, name) for name in ("smax", "umax"))
        both = high.shuffle(range(2 * high.lanes), low ^ _sign(low.element))  # from here on both are signed maxima
        self._put_row(j, halved([both], high.lanes, "smax"))

    def compute(self) -> None:
        """The formula of `torch_codec`, a lane per group."""
        kind, limit = INTEGER[self._dtype], self._limit
        both, sign = self._reduced(kind, 2, "smax"), _sign(kind)
        high = both.shuffle(range(0, both.lanes, 2)).maximum(0)
        low = (both.shuffle(range(1, both.lanes, 2)) ^ sign).minimum(0)
        bad = high.compare(">", limit - 1) | (low & (sign - 1)).compare(">", limit - 1)
        self._set("", "largest", bad.choose(0, self._f.vector(I32, self._most, self._step.levels * _TWICE)))
        low, high = floats(low, self._dtype), floats(high, self._dtype)
        self._set_grid("whole", low, high, bad)
        if self.part:
            self._set_grid("part", low * self.part, high * self.part, bad)

    def _set_grid(self, grid: str, low: Vec, high: Vec, bad: Vec) -> None:
        cut = (1 << (23 - self._step.mantissa)) - 1
        scale = ((high - low) / self._step.levels).maximum(torch_codec.SCALE_MIN).view(I32)
        scale = (scale + cut) & ~cut
        inverse = 1.0 / scale.view(F32)
        zero = bad.choose(0, scale.like(MAGIC_BITS) - (low * inverse + MAGIC).view(I32))
        sent = bad.choose(torch_codec.SCALE_NAN << 16, scale)
        word = (sent >> 15) | zero if self._step.packed else sent >> 16
        bottom = inverse.like(MAGIC) - (zero | MAGIC_BITS).view(F32)
        values = inverse, zero * _TWICE, word, scale ^ _sign(I32), bottom, bottom + self._step.levels
        for name, value in zip(_NAMES, values, strict=True):
            self._set(grid, name, value)

    def put_errors(self, j: Vec, parts: list[Vec]) -> None:
        """Of group j, whose values are in one or two float32 vectors (see `spread`), padded with zeros."""
        more = None  # by so much is "part" worse; integers far below 2^24: in any order the same sum
        for grid in ("part", "whole"):
            for error in self._errors(j, grid, parts):
                factor = error if grid == "part" else error.like(-0.0) - error
                more = factor.intrinsic("fmuladd", error, more) if more else error * error
        assert more
        self._put_row(j, folded([more], "+"))

    def _errors(self, j: Vec, grid: str, parts: list[Vec]) -> list[Vec]:
        """Per part the errors in sixteenths of a step of the whole range, rounded."""
        inverse, minus_scale, bottom, top, whole_inverse = (
            self._get(j, *name).view(F32).splat(parts[0].lanes)
            for name in [*((grid, n) for n in ("inverse", "minus scale", "bottom", "top")), ("whole", "inverse")]
        )
        errors = []
        for x in parts:
            steps = (x * inverse).intrinsic("rint").minimum(top)
            steps = steps.maximum(bottom) if grid == "part" else steps  # no value is below the whole range
            errors.append((minus_scale.intrinsic("fmuladd", steps, x) * (whole_inverse * 16.0)).intrinsic("rint"))
        return errors

    def choose(self) -> None:
        """Make "whole" the better of the two grids."""
        better = self._reduced(F32, 1, "+").compare("<", 0.0)
        for name in ("inverse", "zeros", "word"):
            part, whole = (self._f.load(self._slots[grid, name], I32, self._most) for grid in ("part", "whole"))
            self._set("whole", name, better.choose(part, whole))

    def coded(self, j: Vec, parts: list[Vec]) -> Coded:
        """Of group j, its values as for `put_errors`."""
        inverse, zeros, word = (self._get(j, "whole", name) for name in ("inverse", "zeros", "word"))
        inverse = inverse.view(F32).splat(parts[0].lanes)
        codes = join([(x * inverse + MAGIC).view(I32) for x in parts])
        codes = codes + zeros.splat(codes.lanes // 2).view(I16)
        # In a bad group anything comes out, and is cut to 0. In a whole range no code is below 0: rounding keeps order.
        largest = self._get(j, "", "largest").splat(codes.lanes // 2).view(I16)
        codes = codes.maximum(0).minimum(largest) if self.part else codes.intrinsic("umin", largest)
        return Coded(codes, word.to(I16), zeros.to(I8))

    def _get(self, j: Vec, grid: str, name: str) -> Vec:
        return self._f.load(self._slots[grid, name] + j * 4, I32)

    def _set(self, grid: str, name: str, values: Vec) -> None:
        self._f.store(self._slots[grid, name], values)

    def _put_row(self, j: Vec, row: Vec) -> None:
        self._lanes = row.lanes
        self._f.store(self._rows + j * (REGISTER // 8), row)

    def _reduced(self, kind: Any, each: int, how: str) -> Vec:
        """`each` numbers of every group, made of as many equal parts of its row."""
        rows = [self._rows + j * (REGISTER // 8) for j in range(self._most)]
        return reduced([self._f.load(row, kind, self._lanes) for row in rows], self._lanes // each, how)


def _sign(kind: Any) -> int:
    return 1 << (width(kind) - 1)
