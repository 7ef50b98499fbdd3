"""The codec for GPUs: `torch_codec` as Triton kernels, with the same arguments and the same bits.

A program encodes or decodes a tile of up to `TILE_NUMEL` values. If the group size divides the row, all groups of a
message are contiguous and alike. Otherwise there are two launches, one for full groups and one for the short groups at
the ends of rows, and a group's row and column say where it is. Lengths are run-time values: a new one compiles nothing.
TRITON_INTERPRET=1 runs the same code on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcomm.gpu.compat import INTERPRETED, Start, launcher
from flashcomm.gpu.quantize import quantize
from flashcomm.gpu.tile import (
    Step,
    expand,
    fetch_plane,
    from_hadamard,
    hadamard,
    pieces,
    put_plane,
    put_scales,
    quads,
    step_of,
    store,
    swap,
    values,
    warps,
    widen,
)
from flashcomm.wire.format import Layout

TILE_NUMEL = 4096  # values of a program


class Planes(NamedTuple):
    """Run-time values of a kernel, in bytes: where the sections of a wire buffer are. Tuples have one entry per plane.

    There are up to three planes, widest first.
    """

    begin: tuple[Any, ...]  # offset of the plane
    before: tuple[Any, ...]  # bytes of the plane that values before the range take
    row_bytes: tuple[Any, ...]  # bytes of the plane that a row takes
    scales: Any  # offset of the section
    zero_points: Any  # offset of the section


class Place(NamedTuple):
    """Run-time values of a kernel: which groups of a message a launch is for. All of them have the same size."""

    count: Any  # the number of groups
    first: Any  # the number of groups of this size before the range
    per_row: Any  # the number of groups of this size in a row
    row: Any  # values of a row
    column: Any  # the column at which the first group of this size begins
    start: Any  # the position of the first value of the range
    number: Any  # the number of groups of other sizes before them in a row
    groups_in_row: Any  # the number of groups of any size in a row
    first_group: Any  # the number of groups of any size before the range
    n: Any  # values of a group


class Groups(NamedTuple):
    """Constants of a kernel: what kind of groups it encodes or decodes."""

    CONTIGUOUS: bool  # whether the group size divides the row
    SHORT: bool  # whether n is less than 16 or no power of two
    TRANSFORM: bool  # whether codes are in the Hadamard domain and values are not
    RANKS: int = 1  # the number of wire buffers that are summed
    BF16: bool = False  # see `tile.narrow`


class Uncompressed(NamedTuple):
    """Constants of a kernel of uncompressed values."""

    WIRE: Any  # the dtype of the wire buffer's values
    NUMEL: int  # values of a program
    RANKS: int = 1  # the number of wire buffers that are summed
    BF16: bool = False  # see `tile.narrow`


@triton.jit
def _groups_of(place, how: tl.constexpr, step: tl.constexpr):
    """Return where the groups of this program are.

    Returns:
        An offset, the number of a group. Then for each group of the program: whether it exists, its row, the column of
        its first value, and its number in the range. If CONTIGUOUS, the offset is the program's first group. The rest
        is relative to that group, in int32, and all groups count as one row. Otherwise the offset is 0.
    """
    n = place.n if how.SHORT else step.PIECES * step.LANES
    k, tile = tl.arange(0, step.GROUPS), tl.program_id(0).to(tl.int64) * step.GROUPS
    if how.CONTIGUOUS:
        left = tl.minimum(place.count - tile, step.GROUPS).to(tl.int32)
        return tile, k < left, k * 0, k * n, k
    else:
        k = tile + k
        r, at = (place.first + k) // place.per_row, (place.first + k) % place.per_row
        group = r * place.groups_in_row + place.number + at - place.first_group
        return tile * 0, k < place.count, r, place.column + at * n, group


@triton.jit
def _values_of(keep, r, inside, place, how: tl.constexpr, step: tl.constexpr):
    """Return the offsets (GROUPS, PIECES, LANES) of the groups' values in the tensor, and a mask of existing ones."""
    i = (tl.arange(0, step.PIECES) * step.LANES)[None, :, None] + tl.arange(0, step.LANES)[None, None, :]
    value = inside if how.CONTIGUOUS else r * place.row + inside - place.start
    kept = keep[:, None, None] & (i < place.n) if how.SHORT else keep[:, None, None]
    return value[:, None, None] + i, kept


