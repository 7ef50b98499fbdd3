"""Collectives through host memory: on GPUs if there are two, else in Triton's interpreter, in real processes."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.distributed as dist
from support import N_GPUS, SHORT_S, expected, same_bits, tough

from flashcomm import WireFormat, reference
from flashcomm.errors import CommunicationError
from flashcomm.ranks.launch import RankContext, run

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from flashcomm.gpu import host_sync, launch, sync
from flashcomm.gpu.compat import Int64
from flashcomm.gpu.host_launch import HostCollectives, HostTuning, most_workers, shared_bytes
from flashcomm.gpu.host_sync import MAX_WAVES, MAX_WORKERS, STATE_BYTES
from flashcomm.gpu.launch import ALGORITHMS, SHARDED
from flashcomm.transports import cpu_shared, host_memory

ON_GPUS = N_GPUS >= 2
DEVICE = "cuda" if ON_GPUS else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOW = HostTuning(1024, stage_lag=2, n_workers=8)
FORMATS = {
    2: [("int4", BF16), ("int6-had/int7-had", BF16), ("int8/int5", FP32), ("bf16", BF16), ("bf16/int2-had", FP16)],
    3: [("int4-g32/int8-g128", FP16), ("int3-g32-had/int4-g64-had", BF16), ("bf16", FP32)],
    4: [("int4-had", BF16)],
}


def on_ranks(body: object, world_size: int, *args: object) -> object:
    if ON_GPUS and world_size > N_GPUS:
        pytest.skip(f"{N_GPUS} CUDA devices, {world_size} are needed")
    return run(body, world_size, args, device=DEVICE, timeout_s=1000 if ON_GPUS else 250)  # type: ignore[arg-type]


def make(ctx: RankContext, workspace: int = 1 << 20, timeout_s: float = 60, delay: int = 0) -> HostCollectives:
    memory = host_memory if ON_GPUS else cpu_shared
    region = memory.create(ctx.device, launch.region_bytes(4 << 20), shared_bytes(workspace))
    places: list[str] = [""] * ctx.world_size
    dist.all_gather_object(places, region.place)
    region.rendezvous(dist.group.WORLD, places)
    dist.barrier()
    return HostCollectives(region, workspace, timeout_s, delay=delay)


def call(
    kernels: HostCollectives,
    algorithm: str,
    messages: list[torch.Tensor],
    fmt: WireFormat,
    how: HostTuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's result, and that of the reference."""
    rank, device = kernels.region.rank, kernels.region.device
    want = expected(algorithm, messages, fmt, rank)
    x = messages[rank].to(device)
    out = torch.full(want.shape, float("nan"), dtype=want.dtype, device=device)
    kernels.plan(algorithm, x, x.shape[-1], fmt, how)(x.data_ptr(), out.data_ptr())
    return out.cpu(), want


