"""On GPUs: the plain torch codec gives the CPU's bytes, and collectives over NCCL the reference's bits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import DTYPES, same_bits, tough
from test_codec import FORMATS, SHAPES

from flashcomm import Communicator, WireFormat, reference
from flashcomm.cli.launch import RankContext, run
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat

N_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
needs_gpu = pytest.mark.skipif(N_GPUS < 1, reason="no CUDA device")
needs_two = pytest.mark.skipif(N_GPUS < 2, reason=f"{N_GPUS} CUDA devices, 2 are needed")


@needs_gpu
@pytest.mark.parametrize("step", FORMATS, ids=str)
def test_cuda_writes_the_bytes_of_the_cpu(step: StepFormat) -> None:
    for i, shape in enumerate(SHAPES):
        x = tough(shape, DTYPES[i % 3], i)
        x.view(-1)[0] = float("inf") if i % 2 else 1.0
        layout, n = Layout(step, shape[-1], x.element_size()), x.numel()
        wires = [torch.full((layout.nbytes(0, n),), 0xEE, dtype=torch.uint8, device=d) for d in ("cpu", "cuda")]
        outs = [torch.full((n,), float("nan"), dtype=x.dtype, device=d) for d in ("cpu", "cuda")]
        for wire, out in zip(wires, outs, strict=True):
            torch_codec.encode(x.view(-1).to(wire.device), layout, 0, n, wire)
            torch_codec.decode_sum(torch.stack([wire] * 3), layout, 0, n, out, x.dtype)
        assert torch.equal(wires[0], wires[1].cpu())
        assert same_bits(outs[0], outs[1].cpu())


def nccl_collectives(ctx: RankContext) -> None:
    for fmt in ("int4", "int5-g32/int8", "int4-had", "int3-g32-had/int6-g32-had", "bf16"):
        for dtype in DTYPES:
            for algorithm in ("one_shot", "two_shot"):
                with Communicator(None, fmt, algorithm=algorithm, chunk_bytes=20000) as comm:
                    assert comm.device.type == "cuda"
                    for seed, shape in enumerate([(33, 576), (2, 7), (), (0, 64), (1, 2880), (64, 1152)]):
                        everybody = [tough(shape, dtype, seed + 100 * r) for r in range(ctx.world)]
                        got = comm.all_reduce(everybody[ctx.rank].to(ctx.device)).cpu()
                        assert same_bits(got, getattr(reference, algorithm)(everybody, WireFormat.parse(fmt)))
    with Communicator(None, "int4/int8") as comm:
        everybody = [tough((2 * ctx.world, 576), torch.bfloat16, r) for r in range(ctx.world)]
        mine = everybody[ctx.rank].to(ctx.device)
        assert same_bits(comm.reduce_scatter(mine).cpu(), reference.reduce_scatter(everybody, comm.format)[ctx.rank])
        assert same_bits(comm.all_gather(mine).cpu(), reference.all_gather(everybody, comm.format))
    with pytest.raises(ValueError, match="settings differ"):
        Communicator(None, "int4" if ctx.rank else "int5")
    with Communicator(None, "int4", check=True) as comm, pytest.raises(ValueError, match="same valid call"):
        comm.all_reduce(torch.ones(3 + ctx.rank, device=ctx.device))


@needs_two
def test_nccl_gives_the_bits_of_the_reference() -> None:
    run(nccl_collectives, 2, device="cuda")


def c10d_on_cuda(ctx: RankContext, path: str) -> None:
    import flashcomm.integrations.process_group  # noqa: F401

    dist.destroy_process_group()
    dist.init_process_group("flashcomm", store=dist.FileStore(path, ctx.world), rank=ctx.rank, world_size=ctx.world)
    everybody = [tough((1024, 1152), torch.bfloat16, r) for r in range(ctx.world)]
    x = everybody[ctx.rank].to(ctx.device)
    dist.all_reduce(x)
    assert same_bits(x.cpu(), reference.one_shot(everybody, WireFormat.parse("int4")))
    host = everybody[ctx.rank].clone()
    dist.all_reduce(host)
    assert same_bits(host, reference.one_shot(everybody, WireFormat.parse("int4")))
    small = torch.ones(5, device=ctx.device)
    dist.all_reduce(small)
    assert small.tolist() == [float(ctx.world)] * 5


@needs_two
def test_the_c10d_backend_on_cuda(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
    monkeypatch.setenv("FLASHCOMM_MIN_BYTES", "64K")  # on CUDA the default is to code nothing
    run(c10d_on_cuda, 2, (f"{tmp_path}/store",), device="cuda")