@triton.jit
def _plane_of(wire, tile, r, inside, planes, how: tl.constexpr, WIDTH: tl.constexpr, step: tl.constexpr):
    """Return a pointer to the plane of WIDTH bits, and the offsets from it, in bytes, at which the groups begin."""
    WIDER: tl.constexpr = step.BITS & (15 ^ (2 * WIDTH - 1))
    INDEX: tl.constexpr = 0 if WIDER == 0 else (1 if WIDER & (WIDER - 1) == 0 else 2)  # widest first
    GROUP: tl.constexpr = step.PIECES * step.LANES
    plane = tl.multiple_of(wire + (planes.begin[INDEX] + tile * (GROUP * WIDTH // 8)), 16)
    if how.CONTIGUOUS:
        return plane, tl.arange(0, step.GROUPS) * (GROUP * WIDTH // 8)
    else:
        return plane, r * planes.row_bytes[INDEX] + inside * WIDTH // 8 - planes.before[INDEX]


@triton.jit
def _put_short(plane, begin, keep, codes, n, WIDTH: tl.constexpr, step: tl.constexpr):
    """Do `put_plane` for short groups of n values: each byte selects its values. codes: (GROUPS, 1, LANES)."""
    SHIFT: tl.constexpr = step.BITS & (15 ^ (2 * WIDTH - 1))
    part = tl.reshape((codes >> SHIFT) & ((1 << WIDTH) - 1), (step.GROUPS, step.LANES))
    i, at, m = tl.arange(0, step.LANES), tl.arange(0, step.LANES), (n * WIDTH + 7) // 8
    mine = ((i % m)[:, None] == at[None, :]) & (i < n)[:, None]
    moved = part << ((i // m) * WIDTH)[None, :]
    packed = tl.sum(tl.where(mine[None, :, :], moved[:, :, None], 0), 1)
    tl.store(plane + begin[:, None] + at[None, :], packed.to(tl.uint8), mask=keep[:, None] & (at < m)[None, :])


@triton.jit
def _fetch_short(plane, begin, keep, n, WIDTH: tl.constexpr, step: tl.constexpr):
    """Load what `_put_short` stored, with the bits at their places in the codes."""
    i, m = tl.arange(0, step.LANES), (n * WIDTH + 7) // 8
    packed = tl.load(plane + begin[:, None] + (i % m)[None, :], mask=keep[:, None] & (i < n)[None, :], other=0)
    part = (packed.to(tl.int32) >> ((i // m) * WIDTH)[None, :]) & ((1 << WIDTH) - 1)
    SHIFT: tl.constexpr = step.BITS & (15 ^ (2 * WIDTH - 1))
    return tl.reshape(part << SHIFT, (step.GROUPS, 1, step.LANES))


@triton.jit
def encode_kernel(x, out, planes, place, step: tl.constexpr, how: tl.constexpr):
    """Quantize groups of a message, and store them in its wire buffer."""
    tile, keep, r, inside, group = _groups_of(place, how, step)
    i, kept = _values_of(keep, r, inside, place, how, step)
    y = widen(swap(tl.load(swap(x + tile * (step.PIECES * step.LANES) + i), mask=swap(kept), other=0.0)))
    n = tl.zeros((step.GROUPS,), tl.int32) + (place.n if how.SHORT else step.PIECES * step.LANES)
    if how.TRANSFORM:
        y = hadamard(y, step)
    codes, word, zero_point = quantize(y, n, step)
    scales = tl.multiple_of((out + planes.scales).to(tl.pointer_type(tl.int16)) + tile, 16)
    put_scales(scales, group, keep, word, "", step)
    if step.BITS > 5:
        put_scales(tl.multiple_of(out + (planes.zero_points + tile), 16), group, keep, zero_point, "", step)
    if step.WORD_BYTES == 4:
        codes = quads(codes, step)
    for w in tl.static_range(4):
        if step.BITS & (8 >> w):
            plane, begin = _plane_of(out, tile, r, inside, planes, how, 8 >> w, step)
            if how.SHORT:
                _put_short(plane, begin, keep, codes, place.n, 8 >> w, step)
            else:
                put_plane(plane, begin, keep, codes, step.LANES, 8 >> w, step)


@triton.jit
def decode_sum_kernel(wires, out, stride, planes, place, step: tl.constexpr, how: tl.constexpr):
    """Decode and sum groups of wire buffers in rank order. The buffers are `stride` bytes apart."""
    tile, keep, r, inside, group = _groups_of(place, how, step)
    raws = ()
    for rank in tl.static_range(how.RANKS):  # all loads are issued before the first sum
        wire = wires + stride.to(tl.int64) * rank
        raw = (tl.zeros((step.GROUPS, step.PIECES, step.LANES), tl.int32),) if how.SHORT else ()
        for w in tl.static_range(4):
            if step.BITS & (8 >> w):
                plane, begin = _plane_of(wire, tile, r, inside, planes, how, 8 >> w, step)
                if how.SHORT:
                    raw = (raw[0] | _fetch_short(plane, begin, keep, place.n, 8 >> w, step),)
                else:
                    raw = raw + (fetch_plane(plane, begin, keep, step.LANES, 8 >> w, "", step),)
        scales = tl.multiple_of((wire + planes.scales).to(tl.pointer_type(tl.int16)) + tile, 16)
        raw = raw + (tl.load(scales + group, mask=keep, other=0),)
        if step.BITS > 5:
            zero_points = tl.multiple_of(wire + (planes.zero_points + tile), 16)
            raw = raw + (tl.load(zero_points + group, mask=keep, other=0),)
        raws = raws + (raw,)
    total = tl.zeros((step.GROUPS, step.PIECES, step.LANES), tl.float32)
    for rank in tl.static_range(how.RANKS):
        if how.SHORT:
            zero_point = raws[rank][2] if step.BITS > 5 else raws[rank][1]
            steps, scale = values(raws[rank][0], raws[rank][1], zero_point, step)
        else:
            steps, scale = expand(raws[rank], step)
        if rank == 0:
            total = scale[:, None, None] * steps
        else:
            total = tl.fma(scale[:, None, None], steps, total)
    if how.TRANSFORM:
        total = from_hadamard(total, step)
    i, kept = _values_of(keep, r, inside, place, how, step)
    store(out + tile * (step.PIECES * step.LANES), i, kept, total, how.BF16)


@triton.jit
def put_uncompressed_kernel(x, out, n, how: tl.constexpr):
    """Copy n values into a wire buffer."""
    i = tl.program_id(0).to(tl.int64) * how.NUMEL + tl.arange(0, how.NUMEL)
    wire = tl.multiple_of(out.to(tl.pointer_type(how.WIRE)), 16)
    for tail in tl.static_range(2):  # first all eights, then the rest
        keep = (i < n) & (i >= n // 8 * 8) if tail else i // 8 < n // 8
        tl.store(wire + i, tl.load(x + i, mask=keep), mask=keep)


@triton.jit
def sum_uncompressed_kernel(wires, out, stride, n, how: tl.constexpr):
    """Sum n values of wire buffers in rank order. The buffers are `stride` bytes apart."""
    i = tl.program_id(0).to(tl.int64) * how.NUMEL + tl.arange(0, how.NUMEL)
    for tail in tl.static_range(2):
        keep = (i < n) & (i >= n // 8 * 8) if tail else i // 8 < n // 8
        total = tl.zeros((how.NUMEL,), tl.float32)
        for rank in tl.static_range(how.RANKS):
            wire = tl.multiple_of((wires + stride.to(tl.int64) * rank).to(tl.pointer_type(how.WIRE)), 16)
            y = widen(tl.load(wire + i, mask=keep, other=0.0))
            total = y if rank == 0 else total + y
        store(out, i, keep, total, how.BF16)


def encode(x: Tensor, layout: Layout, start: int, stop: int, out: Tensor) -> None:
    """Do what `torch_codec.encode` does, in up to two launches and one more for each gap between sections."""
    _hold(x, stop - start, "values")
    _hold(out, layout.nbytes(start, stop), "wire bytes")
    for a, b in _gaps(layout, start, stop):
        out[a:b].zero_()
    addresses = x.data_ptr(), out.data_ptr()
    for launch in _encoders(layout, start, stop, x.dtype, *_target(out, addresses)):
        launch(*addresses)


def decode_sum(wires: Tensor, layout: Layout, start: int, stop: int, out: Tensor, dtype: torch.dtype) -> None:
    """Do what `torch_codec.decode_sum` does, in up to two launches."""
    _hold(out, stop - start, "values")
    for wire in (wires[0], wires[-1]):
        _hold(wire, layout.nbytes(start, stop), "wire bytes")
    addresses, buffers = (wires.data_ptr(), out.data_ptr()), (wires.shape[0], wires.stride(0), dtype)
    for launch in _decoders(layout, start, stop, out.dtype, *_target(wires, addresses), buffers):
        launch(*addresses)


@lru_cache(maxsize=4096)
def _encoders(layout: Layout, start: int, stop: int, dtype: torch.dtype, device: int, aligned: bool) -> list[Start]:
    """The launches that encode a range of a message."""
    step, out, pointers = layout.step, [], (dtype, torch.uint8)
    if step.uncompressed:
        n, how = stop - start, Uncompressed(_TRITON[dtype], TILE_NUMEL)
        grid = triton.cdiv(n, TILE_NUMEL)
        return [launcher(put_uncompressed_kernel, grid, pointers, (n,), (how,), num_warps=4, device=device, aligned=aligned)]  # fmt: skip
    for grid, planes, place, constants, short, num_warps in _launches(layout, start, stop):
        transform = step.transforms(place.n) and not step.in_hadamard_domain
        groups = Groups(layout.row % step.group == 0, short, transform)
        out.append(launcher(encode_kernel, grid, pointers, (planes, place), (constants, groups), num_warps=num_warps, device=device, aligned=aligned))  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _decoders(
    layout: Layout,
    start: int,
    stop: int,
    dtype: torch.dtype,
    device: int,
    aligned: bool,
    buffers: tuple[int, int, torch.dtype],
) -> list[Start]:
    """The launches that decode and sum a range of a message.

    buffers: the number of wire buffers, the bytes from one to the next, and the dtype of their values.
    """
    step, out, (n_ranks, stride, wire) = layout.step, [], buffers
    by_hand = INTERPRETED and dtype == torch.bfloat16
    dtype = torch.int16 if by_hand else dtype
    pointers = torch.uint8, dtype
    if step.uncompressed:
        n = stop - start
        how = Uncompressed(_TRITON[wire], TILE_NUMEL, n_ranks, by_hand)
        grid = triton.cdiv(n, TILE_NUMEL)
        return [launcher(sum_uncompressed_kernel, grid, pointers, (stride, n), (how,), num_warps=4, device=device, aligned=aligned)]  # fmt: skip
    for grid, planes, place, constants, short, num_warps in _launches(layout, start, stop):
        transform = step.transforms(place.n) and not step.in_hadamard_domain
        groups = Groups(layout.row % step.group == 0, short, transform, n_ranks, by_hand)
        out.append(launcher(decode_sum_kernel, grid, pointers, (stride, planes, place), (constants, groups), num_warps=num_warps, device=device, aligned=aligned))  # fmt: skip
    return out


_gaps = lru_cache(maxsize=4096)(Layout.gaps)
_TRITON = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.int16: tl.int16
}  # fmt: skip


def _target(tensor: Tensor, addresses: Sequence[int]) -> tuple[int, bool]:
    """The index of the GPU, and whether all addresses are multiples of 16."""
    return tensor.get_device(), not any(address & 15 for address in addresses)


def _hold(x: Tensor, count: int, what: str) -> None:
    """Raise ValueError unless x holds the memory that a kernel will access: kernels get bare addresses."""
    if (x.is_cpu and not INTERPRETED) or not x.is_contiguous() or x.numel() < count:
        raise ValueError(f"{count} contiguous {what} on a GPU are needed, got {tuple(x.shape)} on {x.device}")


def _launches(layout: Layout, start: int, stop: int) -> list[tuple[int, Planes, Place, Step, bool, int]]:
    """For each size of group: the grid, the planes, the groups, the step, whether groups are short, and num_warps."""
    step, row, at = layout.step, layout.row, layout.sections(start, stop)
    full, tail = divmod(row, step.group)
    before, row_bytes = (
        _three([layout.plane_bytes_before(width, position) for width, _ in step.planes]) for position in (start, row)
    )
    planes = Planes(_three(at.planes), before, row_bytes, at.scale, at.zero_point)

    def fulls_before(position: int) -> int:
        return position // row * full + min(position % row // step.group, full)

    out = []
    classes = ((step.group, full, 0, 0, fulls_before), (tail, 1, full * step.group, full, lambda p: p // row))
    for n, per_row, column, number, before_ in classes:
        first = before_(start)
        count = before_(stop) - first
        if n == 0 or count == 0:
            continue
        short = n & (n - 1) != 0 or n < 16
        padded = triton.next_power_of_2(n)
        n_pieces = 1 if short else max(pieces(step), min(4, n // 16))
        n_groups = max(1, TILE_NUMEL // (padded * (padded if short else 1)))
        lanes = padded // n_pieces
        place = Place(count, first, per_row, row, column, start, number, layout.groups_per_row, layout.groups_before(start), n)  # fmt: skip
        constants = step_of(step, n_pieces, n_groups, lanes, n=n, words=tail == 0 and not short)  # fmt: skip
        out.append((triton.cdiv(count, n_groups), planes, place, constants, short, warps(n_groups, lanes)))
    return out


def _three(numbers: Sequence[int]) -> tuple[int, ...]:
    return (*numbers, 0, 0, 0)[:3]
