"""The compiled CPU codec: the bytes and sums of the torch codec, bit for bit."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, halfway, same_bits, tough
from wire_formats import ALL, FORMATS, IN_HADAMARD_DOMAIN, SHAPES, name

from flashcomm.cpu import codec as cpu_codec
from flashcomm.cpu.jit import once
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat, bounds

IN_DOMAIN = [step for step in IN_HADAMARD_DOMAIN if step.group == 64]
KERNELS = [(s, DTYPES[i % 3], i % 3) for i, s in enumerate([*FORMATS, *IN_DOMAIN, *[StepFormat.parse("none")] * 3])]
"""Each format with one dtype and a third of the shapes, because every combination compiles a kernel of its own."""


@pytest.mark.parametrize(("step", "dtype", "third"), KERNELS, ids=name)
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


@pytest.mark.parametrize(("step", "dtype", "third"), KERNELS, ids=name)
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
    """Random formats, rows, dtypes, ranks, ranges of messages and corner cases."""
    step, dtype = data.draw(st.sampled_from([*ALL, *IN_HADAMARD_DOMAIN])), data.draw(st.sampled_from(DTYPES))
    row, n_rows = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 5))
    world_size, kind = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(sorted(CORNERS)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    bad = data.draw(st.sampled_from([None, *NOT_FINITE]))
    ends = bounds(0, row * n_rows, row, step.group, 3)
    ranges = [(a, b) for a, b in [(ends[0], ends[3]), *itertools.pairwise(ends)] if a < b]
    start, stop = data.draw(st.sampled_from(ranges))
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


@pytest.mark.parametrize("fmt", ["int2-had", "int3-had", "int4-had", "int4-g16-had"])
def test_a_code_above_the_range_counts_half_a_step(fmt: str) -> None:
    """The choice between two ranges, where the code of the largest value is 1 too large before it is clamped."""
    step = replace(StepFormat.parse(fmt), in_hadamard_domain=True)
    x = halfway(step, 2048)
    codes, scale, zero_point = torch_codec.quantize(x, replace(step, hadamard=False))
    largest = torch.round(x[:, 1] * (1.0 / scale)) + zero_point
    assert (codes[:, 1] == step.levels).all()
    assert (largest == step.levels + 1).float().mean() > 0.9
    layout, n = Layout(step, 16 * step.group, 4), x.numel()
    wires = [torch.full((layout.nbytes(0, n),), poison, dtype=torch.uint8) for poison in (0x11, 0xEE)]
    for codec, wire in zip((torch_codec, cpu_codec), wires, strict=True):
        codec.encode(x.view(-1), layout, 0, n, wire)
    assert torch.equal(*wires)


def test_wires_may_be_strided_and_values_unaligned() -> None:
    """Buffers of ranks may be further apart than their size, and at odd addresses, as in workspaces of collectives."""
    step, x = StepFormat.parse("int3-g32-had"), tough((3, 100), torch.bfloat16)
    layout, n = Layout(step, 100, 2), x.numel()
    size = layout.nbytes(0, n)
    memory = torch.full((3, size + 7), 0xEE, dtype=torch.uint8)
    values = torch.empty(n + 1, dtype=torch.bfloat16)[1:].copy_(x.view(-1))
    want_wire = torch.zeros(size, dtype=torch.uint8)
    torch_codec.encode(x.view(-1), layout, 0, n, want_wire)
    for wire in memory:
        cpu_codec.encode(values, layout, 0, n, wire[:size])
        assert torch.equal(wire[:size], want_wire)
        assert (wire[size:] == 0xEE).all()
    out, want = torch.zeros(n + 1)[1:], torch.empty(n)
    cpu_codec.decode_sum(memory[:, :size], layout, 0, n, out, torch.bfloat16)
    torch_codec.decode_sum(memory[:, :size].contiguous(), layout, 0, n, want, torch.bfloat16)
    assert same_bits(out, want)


@pytest.mark.parametrize("text", ["int4", "int4-had"])
def test_compiled_codec_on_many_threads_and_many_callers(text: str) -> None:
    """Large messages are split over threads. That changes no byte, even if several callers do it at the same time."""
    step, x = StepFormat.parse(text), tough((700, 1088), torch.bfloat16)
    layout, n = Layout(step, 1088, 2), x.numel()
    want = torch.zeros(layout.nbytes(0, n), dtype=torch.uint8)
    torch_codec.encode(x.view(-1), layout, 0, n, want)
    want_total = torch.empty(n, dtype=torch.bfloat16)
    torch_codec.decode_sum(torch.stack([want] * 4), layout, 0, n, want_total, torch.bfloat16)
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
            assert same_bits(total, want_total)
    finally:
        torch.set_num_threads(before)


def test_a_kernel_is_made_once_whatever_threads_ask() -> None:
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
