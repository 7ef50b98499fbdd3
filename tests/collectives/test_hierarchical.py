"""The hierarchical all-reduce: its results and bytes, over gloo and on GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from by_hand import by_hand, rounded, transform
from support import N_GPUS, ranks, same_bits, tough

from flashcomm import Communicator, WireFormat, reference
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.errors import InputError
from flashcomm.ranks.launch import RankContext
from flashcomm.routing.route import Executor
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT4 = WireFormat.parse("int4")
SHAPES: list[tuple[int, ...]] = [(5, 600), (2, 3, 640), (7,), (), (3, 1), (0, 64), (1, 1), (12, 512)]


def make(group: Any, fmt: str, local_world_size: int | None, **more: Any) -> Communicator:
    return Communicator(group, fmt, algorithm="hierarchical", local_world_size=local_world_size, min_bytes=0, **more)


@pytest.mark.contract(1, 2, 3)
@pytest.mark.parametrize(("world_size", "local_world_size"), [(4, 2), (6, 3), (6, 2), (8, 4)])
@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        ("int4", BF16),
        ("int8-g32/int5", FP32),
        ("none/int4", FP16),
        ("int6-had/int7-had", BF16),
        ("int4-had/none", BF16),
        ("none", FP32),
    ],
)
@ranks()
def test_ranks_give_the_bits_of_the_reference(
    group: dist.ProcessGroup, rank: int, world_size: int, local_world_size: int, fmt: str, dtype: torch.dtype
) -> None:
    """The cases include chunks of a few rows, and empty shards."""
    with make(group, fmt, local_world_size, chunk_bytes=2000) as comm:
        for s, shape in enumerate(SHAPES):
            tensors = [tough(shape, dtype, 10 * s + r) for r in range(world_size)]
            want = reference.hierarchical(tensors, comm.format, local_world_size)
            assert same_bits(comm.all_reduce(tensors[rank]), want), shape


@ranks(6)
def test_it_sends_what_explain_says(group: dist.ProcessGroup, rank: int) -> None:
    int4, int8 = 16 * (32 + 2), 16 * (64 + 3)  # a shard has 16 groups of 64: codes, then scale and zero point
    with make(group, "int4/int8", 3) as comm:
        comm.all_reduce(torch.ones(6, 512, dtype=BF16))  # two rows per shard, equal for all ranks
        sent = comm.transport.n_bytes_sent
        assert sent == sum(comm.sent.values()) == 2 * int4 + int4 + 2 * int8
        output = str(comm.explain((6, 512), BF16))
    assert f"hierarchical as int4/int8 over process_group: {sent} bytes a rank" in output


@pytest.mark.contract(2, 3)
@pytest.mark.parametrize(
    ("fmt", "bits", "hadamard"), [("int4-g16/int8-g16", (4, 8), False), ("int5-g16-had", (5, 5), True)]
)
def test_the_reference_is_what_the_method_says(fmt: str, bits: tuple[int, int], hadamard: bool) -> None:
    """Compare with plain loops that quantize values, nodes' sums and the sum, and transform back once at the end."""
    tensors = [torch.randn(1, 39) * (r + 1) for r in range(6)]
    want: list[float] = []
    for begin in range(0, 39, 16):
        groups = [t[0, begin : begin + 16].tolist() for t in tensors]
        n = len(groups[0])
        transformed = hadamard and n != 7

        def summed(rank_inputs: list[list[float]], n: int = n) -> list[float]:
            total = [0.0] * n
            for sent in rank_inputs:
                decoded = by_hand(sent, bits[0], None)
                total = [rounded(t + v) for t, v in zip(total, decoded, strict=True)]
            return total

        sent = [transform(group) if transformed else group for group in groups]
        nodes = [summed(sent[i : i + 2]) for i in range(0, 6, 2)]
        decoded = by_hand(summed(nodes), bits[1], None)
        want += [v / n for v in transform(decoded)] if transformed else decoded
    assert reference.hierarchical(tensors, WireFormat.parse(fmt), 2)[0].tolist() == want


