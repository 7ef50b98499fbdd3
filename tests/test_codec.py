"""The codecs: the error bound, special values, and equality of the compiled codec with the definition, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import DTYPES, same_bits, tough
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcomm.wire import cpu_codec, torch_codec
from flashcomm.wire.format import GROUPS, WIDTHS, Layout, StepFormat, bounds

FORMATS = [StepFormat(b, g, s) for b, g, s in itertools.product(WIDTHS, GROUPS, (False, True))]
COMPILED = [(step, DTYPES[i % 3], i % 3) for i, step in enumerate([*FORMATS, *[StepFormat.parse("bf16")] * 3])]
"""Every format, in one of the dtypes each, on a third of the shapes each: kernels differ in all of these."""
SHAPES = [(5, 576), (3, 7), (1, 1000), (4, 256), (2, 1), (2, 2880), (1,), (640,), (3, 896)]


def roundtrip(x: torch.Tensor, step: StepFormat) -> torch.Tensor:
    layout = Layout(step, x.shape[-1], x.element_size())
    wire = torch.full((layout.nbytes(0, x.numel()),), 0xEE, dtype=torch.uint8)
    torch_codec.encode(x.view(-1), layout, 0, x.numel(), wire)
    return torch_codec.decode(wire, layout, 0, x.numel(), x.dtype).view(x.shape)


def bound(x: torch.Tensor, step: StepFormat) -> torch.Tensor:
    layout = Layout(step, x.shape[-1], x.element_size())
    return torch_codec.error_bound(x.view(-1), layout, 0, x.numel()).view(x.shape)


@pytest.mark.parametrize("step", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_within_the_bound_and_the_bound_is_tight(step: StepFormat, dtype: torch.dtype) -> None:
    worst = 0.0
    for seed, shape in enumerate([(7, 576), (64, 256), (3, 7)]):
        x = tough(shape, dtype, seed)
        error, limit = (roundtrip(x, step) - x.float()).abs(), bound(x, step)
        assert (error <= limit).all()
        worst = max(worst, (error / limit).max().item())
    assert worst > 0.9, "a bound that nothing comes near would let a wrong rounding pass"


@pytest.mark.parametrize("step", FORMATS, ids=str)
def test_the_stored_scale_is_no_coarser_than_needed(step: StepFormat) -> None:
    """Half a step is at most (max - min) / levels / 2, the scale's rounding up (2^-7) aside."""
    x = tough((16, 512), torch.float32)
    groups = x.view(-1, step.group)
    span = 2 * groups.abs().amax(1) if step.symmetric else groups.amax(1) - groups.amin(1)
    levels = step.levels - 1 if step.symmetric else step.levels
    needed = torch.maximum(span / levels, groups.abs().amax(1) * 2**-14).clamp_min(2**-110)
    step_size = (bound(x, step).view(-1, step.group) - groups.abs() * 2**-22).amax(1) / (0.5 + 2**-14)
    assert (step_size <= needed * (1 + 2**-7) * (1 + 2**-12)).all()
    assert (step_size >= needed * (1 - 2**-12)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", ["int2", "int4", "int8-g16"])
def test_constant_groups_come_back_exactly(text: str, dtype: torch.dtype) -> None:
    """In 16-bit dtypes: the grid's offset is finer than the dtype, wherever the constant lies."""
    values = torch.cat(
        [torch.tensor([0.0, -0.0, 1.0, -1.0, 100.0, 65504.0, -6e-5, 3.14159, 1e-30]), torch.randn(200) * 50]
    )
    x = values.to(dtype)[:, None].expand(-1, 130).contiguous()
    assert (roundtrip(x, StepFormat.parse(text)).to(dtype) == x).all()


@pytest.mark.parametrize("text", ["int2", "int4", "int8"])
def test_zero_comes_back_as_zero(text: str) -> None:
    x = torch.randn(64, 256)
    x[:, ::5] = 0.0
    assert (roundtrip(x, StepFormat.parse(text))[:, ::5] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**126, -(2.0**127)])
@pytest.mark.parametrize("text", ["int3", "int4", "int8-sym", "int5"])
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
    """Above float16's 65504 and up to 2^126 values are ordinary."""
    x = torch.randn(4, 128) * 2.0**123
    assert ((roundtrip(x, StepFormat.parse("int8")) - x).abs() <= bound(x, StepFormat.parse("int8"))).all()
    assert (
        roundtrip(torch.full((1, 128), 70000.0, dtype=torch.bfloat16), StepFormat.parse("int4")).to(torch.bfloat16)[
            0, 0
        ]
        == 70144
    )


@given(st.lists(st.floats(width=32), min_size=1, max_size=70), st.sampled_from(FORMATS))
@settings(max_examples=400, deadline=None)
def test_any_floats(values: list[float], step: StepFormat) -> None:
    """Whatever the values: finite groups keep the bound, the others are NaN throughout, and sums stay exact."""
    x = torch.tensor([values])
    got, limit = roundtrip(x, step), bound(x, step)
    for begin in range(0, len(values), step.group):
        group = x[0, begin : begin + step.group]
        out = got[0, begin : begin + step.group]
        if (group.abs() < 2.0**126).all():
            assert ((out.double() - group.double()).abs() <= limit[0, begin : begin + step.group].double()).all()
        else:
            assert out.isnan().all()


@given(st.integers(0, 0x7F), st.integers(0, 255), st.integers(-(2**14), 2**14))
@settings(deadline=None)
def test_decoded_values_are_exact(mantissa: int, code: int, zero: int) -> None:
    """scale * (code + zero) in float32 equals the product in float64: no multiply-add can round it differently."""
    scale = torch.tensor([(127 << 7 | mantissa)], dtype=torch.int16).view(torch.bfloat16)
    got = torch_codec.dequantise(
        torch.tensor([[code]], dtype=torch.uint8), scale, torch.tensor([zero], dtype=torch.int16)
    )
    assert got.double().item() == scale.double().item() * (code + zero)


@pytest.mark.parametrize(("step", "dtype", "third"), COMPILED, ids=str)
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


@pytest.mark.parametrize(("step", "dtype", "third"), COMPILED, ids=str)
def test_compiled_codec_sums_to_the_same_bits(step: StepFormat, dtype: torch.dtype, third: int) -> None:
    for world, (seed, shape) in list(zip((1, 2, 3, 8, 5, 4, 3, 2, 1), enumerate(SHAPES), strict=True))[third::3]:
        layout, n = Layout(step, shape[-1], dtype.itemsize), tough(shape, dtype).numel()
        wires = torch.empty(world, layout.nbytes(0, n), dtype=torch.uint8)
        for rank in range(world):
            x = tough(shape, dtype, 100 * seed + rank)
            if rank == 1:
                x.view(-1)[0] = float("nan")
            torch_codec.encode(x.view(-1), layout, 0, n, wires[rank])
        for out_dtype in (dtype, torch.float32):
            outs = [torch.full((n,), float("nan"), dtype=out_dtype) for _ in range(2)]
            for codec, out in zip((torch_codec, cpu_codec), outs, strict=True):
                codec.decode_sum(wires, layout, 0, n, out, dtype)
            assert same_bits(*outs)


def test_compiled_codec_on_many_threads_and_many_callers() -> None:
    """Large messages split over threads give the same bytes, also when several callers do it at once."""
    from concurrent.futures import ThreadPoolExecutor

    step, x = StepFormat.parse("int4"), tough((700, 1088), torch.bfloat16)
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
