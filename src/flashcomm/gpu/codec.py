"""The bits of `torch_codec` as Triton kernels: same arguments, same bytes, for CUDA tensors.

One program codes a tile of up to `TILE` values. Where groups divide the row, a message is one run of groups; otherwise
full groups and the short ones at the ends of rows are separate launches, each finding its groups by row and place.
Lengths are run-time values: a new one compiles nothing. TRITON_INTERPRET=1 runs the same code on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcomm.gpu.indirect import Indirect
from flashcomm.gpu.tile import (
    expand,
    fetch_plane,
    hadamard,
    pieces,
    put_plane,
    put_words,
    quads,
    quantize,
    store,
    values,
    warps,
    widen,
)
from flashcomm.wire.format import Layout

TILE = 4096  # values of a program
INTERPRETED = triton.knobs.runtime.interpret

# Where the groups of a launch are; see `_launches`
_PLACE = ("count", "first", "per_row", "row", "column", "start", "number", "groups_in_row", "first_group", "n")
_PLANES = ("plane0", "plane1", "plane2", "before0", "before1", "before2", "row0", "row1", "row2", "scales", "zeros")


@triton.jit
def _places(count, first, per_row, row, column, start, number, groups_in_row, first_group, n, B: tl.constexpr,
            RUN: tl.constexpr):  # fmt: skip
    """Where this program's groups are: the number of the first one, and of all of them, counted from there, which
    exist, their rows, first values within the row, and numbers. In a RUN all of this is one row, in int32."""
    k, tile = tl.arange(0, B), tl.program_id(0).to(tl.int64) * B
    if RUN:
        left = tl.minimum(count - tile, B).to(tl.int32)
        return tile, k < left, k * 0, k * n, k
    else:
        k = tile + k
        r, place = (first + k) // per_row, (first + k) % per_row
        return tile * 0, k < count, r, column + place * n, r * groups_in_row + number + place - first_group


@triton.jit
def _pick(a, b, c, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Which of three numbers belongs to the plane of WIDTH bits: widest first."""
    SHIFT: tl.constexpr = BITS & (15 ^ (2 * WIDTH - 1))
    if SHIFT == 0:
        return a
    elif SHIFT & (SHIFT - 1) == 0:
        return b
    else:
        return c


