"""The encoder of one format, as vector code: `torch_codec.quantize` and `pack`, bit for bit.

A block of groups goes through the stages of `cpu_grid` while it is in the first-level cache. Transforms are made in the
first of them and kept for the others. The last one leaves codes, which are packed into bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir

from flashcomm.cpu.grid import Grid
from flashcomm.cpu.groups import INTEGER, At, for_blocks, padded, plane_bytes, spread
from flashcomm.cpu.hadamard import hadamard
from flashcomm.cpu.jit import once
from flashcomm.cpu.vector import F32, I8, I32, Function, Vec
from flashcomm.wire.format import StepFormat


@once
def encoder(dtype: torch.dtype, step: StepFormat, tail: int) -> Callable[..., None]:
    """kernel(values, scale, zero, plane, plane, plane, groups to the end of the row, per row, in all).

    Addresses of the first group; planes and zero that the format lacks are not looked at. tail: row % group.
    """
    f, most = Function("encode", pointers=6, integers=3), _block(step.group)
    groups = {n: _Groups(f, dtype, step, n, count) for n, count in ((step.group, most), (tail, 1)) if n}

    def block(n: int, count: Vec, at: At) -> None:
        group, grid, stride = groups[n], groups[n].grid, n * dtype.itemsize
        with f.loop(count) as j:
            grid.put_extremes(j, group.turned(j, at.values + j * stride))
        grid.compute()
        if grid.part:
            with f.loop(count) as j:
                grid.put_errors(j, group.values(j, at.values + j * stride))
            grid.choose()
        with f.loop(count) as j:
            codes, word, zero = grid.coded(j, group.values(j, at.values + j * stride))
            for plane, (width, shift) in zip(at.planes, step.planes, strict=True):
                f.store(plane + j * plane_bytes(n, width), _pack(codes, n, width, shift, step.bits))
            f.store(at.scale + j * 2, word)
            if not step.packed:
                f.store(at.zero + j, zero)

    for_blocks(f, step, dtype, tail, block, most)
    return f.compile()


def _block(group: int) -> int:
    """Groups in a block: enough to fill vectors, few enough to stay in the cache."""
    return min(64, max(16, 2048 // group))


class _Groups:
    """Groups of n values, at most `most` of them in a block: their grids, and their transforms between the stages."""

    def __init__(self, f: Function, dtype: torch.dtype, step: StepFormat, n: int, most: int) -> None:
        self._f, self._dtype, self._n = f, dtype, n
        turns = step.transforms(n) and not step.in_hadamard_domain
        self.grid = Grid(f, torch.float32 if turns else dtype, step, n, most)
        self._kept = f.scratch(ir.ArrayType(F32, padded(n) * most)) if turns else None

    def turned(self, j: Vec, address: Vec) -> list[Vec]:
        """The bit patterns of group j, whose values are at that address; its transform, if that is what is coded."""
        bits = self._load(address)
        if self._kept is None:
            return [bits]
        parts = hadamard(spread(bits, self._dtype), self._n)
        for i, part in enumerate(parts):
            self._f.store(self._kept + (j * len(parts) + i) * (4 * part.lanes), part)
        return [part.view(I32) for part in parts]

    def values(self, j: Vec, address: Vec) -> list[Vec]:
        """After `turned`: what is coded, as float32 in one or two vectors (see `spread`)."""
        if self._kept is None:
            return spread(self._load(address), self._dtype)
        count = 2 if self._dtype == torch.bfloat16 else 1
        lanes = padded(self._n) // count
        return [self._f.load(self._kept + (j * count + i) * (4 * lanes), F32, lanes) for i in range(count)]

    def _load(self, address: Vec) -> Vec:
        """The bit patterns of the values, padded with zeros: they change neither range nor transform nor error."""
        bits = self._f.load(address, INTEGER[self._dtype], self._n)
        return bits.shuffle([min(i, self._n) for i in range(padded(self._n))], bits.like(0))


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