@pytest.mark.contract(4)
def test_the_error_of_three_steps_is_within_the_sum_of_their_bounds() -> None:
    """The bound is half a step for every rank, for every node's sum and for the sum, and a rounding to the dtype."""
    tensors = [tough((6, 576), FP32, r) for r in range(4)]
    layout = Layout(INT4.reduce, 576, 4)

    def bound(x: torch.Tensor) -> torch.Tensor:
        return torch_codec.error_bound(x.reshape(-1), layout, 0, x.numel()).double()

    nodes = [reference.one_shot(tensors[i : i + 2], INT4) for i in (0, 2)]
    limit = sum(bound(t) for t in (*tensors, *nodes)) + bound(reference.one_shot(nodes, INT4))
    exact = torch.stack([t.double() for t in tensors]).sum(0)
    error = (reference.hierarchical(tensors, INT4, 2).double() - exact).abs().view(-1)
    rounding = torch.stack([t.double().abs() for t in tensors]).sum(0).view(-1) * 6 * 2**-23
    assert (error <= limit + rounding).all()
    assert (error / limit).max() > 0.5


@pytest.mark.parametrize("local_world_size", [0, 3])
def test_nodes_that_the_ranks_do_not_make_are_refused(local_world_size: int) -> None:
    with pytest.raises(InputError, match="4 ranks do not make nodes of"):
        reference.hierarchical([torch.ones(8)] * 4, INT4, local_world_size)


@ranks(4)
def test_a_closed_communicator_keeps_no_exchange(group: dist.ProcessGroup, rank: int) -> None:
    comm = make(group, "int4", 2)
    assert comm._executors[Executor.PIPELINED].context.nodes is not None
    comm.close()
    assert not comm._executors


def test_simulated_ranks_give_the_bits_of_the_reference() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model.tp_plan = {"0": "rowwise"}  # type: ignore[assignment]
    tensors = [tough((4, 600), BF16, r) for r in range(4)]
    ranks = TensorParallel(model, 4, "int4", algorithm="hierarchical", local_world_size=2)
    assert same_bits(ranks.reduce(tensors, INT4), reference.hierarchical(tensors, INT4, 2))
    for wrong in (3, 0):
        with pytest.raises(InputError, match=f"local_world_size={wrong}: 4 ranks cannot be divided"):
            TensorParallel(model, 4, algorithm="hierarchical", local_world_size=wrong)


# --------------------------------------------------------------------------------------------------------- on four GPUs


@pytest.mark.skipif(N_GPUS < 4, reason=f"{N_GPUS} CUDA devices, 4 are needed")
@pytest.mark.contract(1, 2, 9)
@pytest.mark.parametrize("transport", ["host_memory", "process_group"])
@ranks(4, device="cuda")
def test_on_four_gpus(ctx: RankContext, transport: str) -> None:
    """Run twice eagerly, then one graph replay per call. Small messages take the same route."""
    shapes: list[tuple[int, ...]] = [(700, 4096), (5, 600), (3, 64), (0, 64)]
    for fmt in ("int4", "int6-had/int7-had", "none"):
        with make(None, fmt, 2, device="cuda", transport=transport, timeout_s=30) as comm:
            for turn in range(5):
                for i, shape in enumerate(shapes):
                    inputs = [tough(shape, BF16, 100 * turn + 10 * i + r) for r in range(ctx.world_size)]
                    got = comm.all_reduce(inputs[ctx.rank].to(ctx.device)).cpu()
                    want = reference.hierarchical(inputs, comm.format, 2)
                    assert same_bits(got, want), (fmt, shape, turn)
            assert set(comm.calls) == {"all_reduce/hierarchical"}
            assert comm.explain((700, 4096), BF16).route.transport == transport
