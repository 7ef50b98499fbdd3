"""On GPUs: both codecs give the bytes of the CPU, and collectives over NCCL give the bits of the reference.

Also what the interpreter cannot show of kernels: graphs, streams, and that nothing is compiled after the first calls.
"""

from __future__ import annotations

import importlib
import time

import pytest
import torch
import torch.distributed as dist
from support import DTYPES, N_GPUS, NCCL, over_cuda, same_bits, tough
from wire_formats import FORMATS, SHAPES

from flashcomm import Communicator, WireFormat, reference
from flashcomm.ranks.launch import RankContext, run
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat

needs_gpu = pytest.mark.skipif(N_GPUS < 1, reason="no CUDA device")
needs_two = pytest.mark.skipif(N_GPUS < 2, reason=f"{N_GPUS} CUDA devices, 2 are needed")
needs_nccl = pytest.mark.skipif(not NCCL, reason="NCCL needs two CUDA devices of which each has one rank")


@needs_gpu
@pytest.mark.parametrize("name", ["flashcomm.wire.torch_codec", "flashcomm.gpu.codec"])
@pytest.mark.parametrize("step", FORMATS, ids=str)
def test_cuda_writes_the_bytes_of_the_cpu(step: StepFormat, name: str) -> None:
    codecs = [torch_codec, importlib.import_module(name)]
    for i, shape in enumerate(SHAPES):
        x = tough(shape, DTYPES[i % 3], i)
        x.view(-1)[0] = float("inf") if i % 2 else 1.0
        layout, n = Layout(step, shape[-1], x.element_size()), x.numel()
        wires = [torch.full((layout.nbytes(0, n),), 0xEE, dtype=torch.uint8, device=d) for d in ("cpu", "cuda")]
        outs = [torch.full((n,), float("nan"), dtype=x.dtype, device=d) for d in ("cpu", "cuda")]
        for wire, out, codec in zip(wires, outs, codecs, strict=True):
            codec.encode(x.view(-1).to(wire.device), layout, 0, n, wire)
            codec.decode_sum(torch.stack([wire] * 3), layout, 0, n, out, x.dtype)
        assert torch.equal(wires[0], wires[1].cpu())
        assert same_bits(outs[0], outs[1].cpu())


def nccl_collectives(ctx: RankContext) -> None:
    for fmt in ("int4", "int5-g32/int8", "int4-had", "int3-g32-had/int6-g32-had", "none"):
        for dtype in DTYPES:
            for algorithm in ("one_shot", "two_shot"):
                with Communicator(None, fmt, algorithm=algorithm, chunk_bytes=20000, transport="process_group") as comm:
                    assert comm.device.type == "cuda"
                    for seed, shape in enumerate([(33, 576), (2, 7), (), (0, 64), (1, 2880), (64, 1152)]):
                        messages = [tough(shape, dtype, seed + 100 * r) for r in range(ctx.world_size)]
                        got = comm.all_reduce(messages[ctx.rank].to(ctx.device)).cpu()
                        assert same_bits(got, getattr(reference, algorithm)(messages, WireFormat.parse(fmt)))
    with Communicator(None, "int4/int8", transport="process_group") as comm:
        messages = [tough((2 * ctx.world_size, 576), torch.bfloat16, r) for r in range(ctx.world_size)]
        mine = messages[ctx.rank].to(ctx.device)
        assert same_bits(comm.reduce_scatter(mine).cpu(), reference.reduce_scatter(messages, comm.format)[ctx.rank])
        assert same_bits(comm.all_gather(mine).cpu(), reference.all_gather(messages, comm.format))
    with pytest.raises(ValueError, match="settings differ"):
        Communicator(None, "int4" if ctx.rank else "int5")
    with Communicator(None, "int4", check=True) as comm, pytest.raises(ValueError, match="same valid call"):
        comm.all_reduce(torch.ones(3 + ctx.rank, device=ctx.device))


@needs_nccl
def test_nccl_gives_the_bits_of_the_reference() -> None:
    run(nccl_collectives, 2, device="cuda")


def c10d_on_cuda(ctx: RankContext, path: str) -> None:
    import flashcomm.integrations.process_group  # noqa: F401

    dist.destroy_process_group()
    dist.init_process_group(
        "flashcomm", store=dist.FileStore(path, ctx.world_size), rank=ctx.rank, world_size=ctx.world_size
    )
    messages = [tough((1024, 1152), torch.bfloat16, r) for r in range(ctx.world_size)]
    x = messages[ctx.rank].to(ctx.device)
    dist.all_reduce(x)
    assert same_bits(x.cpu(), reference.one_shot(messages, WireFormat.parse("int4")))
    host = messages[ctx.rank].clone()
    dist.all_reduce(host)
    assert same_bits(host, reference.one_shot(messages, WireFormat.parse("int4")))
    small = torch.ones(5, device=ctx.device)
    dist.all_reduce(small)
    assert small.tolist() == [float(ctx.world_size)] * 5


