"""The Triton codec writes and reads the bytes of the torch codec. Here in the interpreter; test_on_gpus.py has GPUs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import DTYPES, N_GPUS, halfway, same_bits, tough

from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat, WireFormat

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(N_GPUS > 0, reason="kernels are not interpreted where there is a GPU: test_on_gpus.py")

FORMATS = [
    "int8",
    "int7-g16",
    "int6-had",
    "int5-g128-had",
    "int4",
    "int4-had",
    "int3-g32-had",
    "int3-g256",
    "int2-g16-had",
]


@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_of_the_torch_codec(name: str) -> None:
    """Rows of whole groups, with tails, and shorter than a group; a range of a message; sums of 3 ranks."""
    from flashcomm.gpu import codec as gpu_codec

    step = StepFormat.parse(name)
    for i, row in enumerate((2 * step.group, 600, 21, 1, 96)):
        dtype = DTYPES[i % 3]
        in_hadamard_domain = replace(step, in_hadamard_domain=True) if step.hadamard and i % 2 else step
        layout, n = Layout(in_hadamard_domain, row, dtype.itemsize), 5 * row
        x = tough((5, row), dtype, i)
        x[1, 0], x[2, -1], x[3] = float("inf"), float("nan"), -x[3].abs()
        for start, stop in ((0, n), (row, 3 * row)):
            wires = []
            for rank in range(3):
                values = x.roll(rank, 0).reshape(-1)[start:stop].contiguous()
                pair = [torch.full((layout.nbytes(start, stop),), 0xEE, dtype=torch.uint8) for _ in range(2)]
                torch_codec.encode(values, layout, start, stop, pair[0])
                gpu_codec.encode(values, layout, start, stop, pair[1])
                assert torch.equal(*pair), (row, dtype, start, stop)
                wires.append(pair[0])
            outs = [torch.full((stop - start,), 7, dtype=dtype) for _ in range(2)]
            for codec, out in zip((torch_codec, gpu_codec), outs, strict=True):
                codec.decode_sum(torch.stack(wires), layout, start, stop, out, dtype)  # type: ignore[attr-defined]
            assert same_bits(*outs), (row, dtype, start, stop)


@pytest.mark.parametrize("name", ["int2-had", "int3-had", "int4-had", "int4-g16-had"])
def test_a_code_above_the_range_counts_half_a_step(name: str) -> None:
    """The choice between two ranges, where the code of the largest value is 1 too large before it is clamped."""
    from flashcomm.gpu import codec as gpu_codec

    step = replace(StepFormat.parse(name), in_hadamard_domain=True)
    x = halfway(step, 512)
    layout, n = Layout(step, 16 * step.group, 4), x.numel()
    wires = [torch.full((layout.nbytes(0, n),), poison, dtype=torch.uint8) for poison in (0x11, 0xEE)]
    for codec, wire in zip((torch_codec, gpu_codec), wires, strict=True):
        codec.encode(x.view(-1), layout, 0, n, wire)  # type: ignore[attr-defined]
    assert torch.equal(*wires)


def test_sums_run_in_rank_order() -> None:
    """The ranks' values differ in size so much that float32 sums in another order give other bits."""
    from flashcomm.gpu import codec as gpu_codec

    layout, n = Layout(StepFormat.parse("int8"), 192, 4), 4 * 192
    wires = torch.empty(4, layout.nbytes(0, n), dtype=torch.uint8)
    for rank, wire in enumerate(wires):
        torch_codec.encode(torch.randn(n) * 10.0 ** (rank % 3 - 4 * (rank == 1)), layout, 0, n, wire)
    outs = [torch.empty(n) for _ in range(3)]
    torch_codec.decode_sum(wires, layout, 0, n, outs[0], torch.float32)
    gpu_codec.decode_sum(wires, layout, 0, n, outs[1], torch.float32)
    assert same_bits(outs[0], outs[1])
    torch_codec.decode_sum(wires.flip(0).contiguous(), layout, 0, n, outs[2], torch.float32)
    assert not same_bits(outs[0], outs[2])


