"""Encode and decode in plain torch: the definition of every bit. Nothing here is optimized, so nothing is in doubt.

Per group of values, y being the values, or their transform H x in -had formats, L = 2^bits - 1 the largest code, and
every operation in float32 and rounded once:

    low, high = min(y, 0), max(y, 0)
    scale = up(max((high - low) / L, 2^-110))      up: to the next number of 8 significant bits (9 - bits up to 5 bits)
    inv   = 1 / scale
    zero  = -round(low * inv)                      0 to L: the code of the value 0; round: half to even
    code  = clamp(round(y * inv) + zero, 0, L)
    y^    = scale * (code - zero)                  x^ = y^, or H y^ / n

H is the Hadamard matrix of the n values of the group (n a power of 2): log2(n) rounds in which the values h apart, for
h = 1, 2, 4, ..., become their sum and their difference. A -had group of 2, 3 or 4 bits may be coded in a smaller range,
low * f and high * f with f = 11/16, 13/16, 29/32, what lies outside being clamped: the range with the smaller sum of
round(16 * (y - y^) * inv)^2, inv being that of the whole range, which is taken if the sums are equal.

Why so. The grid is integer multiples of the stored scale, so the zero point costs nothing, a value of 0 comes out as
0, and y^ has at most 16 significant bits: it is *exact* in float32, so that fused multiply-adds cannot change a bit.
Sums of ranks are sums of y^, transformed once, in the order above, which is part of the definition; only the
transform of a single buffer is exact (24 bits) in any order. The floor 2^-110 keeps subnormals out of every result.

Error: see `error_bound`. A group that holds NaN, Inf or |y| >= 2^126 (8.5e37; a transform 2^126 / n) has the scale NaN,
codes and zero 0, and decodes to NaN throughout; other groups do not notice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashcomm.wire.format import Layout, Sections, StepFormat

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_MIN = 2.0**-110
SCALE_NAN = 0x7FC0  # the bits of the scale of a group that is not finite


def up(x: Tensor, mantissa: int) -> Tensor:
    """x (float32, positive, finite) rounded up to `mantissa` bits behind the leading one, still float32."""
    low = (1 << (23 - mantissa)) - 1
    return ((x.view(torch.int32) + low) & ~low).view(torch.float32)


def hadamard(x: Tensor) -> Tensor:
    """H x for each row of x (groups, n), n a power of 2: not normalized, so that H H x is n x."""
    y, h = x, 1
    while h < x.shape[1]:
        a, b = y.view(x.shape[0], -1, 2, h).unbind(2)
        y, h = torch.stack((a + b, a - b), 2).view(x.shape), 2 * h
    return y


def quantize(x: Tensor, step: StepFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scale (float32, NaN where not finite) and zero (uint8) of x (float32, shape (groups, n))."""
    n = x.shape[1]
    y = hadamard(x) if step.transforms(n) and not step.in_hadamard_domain else x
    low, high = y.amin(1).clamp_max(0.0), y.amax(1).clamp_min(0.0)
    finite = torch.maximum(low.abs(), high.abs()) < step.limit(n)  # False for NaN
    y, low, high = (torch.where(finite.view(-1, *[1] * (v.dim() - 1)), v, 0.0) for v in (y, low, high))
    codes, scale, zero = _in_range(y, low, high, step)
    if (part := step.clip_ratio(n)) is not None:
        inverse, smaller = 1.0 / scale, _in_range(y, low * part, high * part, step)
        better = _square_error(y, *smaller, inverse) < _square_error(y, codes, scale, zero, inverse)
        codes = torch.where(better[:, None], smaller[0], codes)
        scale, zero = torch.where(better, smaller[1], scale), torch.where(better, smaller[2], zero)
    return codes.to(torch.uint8), torch.where(finite, scale, float("nan")), zero.to(torch.uint8)