@needs_nccl
def test_the_c10d_backend_on_cuda(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
    monkeypatch.setenv("FLASHCOMM_MIN_BYTES", "64K")  # on CUDA nothing is quantized by default
    run(c10d_on_cuda, 2, (f"{tmp_path}/store",), device="cuda")


def graphs(ctx: RankContext) -> None:
    """A graph of several calls is replayed with changing inputs, with eager calls in between."""
    shapes = [(1, 4096), (64, 4096), (700, 4096), (3, 640)]
    with over_cuda("int4", min_bytes=0) as comm:
        static = [torch.empty(shape, dtype=torch.bfloat16, device=ctx.device) for shape in shapes]
        sets = [
            [[tough(shape, torch.bfloat16, 10 * turn + r) for r in range(ctx.world_size)] for shape in shapes]
            for turn in range(3)
        ]
        want = [[reference.one_shot(xs, comm.format).to(ctx.device) for xs in per_turn] for per_turn in sets]
        mine = [[xs[ctx.rank].to(ctx.device) for xs in per_turn] for per_turn in sets]
        for x in static:
            comm.all_reduce(x.normal_())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [comm.all_reduce(x) for x in static]
        unlike = torch.zeros(1, dtype=torch.int64, device=ctx.device)
        for replay in range(1000):
            turn = replay % 3
            for x, values in zip(static, mine[turn], strict=True):
                x.copy_(values)
            graph.replay()
            for result, values in zip(results, want[turn], strict=True):
                unlike += (result != values).sum()
            if replay % 10 == 0:
                unlike += (comm.all_reduce(mine[turn][1]) != want[turn][1]).sum()
        assert unlike.item() == 0
        comm.synchronize()


@needs_two
def test_a_graph_replayed_a_thousand_times_with_changing_inputs() -> None:
    run(graphs, 2, device="cuda")


def capture_first(ctx: RankContext) -> None:
    with over_cuda("int5", min_bytes=0) as comm:
        x = torch.ones(64, 4096, dtype=torch.bfloat16, device=ctx.device)
        with pytest.raises(ValueError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            comm.all_reduce(x)
        want = reference.one_shot([x.cpu()] * ctx.world_size, comm.format)
        assert same_bits(comm.all_reduce(x).cpu(), want)


@needs_two
def test_capturing_what_was_never_run_is_an_error() -> None:
    run(capture_first, 2, device="cuda")


def new_lengths(ctx: RankContext) -> None:
    """After the first call, a new length compiles nothing, allocates only the result, and does not wait for the GPU."""
    from flashcomm.gpu import compat

    with over_cuda("int6-had/int7-had", min_bytes=0) as comm:
        comm.all_reduce(torch.ones(8, 4096, dtype=torch.bfloat16, device=ctx.device))
        before = compat.n_compiled()
        torch.cuda.synchronize()
        for tokens in (1, 7, 33, 250, 1023, 4097, 9001):
            x = torch.ones(tokens, 4096, dtype=torch.bfloat16, device=ctx.device)
            out = torch.empty_like(x)
            dist.barrier()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda._sleep(100_000_000)  # 50 ms, by which a call that waits for the device would take longer
            begin = time.perf_counter()
            comm.all_reduce(x, out)
            took = time.perf_counter() - begin
            assert torch.cuda.memory_allocated() == held
            assert took < 0.03, f"{tokens} tokens: the host waited {took * 1e3:.1f} ms"
        assert compat.n_compiled() == before
        comm.synchronize()


@needs_two
def test_a_new_length_compiles_and_allocates_nothing() -> None:
    run(new_lengths, 2, device="cuda")


def streams(ctx: RankContext) -> None:
    """Calls of one Communicator from two streams, and of two Communicators on two streams at once."""
    others = [torch.cuda.Stream(), torch.cuda.Stream()]
    one, two = (over_cuda(fmt, min_bytes=0) for fmt in ("int4", "int8"))
    messages = [[tough((200, 4096), torch.bfloat16, 10 * i + r) for r in range(ctx.world_size)] for i in range(4)]
    want = {c: [reference.one_shot(xs, c.format) for xs in messages] for c in (one, two)}
    mine = [xs[ctx.rank].to(ctx.device) for xs in messages]
    torch.cuda.synchronize()
    got: dict[Communicator, list[torch.Tensor]] = {one: [], two: []}
    for turn in range(40):
        with torch.cuda.stream(others[turn % 2]):
            got[one].append(one.all_reduce(mine[turn % 4]))
    torch.cuda.synchronize()
    for turn in range(40):
        for comm, stream in zip((one, two), others, strict=True):
            with torch.cuda.stream(stream):
                got[comm].append(comm.all_reduce(mine[turn % 4]))
    torch.cuda.synchronize()
    for comm, results in got.items():
        for turn, result in enumerate(results):
            assert same_bits(result.cpu(), want[comm][turn % 4]), (str(comm.format), turn)
        comm.close()


@needs_two
def test_streams() -> None:
    run(streams, 2, device="cuda")
