"""The codecs: the error bound, special values, and equality of the compiled codec with the definition, bit for bit."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, same_bits, tough

from flashcomm.cpu import codec as cpu_codec
from flashcomm.wire import torch_codec
from flashcomm.wire.format import GROUPS, WIDTHS, Layout, StepFormat, bounds

FORMATS = [StepFormat(b, g, h) for b, g, h in itertools.product(WIDTHS, GROUPS, (False, True))]
HADAMARD = [step for step in FORMATS if step.hadamard]
ROTATED = [replace(step, in_hadamard_domain=True) for step in HADAMARD]
SOME = [step for step in ROTATED if step.group == 64]
COMPILED = [(step, DTYPES[i % 3], i % 3) for i, step in enumerate([*FORMATS, *SOME, *[StepFormat.parse("bf16")] * 3])]
"""Every format, in one of the dtypes each, on a third of the shapes each: kernels differ in all of these."""
name = lambda v: f"{v}-rotated" if getattr(v, "in_hadamard_domain", False) else str(v)  # noqa: E731
SHAPES = [(5, 576), (3, 7), (1, 1000), (4, 256), (2, 1), (2, 2880), (1,), (640,), (3, 600)]


def encoded(x: torch.Tensor, step: StepFormat) -> tuple[torch.Tensor, Layout]:
    layout = Layout(step, x.shape[-1], x.element_size())
    wire = torch.full((layout.nbytes(0, x.numel()),), 0xEE, dtype=torch.uint8)
    torch_codec.encode(x.view(-1), layout, 0, x.numel(), wire)
    return wire, layout


def roundtrip(x: torch.Tensor, step: StepFormat) -> torch.Tensor:
    """float32, as x after encoding and decoding."""
    wire, layout = encoded(x, step)
    out = torch.full((x.numel(),), 123.0)
    torch_codec.decode_sum(wire[None], layout, 0, x.numel(), out, x.dtype)
    return out.view(x.shape)


def bound(x: torch.Tensor, step: StepFormat) -> torch.Tensor:
    layout = Layout(step, x.shape[-1], x.element_size())
    return torch_codec.error_bound(x.view(-1), layout, 0, x.numel()).view(x.shape)


@pytest.mark.parametrize("step", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_within_the_bound_and_the_bound_is_tight(step: StepFormat, dtype: torch.dtype) -> None:
    """Tight where values are coded; the errors of a transform add up to its bound only if all of them agree (below)."""
    worst = 0.0
    for seed, shape in enumerate([(7, 576), (64, 256), (3, 7)]):
        x = tough(shape, dtype, seed)
        error, limit = (roundtrip(x, step) - x.float()).abs(), bound(x, step)
        assert (error <= limit).all()
        worst = max(worst, (error / limit).max().item())
    assert step.hadamard or worst > 0.9, "a bound that nothing comes near would let a wrong rounding pass"


@pytest.mark.parametrize("step", [s for s in HADAMARD if s.bits > 4], ids=str)
def test_the_bound_of_a_transform_is_tight(step: StepFormat) -> None:
    """y is 0.484 above a step everywhere, but for the largest, which makes the step 1. So the first value of x, their
    mean, is off by nearly as much."""
    y = torch.arange(step.group) % step.levels + 31 / 64
    y[3] = step.levels
    x = torch_codec.hadamard(y[None]) / step.group
    error, limit = (roundtrip(x, step) - x).abs()[0, 0], bound(x, step)[0, 0]
    assert error == 31 / 64 * (step.group - 1) / step.group
    assert 0.9 < error / limit <= 1


@pytest.mark.parametrize("step", FORMATS, ids=str)
def test_the_stored_scale_is_as_needed(step: StepFormat) -> None:
    """The range of the values and 0 in 2^bits - 1 steps, rounded up to the bits there are; or a part of it."""
    x = tough((16, 512), torch.float32)
    wire, layout = encoded(x, step)
    at, groups = layout.sections(0, x.numel()), x.view(-1, step.group)
    y = torch_codec.hadamard(groups) if step.hadamard else groups
    words = wire[at.scale : at.scale + 2 * at.n_groups].view(torch.int16)
    scale, _ = torch_codec.unpack_scales(words, step)
    needed = ((y.amax(1).clamp_min(0) - y.amin(1).clamp_max(0)) / step.levels).clamp_min(2**-110)
    step_size, slack = 2.0 ** (step.bits - 8 if step.bits < 6 else -7), 2**-20

    def fits(part: float) -> torch.Tensor:
        return (scale >= part * needed * (1 - slack)) & (scale <= part * needed * (1 + step_size) * (1 + slack))

    part = step.clip_ratio(step.group)
    if part is None:
        assert fits(1.0).all()
    else:
        assert (fits(1.0) | fits(part)).all()
        assert (fits(part) & ~fits(1.0)).any()


@pytest.mark.parametrize("text", ["int2", "int4", "int8"])
def test_zero_comes_back_as_zero(text: str) -> None:
    x = torch.randn(64, 256)
    x[:, ::5] = 0.0
    assert (roundtrip(x, StepFormat.parse(text))[:, ::5] == 0).all()


@pytest.mark.parametrize("step", FORMATS, ids=str)
def test_a_group_of_zeros_comes_back_as_zeros(step: StepFormat) -> None:
    x = torch.randn(3, 2 * step.group + 16)
    x[1, step.group : 2 * step.group] = 0.0
    x[2, 2 * step.group :] = -0.0
    got = roundtrip(x, step)
    assert same_bits(got[1, step.group : 2 * step.group], torch.zeros(step.group))
    assert same_bits(got[2, 2 * step.group :], torch.zeros(16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**126, -(2.0**127)])
@pytest.mark.parametrize("text", ["int3", "int4", "int5", "int8", "int2-had", "int4-g16-had", "int6-had"])
def test_not_finite_poisons_its_group_and_nothing_else(bad: float, text: str) -> None:
    step = StepFormat.parse(text)
    x = torch.randn(3, 4 * step.group)
    clean = roundtrip(x, step)
    x[1, 2 * step.group + 3] = bad
    got = roundtrip(x, step)
    hit = torch.zeros(x.shape, dtype=torch.bool)
    hit[1, 2 * step.group : 3 * step.group] = True
    assert got[hit].isnan().all()
    assert same_bits(got[~hit], clean[~hit])


def test_large_values_are_not_large() -> None:
    """Above float16's 65504 and up to 2^126 values are ordinary; of a transform up to 2^126 / n."""
    for text, size in (("int8", 2.0**123), ("int8-had", 2.0**114)):
        x, step = torch.randn(4, 128) * size, StepFormat.parse(text)
        assert ((roundtrip(x, step) - x).abs() <= bound(x, step)).all()
    x = torch.full((1, 128), 70000.0, dtype=torch.bfloat16)
    assert ((roundtrip(x, StepFormat.parse("int4")) - x).abs() <= 70144 / 15 / 2 * (1 + 2**-4)).all()


