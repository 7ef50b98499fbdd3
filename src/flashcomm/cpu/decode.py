"""The decoder of one format, as vector code: `torch_codec.decode_sum` over the wire buffers of all ranks, bit for bit.

The sum of a group stays in registers while the ranks are added to it. Two facts save instructions. First, one OR and
one subtraction turn a code into the float code - zero_point, and both are exact (see `MAGIC`). Second, the product
scale * (code - zero_point) is exact in float32. So `fmuladd` gives the same bits whether the machine fuses it or not.
Sums start at -0.0, the neutral element of addition: 0.0 would turn a -0.0 into 0.0.

Four codes are one int32. The codes 0, 4, 8, ... are taken from the lowest bytes of such integers, 1, 5, 9, ... from the
next. So no byte has to be widened, and the sums are put in order once, after the last rank. Several small groups are
decoded at once: a *tile* is as many groups as fit the registers, or one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashcomm.cpu.groups import (
    INTEGER,
    MAGIC_BITS,
    BlockAddresses,
    floats,
    for_each_block,
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

_TILE_VALUES = 256 if cpu()[1].get("avx512f", False) else 128  # as many sums as fit the registers
_MIN_FOR_QUARTERS = 64  # values; in shorter groups a quarter would not fill a register, so codes are widened instead


@once
def decoder(dtype: torch.dtype, step: StepFormat, tail: int) -> Callable[..., None]:
    """Return kernel(out, scale, zero_point, plane, plane, plane, stride, ranks, then groups as for `encoder`).

    The first six are the addresses of the first group, in the buffer of rank 0. Those of each next rank are `stride`
    bytes further.

    Args:
        dtype: The dtype of out.
        step: The format.
        tail: The size of a short group at the end of a row: row % group.
    """
    f = Function("decode_sum", pointers=6, integers=5)
    stride, ranks = f.integers[:2]

    def tile(j: Vec, k: int, n: int, at: BlockAddresses) -> None:
        """Emit the sum of the k groups from j on."""
        values = [divmod(min(i, k * n - 1), n) for i in range(padded(k * n))]
        quarters = 4 if len(values) >= _MIN_FOR_QUARTERS else 1
        group_of_lane = [g for g, _ in values[::quarters]]
        totals = [Variable(f.vector(F32, len(group_of_lane), -0.0)) for _ in range(quarters)]
        with f.loop(ranks) as r:
            scale_bits = f.load(at.scale + r * stride + j * 2, I16, k).to(I32)
            if step.packed:
                zero_point, scale = scale_bits & step.levels, (scale_bits & ~step.levels) << 15
            else:
                zero_point, scale = f.load(at.zero_point + r * stride + j, I8, k).to(I32), scale_bits << 16
            origin = (zero_point | MAGIC_BITS).view(F32).shuffle(group_of_lane)
            scale = scale.view(F32).shuffle(group_of_lane)
            sizes = [plane_bytes(n, width) for width, _ in step.planes]
            planes = [f.load(p + r * stride + j * m, I8, k * m) for p, m in zip(at.planes, sizes, strict=True)]
            codes = _unpack(planes, step, n, values)
            integers = codes.view(I32) if quarters == 4 else codes.to(I32)
            for i, total in enumerate(totals):
                steps = (((integers >> 8 * i) & 0xFF) | MAGIC_BITS).view(F32) - origin
                total.set(steps.intrinsic("fmuladd", scale, total.get()))
        sums = [total.get() for total in totals]
        if step.transforms(n) and not step.in_hadamard_domain:
            sums = [x * (1 / n) for x in hadamard(sums, n)]
        result = _in_order(sums, dtype)
        if len(values) > k * n:
            result = result.shuffle(range(k * n))
        f.store(at.values + j * (n * dtype.itemsize), result)

    def block(n: int, count: Vec, at: BlockAddresses) -> None:
        done = Variable(f.number(0))
        at_once = _TILE_VALUES // n if n == step.group and n < _TILE_VALUES else 1
        for k in sorted({at_once, max(1, at_once // 4), 1}, reverse=True):
            with f.loop_while(lambda k=k: (done.get() + k).compare("<=", count)):  # type: ignore[misc]
                tile(done.get(), k, n, at)
                done.set(done.get() + k)

    for_each_block(f, step, dtype, tail, block)
    return f.compile()


def _unpack(planes: list[Vec], step: StepFormat, n: int, values: list[tuple[int, int]]) -> Vec:
    """The codes of values, each given as (group, place in its group of n)."""
    codes = None
    for plane, (width, shift) in zip(planes, step.planes, strict=True):
        m = plane_bytes(n, width)
        bits = plane.shuffle([g * m + i % m for g, i in values])
        if width < 8:
            # Up to four bytes that need the same shift are shifted as one: CPUs have no shift of single bytes.
            together = min(4, m & -m)
            integer = {1: I8, 2: I16, 4: I32}[together]
            mask = int.from_bytes(bytes([(1 << width) - 1] * together), "little")
            bits = (bits.view(integer) >> [width * (i // m) for _, i in values[::together]]) & mask
            bits = (bits << shift).view(I8)
        codes = codes | bits if codes else bits
    assert codes
    return codes


def _in_order(totals: list[Vec], dtype: torch.dtype) -> Vec:
    """The totals as bit patterns of dtype, in order. If there are four vectors, vector i has the values i, i+4, ..."""
    if len(totals) == 1:
        return _bits(totals[0], dtype)
    first, second = (_pairs(totals[i], totals[i + 1], dtype) for i in (0, 2))
    return interleave(first, second).view(INTEGER[dtype])


def _pairs(even: Vec, odd: Vec, dtype: torch.dtype) -> Vec:
    """Integers of twice the width, with the bit pattern of each even value below that of the odd one after it."""
    if dtype == torch.bfloat16:
        return (round_to_bf16(odd) & 0xFFFF0000) | (round_to_bf16(even) >> 16)
    return interleave(_bits(even, dtype), _bits(odd, dtype)).view(I64 if dtype == torch.float32 else I32)


def _bits(x: Vec, dtype: torch.dtype) -> Vec:
    if dtype == torch.bfloat16:
        return (round_to_bf16(x) >> 16).to(I16)
    return x.to(F16).view(I16) if dtype == torch.float16 else x.view(I32)


@once
def adder(source: torch.dtype, target: torch.dtype) -> Callable[..., None]:
    """Return kernel(values, out, stride, ranks, n): sums uncompressed buffers of `source`, rounded to `target`."""
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
