"""Encode and decode in plain torch: the definition of every bit. Nothing here is optimised, so nothing is in doubt.

Per group of values x, with L = 2^bits - 1 levels, everything in float32 and every operation rounded once:

    scale = bf16_up(max((max - min) / L, max(|min|, |max|) * 2^-14, 2^-110))      bf16_up: to the next bfloat16
    inv   = 1 / scale
    zero  = round(min * inv)                                                       an integer, |zero| <= 2^14
    code  = clamp(round(x * inv) - zero, 0, L)                                     round: half to even
    x^    = scale * (code + zero)

Symmetric: scale from max|x| over 2^(bits-1) - 1 levels, zero = -2^(bits-1), not sent.

Why so. The grid is integer multiples of the stored scale, so rounding the zero point costs nothing (a 16-bit float
zero moves the grid by up to half a step at 8 bits), a value of 0 comes out as 0, and x^ has at most 8 + 15
significant bits: it is *exact* in float32, so no fused multiply-add can change a bit of any sum. The floor
2^-110 makes every x^ and every sum a multiple of 2^-117: subnormals never appear, flush-to-zero changes nothing.

Error: |x - x^| <= scale * (1/2 + 2^-14) + |x| * 2^-22 (see `error_bound`). A group that holds NaN, Inf or a magnitude
of 2^126 (8.5e37) or more has the scale NaN, codes and zero 0, and decodes to NaN throughout; other groups do not
notice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcomm.wire.format import Layout, Sections, StepFormat

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMIT = 2.0**126  # magnitudes from here on count as not finite
SCALE_MIN = 2.0**-110
SCALE_NAN = 0x7FC0  # the bits of the scale of a group that is not finite
ZERO_REACH = 2.0**-14  # scale >= max|x| * this keeps |code + zero| within 15 bits


def bf16_up(x: Tensor) -> Tensor:
    """x (float32, positive, finite) rounded up to a bfloat16 value, still float32."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def quantise(x: Tensor, step: StepFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scale (bfloat16) and zero (int16) of x (float32, shape (groups, n)); the module's formula."""
    low, high = x.amin(1), x.amax(1)
    magnitude = torch.maximum(low.abs(), high.abs())
    finite = magnitude < LIMIT  # False for NaN
    if step.symmetric:
        half = 1 << (step.bits - 1)
        scale = magnitude / torch.full_like(magnitude, half - 1)  # by a tensor: by a number CUDA multiplies
    else:
        scale = torch.maximum((high - low) / torch.full_like(low, step.levels), magnitude * ZERO_REACH)
    scale = bf16_up(torch.where(finite, scale, 1.0).clamp_min(SCALE_MIN))
    inv = 1.0 / scale
    zero = torch.full_like(low, -half) if step.symmetric else torch.round(torch.where(finite, low, 0.0) * inv)
    codes = (torch.round(x * inv[:, None]) - zero[:, None]).clamp(0, step.levels)
    codes = torch.where(finite[:, None], codes, 0.0)
    bits = torch.where(finite, scale.view(torch.int32) >> 16, SCALE_NAN)  # not .to(bfloat16): its NaN varies
    return codes.to(torch.uint8), bits.to(torch.int16).view(torch.bfloat16), zero.to(torch.int16)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """scale * (codes + zero) in float32, shape (groups, n): exact, or NaN where the scale is NaN."""
    return scale.to(torch.float32)[:, None] * (codes.to(torch.int32) + zero.to(torch.int32)[:, None]).to(torch.float32)


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
    if layout.step.lossless:
        out[: x.numel() * x.element_size()].copy_(flat.view(torch.uint8))
        return
    scales = _section(out, at.scale, at.n_groups, torch.bfloat16)
    zeros = None if layout.step.symmetric else _section(out, at.zero, at.n_groups, torch.int16)
    for groups, values, offsets in _classes(layout, start, stop, x.device):
        codes, scale, zero = quantise(flat[values - start].to(torch.float32), layout.step)
        scales[groups] = scale
        if zeros is not None:
            zeros[groups] = zero
        for (width, shift), base, offset in zip(layout.step.planes, at.planes, offsets, strict=True):
            plane = pack(codes, width, shift)
            out[base + offset[:, None] + torch.arange(plane.shape[1], device=x.device)] = plane