def test_transforms_have_a_smaller_limit() -> None:
    """A value between 2^126 / n and 2^126 is too large for a -had group of n values, but not for a plain group."""
    from flashcomm.gpu import codec as gpu_codec

    x = torch.randn(3, 64)
    x[1, 5] = 2.0**121
    for name, finite in (("int4", True), ("int4-had", False)):
        layout, out = Layout(StepFormat.parse(name), 64, 4), torch.empty(192)
        wires = torch.zeros(2, layout.nbytes(0, 192), dtype=torch.uint8)
        torch_codec.encode(x, layout, 0, 192, wires[0])
        gpu_codec.encode(x, layout, 0, 192, wires[1])
        assert torch.equal(wires[0], wires[1])
        gpu_codec.decode_sum(wires[1:], layout, 0, 192, out, torch.float32)
        assert out.isfinite().view(3, 64).all(1).tolist() == [True, finite, True]


def test_a_new_length_is_no_new_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that depends on a message's length is a run-time number, whose type does not depend on the length."""
    from flashcomm.gpu import codec as gpu_codec
    from flashcomm.gpu import launch, tuning
    from flashcomm.gpu.compat import types_of

    kernels: set[object] = set()

    def record(
        kernel: object, grid: int, pointers: object, numbers: tuple[object, ...], bundles: object, **more: object
    ):
        kernels.add((kernel, pointers, types_of(numbers), bundles, more["num_warps"]))
        return lambda *addresses: None

    monkeypatch.setattr(gpu_codec, "launcher", record)
    monkeypatch.setattr(launch, "launcher", record)
    for row, classes in ((4096, 1), (600, 2)):  # rows of whole groups; rows with tails
        layout = Layout(StepFormat.parse("int6-had"), row, 2)
        for rows in (1, 7, 64, 1000, 100_000):
            gpu_codec._encoders(layout, 0, rows * row, torch.bfloat16, -1, True)
            gpu_codec._decoders(layout, 0, rows * row, torch.bfloat16, -1, True, (2, 1 << 20, torch.bfloat16))
        assert len(kernels) == 2 * classes
        kernels.clear()
    region = SimpleNamespace(
        rank=0,
        world_size=2,
        n_bytes=launch.region_bytes(256 << 20),
        device=torch.device("cpu"),
        own=1 << 40,
        peers=torch.zeros(2, dtype=torch.int64),
        status=torch.zeros(5, dtype=torch.int32),
    )
    collectives = launch.KernelCollectives(region, 1)
    for algorithm in launch.ALGORITHMS:
        for how in tuning.tunings(WireFormat.parse("int4")):
            for rows in (1, 2, 7, 64, 1000, 100_000):
                x = torch.empty(2 * rows, 4096, dtype=torch.bfloat16, device="meta")
                collectives.plan(algorithm, x, 4096, WireFormat.parse("int4"), how)
            assert len(kernels) == 1, (algorithm, how)
            kernels.clear()


def test_kernels_refuse_what_they_must_not_touch() -> None:
    from flashcomm.gpu import codec as gpu_codec

    layout, out = Layout(StepFormat.parse("int4"), 64, 2), torch.empty(4096, dtype=torch.uint8)
    x = torch.randn(4, 64).bfloat16()
    with pytest.raises(ValueError, match="256 contiguous values on a GPU are needed"):
        gpu_codec.encode(x.t(), layout, 0, 256, out)
    with pytest.raises(ValueError, match="contiguous wire bytes"):
        gpu_codec.encode(x, layout, 0, 256, out[:100])
    with pytest.raises(ValueError, match="wire bytes"):
        gpu_codec.decode_sum(out[:100].view(1, -1), layout, 0, 256, x, torch.bfloat16)
