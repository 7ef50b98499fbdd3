"""Values as large as large models have them: sums of 75,000, of partial sums of 300,000."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import massive, ranks, same_bits
from torch import Tensor

from flashcomm import Communicator, WireFormat, reference
from flashcomm.cpu import codec as cpu_codec
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat

BF16, FP16 = torch.bfloat16, torch.float16
FORMATS = ["none", "int8", "int6-had/int7-had", "int5-had", "int4", "int4-had", "int3-g32-had", "int2-had", "none/int8"]
ALGORITHMS = ["one_shot", "two_shot", "hierarchical"]


def result(algorithm: str, tensors: list[Tensor], fmt: str) -> Tensor:
    return reference.all_reduce(algorithm, tensors, WireFormat.parse(fmt), 2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_partial_sums_of_300_000_add_up_to_75_000(fmt: str, algorithm: str) -> None:
    """Compare with float64. Every result is finite, and its error within the sum of the steps' bounds."""
    tensors, parsed = massive(BF16, 4), WireFormat.parse(fmt)
    exact = torch.stack([t.double() for t in tensors]).sum(0)
    assert 70_000 < exact.max() < 80_000
    assert max(t.abs().max() for t in tensors) > 295_000
    got = result(algorithm, tensors, fmt)
    assert got.isfinite().all()
    sent, limit = [t.float() for t in tensors], torch.zeros(exact.shape, dtype=torch.float64)
    for members in (2, 2) if algorithm == "hierarchical" else (4,):  # the steps in which ranks, or nodes, are summed
        limit = limit + sum(bound(x, parsed.reduce) for x in sent)
        sent = [reference.one_shot(sent[i : i + members], parsed) for i in range(0, len(sent), members)]
    if algorithm != "one_shot":
        limit = limit + bound(sent[0], parsed.gather)
    roundings = 4 * 2**-9 * torch.stack([t.double().abs() for t in tensors]).sum(0)  # to bf16 at most once a step
    assert ((got.double() - exact).abs() <= limit + roundings).all()


def bound(x: Tensor, step: StepFormat) -> Tensor:
    layout = Layout(step, x.shape[-1], 2)
    return torch_codec.error_bound(x.reshape(-1), layout, 0, x.numel()).view(x.shape).double()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("fmt", [f for f in FORMATS if "none" not in f])
def test_sums_are_rounded_to_fp16_once_at_the_end(fmt: str, algorithm: str) -> None:
    """Until then they are float32: what exceeds 65,504 is infinite in the result, and nothing else is."""
    tensors = massive(FP16, 4)
    wide = result(algorithm, [t.float() for t in tensors], fmt)
    assert wide.isfinite().all()
    assert wide.max() > 65_520
    got = result(algorithm, tensors, fmt)
    assert same_bits(got, wide.to(FP16))
    assert torch.equal(got.isinf(), wide.abs() >= 65_520)


@pytest.mark.parametrize(("fmt", "dtype"), [("int8", FP16), ("int6-had", BF16), ("int4-had", FP16), ("int4", BF16)])
def test_the_compiled_codec_agrees(fmt: str, dtype: torch.dtype) -> None:
    tensors = massive(dtype, 4)
    layout, n = Layout(StepFormat.parse(fmt), tensors[0].shape[-1], 2), tensors[0].numel()
    wires = torch.full((2, 4, layout.nbytes(0, n)), 0x11, dtype=torch.uint8)
    outs = torch.empty(2, n), torch.empty(2, n, dtype=dtype)
    for i, codec in enumerate((torch_codec, cpu_codec)):
        for wire, tensor in zip(wires[i], tensors, strict=True):
            codec.encode(tensor.view(-1), layout, 0, n, wire)
        for out in outs:
            codec.decode_sum(wires[i], layout, 0, n, out[i], dtype)
    assert torch.equal(wires[0], wires[1])
    assert all(same_bits(*out) for out in outs)


@pytest.mark.parametrize(("fmt", "dtype"), [("none", FP16), ("int6-had/int7-had", BF16), ("int4", FP16)])
@ranks(4)
def test_every_collective_equals_the_reference(
    group: dist.ProcessGroup, rank: int, fmt: str, dtype: torch.dtype
) -> None:
    tensors = massive(dtype, 4)
    for algorithm in ALGORITHMS:
        options = {"algorithm": algorithm, "min_bytes": 0, "local_world_size": 2, "chunk_bytes": 900}
        with Communicator(group, fmt, **options) as comm:
            want = result(algorithm, tensors, fmt)
            assert same_bits(comm.all_reduce(tensors[rank]), want), algorithm
            residual, weight = tensors[0].flip(0), torch.ones(tensors[0].shape[-1], dtype=dtype)
            normed = comm.all_reduce_add_rms_norm(tensors[rank], residual, weight, 1e-5)
            for got, expected in zip(normed, reference.add_rms_norm(want, residual, weight, 1e-5), strict=True):
                assert same_bits(got, expected), algorithm
    with Communicator(group, fmt, min_bytes=0, chunk_bytes=900) as comm:
        assert same_bits(comm.reduce_scatter(tensors[rank]), reference.reduce_scatter(tensors, comm.format)[rank])
        assert same_bits(comm.all_gather(tensors[rank]), reference.all_gather(tensors, comm.format))
