"""Which transport a message takes: the same by every integration, on every kind of machine.

Kinds of machine are simulated: discovery finds the transports of that machine, which here are memory of CPU processes.
On real machines tests/gpu/test_routes_on_gpus.py does the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flashcomm import Communicator, ops
from flashcomm.collectives import executors
from flashcomm.compat import name_of, process_group_named
from flashcomm.integrations.planned import PlannedAllReduce
from flashcomm.ranks.launch import RankContext, run
from flashcomm.setup import discovery
from flashcomm.transports import cpu_shared

pytest.importorskip("triton", reason="triton is not installed")

LARGE, SMALL = (32, 1024), (2, 1024)  # 64 and 4 KB of bf16: above and below the least that is quantized
Sum = Callable[[torch.Tensor], object]


class SymmetricStandIn(cpu_shared.SharedRegion):
    """Finds its ranks by the name of their group, as torch's symmetric memory does."""

    def rendezvous(self, group: dist.ProcessGroup, places: Any) -> None:
        found = process_group_named(name_of(group) or "")
        assert found is group
        assert (found.rank(), found.size()) == (group.rank(), group.size())
        super().rendezvous(found, places)


def transport(name: str, why_not: str = "", region: Any = cpu_shared.SharedRegion) -> Any:
    probe = lambda device: {"why": why_not}  # noqa: E731
    first = lambda probes: next((p["why"] for p in probes if p["why"]), "")  # noqa: E731
    return SimpleNamespace(NAME=name, probe=probe, why_not=first, create=region, SELF_TEST=False)


NO_ACCESS = "no peer access"
MACHINES: dict[str, tuple[list[Any], str]] = {  # transports that discovery tries, and the one that it must take
    "NVLink": ([transport("symmetric", "", SymmetricStandIn), transport("host_memory")], "symmetric"),
    "no peer access": ([transport("symmetric", NO_ACCESS), transport("host_memory")], "host_memory"),
    "several hosts": (
        [transport("symmetric", "another host"), transport("host_memory", "another host")],
        "process_group",
    ),
}


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """A list to which executors, instead of sending a message, add its algorithm, format and transport."""
    taken: list[tuple[str, str, str]] = []

    def run(self: object, route: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        taken.append((route.algorithm, str(route.format), route.transport))

    for kind in (executors.Kernel, executors.Pipelined, executors.Backend):
        monkeypatch.setattr(kind, "run", run)
    return taken


def by_c10d(group: Any) -> dict[str, Sum]:
    import flashcomm.integrations.process_group as c10d

    backend = dist.new_group(backend="flashcomm")
    assert isinstance(backend, c10d.FlashProcessGroup)
    mesh = init_device_mesh(
        "cpu", (1, 2), mesh_dim_names=("dp", "tp"), backend_override={"dp": "gloo", "tp": "flashcomm"}
    )
    of_mesh = mesh.get_group("tp")
    assert isinstance(of_mesh, c10d.FlashProcessGroup)
    return {
        "c10d": lambda x: dist.all_reduce(x, group=backend),
        "device mesh": lambda x: dist.all_reduce(x, group=of_mesh),
        "a Communicator of a c10d group": lambda x: Communicator(backend, "int4").all_reduce(x),
    }


def by_dtensor(group: Any) -> dict[str, Sum]:
    from flashcomm.integrations.dtensor import MeshCollectives

    mesh = init_device_mesh("cpu", (2,))
    ops._communicators.clear()
    return {"DTensor": lambda x: MeshCollectives.of(mesh, "int4").all_reduce(x)}


def by_engines(group: Any) -> dict[str, Sum]:
    from flashcomm.contrib.sglang import QuickReduce
    from flashcomm.integrations.vllm_group import TensorParallelAllReduce

    planned = PlannedAllReduce(Communicator(group, "int4"))
    vllm = TensorParallelAllReduce("tp:0", planned, 1024, lambda x: dist.all_reduce(x), lambda layers: None)
    sglang = QuickReduce(group, "int4")
    return {
        "vLLM": vllm,
        "SGLang": lambda x: sglang.quick_all_reduce(x) if sglang.should_quick_allreduce(x) else dist.all_reduce(x),
    }


def by_transformers(group: Any) -> dict[str, Sum]:
    from flashcomm.integrations.transformers import RowwiseAllReduce
    from flashcomm.plan import Plan

    all_reduce = RowwiseAllReduce({"format": "int4"}, Plan.of("int4"))
    return {"transformers": lambda x: all_reduce.reduce(x, group, "")}


ENGINES_OWN = {"vLLM", "SGLang"}  # a message that is not quantized is left to the engine, which has kernels for it


def every_machine(ctx: RankContext, integrations: list[Any]) -> None:
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context():
        taken = watch(monkeypatch)
        for machine, (kinds, expected) in MACHINES.items():
            monkeypatch.setattr(discovery, "candidates", lambda *_, kinds=kinds: kinds)
            comm = Communicator(dist.group.WORLD, "int4")
            assert comm.machine.transport == expected, machine
            for shape, low_bit in ((LARGE, True), (SMALL, False)):
                want = comm.explain(shape, torch.bfloat16).route
                assert want.low_bit is low_bit
                assert want.transport == (expected if low_bit or want.algorithm == "one_shot" else "process_group")
            sums = [make(dist.group.WORLD).items() for make in integrations]
            for (name, reduce), shape in itertools.product(itertools.chain(*sums), (LARGE, SMALL)):
                taken.clear()
                reduce(torch.ones(shape, dtype=torch.bfloat16))
                route = comm.explain(shape, torch.bfloat16).route
                expect = [(route.algorithm, str(route.format), route.transport)]
                left = not route.low_bit and (name in ENGINES_OWN or route.algorithm == "backend")
                assert taken == expect or (left and taken in ([], expect)), (machine, name, shape, taken, expect)


def names_of_groups(ctx: RankContext) -> None:
    """The inner group can be found by its name until the group is destroyed. A new group gets another name."""
    import flashcomm.integrations.process_group  # noqa: F401

    names = []
    for _ in range(2):
        group: Any = dist.new_group(backend="flashcomm")
        inner = group.backend_group
        assert name_of(inner) is not None
        comm = Communicator(group, "int4")
        assert comm.group is group
        assert comm.transport.group is inner
        names.append(name_of(inner))
        dist.all_reduce(torch.ones(LARGE), group=group)
        planned = group._planned["cpu"].comm
        dist.destroy_process_group(group)
        assert planned.closed
        assert name_of(inner) is None
    shared: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(shared, names)
    assert names[0] != names[1]
    assert shared == [names] * ctx.world_size


def names_and_routes(ctx: RankContext, integrations: list[Any]) -> None:
    names_of_groups(ctx)
    every_machine(ctx, integrations)


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
    monkeypatch.setenv("FLASHCOMM_WORKSPACE_BYTES", "4M")


def test_every_integration_takes_the_route_of_a_communicator() -> None:
    """Also, the inner group of the c10d backend has a name of its own while the group lives."""
    run(names_and_routes, 2, ([by_c10d, by_dtensor, by_engines],), timeout_s=120)


@pytest.mark.thorough
def test_transformers_takes_the_route_of_a_communicator() -> None:
    run(every_machine, 2, ([by_transformers],), timeout_s=120)
