"""The encoder of one format, as vector code: `torch_codec.quantize` and `pack`, bit for bit.

A block of groups goes through the stages of `BlockQuantizer` while it is in the first-level cache. Transforms are
computed in the first stage and kept for the others. The last stage leaves codes, which are packed into bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir

from flashcomm.cpu.groups import INTEGER, BlockAddresses, for_each_block, padded, plane_bytes, spread
from flashcomm.cpu.hadamard import hadamard
from flashcomm.cpu.jit import once
from flashcomm.cpu.quantize import BlockQuantizer
from flashcomm.cpu.vector import F32, I8, I32, Function, Vec
from flashcomm.wire.format import StepFormat


@once
def encoder(dtype: torch.dtype, step: StepFormat, tail: int) -> Callable[..., None]:
    """Return kernel(values, scale, zero_point, plane, plane, plane, groups to the end of the row, per row, in all).

    The first six are the addresses of the first group. Addresses that the format has no use for are ignored.

    Args:
        dtype: The dtype of the values.
        step: The format.
        tail: The size of a short group at the end of a row: row % group.
    """
    f, most = Function("encode", pointers=6, integers=3), _block_size(step.group)
    groups = {n: _Groups(f, dtype, step, n, count) for n, count in ((step.group, most), (tail, 1)) if n}

    def block(n: int, count: Vec, at: BlockAddresses) -> None:
        group, quantizer, stride = groups[n], groups[n].quantizer, n * dtype.itemsize
        with f.loop(count) as j:
            quantizer.put_extremes(j, group.load_bits(j, at.values + j * stride))
        quantizer.compute()
        if quantizer.clip_ratio:
            with f.loop(count) as j:
                quantizer.put_errors(j, group.values(j, at.values + j * stride))
            quantizer.choose()
        with f.loop(count) as j:
            codes, scale_bits, zero_point = quantizer.quantized(j, group.values(j, at.values + j * stride))
            for plane, (width, shift) in zip(at.planes, step.planes, strict=True):
                f.store(plane + j * plane_bytes(n, width), _pack(codes, n, width, shift, step.bits))
            f.store(at.scale + j * 2, scale_bits)
            if not step.packed:
                f.store(at.zero_point + j, zero_point)

    for_each_block(f, step, dtype, tail, block, most)
    return f.compile()


def _block_size(group: int) -> int:
    """The number of groups in a block: enough to fill vectors, few enough to stay in the cache."""
    return min(64, max(16, 2048 // group))


class _Groups:
    """Groups of n values, at most `most` in a block: their quantizer, and memory for their transforms."""

    def __init__(self, f: Function, dtype: torch.dtype, step: StepFormat, n: int, most: int) -> None:
        self._f, self._dtype, self._n = f, dtype, n
        transforms = step.transforms(n) and not step.in_hadamard_domain
        self.quantizer = BlockQuantizer(f, torch.float32 if transforms else dtype, step, n, most)
        self._transforms = f.scratch(ir.ArrayType(F32, padded(n) * most)) if transforms else None

    def load_bits(self, j: Vec, address: Vec) -> list[Vec]:
        """Return the bit patterns of the numbers that are quantized in group j: its values, or their transform.

        address: that of the group's values.
        """
        bits = self._load(address)
        if self._transforms is None:
            return [bits]
        vectors = hadamard(spread(bits, self._dtype), self._n)
        for i, vector in enumerate(vectors):
            self._f.store(self._transforms + (j * len(vectors) + i) * (4 * vector.lanes), vector)
        return [vector.view(I32) for vector in vectors]

    def values(self, j: Vec, address: Vec) -> list[Vec]:
        """Return the same numbers as float32 in one or two vectors (see `spread`). Call `load_bits` before."""
        if self._transforms is None:
            return spread(self._load(address), self._dtype)
        count = 2 if self._dtype == torch.bfloat16 else 1
        lanes = padded(self._n) // count
        return [self._f.load(self._transforms + (j * count + i) * (4 * lanes), F32, lanes) for i in range(count)]

    def _load(self, address: Vec) -> Vec:
        """The bit patterns of the values, padded with zeros, which change neither range nor transform nor error."""
        bits = self._f.load(address, INTEGER[self._dtype], self._n)
        return bits.shuffle([min(i, self._n) for i in range(padded(self._n))], bits.like(0))


def _pack(codes: Vec, n: int, width: int, shift: int, bits: int) -> Vec:
    """The m bytes of a plane: value i is at bit width * (i div m) of byte i mod m.

    Every code is shifted to its place in its byte. Then the vector is folded in half until m lanes are left.
    """
    m = plane_bytes(n, width)
    lanes = m * 8 // width
    plane = codes.shuffle([i if i < n else codes.lanes for i in range(lanes)], codes.like(0))
    if shift:
        plane = plane >> shift
    if shift + width < bits:
        plane = plane & ((1 << width) - 1)
    plane = plane << [width * (i // m) for i in range(lanes)]
    while plane.lanes > m:
        half = plane.lanes // 2
        plane = plane.shuffle(range(half)) | plane.shuffle(range(half, 2 * half))
    return plane.to(I8)