@given(st.lists(st.floats(width=32), min_size=1, max_size=70), st.sampled_from(FORMATS))
@settings(max_examples=400, deadline=None)
def test_any_floats(values: list[float], step: StepFormat) -> None:
    """Finite groups keep the bound; those with NaN, Inf or 2^126 (in a transform 2^126 / n) are NaN throughout."""
    x = torch.tensor([values])
    got, limit = roundtrip(x, step), bound(x, step)
    for begin in range(0, len(values), step.group):
        group = x[:, begin : begin + step.group]
        out, n = got[:, begin : begin + step.group], group.shape[1]
        y = torch_codec.hadamard(group) if step.transforms(n) else group
        if not (y.abs() < 2.0**126 / (n if step.transforms(n) else 1)).all():
            assert out.isnan().all()
        else:
            assert ((out.double() - group.double()).abs() <= limit[:, begin : begin + step.group].double()).all()


@given(st.integers(0, 0x7F), st.integers(0, 255), st.integers(0, 255))
@settings(deadline=None)
def test_decoded_values_are_exact(mantissa: int, code: int, zero: int) -> None:
    """scale * (code - zero) in float32 equals the product in float64: no multiply-add can round it differently."""
    scale = torch.tensor([(127 << 7 | mantissa)], dtype=torch.int16).view(torch.bfloat16).float()
    codes, zeros = torch.tensor([[code]], dtype=torch.uint8), torch.tensor([zero], dtype=torch.uint8)
    got = torch_codec.dequantize(codes, scale, zeros)
    assert got.double().item() == scale.double().item() * (code - zero)


@pytest.mark.parametrize("n", [16, 256])
def test_transforms_of_decoded_values_are_exact(n: int) -> None:
    """Also of the worst, 8 bits and 255 steps off all of them: so the order of the transform's sums does not matter."""
    steps = torch.cat([torch.randint(-255, 256, (50, n)), 255 * torch.ones(1, n, dtype=torch.int64)])
    y = steps * 1.9921875
    assert torch.equal(torch_codec.hadamard(y.float()).double(), torch_codec.hadamard(y.double()))


