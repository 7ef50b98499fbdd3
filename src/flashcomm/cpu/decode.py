"""The decoder of one format, as vector code: decode the wire buffers of all ranks and add them up, bit for bit.

The total of a group stays in registers while the ranks are added to it. Two facts keep that short. A code becomes
the float code - zero by one OR and one subtraction (see `MAGIC`), both exact. And scale * (code - zero) is exact in
float32, so that `fmuladd` gives the same bits whether the machine fuses it or not. Totals start at -0.0, the neutral
element of addition: 0.0 would turn a -0.0 into 0.0.

Four codes are one int32. The codes 0, 4, 8, ... are taken from the lowest bytes of such words, 1, 5, 9, ... from the
next: no byte has to be widened, and the totals are put in order once, after the last rank. Small groups are taken
several at once, so that a group of 16 costs a value no more than a group of 128.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashcomm.cpu.groups import (
    INTEGER,
    MAGIC_BITS,
    At,
    floats,
    for_blocks,
    interleave,
    padded,
    plane_bytes,
    round_to_bf16,
)
from flashcomm.cpu.hadamard import hadamard
from flashcomm.cpu.jit import cpu, once
from flashcomm.cpu.vector import F16, F32, I8, I16, I32, I64, Function, Variable, Vec
from flashcomm.wire.format import StepFormat
from flashcomm.wire.torch_codec import SCALE_NAN

# Values whose totals fit in the registers: so much of a group, or so many groups, at once.
_TILE = 256 if cpu()[1].get("avx512f", False) else 128
_QUARTER = 64  # with fewer values than this (ends of rows), quarters of words fill no register: codes are widened


@once
def decoder(dtype: torch.dtype, step: StepFormat, tail: int) -> Callable[..., None]:
    """kernel(out, scale, zero, plane, plane, plane, stride, ranks, groups to the end of the row, per row, in all).

    Addresses of the first group, in rank 0's buffer; those of the next rank are `stride` bytes on. dtype: of out.
    """
    f = Function("decode_sum", pointers=6, integers=5)
    stride, ranks = f.integers[:2]

    def tile(j: Vec, k: int, n: int, at: At, begin: int, size: int) -> None:
        """Values [begin, begin + size) of the k groups from j on."""
        values = [divmod(min(begin + i, k * n - 1), n) for i in range(min(size, padded(k * n - begin)))]
        parts = 4 if len(values) >= _QUARTER else 1
        group_of_word = [g for g, _ in values[::parts]]
        totals = [Variable(f.vector(F32, len(group_of_word), -0.0)) for _ in range(parts)]
        with f.loop(ranks) as r:
            word = f.load(at.scale + r * stride + j * 2, I16, k).to(I32)
            if step.packed:
                zero, scale = word & step.levels, (word & ~step.levels) << 15
            else:
                zero, scale = f.load(at.zero + r * stride + j, I8, k).to(I32), word << 16
            origin = (zero | MAGIC_BITS).view(F32).shuffle(group_of_word)
            scale = scale.view(F32).shuffle(group_of_word)
            sizes = [plane_bytes(n, width) for width, _ in step.planes]
            planes = [f.load(p + r * stride + j * m, I8, k * m) for p, m in zip(at.planes, sizes, strict=True)]
            codes = _unpack(planes, step, n, values)
            words = codes.view(I32) if parts == 4 else codes.to(I32)
            for i, total in enumerate(totals):
                steps = (((words >> 8 * i) & 0xFF) | MAGIC_BITS).view(F32) - origin
                total.set(steps.intrinsic("fmuladd", scale, total.get()))
        sums = [total.get() for total in totals]
        if step.transforms(n) and not step.in_hadamard_domain:
            sums = [x * (1 / n) for x in hadamard(sums, n)]
        result = _stored(sums, dtype)
        if begin + len(values) > k * n:
            result = result.shuffle(range(k * n - begin))
        f.store(at.values + j * (n * dtype.itemsize) + begin * dtype.itemsize, result)

    def block(n: int, count: Vec, at: At) -> None:
        done = Variable(f.number(0))
        at_once = _TILE // n if n == step.group and n < _TILE else 1
        size = (
            max(_TILE, n) if step.transforms(n) and not step.in_hadamard_domain else _TILE
        )  # no transform of half a group
        for k in sorted({at_once, max(1, at_once // 4), 1}, reverse=True):
            with f.loop_while(lambda k=k: (done.get() + k).compare("<=", count)):  # type: ignore[misc]
                for begin in range(0, k * n, size):
                    tile(done.get(), k, n, at, begin, size)
                done.set(done.get() + k)

    for_blocks(f, step, dtype, tail, block)
    return f.compile()


def _unpack(planes: list[Vec], step: StepFormat, n: int, values: list[tuple[int, int]]) -> Vec:
    """The codes of values, each given as (group, place in the group of n)."""
    parts = []
    for plane, (width, shift) in zip(planes, step.planes, strict=True):
        m = plane_bytes(n, width)
        part = plane.shuffle([g * m + i % m for g, i in values])
        if width < 8:
            # Bytes that need the same shift are shifted together, up to four: CPUs have no shift of single bytes.
            together = min(4, m & -m)
            word = {1: I8, 2: I16, 4: I32}[together]
            mask = int.from_bytes(bytes([(1 << width) - 1] * together), "little")
            part = (part.view(word) >> [width * (i // m) for _, i in values[::together]]) & mask
            part = (part << shift).view(I8)
        parts.append(part)
    codes = parts[0]
    for part in parts[1:]:
        codes = codes | part
    return codes


def _stored(totals: list[Vec], dtype: torch.dtype) -> Vec:
    """The totals as bit patterns of dtype and in order; of four vectors, the i-th holds the values i, i+4, ..."""
    if len(totals) == 1:
        return _bits(totals[0], dtype)
    first, second = (_pairs(totals[i], totals[i + 1], dtype) for i in (0, 2))
    return interleave(first, second).view(INTEGER[dtype])


def _pairs(even: Vec, odd: Vec, dtype: torch.dtype) -> Vec:
    """Integers of twice the width: the bit pattern of an even value below that of the odd one after it."""
    if dtype == torch.bfloat16:
        return (round_to_bf16(odd) & 0xFFFF0000) | (round_to_bf16(even) >> 16)
    return interleave(_bits(even, dtype), _bits(odd, dtype)).view(I64 if dtype == torch.float32 else I32)


def _bits(x: Vec, dtype: torch.dtype) -> Vec:
    if dtype == torch.bfloat16:
        return (round_to_bf16(x) >> 16).to(I16)
    return x.to(F16).view(I16) if dtype == torch.float16 else x.view(I32)


@once
def adder(source: torch.dtype, target: torch.dtype) -> Callable[..., None]:
    """kernel(values, out, stride, ranks, n): the sum of lossless buffers, values of `source`, rounded to `target`."""
    f = Function("add", pointers=2, integers=3)
    (values, out), (stride, ranks, n) = f.pointers, f.integers
    done = Variable(f.number(0))
    for lanes in (64, 1):
        with f.loop_while(lambda lanes=lanes: (done.get() + lanes).compare("<=", n)):  # type: ignore[misc]
            total = Variable(f.vector(F32, lanes, -0.0))
            with f.loop(ranks) as r:
                bits = f.load(values + r * stride + done.get() * source.itemsize, INTEGER[source], lanes)
                total.set(total.get() + floats(bits, source))
            result = _bits(total.get(), target)
            if target == torch.bfloat16:
                result = total.get().compare("!=", total.get()).choose(SCALE_NAN, result)
            f.store(out + done.get() * target.itemsize, result)
            done.set(done.get() + lanes)
    return f.compile()
