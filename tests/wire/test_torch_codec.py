"""The torch codec, which defines every bit: its error bound, special values, exactness."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, same_bits, tough
from wire_formats import ALL, FORMATS, HADAMARD

from flashcomm.cpu import codec as cpu_codec
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat


def encoded(x: torch.Tensor, step: StepFormat) -> tuple[torch.Tensor, Layout]:
    layout = Layout(step, x.shape[-1], x.element_size())
    wire = torch.full((layout.nbytes(0, x.numel()),), 0xEE, dtype=torch.uint8)
    torch_codec.encode(x.view(-1), layout, 0, x.numel(), wire)
    return wire, layout


def roundtrip(x: torch.Tensor, step: StepFormat) -> torch.Tensor:
    """x after encoding and decoding, float32."""
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
    """It is tight for plain formats. A transform comes near its bound only if all errors agree: see the next test."""
    worst = 0.0
    for seed, shape in enumerate([(7, 576), (64, 256), (3, 7)]):
        x = tough(shape, dtype, seed)
        error, limit = (roundtrip(x, step) - x.float()).abs(), bound(x, step)
        assert (error <= limit).all()
        worst = max(worst, (error / limit).max().item())
    assert step.hadamard or worst > 0.9, "a bound that nothing comes near would let a wrong rounding pass"


@pytest.mark.parametrize("step", [s for s in HADAMARD if s.bits > 4], ids=str)
def test_the_bound_of_a_transform_is_tight(step: StepFormat) -> None:
    """All y are 0.484 above a multiple of the scale, except the largest, which makes the scale 1.

    So the first value of x, the mean of all y, is off by nearly as much.
    """
    y = torch.arange(step.group) % step.levels + 31 / 64
    y[3] = step.levels
    x = torch_codec.hadamard(y[None]) / step.group
    error, limit = (roundtrip(x, step) - x).abs()[0, 0], bound(x, step)[0, 0]
    assert error == 31 / 64 * (step.group - 1) / step.group
    assert 0.9 < error / limit <= 1


@pytest.mark.parametrize("step", FORMATS, ids=str)
def test_the_stored_scale_is_as_needed(step: StepFormat) -> None:
    """It is the range of the values and 0, or the clipped range, divided by 2^bits - 1 and rounded up."""
    x = tough((16, 512), torch.float32)
    wire, layout = encoded(x, step)
    at, groups = layout.sections(0, x.numel()), x.view(-1, step.group)
    y = torch_codec.hadamard(groups) if step.hadamard else groups
    words = wire[at.scale : at.scale + 2 * at.n_groups].view(torch.int16)
    scale, _ = torch_codec.unpack_scales(words, step)
    needed = ((y.amax(1).clamp_min(0) - y.amin(1).clamp_max(0)) / step.levels).clamp_min(2**-110)
    step_size, slack = 2.0 ** (step.bits - 8 if step.bits < 6 else -7), 2**-20

    def fits(ratio: float) -> torch.Tensor:
        return (scale >= ratio * needed * (1 - slack)) & (scale <= ratio * needed * (1 + step_size) * (1 + slack))

    ratio = step.clip_ratio(step.group)
    if ratio is None:
        assert fits(1.0).all()
    else:
        assert (fits(1.0) | fits(ratio)).all()
        assert (fits(ratio) & ~fits(1.0)).any()


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
    """Values above 65504, the limit of float16, are ordinary up to 2^126, or in a transform up to 2^126 / n."""
    for text, size in (("int8", 2.0**123), ("int8-had", 2.0**114)):
        x, step = torch.randn(4, 128) * size, StepFormat.parse(text)
        assert ((roundtrip(x, step) - x).abs() <= bound(x, step)).all()
    x = torch.full((1, 128), 70000.0, dtype=torch.bfloat16)
    assert ((roundtrip(x, StepFormat.parse("int4")) - x).abs() <= 70144 / 15 / 2 * (1 + 2**-4)).all()


@given(st.lists(st.floats(width=32), min_size=1, max_size=70), st.sampled_from(ALL))
@settings(max_examples=400, deadline=None)
def test_any_floats(values: list[float], step: StepFormat) -> None:
    """Finite groups stay within the bound. Groups with NaN, Inf or 2^126 (in a transform, 2^126 / n) become all NaN."""
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
    """The order of additions does not matter, even in the worst case: 8 bits, and all codes 255 from the zero point."""
    steps = torch.cat([torch.randint(-255, 256, (50, n)), 255 * torch.ones(1, n, dtype=torch.int64)])
    y = steps * 1.9921875
    assert torch.equal(torch_codec.hadamard(y.float()).double(), torch_codec.hadamard(y.double()))


@given(st.sampled_from(ALL), st.integers(0, 0xFF), st.integers(0, 0x7F), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_scales_are_unpacked_as_packed(step: StepFormat, exponent: int, mantissa: int, zero: int) -> None:
    bits = min(exponent, 254) << 7 | mantissa >> (7 - step.mantissa) << (7 - step.mantissa)
    scale = (torch.tensor([bits, 0x7FC0], dtype=torch.int32) << 16).view(torch.float32)
    zeros = torch.tensor([zero % (step.levels + 1), 0], dtype=torch.uint8)
    got_scale, got_zeros = torch_codec.unpack_scales(torch_codec.pack_scales(scale, zeros, step), step)
    assert same_bits(got_scale, scale)
    assert got_zeros.tolist() == (zeros.tolist() if step.bits < 6 else [0, 0])


@pytest.mark.parametrize("codec", [torch_codec, cpu_codec], ids=["torch", "cpu"])
def test_sums_run_in_rank_order_in_float32(codec: ModuleType) -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in this order, 1 in another, and 1 in float64."""
    layout = Layout(StepFormat.parse("none"), 1, 4)
    values = torch.tensor([[1e8], [1.0], [-1e8]])
    for order, want in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        wires = torch.zeros(3, 16, dtype=torch.uint8)
        for i, rank in enumerate(order):
            codec.encode(values[rank], layout, 0, 1, wires[i])
        out = torch.empty(1)
        codec.decode_sum(wires, layout, 0, 1, out, torch.float32)
        assert out.item() == want