def _in_range(y: Tensor, low: Tensor, high: Tensor, step: StepFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of y (groups, n) in the range from low to high (groups,), all float32."""
    scale = (high - low) / torch.full_like(low, step.levels)  # by a tensor: by a number CUDA multiplies
    scale = up(scale.clamp_min(SCALE_MIN), step.mantissa)
    inverse = 1.0 / scale
    zero = 0.0 - torch.round(low * inverse)
    codes = (torch.round(y * inverse[:, None]) + zero[:, None]).clamp(0, step.levels)
    return codes, scale, zero


def _square_error(y: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, inverse: Tensor) -> Tensor:
    """The sum over each group of integer squares: below 2^24, so that their order does not matter."""
    error = (y - scale[:, None] * (codes - zero[:, None])) * inverse[:, None]
    return torch.round(error * 16.0).square().sum(1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """scale * (codes - zero) in float32, shape (groups, n): exact, or NaN where the scale is NaN."""
    return scale[:, None] * (codes.to(torch.int32) - zero.to(torch.int32)[:, None]).to(torch.float32)


def words(scale: Tensor, zero: Tensor, step: StepFormat) -> Tensor:
    """What stands in the scale's section, int16: the scale's bfloat16, or with `packed` formats scale and zero."""
    word = torch.where(scale.isnan(), SCALE_NAN, scale.view(torch.int32) >> 16)  # not .to(bfloat16): its NaN varies
    if step.packed:
        word = (word >> (step.bits - 1) << step.bits) | zero.to(torch.int32)
    return word.to(torch.int16)


def from_words(word: Tensor, step: StepFormat) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero (int32) out of the scale's section; the zero only with `packed` formats, or 0."""
    bits = word.to(torch.int32) & 0xFFFF
    zero = bits & step.levels if step.packed else torch.zeros_like(bits)
    if step.packed:
        bits = bits >> step.bits << (step.bits - 1)
    return (bits << 16).view(torch.float32), zero


def pack(codes: Tensor, width: int, shift: int) -> Tensor:
    """The plane of bits [shift, shift+width) of codes (groups, n): uint8 (groups, ceil(n*width/8))."""
    n_groups, n = codes.shape
    m, per_byte = -(-n * width // 8), 8 // width
    part = (codes >> shift) & ((1 << width) - 1)
    part = torch.nn.functional.pad(part, (0, m * per_byte - n)).view(n_groups, per_byte, m)
    out = part[:, 0]
    for i in range(1, per_byte):
        out = out | (part[:, i] << (width * i))
    return out


def unpack(plane: Tensor, width: int, shift: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8 (groups, n) with only the bits [shift, shift+width) set."""
    parts = [(plane >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)]
    return torch.cat(parts, 1)[:, :n] << shift


def encode(x: Tensor, layout: Layout, start: int, stop: int, out: Tensor) -> None:
    """Write the wire buffer of a span of a message into out.

    x: the values [start, stop) of the message, contiguous, bf16, fp16 or fp32. out: uint8, contiguous, at least
    `layout.nbytes(start, stop)` long; padding between sections is written as 0.
    """
    flat, at = x.view(-1), layout.sections(start, stop)
    out[: at.nbytes].zero_()
    if layout.step.uncompressed:
        out[: x.numel() * x.element_size()].copy_(flat.view(torch.uint8))
        return
    scales = _section(out, at.scale, at.n_groups, torch.int16)
    for part in _classes(layout, start, stop, x.device):
        codes, scale, zero = quantize(part.take(flat).to(torch.float32), layout.step)
        scales[part.groups] = words(scale, zero, layout.step)
        if not layout.step.packed:
            _section(out, at.zero, at.n_groups, torch.uint8)[part.groups] = zero
        for i, (width, shift) in enumerate(layout.step.planes):
            part.put_plane(out, at, i, pack(codes, width, shift))


def decode_sum(wires: Tensor, layout: Layout, start: int, stop: int, out: Tensor, dtype: torch.dtype) -> None:
    """Write the sum of W wire buffers, in float32 and in rank order, into out, rounded once to out's dtype.

    wires: uint8 (W, nbytes), a buffer per rank, all of the span [start, stop). out: (stop-start,), contiguous.
    dtype: that of the message, which lossless buffers hold; out may be float32 scratch all the same.
    """
    at = layout.sections(start, stop)
    if layout.step.uncompressed:
        raw = [_section(wire, 0, stop - start, dtype).to(torch.float32) for wire in wires]
        out.copy_(_sum(raw))
        return
    for part in _classes(layout, start, stop, wires.device):
        total = _sum([_decode(wire, layout.step, at, part) for wire in wires])
        if layout.step.transforms(part.n) and not layout.step.in_hadamard_domain:
            total = hadamard(total) * (1.0 / part.n)
        part.put(out, total.to(out.dtype))


def _decode(wire: Tensor, step: StepFormat, at: Sections, part: _Class) -> Tensor:
    """y^ of a class of groups of one wire buffer, float32 (groups, n)."""
    planes = enumerate(step.planes)
    parts = [unpack(part.take_plane(wire, at, i, width), width, shift, part.n) for i, (width, shift) in planes]
    codes = parts[0]
    for more in parts[1:]:
        codes = codes | more
    scale, zero = from_words(_section(wire, at.scale, at.n_groups, torch.int16)[part.groups], step)
    if not step.packed:
        zero = _section(wire, at.zero, at.n_groups, torch.uint8)[part.groups]
    return dequantize(codes, scale, zero)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def error_bound(x: Tensor, layout: Layout, start: int, stop: int) -> Tensor:
    """Largest |x - x^| the contract allows, float32, for the values x = [start, stop) of a message, not rotated.

    In terms of y: half of the stored scale, plus the roundings of y * inv, scale * 2^-14 + |y| * 2^-22, plus the part
    (1 - f) of the larger end of the range if that was shrunk. Where y is a transform, x^ is off by no more than the
    worst y, plus the transform's own roundings, log2(n) * 2^-23 * max|y|. Zero where lossless.
    """
    values, bound = x.reshape(-1).to(torch.float32), torch.zeros(x.numel(), device=x.device)
    if layout.step.uncompressed:
        return bound
    for part in _classes(layout, start, stop, x.device):
        y, n = part.take(values), part.n
        turned = layout.step.transforms(n)
        y = hadamard(y) if turned else y
        off = (quantize(y, replace(layout.step, in_hadamard_domain=True))[1] * (0.5 + 2**-14))[
            :, None
        ] + y.abs() * 2**-22
        if (f := layout.step.clip_ratio(n)) is not None:
            off = off + (1 - f) * y.abs().amax(1, keepdim=True)
        if turned:
            off = off.amax(1, keepdim=True) + n.bit_length() * 2**-23 * y.abs().amax(1, keepdim=True)
        part.put(bound, off.expand(y.shape))
    return bound


def _section(wire: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    return wire[offset : offset + count * dtype.itemsize].view(dtype)


@dataclass(frozen=True)
class _Class:
    """The groups of one size of a span, as a matrix (groups, n)."""

    n: int
    groups: Tensor | slice  # their numbers within the span
    values: Tensor | None = None  # places of their values within the span (groups, n); None: all of it, in order
    offsets: tuple[Tensor, ...] = ()  # per plane, where the bytes of each begin within the plane's section

    def take(self, flat: Tensor) -> Tensor:
        return flat.view(-1, self.n) if self.values is None else flat[self.values]

    def put(self, flat: Tensor, values: Tensor) -> None:
        if self.values is None:
            flat.view(-1, self.n).copy_(values)
        else:
            flat[self.values] = values

    def take_plane(self, wire: Tensor, at: Sections, i: int, width: int) -> Tensor:
        m = -(-self.n * width // 8)
        if self.values is None:
            return wire[at.planes[i] : at.planes[i] + at.n_groups * m].view(-1, m)
        return wire[at.planes[i] + self.offsets[i][:, None] + torch.arange(m, device=wire.device)]

    def put_plane(self, wire: Tensor, at: Sections, i: int, plane: Tensor) -> None:
        m = plane.shape[1]
        if self.values is None:
            wire[at.planes[i] : at.planes[i] + at.n_groups * m].view(-1, m).copy_(plane)
        else:
            wire[at.planes[i] + self.offsets[i][:, None] + torch.arange(m, device=wire.device)] = plane


def _classes(layout: Layout, start: int, stop: int, device: torch.device) -> list[_Class]:
    """The groups of a span by size: full ones, and shorter ones at the end of rows."""
    step, row = layout.step, layout.row
    tail = row % step.group
    if tail == 0:
        return [_Class(step.group, slice(None))] if stop > start else []
    numbers = torch.arange(layout.groups_before(start), layout.groups_before(stop), device=device)
    column = numbers % layout.groups_per_row * step.group
    first = numbers // layout.groups_per_row * row + column
    is_tail = column + step.group > row
    out = []
    for n, mask in ((step.group, ~is_tail), (tail, is_tail)):
        groups = mask.nonzero()[:, 0]
        if groups.numel():
            begin = first[groups]
            offsets = [
                begin // row * layout.plane_bytes_before(width, row)
                + begin % row * width // 8
                - layout.plane_bytes_before(width, start)
                for width, _ in step.planes
            ]
            values = begin[:, None] + torch.arange(n, device=device) - start
            out.append(_Class(n, groups, values, tuple(offsets)))
    return out
