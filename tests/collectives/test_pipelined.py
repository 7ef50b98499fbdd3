"""Pipelined collectives over gloo: the method computed by hand, and one workspace for all kinds of calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from by_hand import by_hand, rounded, transform
from support import raise_first, ranks, run_ranks, same_bits, tough

from flashcomm import Communicator, WireFormat, reference
from flashcomm.transports.process_group import ProcessGroupTransport
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat


@pytest.mark.contract(2, 3)
@pytest.mark.parametrize(
    ("fmt", "bits", "hadamard", "clip_ratios"),
    [
        ("int4-g16/int8-g16", (4, 8), False, (None, None)),
        ("int6-g16-had/int8-g16-had", (6, 8), True, (None, None)),
        ("int4-g16-had/int3-g16-had", (4, 3), True, (29 / 32, 13 / 16)),
        ("int5-g16-had", (5, 5), True, (None, None)),
    ],
)
def test_the_reference_is_what_the_method_says(
    fmt: str, bits: tuple[int, int], hadamard: bool, clip_ratios: tuple[float | None, float | None]
) -> None:
    """Compare with plain loops over values and ranks, which share no code with the codec.

    Transforms are summed and quantized again, and transformed back once, at the end. Rows end in a group of 8, which is
    transformed, or of 7, which is not.
    """
    for row in (40, 39):
        tensors = [torch.randn(1, row) * (r + 1) for r in range(3)]
        want: list[float] = []
        for begin in range(0, row, 16):
            groups = [t[0, begin : begin + 16].tolist() for t in tensors]
            n = len(groups[0])
            transformed = hadamard and n != 7
            total = [0.0] * n
            for group in groups:
                sent = transform(group) if transformed else group
                decoded = by_hand(sent, bits[0], clip_ratios[0] if transformed else None)
                total = [rounded(t + v) for t, v in zip(total, decoded, strict=True)]
            decoded = by_hand(total, bits[1], clip_ratios[1] if transformed else None)
            want += [v / n for v in transform(decoded)] if transformed else decoded
        assert reference.two_shot(tensors, WireFormat.parse(fmt))[0].tolist() == want


@pytest.mark.parametrize("fmt", ["int4-had", "int6-g32-had/int8-g32-had"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_shot_has_no_transform_between_its_steps(fmt: str, dtype: torch.dtype) -> None:
    """Sums stay in the Hadamard domain between steps. Only the last decoder transforms back."""
    parsed, tensors = WireFormat.parse(fmt), [tough((6, 600), dtype, r) for r in range(3)]
    in_hadamard_domain = [replace(step, in_hadamard_domain=True) for step in (parsed.reduce, parsed.gather)]
    n = tensors[0].numel()

    def encoded(x: torch.Tensor, step: StepFormat) -> torch.Tensor:
        layout = Layout(step, 600, dtype.itemsize)
        wire = torch.empty(layout.nbytes(0, n), dtype=torch.uint8)
        torch_codec.encode(x.view(-1), layout, 0, n, wire)
        return wire

    wires, total = torch.stack([encoded(t, parsed.reduce) for t in tensors]), torch.empty(n)
    torch_codec.decode_sum(wires, Layout(in_hadamard_domain[0], 600, dtype.itemsize), 0, n, total, dtype)
    again, want = encoded(total, in_hadamard_domain[1]), torch.empty(n, dtype=dtype)
    torch_codec.decode_sum(again[None], Layout(parsed.gather, 600, dtype.itemsize), 0, n, want, dtype)
    assert same_bits(reference.two_shot(tensors, parsed).view(-1), want)
    group = parsed.reduce.group
    transformed_back = torch_codec.hadamard(total.view(6, 600)[:, :576].reshape(-1, group)).view(6, 576) / group
    assert same_bits(
        transformed_back, reference.quantized_sum(tensors, parsed.reduce).view(6, 600)[:, :576].contiguous()
    )


@ranks(2)
def test_calls_with_and_without_inference_mode_share_a_workspace(group: dist.ProcessGroup, rank: int) -> None:
    tensors = [tough((40, 576), torch.bfloat16, r) for r in range(2)]
    want = reference.two_shot(tensors, WireFormat.parse("int4"))
    with Communicator(group, "int4", algorithm="two_shot") as comm:
        for inference in (True, False, True):
            with torch.inference_mode(inference):
                assert same_bits(comm.all_reduce(tensors[rank].clone()), want)


@pytest.mark.parametrize("algorithm", ["backend", "one_shot", "two_shot"])
@ranks(3)
def test_out_may_be_the_input(group: dist.ProcessGroup, rank: int, algorithm: str) -> None:
    x = tough((5, 1152), torch.float32, rank)
    with Communicator(group, "int4", algorithm=algorithm, chunk_bytes=1000) as comm:
        want = comm.all_reduce(x)
        assert comm.all_reduce(x, out=x) is x
    assert same_bits(x, want)


def test_the_detour_over_the_cpu_that_gpu_tensors_take_without_nccl() -> None:
    """Without a GPU this tests the copies alone, with tensors that are on the CPU already."""

    def body(group: object, rank: int) -> tuple[list[int], list[int], list[int], int]:
        outer, inner = (ProcessGroupTransport(group, torch.device("cpu"), 30) for _ in range(2))  # type: ignore[arg-type]
        outer._by_cpu = inner
        mine = (torch.arange(6, dtype=torch.uint8) + 10 * rank).view(3, 2)
        exchanged, gathered, total = torch.zeros_like(mine), torch.zeros_like(mine), torch.ones(2) * rank
        outer.all_to_all(exchanged, mine, "exchange").wait()
        outer.all_gather(gathered, mine[0], "gather").wait()
        outer.all_reduce_backend(total, "sum").wait()
        outer.close()
        if rank != 1:
            pair = ProcessGroupTransport(group, torch.device("cpu"), 30, [0, 2])  # type: ignore[arg-type]
            pair._by_cpu, of_two = pair.among([0, 2]), torch.zeros(2, 2, dtype=torch.uint8)
            pair.all_gather(of_two, mine[1], "gather of two").wait()
            assert of_two.tolist() == [[2, 3], [22, 23]]
        return exchanged.flatten().tolist(), gathered.flatten().tolist(), total.tolist(), outer.n_bytes_sent

    for rank, got in enumerate(raise_first(run_ranks(3, body))):
        exchanged = [10 * r + 2 * rank + i for r in range(3) for i in range(2)]
        assert got == (exchanged, [0, 1, 10, 11, 20, 21], [3.0, 3.0], 4 + 4 + 10)


@ranks(2)
def test_two_hundred_calls_of_alternating_shapes_on_one_workspace(group: dist.ProcessGroup, rank: int) -> None:
    shapes, fmt = [(1, 576), (33, 576), (2, 64), (17, 130), (1, 1), (8, 2880)], WireFormat.parse("int4")
    tensors = [
        [tough(s, torch.bfloat16, 7 * i + r + k) for r in range(2)] for k in range(2) for i, s in enumerate(shapes)
    ]
    want = [reference.two_shot(inputs, fmt) for inputs in tensors]
    with Communicator(group, fmt, algorithm="two_shot", check=False, chunk_bytes=3000) as comm:
        for call in range(200):
            i = call % len(tensors)
            assert same_bits(comm.all_reduce(tensors[i][rank]), want[i]), call
