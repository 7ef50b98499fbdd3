"""Which transport a message takes on two GPUs, with and without peer access: the same by every integration.

Also times that are measured at set-up, and peer access that fails the self-test.
"""

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
from flashcomm.routing import timings
from flashcomm.setup import measure, self_test
from flashcomm.transports import symmetric

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


def measured_at_set_up(ctx: RankContext) -> None:
    with Communicator(None, "int4", measure="anew") as comm:
        mine = comm.machine.timings
        assert mine is not None
        everyone: list[Any] = [None] * ctx.world_size
        dist.all_gather_object(everyone, timings.as_dict(mine))
        assert everyone[0] == everyone[1]
        assert mine.at_setup
        assert mine.sizes == measure.SIZES, "the limit left out sizes"
        assert set(mine.us) == {"backend", "none one_shot", "int4 one_shot"}
        for size in mine.sizes:
            route = comm.explain((size // 2,), torch.bfloat16).route
            key = "backend" if route.algorithm == "backend" else f"{route.format} {route.algorithm}"
            assert mine.time(key, size) <= mine.time("backend", size)
    with Communicator(None, "int4", measure="auto") as comm:
        assert comm.machine.timings is not None
        assert timings.as_dict(comm.machine.timings) == timings.as_dict(mine), "the stored table was not found"


@pytest.mark.skipif(not NCCL, reason="NCCL needs two CUDA devices of which each has one rank")
def test_gpus_without_timings_measure_themselves(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(measured_at_set_up, 2, device="cuda")


def peer_access_that_lies(ctx: RankContext) -> None:
    """What rank 0 writes for rank 1 ends in memory of rank 0 that nobody reads."""
    rendezvous = symmetric.SymmetricRegion.rendezvous

    def lying(self: Any, group: Any, places: Any) -> None:
        rendezvous(self, group, places)
        if ctx.rank == 0:
            self.nowhere = torch.zeros(self.n_bytes, dtype=torch.uint8, device=ctx.device)
            self.peers[1] = self.nowhere.data_ptr()

    symmetric.SymmetricRegion.rendezvous = lying  # type: ignore[method-assign]
    self_test.TIMEOUT_S = 1.0
    with Communicator(None, "int4", min_bytes=0) as comm:
        assert comm.machine.transport == "host_memory"
        assert "rank 1 waited 1 s for rank 0" in comm.machine.rejected[0][1]
        messages = [tough((64, 4096), torch.bfloat16, rank) for rank in range(2)]
        got = comm.all_reduce(messages[ctx.rank].to(ctx.device)).cpu()
        assert same_bits(got, reference.one_shot(messages, comm.format))
        comm.synchronize()
    assert "" in self_test._verdicts.values(), "host memory passes"


@pytest.mark.skipif(not NCCL, reason="NCCL needs two CUDA devices of which each has one rank")
def test_peer_access_that_lies_is_not_used() -> None:
    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("these two GPUs have no peer access")
    run(peer_access_that_lies, 2, device="cuda")