@given(st.sampled_from(FORMATS), st.integers(0, 0xFF), st.integers(0, 0x7F), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_scales_are_unpacked_as_packed(step: StepFormat, exponent: int, mantissa: int, zero: int) -> None:
    bits = min(exponent, 254) << 7 | mantissa >> (7 - step.mantissa) << (7 - step.mantissa)
    scale = (torch.tensor([bits, 0x7FC0], dtype=torch.int32) << 16).view(torch.float32)
    zeros = torch.tensor([zero % (step.levels + 1), 0], dtype=torch.uint8)
    got_scale, got_zeros = torch_codec.unpack_scales(torch_codec.pack_scales(scale, zeros, step), step)
    assert same_bits(got_scale, scale)
    assert got_zeros.tolist() == (zeros.tolist() if step.bits < 6 else [0, 0])


@pytest.mark.parametrize(("step", "dtype", "third"), COMPILED, ids=name)
def test_compiled_codec_writes_the_same_bytes(step: StepFormat, dtype: torch.dtype, third: int) -> None:
    for seed, shape in list(enumerate(SHAPES))[third::3]:
        x = tough(shape, dtype, seed)
        if seed % 2:
            x.view(-1)[:: max(1, x.numel() // 3)] = float("nan") if seed % 4 == 1 else float("inf")
        layout = Layout(step, shape[-1], dtype.itemsize)
        ends = bounds(0, x.numel(), shape[-1], step.group, 3)
        for start, stop in [(0, x.numel()), *itertools.pairwise(ends)]:
            wires = [torch.full((layout.nbytes(start, stop),), poison, dtype=torch.uint8) for poison in (0x11, 0xEE)]
            for codec, wire in zip((torch_codec, cpu_codec), wires, strict=True):
                codec.encode(x.view(-1)[start:stop], layout, start, stop, wire)
            assert torch.equal(*wires)


@pytest.mark.parametrize(("step", "dtype", "third"), COMPILED, ids=name)
def test_compiled_codec_sums_to_the_same_bits(step: StepFormat, dtype: torch.dtype, third: int) -> None:
    for world_size, (seed, shape) in list(zip((1, 2, 3, 8, 5, 4, 3, 2, 1), enumerate(SHAPES), strict=True))[third::3]:
        layout, n = Layout(step, shape[-1], dtype.itemsize), tough(shape, dtype).numel()
        wires = torch.empty(world_size, layout.nbytes(0, n), dtype=torch.uint8)
        for rank in range(world_size):
            x = tough(shape, dtype, 100 * seed + rank)
            if rank == 1:
                x.view(-1)[0] = float("nan")
            torch_codec.encode(x.view(-1), layout, 0, n, wires[rank])
        for out_dtype in (dtype, torch.float32):
            outs = [torch.full((n,), float("nan"), dtype=out_dtype) for _ in range(2)]
            for codec, out in zip((torch_codec, cpu_codec), outs, strict=True):
                codec.decode_sum(wires, layout, 0, n, out, dtype)
            assert same_bits(*outs)


CORNERS = {
    "usual": lambda shape, g: torch.randn(shape, generator=g),
    "rows apart": lambda shape, g: (
        torch.randn(shape, generator=g) * torch.exp(20 * torch.randn(shape[0], 1, generator=g))
    ),
    "ties": lambda shape, g: torch.randint(-6, 7, shape, generator=g) / 2,
    "any bits": lambda shape, g: torch.randint(-(2**31), 2**31, shape, generator=g).to(torch.int32).view(torch.float32),
    "huge": lambda shape, g: torch.randn(shape, generator=g) * 2.0**119,
    "tiny": lambda shape, g: torch.randn(shape, generator=g) * 2.0**-110,
    "subnormal": lambda shape, g: torch.randn(shape, generator=g).round() * 1e-42,
    "zeros of both signs": lambda shape, g: torch.randn(shape, generator=g).sign() * 0.0,
    "outliers": lambda shape, g: torch.randn(shape, generator=g) ** 7,
}
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 2.0**126, -(2.0**126), 2.0**126 * (1 - 2**-8)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_message_gives_the_same_bits(data: st.DataObject) -> None:
    """Random formats, rows, dtypes, worlds, parts of messages and corners: the bytes and sums of the definition."""
    step, dtype = data.draw(st.sampled_from([*FORMATS, *ROTATED])), data.draw(st.sampled_from(DTYPES))
    row, n_rows = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 5))
    world_size, kind = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(sorted(CORNERS)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    bad = data.draw(st.sampled_from([None, *NOT_FINITE]))
    ends = bounds(0, row * n_rows, row, step.group, 3)
    parts = [(a, b) for a, b in [(ends[0], ends[3]), *itertools.pairwise(ends)] if a < b]
    start, stop = data.draw(st.sampled_from(parts))
    layout = Layout(step, row, dtype.itemsize)
    wires = torch.full((world_size, layout.nbytes(start, stop)), 0x11, dtype=torch.uint8)
    for rank in range(world_size):
        x = CORNERS[kind]((n_rows, row), generator).to(dtype).view(-1)[start:stop]
        if bad is not None:
            x[x.numel() // 2] = bad
        got = torch.full((wires.shape[1],), 0xEE, dtype=torch.uint8)
        torch_codec.encode(x, layout, start, stop, wires[rank])
        cpu_codec.encode(x, layout, start, stop, got)
        assert torch.equal(got, wires[rank])
    for out_dtype in (dtype, torch.float32):
        outs = [torch.full((stop - start,), float("nan"), dtype=out_dtype) for _ in range(2)]
        for codec, out in zip((torch_codec, cpu_codec), outs, strict=True):
            codec.decode_sum(wires, layout, start, stop, out, dtype)
        assert same_bits(*outs)


def test_wires_may_be_strided_and_values_unaligned() -> None:
    """Rank buffers further apart than their size, at odd addresses, as workspaces of collectives hand them over."""
    step, x = StepFormat.parse("int3-g32-had"), tough((3, 100), torch.bfloat16)
    layout, n = Layout(step, 100, 2), x.numel()
    size = layout.nbytes(0, n)
    memory = torch.full((3, size + 7), 0xEE, dtype=torch.uint8)
    values = torch.empty(n + 1, dtype=torch.bfloat16)[1:].copy_(x.view(-1))
    for wire in memory:
        cpu_codec.encode(values, layout, 0, n, wire[:size])
        assert torch.equal(wire[:size], encoded(x, step)[0])
        assert (wire[size:] == 0xEE).all()
    out, want = torch.zeros(n + 1)[1:], torch.empty(n)
    cpu_codec.decode_sum(memory[:, :size], layout, 0, n, out, torch.bfloat16)
    torch_codec.decode_sum(memory[:, :size].contiguous(), layout, 0, n, want, torch.bfloat16)
    assert same_bits(out, want)


@pytest.mark.parametrize("text", ["int4", "int4-had"])
def test_compiled_codec_on_many_threads_and_many_callers(text: str) -> None:
    """Large messages split over threads give the same bytes, also when several callers do it at once."""
    from concurrent.futures import ThreadPoolExecutor

    step, x = StepFormat.parse(text), tough((700, 1088), torch.bfloat16)
    layout, n = Layout(step, 1088, 2), x.numel()
    want = torch.zeros(layout.nbytes(0, n), dtype=torch.uint8)
    torch_codec.encode(x.view(-1), layout, 0, n, want)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            outs = [torch.full_like(want, 0xEE) for _ in range(4)]
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda out: cpu_codec.encode(x.view(-1), layout, 0, n, out), outs))
            assert all(torch.equal(out, want) for out in outs)
            total = torch.full((n,), float("nan"), dtype=torch.bfloat16)
            cpu_codec.decode_sum(torch.stack(outs), layout, 0, n, total, torch.bfloat16)
            assert same_bits(total, (4 * roundtrip(x, step)).to(torch.bfloat16).view(-1))
    finally:
        torch.set_num_threads(before)


def test_sums_run_in_rank_order_in_float32() -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in this order, 1 in another, and 1 in float64."""
    step = StepFormat.parse("bf16")
    layout = Layout(step, 1, 4)
    values = torch.tensor([[1e8], [1.0], [-1e8]])
    for order, want in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        for codec in (torch_codec, cpu_codec):
            wires = torch.zeros(3, 16, dtype=torch.uint8)
            for i, rank in enumerate(order):
                codec.encode(values[rank], layout, 0, 1, wires[i])
            out = torch.empty(1)
            codec.decode_sum(wires, layout, 0, 1, out, torch.float32)
            assert out.item() == want


def test_a_kernel_is_made_once_whatever_threads_ask() -> None:
    from flashcomm.cpu.jit import once

    made: list[int] = []

    @once
    def slow(n: int) -> list[int]:
        made.append(n)
        time.sleep(0.05)
        return [n]

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(slow, (1, 1, 1, 2)))
    assert sorted(made) == [1, 2]
    assert got[0] is got[1] is got[2]
    assert got[3] == [2]
