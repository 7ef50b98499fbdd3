"""On two GPUs: low-bit collectives inside the CUDA graphs of torch.compile(mode="reduce-overhead")."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import N_GPUS, NCCL, same_bits, tough
from torch import nn
from torch.distributed.tensor import Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import flashcomm
from flashcomm import WireFormat, ops, reference
from flashcomm.integrations.dtensor import FlashColwiseParallel, FlashRowwiseParallel
from flashcomm.ranks.launch import RankContext, run

needs_two = pytest.mark.skipif(N_GPUS < 2, reason=f"{N_GPUS} CUDA devices, 2 are needed")
needs_nccl = pytest.mark.skipif(not NCCL, reason="DTensor on GPUs wants NCCL: two CUDA devices of one rank each")
FMT = WireFormat.parse("int4")


@pytest.fixture(autouse=True)
def _quantize_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCOMM_MIN_BYTES", "0")


def n_calls() -> int:
    return sum(sum(comm.calls.values()) for comm in ops.communicators())


def recorded(ctx: RankContext) -> None:
    """Every length and input gives the bits of the reference. Graphs are replayed, and compiled only once."""
    from torch._dynamo.utils import counters

    @torch.compile(mode="reduce-overhead", fullgraph=True, dynamic=True)
    def block(x: torch.Tensor) -> torch.Tensor:
        return flashcomm.all_reduce(x * 2, "int4") + 1

    flashcomm.all_reduce(torch.ones(64, 4096, dtype=torch.bfloat16, device=ctx.device), "int4")  # before any recording
    flashcomm.all_reduce(torch.ones(4096, 4096, dtype=torch.bfloat16, device=ctx.device), "int4")
    for rows in (64, 65, 700, 3000):
        for turn in range(8):
            messages = [tough((rows, 4096), torch.bfloat16, 10 * turn + r) for r in range(ctx.world_size)]
            want = reference.one_shot([x * 2 for x in messages], FMT) + 1
            before = n_calls()
            torch.compiler.cudagraph_mark_step_begin()
            got = block(messages[ctx.rank].to(ctx.device)).clone()
            assert same_bits(got.cpu(), want), (rows, turn)
            assert turn < 3 or n_calls() == before, f"{rows} rows, turn {turn}: called again instead of replayed"
    assert counters["stats"]["unique_graphs"] == 1, "a length compiled again"
    assert counters["inductor"]["cudagraph_skips"] == 0


@needs_two
def test_cuda_graph_trees_of_an_all_reduce() -> None:
    run(recorded, 2, device="cuda")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(1024, 2048)
        self.down = nn.Linear(2048, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def tensor_parallel(ctx: RankContext, sequence: bool) -> None:
    """A parallelized block, eager and in CUDA graphs, is close to the unsharded one, and equal on all ranks."""
    mesh = init_device_mesh("cuda", (ctx.world_size,))
    torch.manual_seed(0)
    model = Mlp().to(ctx.device, torch.bfloat16).requires_grad_(False)
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": FlashRowwiseParallel(format="int8")}
    if sequence:
        plan = {
            "up": FlashColwiseParallel(format="int8", input_layouts=Shard(1)),
            "down": FlashRowwiseParallel(format="int8", output_layouts=Shard(1)),
        }
    sharded = parallelize_module(copy.deepcopy(model), mesh, plan)
    fast = torch.compile(sharded, mode="reduce-overhead", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n in (64, 640, 1026):
            for turn in range(6):
                x = torch.randn(2, n, 1024, generator=torch.Generator().manual_seed(turn)).bfloat16().to(ctx.device)
                given = x.chunk(ctx.world_size, 1)[ctx.rank].contiguous() if sequence else x
                eager, before = sharded(given), n_calls()
                torch.compiler.cudagraph_mark_step_begin()
                got = fast(given).clone()
                want = model(x).float()
                want = want.chunk(ctx.world_size, 1)[ctx.rank] if sequence else want
                for result in (eager, got):
                    assert result.shape == want.shape
                    assert ((result - want).norm() / want.norm()).item() < 0.02
                assert turn < 3 or n_calls() == before, f"{n} tokens, turn {turn}: called again instead of replayed"
                if not sequence:
                    others = [torch.empty_like(got) for _ in range(ctx.world_size)]
                    torch.distributed.all_gather(others, got)
                    assert all(torch.equal(other, got) for other in others)


@needs_nccl
@pytest.mark.parametrize("sequence", [False, True], ids=["all_reduce", "sequence_parallel"])
def test_a_tensor_parallel_block_in_cuda_graphs(sequence: bool) -> None:
    run(tensor_parallel, 2, (sequence,), device="cuda")
