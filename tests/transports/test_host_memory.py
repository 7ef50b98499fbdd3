"""Communicators over host memory, on two GPUs. `gpu/test_host_kernel.py` tests the kernel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import N_GPUS, SHORT_S, over_cuda, same_bits, tough, wait_at_most

from flashcomm import Communicator, WireFormat, reference
from flashcomm.errors import CommunicationError, UnavailableError
from flashcomm.ranks.launch import RankContext, run
from flashcomm.routing import policy
from flashcomm.routing.route import Executor, Machine, Message

BF16, FP32 = torch.bfloat16, torch.float32
two_gpus = pytest.mark.skipif(N_GPUS < 2, reason=f"{N_GPUS} CUDA devices, 2 are needed")


def test_the_policy_over_host_memory() -> None:
    machine = Machine("host_memory")

    def way(n_bytes: int, fmt: str, world_size: int = 2, min_bytes: int | str = "auto") -> tuple[str, str, str]:
        call = Message(n_bytes // 2, min(4096, n_bytes // 2), 2, world_size, "cuda")
        route = policy.choose(call, WireFormat.parse(fmt), "auto", min_bytes, machine).route
        return route.algorithm, str(route.format), route.transport

    assert way(4 << 10, "int4") == ("one_shot", "none", "host_memory")
    assert way(64 << 10, "int4") == ("one_shot", "int4", "host_memory")
    assert way(64 << 20, "int4") == ("one_shot", "int4", "host_memory")
    assert way(64 << 20, "none") == ("one_shot", "none", "host_memory")
    assert way(64 << 20, "int4", world_size=4) == ("two_shot", "int4", "host_memory")
    assert way(64 << 20, "none", world_size=4) == ("two_shot", "none", "host_memory")
    assert way(64 << 10, "int4", min_bytes=1 << 20) == ("one_shot", "none", "host_memory")


def test_rows_with_short_groups_and_nodes_go_over_the_process_group() -> None:
    machine = Machine("host_memory", local_world_size=2)
    for row, algorithm in ((600, "one_shot"), (640, "hierarchical")):
        message = Message(row * 1000, row, 2, 4, "cuda", 2)
        route = policy.choose(message, WireFormat.parse("int4"), algorithm, 0, machine).route
        assert (route.algorithm, route.transport, route.executor) == (algorithm, "process_group", Executor.PIPELINED)


def over_host(ctx: RankContext) -> None:
    """Capture messages of all sizes in one graph, and replay it with changing inputs."""
    shapes = [(8, 4096), (1500, 4096), (3, 640), (700, 4096)]
    for fmt in ("int4", "none", "int6-had/int7-had"):
        with over_cuda(fmt, transport="host_memory", min_bytes=0, timeout_s=20) as comm:
            routes = {comm.explain(shape, BF16).route.transport for shape in shapes}
            assert routes == {"host_memory"}
            sets = [
                [[tough(shape, BF16, 10 * turn + r) for r in range(ctx.world_size)] for shape in shapes]
                for turn in range(3)
            ]
            want = [[reference.one_shot(xs, comm.format).to(ctx.device) for xs in per_turn] for per_turn in sets]
            static = [torch.empty(shape, dtype=BF16, device=ctx.device).normal_() for shape in shapes]
            with pytest.raises(ValueError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                comm.all_reduce(static[1])
            for _ in range(2):
                for x in static:
                    comm.all_reduce(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = [comm.all_reduce(x) for x in static]
            unlike = torch.zeros(1, dtype=torch.int64, device=ctx.device)
            for replay in range(60):
                for x, xs in zip(static, sets[replay % 3], strict=True):
                    x.copy_(xs[ctx.rank])
                graph.replay()
                for result, values in zip(results, want[replay % 3], strict=True):
                    unlike += (result != values).sum()
                eager = comm.all_reduce(sets[replay % 3][1][ctx.rank].to(ctx.device))
                unlike += (eager != want[replay % 3][1]).sum()
            comm.synchronize()
            assert unlike.item() == 0, fmt


@two_gpus
def test_host_memory_in_graphs_and_between_them() -> None:
    run(over_host, 2, device="cuda")


def host_slices(ctx: RankContext) -> None:
    for fmt in ("int4/int8", "none"):
        with over_cuda(fmt, transport="host_memory", timeout_s=20) as comm:
            for rows in (1, 3000):
                whole = [tough((rows * ctx.world_size, 576), BF16, r) for r in range(ctx.world_size)]
                got = comm.reduce_scatter(whole[ctx.rank].to(ctx.device)).cpu()
                assert same_bits(got, reference.reduce_scatter(whole, comm.format)[ctx.rank])
                got = comm.all_gather(whole[ctx.rank].to(ctx.device)).cpu()
                assert same_bits(got, reference.all_gather(whole, comm.format))
        with over_cuda(fmt, transport="host_memory", algorithm="two_shot", timeout_s=20, host_workers=5) as comm:
            all_inputs = [tough((2500, 640), FP32, r) for r in range(ctx.world_size)]
            got = comm.all_reduce(all_inputs[ctx.rank].to(ctx.device)).cpu()
            assert same_bits(got, reference.two_shot(all_inputs, comm.format))
            for turn in range(4):  # misaligned on one rank only
                x = all_inputs[ctx.rank].to(ctx.device)
                if ctx.rank == turn % 2:
                    x = torch.cat((x.new_zeros(1), x.view(-1)))[1:].view(x.shape)
                assert same_bits(comm.all_reduce(x).cpu(), reference.two_shot(all_inputs, comm.format))


@two_gpus
def test_slices_and_two_shot_over_host_memory() -> None:
    run(host_slices, 2, device="cuda")


def _twice(comm: Communicator, x: torch.Tensor, out: torch.Tensor) -> None:
    for _ in range(2):
        comm.all_reduce(x, out)
        comm.synchronize()


def gone_on_gpus(ctx: RankContext, shape: tuple[int, int]) -> None:
    with over_cuda("int4", transport="host_memory", min_bytes=0) as comm:
        x = tough(shape, BF16, ctx.rank).to(ctx.device)
        comm.all_reduce(x)
        wait_at_most(comm, SHORT_S)
        if ctx.rank == 1:
            dist.barrier()
            return
        out = torch.zeros_like(x)
        with pytest.raises(CommunicationError, match="of rank 1"):
            _twice(comm, x, out)
        assert out.isnan().all()
        dist.barrier()


@two_gpus
@pytest.mark.parametrize("shape", [(4, 512), (3000, 4096)])
def test_a_dead_peer_over_host_memory(shape: tuple[int, int]) -> None:
    run(gone_on_gpus, 2, (shape,), device="cuda")


def cannot_pin(ctx: RankContext) -> None:
    from flashcomm.transports import host_memory

    if ctx.rank == 1:
        host_memory.HostRegion._pin = lambda self, address: 2  # type: ignore[method-assign]
    with pytest.raises(
        UnavailableError, match=r"rank 1: .* cannot be pinned \(CUDA error 2\): allow more locked memory"
    ):
        over_cuda("int4", transport="host_memory")
    with over_cuda("int4", transport="auto", min_bytes=0) as comm:
        assert comm.machine.transport == "symmetric"


@two_gpus
def test_memory_that_one_rank_cannot_pin_is_an_error_on_all() -> None:
    run(cannot_pin, 2, device="cuda")
