"""The codec in plain torch: the definition of every bit. It is written for clarity, not for speed.

A group is quantized as follows. y is its values, or in -had formats their Hadamard transform H x, and L = 2^bits - 1 is
the largest code. Every operation is in float32 and rounded once:

    low, high  = min(y, 0), max(y, 0)
    scale      = round_up(max((high - low) / L, 2^-110))
    inverse    = 1 / scale
    zero_point = -round(low * inverse)                           round: half to even; the result is 0 to L
    code       = clamp(round(y * inverse) + zero_point, 0, L)

    y^         = scale * (code - zero_point)                     decoding: x^ = y^, or H y^ / n for a transform

`round_up` rounds up to the number of significant bits that are sent: 8, or 9 - bits in formats of up to 5 bits.

H is the Hadamard matrix of the n values of a group, n a power of 2. In log2(n) rounds h = 1, 2, 4, ... the values h
apart become their sum and their difference. With 2, 3 or 4 bits a transform is quantized in two ranges: the whole one,
and low * f to high * f with f = 11/16, 13/16 or 29/32. Values outside the second range are clamped. The group is sent
in the range with the smaller sum of round(16 * (y - y^) * inverse)^2, where inverse is that of the whole range. If the
sums are equal, the whole range is taken.

Reasons. All y^ are multiples of the stored scale, so rounding the zero point adds no error, and 0 is decoded to 0. y^
has at most 16 significant bits. It is *exact* in float32, so a fused multiply-add cannot change a bit. A sum over ranks
is a sum of y^ in rank order. It is transformed back once at the end, with additions in the order above, which is part
of the definition. (The transform of a single y^ is exact, 24 bits, in any order.) With scales of at least 2^-110 no
subnormal numbers occur.

A group that holds NaN, infinity or |y| >= 2^126 (8.5e37; for a transform 2^126 / n) gets the scale NaN and zeros as
codes and zero point. All its values are decoded to NaN. Other groups are not affected. `error_bound` gives the error of
all other groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashcomm.wire.format import Layout, StepFormat

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_MIN = 2.0**-110
SCALE_NAN = 0x7FC0  # the bfloat16 bits of the scale of a group that is not finite


def encode(x: Tensor, layout: Layout, start: int, stop: int, out: Tensor) -> None:
    """Quantize a range of a message into a wire buffer.

    Args:
        x: (stop - start,), bf16, fp16 or fp32, contiguous: the values [start, stop) of the message.
        layout: The message's layout.
        start: The position of the range's first value in the message; it starts a group.
        stop: The position after its last value, at the end of a group.
        out: uint8, contiguous, at least `layout.nbytes(start, stop)` long: the wire buffer. Padding is written as 0.
    """
    flat, step, at = x.view(-1), layout.step, layout.sections(start, stop)
    out[: at.nbytes].zero_()
    if step.uncompressed:
        out[: x.numel() * x.element_size()].copy_(flat.view(torch.uint8))
        return
    scales = _section(out, at.scale, at.n_groups, torch.int16)
    for groups in _groups_by_size(layout, start, stop, x.device):
        codes, scale, zero_point = quantize(flat[groups.values].to(torch.float32), step)
        scales[groups.numbers] = pack_scales(scale, zero_point, step)
        if not step.packed:
            _section(out, at.zero_point, at.n_groups, torch.uint8)[groups.numbers] = zero_point
        for places, (width, shift) in zip(groups.plane_bytes, step.planes, strict=True):
            out[places] = pack(codes, width, shift)


def decode_sum(wires: Tensor, layout: Layout, start: int, stop: int, out: Tensor, dtype: torch.dtype) -> None:
    """Write the sum of wire buffers into out: added in float32 in rank order, rounded once to out's dtype.

    Args:
        wires: uint8 (ranks, at least `layout.nbytes(start, stop)`): a buffer of the same range from every rank.
        layout: The message's layout.
        start: The position of the range's first value in the message.
        stop: The position after its last value.
        out: (stop - start,), contiguous: the sum, in the message's dtype or in float32.
        dtype: The dtype of the message, which is what uncompressed buffers hold.
    """
    step = layout.step
    if step.uncompressed:
        out.copy_(_sum([_section(wire, 0, stop - start, dtype).to(torch.float32) for wire in wires]))
        return
    for groups in _groups_by_size(layout, start, stop, wires.device):
        total = _sum([_decode(wire, layout, start, stop, groups) for wire in wires])
        if step.transforms(groups.n) and not step.in_hadamard_domain:
            total = hadamard(total) * (1.0 / groups.n)
        out[groups.values] = total.to(out.dtype)


def error_bound(x: Tensor, layout: Layout, start: int, stop: int) -> Tensor:
    """Return the largest |x - x^| that the contract allows, elementwise. It is 0 for uncompressed values.

    |y - y^| is at most half of the stored scale, plus scale * 2^-14 + |y| * 2^-22 for the roundings of y * inverse,
    plus (1 - f) * max|y| if the smaller range may have been sent. For a transform, |x - x^| is at most the largest
    such bound in the group, plus log2(2n) * 2^-23 * max|y| for the roundings of the transform.

    Args:
        x: The values [start, stop) of a message, not in the Hadamard domain.
        layout: The message's layout.
        start: The position of the first value in the message.
        stop: The position after the last one.

    Returns:
        float32, flat, as many as x has values.
    """
    step, values, bound = layout.step, x.reshape(-1).to(torch.float32), torch.zeros(x.numel(), device=x.device)
    if step.uncompressed:
        return bound
    for groups in _groups_by_size(layout, start, stop, x.device):
        y, n = values[groups.values], groups.n
        y = hadamard(y) if step.transforms(n) else y
        _, scale, _ = quantize(y, replace(step, in_hadamard_domain=True))
        largest = y.abs().amax(1, keepdim=True)
        error = scale[:, None] * (0.5 + 2**-14) + y.abs() * 2**-22
        if (ratio := step.clip_ratio(n)) is not None:
            error = error + (1 - ratio) * largest
        if step.transforms(n):
            error = error.amax(1, keepdim=True) + n.bit_length() * 2**-23 * largest
        bound[groups.values] = error.expand(y.shape)
    return bound


def quantize(x: Tensor, step: StepFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points of the rows of x, each a group. See the module docstring.

    Args:
        x: float32 (groups, n).
        step: The format; its group size is ignored.

    Returns:
        Codes: uint8 (groups, n).
        Scales: float32 (groups,), NaN where the group is not finite.
        Zero points: uint8 (groups,).
    """
    n = x.shape[1]
    y = hadamard(x) if step.transforms(n) and not step.in_hadamard_domain else x
    low, high = y.amin(1).clamp_max(0.0), y.amax(1).clamp_min(0.0)
    finite = torch.maximum(low.abs(), high.abs()) < step.limit(n)  # False for NaN
    y, low, high = torch.where(finite[:, None], y, 0.0), torch.where(finite, low, 0.0), torch.where(finite, high, 0.0)
    codes, scale, zero_point = _quantize_in_range(y, low, high, step)
    if (ratio := step.clip_ratio(n)) is not None:
        inverse, smaller = 1.0 / scale, _quantize_in_range(y, low * ratio, high * ratio, step)
        better = _square_error(y, *smaller, inverse) < _square_error(y, codes, scale, zero_point, inverse)
        codes = torch.where(better[:, None], smaller[0], codes)
        scale, zero_point = torch.where(better, smaller[1], scale), torch.where(better, smaller[2], zero_point)
    return codes.to(torch.uint8), torch.where(finite, scale, float("nan")), zero_point.to(torch.uint8)


