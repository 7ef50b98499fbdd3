"""Bytes through host memory: in real processes over `transports.shared`, flags in Triton's interpreter; over pinned
memory and copy engines where there are two GPUs (there by way of Communicators, with transport="host_memory").
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support import N_GPUS, over_cuda, same_bits, tough

from flashcomm import Communicator, WireFormat, reference
from flashcomm.collectives import pipelined
from flashcomm.errors import CommunicationError, UnavailableError
from flashcomm.ranks.launch import RankContext, run
from flashcomm.routing import policy
from flashcomm.routing.route import Machine, Message

pytest.importorskip("triton", reason="triton is not installed")

LINE = 64  # bytes from flag to flag
ON_GPUS = N_GPUS >= 2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
no_gpu = pytest.mark.skipif(ON_GPUS, reason="flags are not interpreted where there are GPUs")
two_gpus = pytest.mark.skipif(not ON_GPUS, reason=f"{N_GPUS} CUDA devices, 2 are needed")


def staged(
    ctx: RankContext, slot_bytes: int, timeout_s: float = 60, exchanges: int = 1
) -> tuple[pipelined.Context, torch.Tensor]:
    """What composed collectives need, over slots of that size; and where timed-out waits are reported.

    exchanges: of all ranks and, if 3, among parts of them.
    """
    from flashcomm.codecs import codec_for
    from flashcomm.transports.cpu_shared import SharedRegion
    from flashcomm.transports.staging import StagedTransport, staging_bytes

    region = SharedRegion(ctx.device, 4096, exchanges * staging_bytes(slot_bytes))
    places: list[str] = [""] * ctx.world_size
    dist.all_gather_object(places, region.place)
    region.join(dist.group.WORLD, places)
    dist.barrier()
    transport = StagedTransport(region, region.n_bytes, slot_bytes, timeout_s)
    workspace = pipelined.Workspace(ctx.device)
    context = pipelined.Context(WireFormat.parse("int4"), codec_for("cpu"), transport, workspace, 4096)
    return context, region.status


def collectives(ctx: RankContext, chunk_bytes: int, slot_bytes: int) -> None:
    context, status = staged(ctx, slot_bytes)
    context.chunk_bytes = chunk_bytes
    for fmt, dtype in (("int4", BF16), ("int6-had/none", FP32)):
        context.fmt = WireFormat.parse(fmt)
        for seed, shape in enumerate([(5, 600), (1, 7)]):
            everybody = [tough(shape, dtype, seed + 100 * rank) for rank in range(ctx.world_size)]
            for name in ("one_shot", "two_shot"):
                out = torch.empty(shape, dtype=dtype)
                getattr(pipelined, name)(everybody[ctx.rank], out, context)
                assert same_bits(out, getattr(reference, name)(everybody, context.fmt)), (fmt, shape, name)
        whole = [tough((2 * ctx.world_size, 576), dtype, rank) for rank in range(ctx.world_size)]
        part = torch.empty((2, 576), dtype=dtype)
        pipelined.reduce_scatter(whole[ctx.rank], part, context)
        assert same_bits(part, reference.reduce_scatter(whole, context.fmt)[ctx.rank])
        gathered = torch.empty((2 * ctx.world_size**2, 576), dtype=dtype)
        pipelined.all_gather(whole[ctx.rank], gathered, context)
        assert same_bits(gathered, reference.all_gather(whole, context.fmt))
    assert status.tolist() == [0] * 5


@no_gpu
@pytest.mark.parametrize(("world_size", "chunk_bytes", "slot_bytes"), [(2, 2048, 4096), (3, 3000, 1024)])
def test_collectives_equal_the_reference(world_size: int, chunk_bytes: int, slot_bytes: int) -> None:
    """Many chunks through four slots; the same in many pieces."""
    run(collectives, world_size, (chunk_bytes, slot_bytes), timeout_s=250)


def slow_fetcher(ctx: RankContext) -> None:
    """Rank 0 is slow between its wait and its fetch; nobody may put anything else into the slot meanwhile."""
    from flashcomm.transports.staging import BEFORE_FETCH

    context, _ = staged(ctx, 4096)
    turn: Callable[[int, torch.Tensor, int], None] = context.transport._turns[BEFORE_FETCH]  # type: ignore[attr-defined]

    def late(slot: int, out: torch.Tensor, stream: int) -> None:
        turn(slot, out, stream)
        time.sleep(0.3)

    if ctx.rank == 0:
        context.transport._turns[BEFORE_FETCH] = late  # type: ignore[attr-defined]
    for call in range(10):
        everybody = [tough((2, 512), BF16, call + 100 * rank) for rank in range(ctx.world_size)]
        out = torch.empty_like(everybody[0])
        context.transport._next = 0  # type: ignore[attr-defined]  # the same slot again, as in a graph that is replayed
        pipelined.one_shot(everybody[ctx.rank], out, context)
        assert same_bits(out, reference.one_shot(everybody, context.fmt)), call


@no_gpu
def test_a_slow_fetcher_fetches_what_was_meant_for_it() -> None:
    run(slow_fetcher, 2, timeout_s=120)


def a_rank_is_gone(ctx: RankContext) -> None:
    context, status = staged(ctx, 4096, timeout_s=1)
    x = tough((2, 512), BF16, ctx.rank)
    out = torch.empty_like(x)
    pipelined.one_shot(x, out, context)
    if ctx.rank == 1:
        return
    for _ in range(2):
        pipelined.one_shot(x, out.fill_(7), context)
        assert out.isnan().all()
    assert status.tolist() == [1, 3, 1, 1, 0]  # the staged bytes of rank 1: wanted put 1 of that slot, saw 0
    begin = int(context.transport._flags[0])  # type: ignore[attr-defined]
    puts = [ctypes.c_int32.from_address(begin + LINE * slot).value for slot in range(3)]
    assert puts == [1, 1, 0]  # nothing is put for others once a wait was in vain


@no_gpu
def test_without_a_rank_results_are_nan_and_the_rank_is_named() -> None:
    run(a_rank_is_gone, 2, timeout_s=120)


def test_the_policy_over_host_memory() -> None:
    machine = Machine("host_memory")

    def way(n_bytes: int, fmt: str, world_size: int = 2, min_bytes: int | None = None) -> tuple[str, str, str]:
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


def over_host(ctx: RankContext) -> None:
    """Small messages by kernels on mapped memory, large ones by copies, in one graph, replayed with changing inputs."""
    shapes = [(8, 4096), (1500, 4096), (3, 600), (700, 4096)]
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
        with over_cuda(fmt, transport="host_memory", algorithm="two_shot", timeout_s=20) as comm:
            everybody = [tough((2500, 600), FP32, r) for r in range(ctx.world_size)]
            got = comm.all_reduce(everybody[ctx.rank].to(ctx.device)).cpu()
            assert same_bits(got, reference.two_shot(everybody, comm.format))
            for turn in range(4):  # misaligned on one rank alone, whose slots must stay those of the others
                x = everybody[ctx.rank].to(ctx.device)
                if ctx.rank == turn % 2:
                    x = torch.cat((x.new_zeros(1), x.view(-1)))[1:].view(x.shape)
                assert same_bits(comm.all_reduce(x).cpu(), reference.two_shot(everybody, comm.format))


@two_gpus
def test_slices_and_two_shot_over_host_memory() -> None:
    run(host_slices, 2, device="cuda")


def _twice(comm: Communicator, x: torch.Tensor, out: torch.Tensor) -> None:
    for _ in range(2):
        comm.all_reduce(x, out)
        comm.synchronize()


def gone_on_gpus(ctx: RankContext, shape: tuple[int, int]) -> None:
    with over_cuda("int4", transport="host_memory", min_bytes=0, timeout_s=2) as comm:
        x = tough(shape, BF16, ctx.rank).to(ctx.device)
        comm.all_reduce(x)
        if ctx.rank == 1:
            time.sleep(8)
            return
        out = torch.zeros_like(x)
        with pytest.raises(CommunicationError, match="of rank 1"):
            _twice(comm, x, out)
        assert out.isnan().all()


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