def inputs(
    ctx: RankContext, algorithm: str, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> list[torch.Tensor]:
    rows = shape[0] * ctx.world_size if ALGORITHMS.index(algorithm) in SHARDED else shape[0]
    return [tough((rows, shape[1]), dtype, seed + 100 * rank) for rank in range(ctx.world_size)]


def all_kinds(ctx: RankContext, formats: list[tuple[str, torch.dtype]]) -> None:
    """Messages smaller than a tile, smaller than a wave, and of several launches alternate in one region."""
    kernels = make(ctx, 16_000 if ctx.world_size == 2 else 40_000)
    cases = [(1, (1, 256)), (2, (5, 512)), (3, (3, 1152))]
    for seed, (name, dtype) in enumerate(formats):
        fmt = WireFormat.parse(name)
        for kind, algorithm in enumerate(ALGORITHMS):
            for lag, shape in cases if ON_GPUS else [cases[(seed + kind) % 3]]:
                messages = inputs(ctx, algorithm, shape, dtype, seed)
                if lag == 2:
                    messages[1].view(-1)[-1] = float("inf")
                got, want = call(kernels, algorithm, messages, fmt, HostTuning(1024, stage_lag=lag, n_workers=8))
                assert same_bits(got, want), (name, algorithm, lag, shape)
    kernels.check()
    kernels.region.close()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_collective_equals_the_reference(world_size: int) -> None:
    on_ranks(all_kinds, world_size, FORMATS[world_size])


def in_place(ctx: RankContext) -> None:
    kernels = make(ctx)
    for algorithm in ("one_shot", "two_shot"):
        for name in ("int4", "bf16"):
            fmt = WireFormat.parse(name)
            messages = inputs(ctx, algorithm, (9, 512), BF16, 5)
            x = messages[ctx.rank].clone().to(ctx.device)
            kernels.plan(algorithm, x, 512, fmt, HostTuning(1024, stage_lag=2, n_workers=3))(x.data_ptr(), x.data_ptr())
            assert same_bits(x.cpu(), getattr(reference, algorithm)(messages, fmt)), (algorithm, name)
    kernels.check()
    kernels.region.close()


def test_the_result_may_take_the_place_of_the_message() -> None:
    on_ranks(in_place, 2)


def slow_reader(ctx: RankContext, delay: int) -> None:
    """Rank 0 is slow between its wait and its read. No peer may overwrite what it is going to read."""
    kernels = make(ctx, timeout_s=30, delay=delay if ctx.rank == 0 else 0)
    for seed in range(8):
        algorithm = ("one_shot", "two_shot", "all_gather")[seed % 3]
        got, want = call(
            kernels, algorithm, inputs(ctx, algorithm, (4, 512), BF16, seed), WireFormat.parse("int8"), HOW
        )
        assert same_bits(got, want), seed
    kernels.check()
    kernels.region.close()


def test_a_slow_reader_reads_what_was_meant_for_it() -> None:
    on_ranks(slow_reader, 2, 20_000 if ON_GPUS else 500)


def a_rank_is_gone(ctx: RankContext, algorithm: str) -> None:
    gone = ctx.world_size - 1
    kernels = make(ctx)

    def is_lost(got: torch.Tensor) -> bool:  # an all-to-all keeps the own piece
        pieces = got.tensor_split(ctx.world_size) if algorithm == "all_to_all_single" else (got,)
        return all(bool(p.isnan().all()) for i, p in enumerate(pieces) if len(pieces) == 1 or i != ctx.rank)

    fmt, messages = WireFormat.parse("int4"), inputs(ctx, algorithm, (4, 512), BF16, 1)
    got, want = call(kernels, algorithm, messages, fmt, HOW)
    assert same_bits(got, want)
    dist.barrier()
    kernels.timeout_s = SHORT_S  # not before: ranks that compile may be seconds apart
    if ctx.rank == gone:
        dist.barrier()  # it keeps its memory, but makes no second call
        return
    got, _ = call(kernels, algorithm, messages, fmt, HOW)
    assert is_lost(got)
    with pytest.raises(CommunicationError, match=rf"of rank {gone}: expected call 2, saw 1\. That rank died"):
        kernels.check()
    for _ in range(2):  # from now on it neither disturbs its peers nor waits again
        got, _ = call(kernels, algorithm, messages, fmt, HOW)
        assert is_lost(got)
    flag = ctypes.c_int32.from_address(kernels.region.mappings[ctx.rank] + kernels.region.n_bytes).value
    assert flag // MAX_WAVES <= 2  # it has published no later call
    dist.barrier()


@pytest.mark.parametrize(
    ("algorithm", "world_size"),
    [("one_shot", 2), ("one_shot", 3), ("all_gather", 3), ("all_to_all_single", 3), ("two_shot", 3)],
)
def test_a_rank_that_does_not_come_is_an_error_that_names_it(algorithm: str, world_size: int) -> None:
    on_ranks(a_rank_is_gone, world_size, algorithm)


def many_calls(ctx: RankContext, calls: int) -> None:
    """Algorithms, shapes, formats and protocols change from call to call without a pause. Some results are compared."""
    kernels = make(ctx, 1 << 22)
    shapes = [(1, 256), (40, 512), (7, 1024), (300, 4096)]
    cases = []
    for i in range(30):
        algorithm, fmt = ALGORITHMS[i % 5], WireFormat.parse(("int4", "bf16")[i % 2])
        messages = inputs(ctx, algorithm, shapes[(i * 5 // 3) % 4], BF16, i)
        x, (_, want) = messages[ctx.rank].to(ctx.device), call(kernels, algorithm, messages, fmt)
        out = torch.empty(want.shape, dtype=BF16, device=ctx.device)
        cases.append((kernels.plan(algorithm, x, x.shape[-1], fmt), x, out, want.to(ctx.device)))
    for number in range(calls):
        plan, x, out, want = cases[(number * number + number // 3) % len(cases)]
        plan(x.data_ptr(), out.data_ptr())
        if number % 97 == 0:
            assert same_bits(out, want), number
    torch.cuda.synchronize()
    kernels.check()
    kernels.region.close()


@pytest.mark.skipif(not ON_GPUS, reason=f"{N_GPUS} CUDA devices, 2 are needed")
def test_many_calls_back_to_back() -> None:
    on_ranks(many_calls, 2, 50_000)


def in_graphs(ctx: RankContext) -> None:
    """A graph of two algorithms is replayed with changing inputs."""
    kernels = make(ctx, 1 << 22)
    fmt, n = WireFormat.parse("int4"), 40
    messages = [[tough((64, 1024), BF16, i + 100 * rank) for rank in range(ctx.world_size)] for i in range(n)]
    wants = [[reference.one_shot(xs, fmt), reference.two_shot(xs, fmt)] for xs in messages]
    x = messages[0][ctx.rank].to(ctx.device)
    outs = [torch.empty_like(x) for _ in range(2)]
    plans = [kernels.plan(algorithm, x, 1024, fmt) for algorithm in ("one_shot", "two_shot")]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for plan, out in zip(plans, outs, strict=True):
            plan(x.data_ptr(), out.data_ptr())
    mine = [xs[ctx.rank].to(ctx.device) for xs in messages]
    for replay in range(1000):
        x.copy_(mine[replay % n])
        graph.replay()
        if replay % 37 == 0:
            assert all(same_bits(out.cpu(), want) for out, want in zip(outs, wants[replay % n], strict=True)), replay
    kernels.check()
    kernels.region.close()


@pytest.mark.skipif(not ON_GPUS, reason=f"{N_GPUS} CUDA devices, 2 are needed")
def test_a_graph_replayed_a_thousand_times_with_changing_inputs() -> None:
    on_ranks(in_graphs, 2)


@triton.jit
def _publisher(progress, region, outbox, ranks: tl.constexpr):
    """The publisher of a call of 3 waves in epoch 5, in both stages."""
    base = tl.load(progress) * 0 + 5 * MAX_WAVES
    host_sync.publish_all(base * 0 + 3, (base, base), region, outbox, ranks, 2)


@pytest.mark.skipif(ON_GPUS, reason="kernels are not interpreted where there are GPUs")
def test_words_of_workers_that_a_launch_does_not_have_follow_the_calls() -> None:
    """Otherwise a word could be 2^19 calls old when it is used again, and look like progress of that call."""
    n_workers, base = 2, 5 * MAX_WAVES
    state, memory = torch.zeros(STATE_BYTES // 4, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    progress = state[256:].view(2, MAX_WORKERS)
    progress[:, :n_workers], progress[:, n_workers:] = base + 3, base - (1 << 31)
    local = torch.zeros(4, dtype=torch.int32)
    where = sync.Region(Int64(0), Int64(local.data_ptr()), 0, Int64(0), memory, memory)
    table = torch.tensor([memory.data_ptr()])
    counter = host_sync.Counter(Int64(0))
    outbox = host_sync.Outbox(table, Int64(0), Int64(state.data_ptr()), counter, counter, n_workers)
    _publisher[(1,)](progress, where, outbox, sync.Ranks(2, False, 0))
    assert (progress[:, :n_workers] == base + 3).all()
    assert (progress[:, n_workers:] == base).all()
    assert memory[[0, 32]].tolist() == [base + 3, base + 3]


def test_a_grid_fits_the_gpu() -> None:
    """All programs must run at the same time: on a GPU of 20 multiprocessors, 4 ranks leave 16 for workers."""
    assert most_workers(0, 20, 4) == 16
    assert most_workers(8, 20, 4) == 8
    assert most_workers(64, 20, 40) == 1
    assert most_workers(0, 1000, 2) == MAX_WORKERS