def _quantize_in_range(y: Tensor, low: Tensor, high: Tensor, step: StepFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points, all float32, of y (groups, n) in the range from low to high (groups,)."""
    scale = (high - low) / torch.full_like(low, step.levels)  # by a number CUDA would not divide but multiply
    scale = round_up(scale.clamp_min(SCALE_MIN), step.mantissa)
    inverse = 1.0 / scale
    zero_point = 0.0 - torch.round(low * inverse)
    codes = (torch.round(y * inverse[:, None]) + zero_point[:, None]).clamp(0, step.levels)
    return codes, scale, zero_point


def _square_error(y: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, inverse: Tensor) -> Tensor:
    """The sum of squared errors of each group, integers below 2^24: so the order of additions does not matter."""
    error = (y - scale[:, None] * (codes - zero_point[:, None])) * inverse[:, None]
    return torch.round(error * 16.0).square().sum(1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return scale * (codes - zero_point), float32 (groups, n): exact, or NaN where the scale is NaN."""
    return scale[:, None] * (codes.to(torch.int32) - zero_point.to(torch.int32)[:, None]).to(torch.float32)


def hadamard(x: Tensor) -> Tensor:
    """Return H x for each row of x (groups, n), n a power of 2. It is not normalized: H H x is n x."""
    y, h = x, 1
    while h < x.shape[1]:
        a, b = y.view(x.shape[0], -1, 2, h).unbind(2)
        y, h = torch.stack((a + b, a - b), 2).view(x.shape), 2 * h
    return y


def round_up(x: Tensor, mantissa: int) -> Tensor:
    """Return x (float32, positive, finite) rounded up to `mantissa` bits behind the leading one, as float32."""
    low = (1 << (23 - mantissa)) - 1
    return ((x.view(torch.int32) + low) & ~low).view(torch.float32)


def pack_scales(scale: Tensor, zero_point: Tensor, step: StepFormat) -> Tensor:
    """Return the section of scales, int16 (groups,): bfloat16, in `packed` formats with the zero points in low bits."""
    bits = torch.where(scale.isnan(), SCALE_NAN, scale.view(torch.int32) >> 16)  # not .to(bfloat16): its NaN varies
    if step.packed:
        bits = (bits >> (step.bits - 1) << step.bits) | zero_point.to(torch.int32)
    return bits.to(torch.int16)


def unpack_scales(section: Tensor, step: StepFormat) -> tuple[Tensor, Tensor]:
    """Return scales (float32) and zero points (int32) of a section of scales. Zero points are 0 unless `packed`."""
    bits = section.to(torch.int32) & 0xFFFF
    if not step.packed:
        return (bits << 16).view(torch.float32), torch.zeros_like(bits)
    return (bits >> step.bits << (step.bits + 15)).view(torch.float32), bits & step.levels


def pack(codes: Tensor, width: int, shift: int) -> Tensor:
    """Return the plane of bits [shift, shift + width) of codes (groups, n): uint8 (groups, ceil(n * width / 8))."""
    n_groups, n = codes.shape
    m, per_byte = -(-n * width // 8), 8 // width
    bits = (codes >> shift) & ((1 << width) - 1)
    bits = torch.nn.functional.pad(bits, (0, m * per_byte - n)).view(n_groups, per_byte, m)
    plane = bits[:, 0]
    for i in range(1, per_byte):
        plane = plane | (bits[:, i] << (width * i))
    return plane


def unpack(plane: Tensor, width: int, shift: int, n: int) -> Tensor:
    """Return what `pack` packed: uint8 (groups, n) with only the bits [shift, shift + width) set."""
    bits = [(plane >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)]
    return torch.cat(bits, 1)[:, :n] << shift


def _decode(wire: Tensor, layout: Layout, start: int, stop: int, groups: _Groups) -> Tensor:
    """y^ of groups of one wire buffer, float32 (groups, n)."""
    step, at = layout.step, layout.sections(start, stop)
    codes = torch.zeros(groups.values.shape, dtype=torch.uint8, device=wire.device)
    for places, (width, shift) in zip(groups.plane_bytes, step.planes, strict=True):
        codes = codes | unpack(wire[places], width, shift, groups.n)
    scale, zero_point = unpack_scales(_section(wire, at.scale, at.n_groups, torch.int16)[groups.numbers], step)
    if not step.packed:
        zero_point = _section(wire, at.zero_point, at.n_groups, torch.uint8)[groups.numbers]
    return dequantize(codes, scale, zero_point)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _section(wire: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    return wire[offset : offset + count * dtype.itemsize].view(dtype)


@dataclass(frozen=True)
class _Groups:
    """Those groups of a range that have n values, and the indices of their data."""

    n: int
    numbers: Tensor  # (groups,): their indices among all groups of the range
    values: Tensor  # (groups, n): the indices of their values in the range
    plane_bytes: list[Tensor]  # for each plane (groups, bytes): the indices of their bytes in the wire buffer


def _groups_by_size(layout: Layout, start: int, stop: int, device: torch.device) -> list[_Groups]:
    """The full groups of a range, and the shorter ones at the ends of rows."""
    step, row, at = layout.step, layout.row, layout.sections(start, stop)
    number = torch.arange(layout.groups_before(start), layout.groups_before(stop), device=device)
    column = number % layout.groups_per_row * step.group
    position = number // layout.groups_per_row * row + column
    found = []
    for n in (step.group, row % step.group):
        chosen = ((row - column).clamp_max(step.group) == n).nonzero()[:, 0]
        first = position[chosen, None]
        planes = []
        for offset, (width, _) in zip(at.planes, step.planes, strict=True):
            before = first // row * layout.plane_bytes_before(width, row) + first % row * width // 8
            begin = offset + before - layout.plane_bytes_before(width, start)
            planes.append(begin + torch.arange(-(-n * width // 8), device=device))
        if chosen.numel():
            found.append(_Groups(n, chosen, first + torch.arange(n, device=device) - start, planes))
    return found