def decode(wire: Tensor, layout: Layout, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The values [start, stop), float32 (stop-start,); dtype is that of the message, which lossless buffers hold."""
    at = layout.sections(start, stop)
    if layout.step.lossless:
        return _section(wire, 0, stop - start, dtype).to(torch.float32)
    result = torch.empty(stop - start, dtype=torch.float32, device=wire.device)
    scales = _section(wire, at.scale, at.n_groups, torch.bfloat16)
    for groups, values, offsets in _classes(layout, start, stop, wire.device):
        n = values.shape[1]
        codes = torch.zeros(values.shape, dtype=torch.uint8, device=wire.device)
        for (width, shift), base, offset in zip(layout.step.planes, at.planes, offsets, strict=True):
            m = -(-n * width // 8)
            plane = wire[base + offset[:, None] + torch.arange(m, device=wire.device)]
            codes |= unpack(plane, width, shift, n)
        result[values - start] = dequantise(codes, scales[groups], _zeros(wire, layout.step, at)[groups])
    return result


def decode_sum(wires: Tensor, layout: Layout, start: int, stop: int, out: Tensor, dtype: torch.dtype) -> None:
    """Write the sum of W wire buffers, in float32 and in rank order, into out, rounded once to out's dtype.

    wires: uint8 (W, nbytes), a buffer per rank, all of the span [start, stop). out: (stop-start,), contiguous.
    dtype: that of the message, which lossless buffers hold; out may be float32 scratch all the same.
    """
    total = decode(wires[0], layout, start, stop, dtype)
    for wire in wires[1:]:
        total = total + decode(wire, layout, start, stop, dtype)
    out.copy_(total)


def error_bound(x: Tensor, layout: Layout, start: int, stop: int) -> Tensor:
    """Largest |x - decode(encode(x))| the contract allows, float32, for the values x = [start, stop) of a message.

    Half of the stored scale, plus the roundings of x * inv: scale * (1/2 + 2^-14) + |x| * 2^-22. Zero where lossless.
    """
    values = x.reshape(-1).to(torch.float32)
    if layout.step.lossless:
        return torch.zeros_like(values)
    wire = torch.empty(layout.nbytes(start, stop), dtype=torch.uint8, device=x.device)
    encode(x, layout, start, stop, wire)
    at, bound = layout.sections(start, stop), values.abs() * 2**-22
    scales = _section(wire, at.scale, at.n_groups, torch.bfloat16).to(torch.float32)
    for groups, positions, _ in _classes(layout, start, stop, x.device):
        bound[positions - start] += (scales[groups] * (0.5 + 2**-14))[:, None]
    return bound


def _section(wire: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    return wire[offset : offset + count * dtype.itemsize].view(dtype)


def _zeros(wire: Tensor, step: StepFormat, at: Sections) -> Tensor:
    if step.symmetric:
        return torch.full((at.n_groups,), -(1 << (step.bits - 1)), dtype=torch.int16, device=wire.device)
    return _section(wire, at.zero, at.n_groups, torch.int16)


def _classes(layout: Layout, start: int, stop: int, device: torch.device) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """The groups of a span by size (full ones, shorter ones at the end of rows), so that each class is a matrix.

    Per class: the groups' numbers within the span (k,), the positions of their values in the message (k, n), and for
    each plane the offset of their first byte within the plane's section (k,). All int64.
    """
    step, row = layout.step, layout.row
    tail = row % step.group
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
            out.append((groups, begin[:, None] + torch.arange(n, device=device), offsets))
    return out
