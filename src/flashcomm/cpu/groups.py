"""What the encoder and the decoder share: vectors of bf16 and fp16 numbers, and the loop over blocks of groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from flashcomm.cpu.vector import F16, F32, I16, I32, I64, Function, Variable, Vec
from flashcomm.wire.format import StepFormat

INTEGER = {torch.bfloat16: I16, torch.float16: I16, torch.float32: I32}
"""Maps each dtype to the LLVM integer that holds its bit pattern."""

MAGIC_BITS = 0x4B400000
MAGIC = 1.5 * 2.0**23
"""The float32 with the bits MAGIC_BITS. Floats near it are integers: MAGIC + i has the bits MAGIC_BITS + i for
|i| < 2^22. Adding MAGIC to a float rounds it to an integer, half to even, and leaves that integer in the low bits.
Conversely, an OR with MAGIC_BITS turns a small integer into a float. Neither needs a conversion or lanes of another
width."""

_LANES = 16  # the number of lanes of a vector is a multiple of this, also for short groups


def padded(n: int) -> int:
    """Return the number of lanes that n values take."""
    return -(-n // _LANES) * _LANES


def plane_bytes(n: int, width: int) -> int:
    """Return the bytes of n values in a plane of `width` bits."""
    return -(-n * width // 8)


def floats(bits: Vec, dtype: torch.dtype) -> Vec:
    """Return the float32 values of bit patterns of dtype."""
    if dtype == torch.bfloat16:
        return (bits.to(I32) << 16).view(F32)
    return bits.view(F16).to(F32) if dtype == torch.float16 else bits.view(F32)


def spread(bits: Vec, dtype: torch.dtype) -> list[Vec]:
    """Return the float32 values of bit patterns of dtype, of bfloat16 in two vectors: even ones and odd ones.

    Two bfloat16 are one int32. Splitting it into halves, and joining them later, moves no value to another lane.
    """
    if dtype != torch.bfloat16:
        return [floats(bits, dtype)]
    pairs = bits.view(I32)
    return [(pairs << 16).view(F32), (pairs & 0xFFFF0000).view(F32)]


def join(vectors: list[Vec]) -> Vec:
    """Return the int16 in the low halves of int32 lanes, in order: the inverse of `spread`."""
    if len(vectors) == 1:
        return vectors[0].to(I16)
    even, odd = vectors
    return ((odd << 16) | (even & 0xFFFF)).view(I16)


def round_to_bf16(x: Vec) -> Vec:
    """Return int32 lanes whose upper halves are the values as bfloat16, rounded half to even.

    NaN stays NaN if its low 16 bits are 0, as they are in every NaN that comes from a scale or from arithmetic.
    """
    bits = x.view(I32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


class BlockAddresses(NamedTuple):
    """The addresses at which a block of groups begins: of values, scales, zero points and bytes in each plane."""

    values: Vec
    scale: Vec
    zero_point: Vec
    planes: list[Vec]


def for_each_block(
    f: Function,
    step: StepFormat,
    dtype: torch.dtype,
    tail: int,
    block: Callable[[int, Vec, BlockAddresses], None],
    most: int | None = None,
) -> None:
    """Emit block(n, count, at) for all groups: a block is `count` consecutive groups of n values, beginning at `at`.

    Full groups and shorter last groups of rows ("tails") are different code, each generated for its size.

    Args:
        f: The function. Its pointers are those of `BlockAddresses`, with three planes. Its last three integers are the
            numbers of groups to the end of the first row, in every other row, and in all.
        step: The format.
        dtype: The dtype of the values.
        tail: The size of the last group of a row, 0 if that is a full one.
        block: Emits the code of one block.
        most: The largest number of groups in a block, or None for no limit.
    """
    places = [Variable(p) for p in f.pointers[: 3 + len(step.planes)]]
    first, per_row, n_groups = f.integers[-3:]

    def visit(n: int, count: Vec) -> None:
        values, scale, zero_point, *planes = (p.get() for p in places)
        block(n, count, BlockAddresses(values, scale, zero_point, planes))
        sizes = [n * dtype.itemsize, 2, 1, *(plane_bytes(n, width) for width, _ in step.planes)]
        for place, size in zip(places, sizes, strict=True):
            place.set(place.get() + count * size)

    in_row, todo, full = Variable(first), Variable(n_groups), Variable(n_groups)
    with f.loop_while(lambda: todo.get().compare(">", 0)):
        here = in_row.get().minimum(todo.get())
        tails = here.compare("==", in_row.get()).to(I64) if tail else f.number(0)
        full.set(here - tails)
        with f.loop_while(lambda: full.get().compare(">", 0)):
            count = full.get().minimum(most) if most else full.get()
            visit(step.group, count)
            full.set(full.get() - count)
        if tail:
            with f.loop(tails):
                visit(tail, f.number(1))
        todo.set(todo.get() - here)
        in_row.set(per_row)


def interleave(a: Vec, b: Vec) -> Vec:
    """Return a[0], b[0], a[1], b[1], ..."""
    return a.shuffle([lane for i in range(a.lanes) for lane in (i, i + a.lanes)], b)
