"""What the encoder and the decoder have in common: number formats as vectors, and the way from group to group."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from flashcomm.cpu.vector import F16, F32, I16, I32, I64, Function, Variable, Vec
from flashcomm.wire.format import StepFormat

INTEGER = {torch.bfloat16: I16, torch.float16: I16, torch.float32: I32}
"""Per dtype: the LLVM integer that holds its bit pattern."""

MAGIC_BITS = 0x4B400000
MAGIC = 1.5 * 2.0**23
"""The float32 with the bits MAGIC_BITS. Around it floats are integers: MAGIC + i has the bits MAGIC_BITS + i for
|i| < 2^22. So adding it rounds to an integer, half to even, and leaves that integer in the low bits; and a small
integer becomes a float by putting it there. No conversion instruction, no lane changes its width."""

_PAD = 16  # odd ends of rows are rounded up to so many lanes


def padded(n: int) -> int:
    return -(-n // _PAD) * _PAD


def plane_bytes(n: int, width: int) -> int:
    """Bytes of n values in a plane."""
    return -(-n * width // 8)


def floats(bits: Vec, dtype: torch.dtype) -> Vec:
    """The float32 values of bit patterns of dtype."""
    if dtype == torch.bfloat16:
        return (bits.to(I32) << 16).view(F32)
    return bits.view(F16).to(F32) if dtype == torch.float16 else bits.view(F32)


def spread(bits: Vec, dtype: torch.dtype) -> list[Vec]:
    """The float32 values of bit patterns of dtype: of bfloat16 in two vectors, the even ones and the odd ones.

    Two bfloat16 are one int32: taking the halves apart and joining them moves no value to another lane.
    """
    if dtype != torch.bfloat16:
        return [floats(bits, dtype)]
    pairs = bits.view(I32)
    return [(pairs << 16).view(F32), (pairs & 0xFFFF0000).view(F32)]


def join(parts: list[Vec]) -> Vec:
    """The int16 in the low halves of int32, in order: the way back from `spread`."""
    if len(parts) == 1:
        return parts[0].to(I16)
    even, odd = parts
    return ((odd << 16) | (even & 0xFFFF)).view(I16)


def round_to_bf16(x: Vec) -> Vec:
    """Bits (int32) whose upper halves are the values as bfloat16, rounded half to even.

    NaN stays NaN if its low 16 bits are 0, as they are in every NaN that comes from a scale or from arithmetic.
    """
    bits = x.view(I32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


class At(NamedTuple):
    """Where a block of groups begins: its values, its scales and zeros, its bytes in each plane."""

    values: Vec
    scale: Vec
    zero: Vec
    planes: list[Vec]


def for_blocks(
    f: Function,
    step: StepFormat,
    dtype: torch.dtype,
    tail: int,
    block: Callable[[int, Vec, At], None],
    most: int | None = None,
) -> None:
    """Emit block(n, count, at) for all groups: `count` neighbors (at most `most`) of n values each, from `at` on.

    The function's pointers are those of `At`, with three planes; its last integers are the number of groups to the end
    of the first row, per row, and in all. `tail` is the size of the last group of a row, 0 if that is a full one:
    full groups and tails are different code, each made for its size.
    """
    places = [Variable(p) for p in f.pointers[: 3 + len(step.planes)]]
    first, per_row, n_groups = f.integers[-3:]

    def visit(n: int, count: Vec) -> None:
        values, scale, zero, *planes = (p.get() for p in places)
        block(n, count, At(values, scale, zero, planes))
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
    """a[0], b[0], a[1], b[1], ..."""
    return a.shuffle([lane for i in range(a.lanes) for lane in (i, i + a.lanes)], b)
