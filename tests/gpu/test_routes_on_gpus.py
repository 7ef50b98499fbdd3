"""Which transport a message takes on two GPUs, with and without peer access: the same by every integration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import NCCL, same_bits, tough
from torch.distributed.device_mesh import init_device_mesh

from flashcomm import Communicator, reference
from flashcomm.collectives import executors
from flashcomm.integrations.dtensor import MeshCollectives
from flashcomm.integrations.planned import PlannedAllReduce
from flashcomm.integrations.vllm_group import TensorParallelAllReduce
from flashcomm.ranks.launch import RankContext, run

SHAPES = ((1, 4096), (1024, 4096))  # 8 KB and 8 MB of bf16


def by_integration(where: torch.device) -> dict[str, Any]:
    """Sums of each integration over all ranks."""
    import flashcomm.integrations.process_group  # noqa: F401

    group = dist.new_group(backend="flashcomm")
    mesh = init_device_mesh(
        "cuda", (1, 2), mesh_dim_names=("dp", "tp"), backend_override={"dp": "nccl", "tp": "flashcomm"}
    )
    planned = PlannedAllReduce(Communicator(None, "int4"))
    vllm = TensorParallelAllReduce("tp:0", planned, 4096, lambda x: x, lambda layers: None)
    collectives = MeshCollectives.of(init_device_mesh("cuda", (2,)), "int4")

    def in_place(group: Any) -> Any:
        def reduce(x: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(x, group=group)
            return x

        return reduce

    return {
        "c10d": in_place(group),
        "device mesh": in_place(mesh.get_group("tp")),
        "DTensor": collectives.all_reduce,
        "vLLM": vllm,
    }


def routes(ctx: RankContext, expected: str) -> None:
    taken: list[tuple[str, str, str]] = []

    def watched(run: Any) -> Any:
        def wrapped(self: object, route: Any, x: torch.Tensor, out: torch.Tensor) -> object:
            taken.append((route.algorithm, str(route.format), route.transport))
            return run(self, route, x, out)

        return wrapped

    for kind in (executors.Kernel, executors.Pipelined, executors.Backend):
        kind.run = watched(kind.run)  # type: ignore[method-assign]
    comm = Communicator(None, "int4")
    assert comm.machine.transport == expected, comm.machine.rejected
    for (name, reduce), shape in itertools.product(by_integration(ctx.device).items(), SHAPES):
        messages = [tough(shape, torch.bfloat16, rank) for rank in range(2)]
        x = messages[ctx.rank].to(ctx.device)
        route = comm.explain(shape, torch.bfloat16).route
        assert route.transport == expected
        if name == "vLLM" and not route.low_bit:
            continue  # vLLM's own all-reduce
        taken.clear()
        got = reduce(x)
        assert taken == [(route.algorithm, str(route.format), expected)], (name, shape)
        assert same_bits(got.cpu(), getattr(reference, route.algorithm)(messages, route.format)), (name, shape)
    comm.synchronize()


@pytest.mark.skipif(not NCCL, reason="NCCL needs two CUDA devices of which each has one rank")
@pytest.mark.parametrize("expected", ["symmetric", "host_memory"])
def test_every_integration_takes_the_transport_of_a_communicator(
    expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if expected == "symmetric" and not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("these two GPUs have no peer access")
    monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
    if expected == "host_memory":
        monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    run(routes, 2, (expected,), device="cuda")