@triton.jit
def _put_short(plane, begin, keep, codes, n, BITS: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr,
               M: tl.constexpr):  # fmt: skip
    """`put_plane` for groups of n values, n no power of two: every byte picks its values. codes (B, 1, M)."""
    part = tl.reshape((codes >> (BITS & (15 ^ (2 * WIDTH - 1)))) & ((1 << WIDTH) - 1), (B, M))
    i, at, m = tl.arange(0, M), tl.arange(0, M), (n * WIDTH + 7) // 8
    mine = ((i % m)[:, None] == at[None, :]) & (i < n)[:, None]
    moved = part << ((i // m) * WIDTH)[None, :]
    packed = tl.sum(tl.where(mine[None, :, :], moved[:, :, None], 0), 1)
    tl.store(plane + begin[:, None] + at[None, :], packed.to(tl.uint8), mask=keep[:, None] & (at < m)[None, :])


@triton.jit
def _take_short(plane, begin, keep, n, BITS: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    i, m = tl.arange(0, M), (n * WIDTH + 7) // 8
    packed = tl.load(plane + begin[:, None] + (i % m)[None, :], mask=keep[:, None] & (i < n)[None, :], other=0)
    part = (packed.to(tl.int32) >> ((i // m) * WIDTH)[None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(part << (BITS & (15 ^ (2 * WIDTH - 1))), (B, 1, M))


@triton.jit
def _inside(P: tl.constexpr, M: tl.constexpr):
    """The numbers of a group's values, (1, P, M)."""
    return (tl.arange(0, P) * M)[None, :, None] + tl.arange(0, M)[None, None, :]


@triton.jit
def _begin(group, r, inside, before, row_bytes, N: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr):
    """Where in a plane the bytes of groups begin."""
    if RUN:
        return group * (N * WIDTH // 8)
    else:
        return r * row_bytes + inside * WIDTH // 8 - before


@triton.jit(do_not_specialize=["source", "target"])
def point(cells, source: tl.int64, target: tl.int64):
    """Store two addresses for `_base`, 16 bytes apart."""
    tl.store(cells, source)
    tl.store(cells + 2, target)


@triton.jit
def _base(x, at, INDIRECT: tl.constexpr, DTYPE: tl.constexpr):
    """Where values are: at x, or `at` values behind the address that x points to, see `indirect`."""
    if INDIRECT:
        return tl.multiple_of(tl.load(x).to(tl.pointer_type(DTYPE)) + at, 16)
    else:
        return x


@triton.jit(do_not_specialize=["at", *_PLANES, *_PLACE])
def _encode(
    x, out, at, plane0, plane1, plane2, before0, before1, before2, row0, row1, row2, scales, zeros,
    count, first, per_row, row, column, start, number, groups_in_row, first_group, n,
    BITS: tl.constexpr, SHRUNK: tl.constexpr, HADAMARD: tl.constexpr, TURNED: tl.constexpr,
    INDIRECT: tl.constexpr, DTYPE: tl.constexpr,
    P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, RUN: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    x = _base(x, at, INDIRECT, DTYPE)
    tile, keep, r, inside, group = _places(
        count, first, per_row, row, column, start, number, groups_in_row, first_group, n if SHORT else P * M, B, RUN
    )
    value = inside if RUN else r * row + inside - start
    i = _inside(P, M)
    kept = keep[:, None, None] & (i < n) if SHORT else keep[:, None, None]
    y = widen(tl.load(x + tile * (P * M) + (value[:, None, None] + i), mask=kept, other=0.0))
    sizes = tl.zeros((B,), tl.int32) + (n if SHORT else P * M)
    if HADAMARD:
        y = hadamard(y, sizes, P, B, M, False)
    codes, word, zero = quantize(y, sizes, BITS, SHRUNK, TURNED, P, B, M)
    words = tl.multiple_of((out + scales).to(tl.pointer_type(tl.int16)) + tile, 16)
    put_words(words, group, keep, word, B, M)
    if BITS > 5:
        put_words(tl.multiple_of(out + (zeros + tile), 16), group, keep, zero, B, M)
    U: tl.constexpr = 4 if RUN and not SHORT and M % 4 == 0 else 1
    if U == 4:
        codes = quads(codes, P, B, M)
    for w in tl.static_range(4):
        if BITS & (8 >> w):
            plane = out + (_pick(plane0, plane1, plane2, BITS, 8 >> w) + tile * (P * M * (8 >> w) // 8))
            plane = tl.multiple_of(plane, 16)
            before, row_bytes = _pick(before0, before1, before2, BITS, 8 >> w), _pick(row0, row1, row2, BITS, 8 >> w)
            begin = _begin(group, r, inside, before, row_bytes, P * M, 8 >> w, RUN)
            if SHORT:
                _put_short(plane, begin, keep, codes, n, BITS, 8 >> w, B, M)
            else:
                put_plane(plane, begin, keep, codes, M, BITS, 8 >> w, P, B, M, U)


@triton.jit(do_not_specialize=["at", "stride", *_PLANES, *_PLACE])
def _decode_sum(
    wires, out, at, stride, plane0, plane1, plane2, before0, before1, before2, row0, row1, row2, scales, zeros,
    count, first, per_row, row, column, start, number, groups_in_row, first_group, n,
    RANKS: tl.constexpr, BITS: tl.constexpr, HADAMARD: tl.constexpr, BF16: tl.constexpr,
    INDIRECT: tl.constexpr, DTYPE: tl.constexpr,
    P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, RUN: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    out = _base(out, at, INDIRECT, DTYPE)
    tile, keep, r, inside, group = _places(
        count, first, per_row, row, column, start, number, groups_in_row, first_group, n if SHORT else P * M, B, RUN
    )
    U: tl.constexpr = 4 if RUN and not SHORT and M % 4 == 0 else 1
    raws = ()
    for rank in tl.static_range(RANKS):  # all loads before any sum
        wire = wires + stride.to(tl.int64) * rank
        raw = (tl.zeros((B, P, M), tl.int32),) if SHORT else ()
        for w in tl.static_range(4):
            if BITS & (8 >> w):
                plane = wire + (_pick(plane0, plane1, plane2, BITS, 8 >> w) + tile * (P * M * (8 >> w) // 8))
                plane = tl.multiple_of(plane, 16)
                before = _pick(before0, before1, before2, BITS, 8 >> w)
                row_bytes = _pick(row0, row1, row2, BITS, 8 >> w)
                begin = _begin(group, r, inside, before, row_bytes, P * M, 8 >> w, RUN)
                if SHORT:
                    raw = (raw[0] | _take_short(plane, begin, keep, n, BITS, 8 >> w, B, M),)
                else:
                    raw = raw + (fetch_plane(plane, begin, keep, M, 8 >> w, P, M, U, ""),)
        words = tl.multiple_of((wire + scales).to(tl.pointer_type(tl.int16)) + tile, 16)
        raw = raw + (tl.load(words + group, mask=keep, other=0),)
        if BITS > 5:
            raw = raw + (tl.load(tl.multiple_of(wire + (zeros + tile), 16) + group, mask=keep, other=0),)
        raws = raws + (raw,)
    total = tl.zeros((B, P, M), tl.float32)
    for rank in tl.static_range(RANKS):
        if SHORT:
            zero = raws[rank][2] if BITS > 5 else raws[rank][1]
            d, scale = values(raws[rank][0], raws[rank][1], zero, BITS, P, B, M, 1)
        else:
            d, scale = expand(raws[rank], BITS, P, B, M, U)
        if rank == 0:
            total = scale[:, None, None] * d
        else:
            total = tl.fma(scale[:, None, None], d, total)
    if HADAMARD:
        total = hadamard(total, keep, P, B, M, False) * (1.0 / (P * M))
    value = inside if RUN else r * row + inside - start
    i = _inside(P, M)
    kept = keep[:, None, None] & (i < n) if SHORT else keep[:, None, None]
    store(out + tile * (P * M), value[:, None, None] + i, kept, total, BF16)


@triton.jit(do_not_specialize=["at", "n"])
def _put_lossless(x, out, at, n, INDIRECT: tl.constexpr, DTYPE: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    source, wire = _base(x, at, INDIRECT, DTYPE), tl.multiple_of(out.to(tl.pointer_type(DTYPE)), 16)
    for tail in tl.static_range(2):  # by eights, and what is left
        keep = (i < n) & (i >= n // 8 * 8) if tail else i // 8 < n // 8
        tl.store(wire + i, tl.load(source + i, mask=keep), mask=keep)


@triton.jit(do_not_specialize=["at", "stride", "n"])
def _sum_lossless(wires, out, at, stride, n, RANKS: tl.constexpr, BF16: tl.constexpr, WIRE: tl.constexpr,
                  INDIRECT: tl.constexpr, DTYPE: tl.constexpr, B: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    target = _base(out, at, INDIRECT, DTYPE)
    for tail in tl.static_range(2):
        keep = (i < n) & (i >= n // 8 * 8) if tail else i // 8 < n // 8
        total = tl.zeros((B,), tl.float32)
        for rank in tl.static_range(RANKS):
            wire = tl.multiple_of((wires + stride.to(tl.int64) * rank).to(tl.pointer_type(WIRE)), 16)
            y = widen(tl.load(wire + i, mask=keep, other=0.0))
            total = y if rank == 0 else total + y
        store(target, i, keep, total, BF16)


def encode(x: Tensor | Indirect, layout: Layout, start: int, stop: int, out: Tensor) -> None:
    """As `torch_codec.encode`, in up to two launches, and one for each gap between sections."""
    step = layout.step
    _hold(x, stop - start, "values")
    _hold(out, layout.nbytes(start, stop), "wire bytes")
    gaps, launches = _planned(layout, start, stop)
    for a, b in gaps:
        out[a:b].zero_()
    at, where_x = _where(x, x.dtype)
    if step.uncompressed:
        n = stop - start
        _start(_put_lossless, (triton.cdiv(n, TILE),), (_cell(x), out), (at, n), **where_x, B=TILE, num_warps=4)
        return
    for n, grid, where, constants in launches:
        turned = step.transforms(n)
        _start(
            _encode, grid, (_cell(x), out), (at, *where, n), BITS=step.bits, SHRUNK=step.clip_ratio(n) or 0.0,
            HADAMARD=turned and not step.in_hadamard_domain, TURNED=turned, **where_x, **constants,
        )  # fmt: skip


def decode_sum(
    wires: Tensor, layout: Layout, start: int, stop: int, out: Tensor | Indirect, dtype: torch.dtype
) -> None:
    """As `torch_codec.decode_sum`, in up to two launches."""
    step = layout.step
    _hold(out, stop - start, "values")
    for wire in (wires[0], wires[-1]):
        _hold(wire, layout.nbytes(start, stop), "wire bytes")
    by_hand = INTERPRETED and out.dtype == torch.bfloat16
    at, where_out = _where(out, torch.int16 if by_hand else out.dtype)
    target = out.view(torch.int16) if by_hand and isinstance(out, Tensor) else _cell(out)
    if step.uncompressed:
        n = stop - start
        _start(
            _sum_lossless, (triton.cdiv(n, TILE),), (wires, target), (at, wires.stride(0), n), RANKS=wires.shape[0],
            BF16=by_hand, WIRE=_DTYPES[dtype], **where_out, B=TILE, num_warps=4,
        )  # fmt: skip
        return
    for n, grid, where, constants in _planned(layout, start, stop)[1]:
        _start(
            _decode_sum, grid, (wires, target), (at, wires.stride(0), *where, n),
            RANKS=wires.shape[0], BITS=step.bits, HADAMARD=step.transforms(n) and not step.in_hadamard_domain, BF16=by_hand,
            **where_out, **constants,
        )  # fmt: skip


_DTYPES = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.int16: tl.int16
}  # fmt: skip


def _where(x: Tensor | Indirect, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """Of `_base`: its number and its constants."""
    return (x.start if isinstance(x, Indirect) else 0), {"INDIRECT": isinstance(x, Indirect), "DTYPE": _DTYPES[dtype]}


def _cell(x: Tensor | Indirect) -> Tensor:
    return x.cell if isinstance(x, Indirect) else x


_compiled: dict[Any, Any] = {}


def _start(kernel: Any, grid: tuple[int], tensors: Sequence[Tensor], numbers: Sequence[int], **constants: Any) -> None:
    """Launch a kernel, if it can be by a compiled one that is kept: Triton's own way there takes the host longer."""
    options = {**constants, "enable_fp_fusion": False}
    addresses = [t.data_ptr() for t in tensors]
    if INTERPRETED or any(address & 15 for address in addresses) or max(numbers) >= 1 << 31:
        kernel[grid](*tensors, *numbers, **options)
        return
    device = tensors[0].get_device()
    key = (kernel, device, *(t.dtype for t in tensors), *constants.values())
    if key not in _compiled:
        _compiled[key] = kernel.warmup(*tensors, *numbers, **options, grid=grid)
    start, stream = _compiled[key][(*grid, 1, 1)], torch._C._cuda_getCurrentRawStream(device)
    values = (value for name, value in constants.items() if name != "num_warps")
    start(*addresses, *numbers, *values, stream=stream)


@lru_cache(maxsize=4096)
def _planned(layout: Layout, start: int, stop: int) -> tuple[list[tuple[int, int]], list[Any]]:
    """The gaps of a message's wire buffer, and its launches."""
    return layout.gaps(start, stop), _launches(layout, start, stop)


def _hold(x: Tensor | Indirect, count: int, what: str) -> None:
    """Kernels get bare addresses: refuse a tensor that does not hold what they will touch."""
    if isinstance(x, Indirect):
        assert x.numel() >= count
        return
    if (x.is_cpu and not INTERPRETED) or not x.is_contiguous() or x.numel() < count:
        raise ValueError(f"{count} contiguous {what} on a GPU are needed, got {tuple(x.shape)} on {x.device}")


def _launches(layout: Layout, start: int, stop: int) -> list[tuple[int, tuple[int], tuple[int, ...], dict[str, Any]]]:
    """Per size of group: n, the grid, where planes and groups lie, and what the kernel is made for."""
    step, row, at = layout.step, layout.row, layout.sections(start, stop)
    full, tail = divmod(row, step.group)
    widths = [width for width, _ in step.planes]
    where = [_three(at.planes)]
    where += [_three([layout.plane_bytes_before(w, position) for w in widths]) for position in (start, row)]
    planes = (*where[0], *where[1], *where[2], at.scale, at.zero_point)

    def fulls_before(position: int) -> int:
        return position // row * full + min(position % row // step.group, full)

    out = []
    classes = ((step.group, full, 0, 0, fulls_before), (tail, 1, full * step.group, full, lambda p: p // row))
    for n, per_row, column, number, before in classes:
        count = before(stop) - before(start)
        if n == 0 or count == 0:
            continue
        short = n & (n - 1) != 0 or n < 16
        padded = triton.next_power_of_2(n)
        p = 1 if short else max(pieces(step), min(4, n // 16))
        b = max(1, TILE // (padded * (padded if short else 1)))
        place = (count, before(start), per_row, row, column, start, number, layout.groups_per_row)
        place += (layout.groups_before(start),)
        constants = {"P": p, "B": b, "M": padded // p, "RUN": tail == 0, "SHORT": short}
        constants["num_warps"] = warps(b, padded // p)
        out.append((n, (triton.cdiv(count, b),), (*planes, *place), constants))
    return out


def _three(numbers: Sequence[int]) -> tuple[int, ...]:
    return (*numbers, 0, 0, 0)[:3]
