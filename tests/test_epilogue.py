"""The all-reduce with what follows it in a layer: residual added, RMS norm. One definition, the same bits everywhere"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import DTYPES, N_GPUS, raise_first, run_ranks, same_bits, tough

import flashcomm
from flashcomm import Communicator, WireFormat, epilogue, ops, reference
from flashcomm.cli.launch import RankContext, run
from flashcomm.errors import ClosedError, CommunicationError, FormatError, InputError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HIDDEN = (512, 768, 4096, 5120, 1, 7, 577)


def beside(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual like a message of that shape, and a weight."""
    generator = torch.Generator().manual_seed(900 + seed)
    weight = torch.randn(shape[-1], generator=generator) * 0.3 + 1
    return tough(shape, dtype, 500 + seed), weight.to(dtype)


def same_pair(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(same_bits(a.cpu(), b) for a, b in zip(got, want, strict=True))


def pairs(values: list[np.float32]) -> np.float32:
    """The sum by the words of the definition: halves of the next power of two."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return np.float32(pairs(values[:half]) + pairs(values[half:]))


class TestDefinition:
    @pytest.mark.parametrize("hidden", HIDDEN)
    def test_in_single_float32_operations(self, hidden: int) -> None:
        total, (residual, weight) = tough((2, hidden), FP32, 3), beside((2, hidden), FP32)
        eps = 1e-6
        normed, summed = reference.add_rms_norm(total, residual, weight, eps)
        for row in range(2):
            y = total[row].numpy() + residual[row].numpy()
            mean = np.float32(pairs(list(y * y)) / np.float32(hidden))
            inverse = np.float32(1) / np.sqrt(mean + np.float32(eps))
            assert (summed[row].numpy() == y).all()
            assert (normed[row].numpy() == y * inverse * weight.numpy()).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_formula(self, dtype: torch.dtype) -> None:
        total, (residual, weight) = tough((5, 600), dtype, 1), beside((5, 600), dtype)
        normed, summed = reference.add_rms_norm(total, residual, weight, 1e-5)
        assert same_bits(summed, total + residual)
        y = summed.double()
        want = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        torch.testing.assert_close(normed.double(), want, rtol=2.1 * torch.finfo(dtype).eps, atol=1e-30)

    def test_rounds_before_the_weight(self) -> None:
        """What is normalised is the stored sum; it is rounded, multiplied with the weight, and rounded again."""
        total, (residual, weight) = tough((1, 512), BF16, 1), beside((1, 512), BF16)
        normed, summed = reference.add_rms_norm(total, residual, weight, 1e-5)
        inverse = 1 / (summed.double().square().mean() + 1e-5).sqrt()
        exact, unrounded = summed.double() * inverse, (total.double() + residual.double()) * inverse
        assert torch.equal(normed, (exact.to(BF16).double() * weight.double()).to(BF16))
        for other in (exact * weight.double(), unrounded.to(BF16).double() * weight.double()):
            assert not torch.equal(normed, other.to(BF16))


class TestImplementations:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("hidden", [*HIDDEN, 20000])
    def test_the_kernel_equals_the_reference(self, hidden: int, dtype: torch.dtype) -> None:
        kernel = pytest.importorskip("flashcomm.collectives.norm_kernel", reason="triton is not installed")
        device = "cuda" if N_GPUS else "cpu"
        for n_rows in (1, 3, 9):
            total, (residual, weight) = tough((n_rows, hidden), dtype, n_rows), beside((n_rows, hidden), dtype)
            total[-1, -1] = float("nan")
            if hidden > 1:
                residual[0, 0] = float("inf")
            want = reference.add_rms_norm(total, residual, weight, 1e-6)
            got = kernel.add_rms_norm(*(t.to(device) for t in (total, residual, weight)), 1e-6)
            assert same_pair(got, want)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_blocks_of_rows_strides_and_nothing(self, dtype: torch.dtype) -> None:
        shape = (3, 50, 576)
        total, (residual, weight) = tough(shape, dtype, 2), beside(shape, dtype)
        want = reference.add_rms_norm(total, residual, weight, 1e-5)
        assert same_pair(epilogue.add_rms_norm(total, residual, weight, 1e-5), want)
        spread = torch.stack((residual, residual), -1)[..., 0]
        assert same_pair(epilogue.add_rms_norm(total, spread, torch.stack((weight, weight), 1)[:, 0], 1e-5), want)
        for empty in ((0, 8), (3, 0)):
            none = torch.empty(empty, dtype=dtype)
            got = epilogue.add_rms_norm(none, none, torch.empty(empty[-1], dtype=dtype), 1e-5)
            assert [t.shape for t in got] == [none.shape] * 2


class TestCommunicator:
    @pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", "native"])
    def test_equals_the_reference(self, algorithm: str) -> None:
        shape = (4, 3, 600)
        everybody = [tough(shape, BF16, rank) for rank in range(3)]
        residual, weight = beside(shape, BF16)

        def body(group: dist.ProcessGroup, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            with Communicator(group, "int4-had", algorithm=algorithm) as comm:
                kept = [t.clone() for t in (everybody[rank], residual)]
                out = [
                    comm.all_reduce_add_rms_norm(everybody[rank], residual, weight, 1e-5),
                    comm.all_reduce_add_rms_norm(everybody[rank], residual, weight, 0, format="int8"),
                ]
                assert dict(comm.calls) == {f"all_reduce_add_rms_norm/{algorithm}": 2}
                assert same_bits(kept[0], everybody[rank])
                assert same_bits(kept[1], residual)
                if algorithm == "native":
                    total = comm.all_reduce(everybody[rank])
                    assert same_pair(out[0], reference.add_rms_norm(total, residual, weight, 1e-5))
                return out

        for got in raise_first(run_ranks(3, body)):
            for pair, fmt, eps in zip(got, ("int4-had", "int8"), (1e-5, 0.0), strict=True):
                if algorithm != "native":
                    total = getattr(reference, algorithm)(everybody, WireFormat.parse(fmt))
                    assert same_pair(pair, reference.add_rms_norm(total, residual, weight, eps))

    def test_a_world_of_one_and_no_rows(self) -> None:
        x, (residual, weight) = tough((2, 64), FP16), beside((2, 64), FP16)

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4")
            got = comm.all_reduce_add_rms_norm(x, residual, weight, 1e-5)
            assert same_pair(got, reference.add_rms_norm(x, residual, weight, 1e-5))
            normed, summed = comm.all_reduce_add_rms_norm(x[:0], residual[:0], weight, 1e-5)
            assert normed.shape == summed.shape == (0, 64)
            comm.close()
            with pytest.raises(ClosedError, match="all_reduce_add_rms_norm on a closed"):
                comm.all_reduce_add_rms_norm(x, residual, weight, 1e-5)

        raise_first(run_ranks(1, body))

    @pytest.mark.parametrize("check", [True, False])
    def test_bad_input(self, check: bool) -> None:
        """One rank's bad argument is every rank's error (check=False: only its own, so all of them pass it)."""
        x, (residual, weight) = tough((2, 64), BF16), beside((2, 64), BF16)
        fine = {"x": x, "residual": residual, "weight": weight, "eps": 1e-5}
        bad: list[tuple[dict[str, object], str]] = [
            ({"x": [1.0]}, "a torch.Tensor is needed"),
            ({"residual": residual[:1]}, "residual must be like x"),
            ({"residual": residual.half()}, "residual must be like x"),
            ({"residual": None}, "residual must be like x"),
            ({"residual": residual.to("meta")}, "residual must be like x"),
            ({"weight": weight[:63]}, r"weight must be \(hidden,\)"),
            ({"weight": weight.float()}, r"weight must be \(hidden,\)"),
            ({"weight": torch.nn.Parameter(weight)}, "without a gradient"),
            ({"x": x[0, 0], "residual": residual[0, 0], "weight": weight[0]}, r"weight must be \(hidden,\)"),
            ({"eps": -1.0}, "eps must be a finite number"),
            ({"eps": float("nan")}, "eps must be a finite number"),
            ({"eps": "1e-5"}, "eps must be a finite number"),
        ]

        def body(group: dist.ProcessGroup, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            comm = Communicator(group, "int4", check=check)
            for wrong, advice in bad:
                with pytest.raises(InputError, match=advice):
                    comm.all_reduce_add_rms_norm(**fine | (wrong if rank == 0 or not check else {}))  # type: ignore[arg-type]
            with pytest.raises(InputError if check else FormatError, match=r"format|9 bits"):
                comm.all_reduce_add_rms_norm(**fine, format="int9")  # type: ignore[arg-type]
            if check:
                for other in ({"eps": 1e-6}, {"x": x[:1], "residual": residual[:1]}):
                    with pytest.raises(InputError, match="rank 1: all_reduce_add_rms_norm number"):
                        comm.all_reduce_add_rms_norm(**fine | (other if rank else {}))  # type: ignore[arg-type]
                with pytest.raises(InputError, match="rank 0: all_reduce number"):
                    comm.all_reduce_add_rms_norm(**fine) if rank else comm.all_reduce(x)  # type: ignore[arg-type]
            with torch.no_grad():
                return comm.all_reduce_add_rms_norm(x, residual, torch.nn.Parameter(weight), 1e-5)

        want = reference.add_rms_norm(x + x, residual, weight, 1e-5)  # too small a message to be coded
        assert all(same_pair(got, want) for got in raise_first(run_ranks(2, body)))


def functional(ctx: RankContext) -> None:
    shape = (64, 1152)
    everybody = [tough(shape, BF16, rank) for rank in range(ctx.world)]
    x, (residual, weight) = everybody[ctx.rank], beside(shape, BF16)
    want = reference.add_rms_norm(reference.one_shot(everybody, WireFormat.parse("int4")), residual, weight, 1e-5)
    assert same_pair(flashcomm.all_reduce_add_rms_norm(x, residual, weight, 1e-5, "int4"), want)
    op, name = torch.ops.flashcomm.all_reduce_add_rms_norm, ops.op_name("int4")
    assert same_pair(op(x, residual, weight, 1e-5, name), want)
    torch.library.opcheck(op.default, (x, residual, weight, 1e-5, name))
    torch.library.opcheck(op.default, (x.t()[:4], residual.t()[:4], residual[:, 0].contiguous(), 1e-5, name))

    graphs = 0

    def backend(module: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def block(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flashcomm.all_reduce_add_rms_norm(x * 2, residual, weight, 1e-5, "int4")

    for n_rows in (64, 50, 61):  # of memory of their own: a view is another kind of input
        total = reference.one_shot([t[:n_rows] * 2 for t in everybody], WireFormat.parse("int4"))
        got = block(x[:n_rows].clone(), residual[:n_rows].clone())
        assert same_pair(got, reference.add_rms_norm(total, residual[:n_rows], weight, 1e-5))
    assert graphs == 1


def test_as_an_op_and_compiled() -> None:
    run(functional, 2)


ON_GPUS = N_GPUS >= 2
DEVICE, TRANSPORT = ("cuda", "symmetric") if ON_GPUS else ("cpu", "shared")


def on_ranks(body: object, world: int, *args: object) -> object:
    pytest.importorskip("triton", reason="triton is not installed")
    if ON_GPUS and world > N_GPUS:
        pytest.skip(f"{N_GPUS} CUDA devices, {world} are needed")
    return run(body, world, args, device=DEVICE, timeout_s=1000 if ON_GPUS else 280)  # type: ignore[arg-type]


def over_peers_memory(ctx: RankContext, cases: list[tuple[str, torch.dtype, str, list[tuple[int, ...]]]]) -> None:
    for fmt, dtype, algorithm, shapes in cases:
        settings = {"transport": TRANSPORT, "workspace_bytes": 4 << 20, "min_bytes": 0, "timeout_s": 60}
        with Communicator(None, fmt, device=DEVICE, algorithm=algorithm, **settings) as comm:  # type: ignore[arg-type]
            for seed, shape in enumerate(shapes):
                everybody = [tough(shape, dtype, seed + 100 * rank) for rank in range(ctx.world)]
                everybody[1].view(-1)[-1] = float("inf") if seed % 2 else 1.0
                residual, weight = beside(shape, dtype, seed)
                total = getattr(reference, algorithm)(everybody, comm.format)
                want = reference.add_rms_norm(total, residual, weight, 1e-5)
                mine = [t.to(ctx.device) for t in (everybody[ctx.rank], residual, weight)]
                got = comm.all_reduce_add_rms_norm(*mine, 1e-5)  # type: ignore[arg-type]
                assert same_pair(got, want), (fmt, dtype, algorithm, shape)
                assert same_bits(comm.all_reduce(mine[0]).cpu(), total)  # one region and one count of calls
            one, other = f"all_reduce_add_rms_norm/fused {algorithm}", f"all_reduce_add_rms_norm/{algorithm}"
            assert comm.calls[one] == sum(shape[-1] % comm.format.unit == 0 for shape in shapes)
            assert comm.calls[one] + comm.calls[other] == len(shapes)


ROWS: list[tuple[int, ...]] = [(9, 512), (2, 11, 768), (3, 4096), (1, 64), (2, 600)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_in_one_launch(world: int) -> None:
    """Rows shorter and longer than a tile, in a block and across blocks, across slices; groups of two sizes; tails."""
    cases = {
        2: [
            ("int4", BF16, "one_shot", ROWS),
            ("int6-had/int7-had", BF16, "two_shot", ROWS),
            ("int8", FP16, "two_shot", [(5, 5120), (1, 8192)]),
            ("bf16", FP32, "one_shot", [(9, 768), (2, 4096)]),
        ],
        3: [
            ("int8-g32/int4-g128-had", FP32, "two_shot", [(9, 512), (3, 4096), (10, 768), (4, 1152)]),
            ("bf16", BF16, "two_shot", [(7, 768), (1, 8192)]),
        ],
        4: [("int6-had/int7-had", BF16, "one_shot", [(9, 512), (5, 768)]), ("int4", BF16, "two_shot", [(31, 768)])],
    }
    on_ranks(over_peers_memory, world, cases[world])


def cut_up(ctx: RankContext) -> None:
    """However rows are cut into tiles, blocks, slices and launches: the same bits. A workspace of a few tiles only."""
    from flashcomm.collectives import fused, fused_kernel, fused_norm, fused_sync
    from flashcomm.transports import shared, symmetric

    region = (symmetric if ON_GPUS else shared).make(ctx.device, fused.region_bytes(40_000))
    places: list[str] = [""] * ctx.world
    dist.all_gather_object(places, region.place)
    region.join(dist.group.WORLD, places)
    dist.barrier()
    plans = fused_norm.FusedNorm(fused.FusedCollectives(region, 60))
    kinds = {fused_kernel.ONE_SHOT: reference.one_shot, fused_kernel.TWO_SHOT: reference.two_shot}
    fmt = WireFormat.parse("int4")
    cases = [((9, 512), fused.Tuning(1024, 2, 1)), ((7, 1152), fused.Tuning(1024, 1, 0))]
    cases += [((3, 2048), fused.Tuning(512, 3, 2)), ((3, 1600), fused.Tuning(512, 2, 1))]
    for shape, how in cases:
        everybody, (residual, weight) = [tough(shape, BF16, r) for r in range(ctx.world)], beside(shape, BF16)
        mine = [t.to(ctx.device) for t in (everybody[ctx.rank], residual, weight)]
        for kind, define in kinds.items():
            got = (torch.full_like(mine[0], 7), torch.full_like(mine[0], 8))
            plans.plan(kind, mine[0], fmt, how)(*(t.data_ptr() for t in (*mine, *got)), 1e-6)
            want = reference.add_rms_norm(define(everybody, fmt), residual, weight, 1e-6)
            assert same_pair(got, want), (how, shape, kind)
    plans.collectives.check()
    dist.barrier()
    if not ON_GPUS:  # what carries its epoch has an area of its own, in which nothing else may ever lie
        of = plans.collectives
        assert not any((ctypes.c_uint8 * (2 * of.ll_half)).from_address(of.local + fused_sync.DATA))
    region.close()


def test_how_rows_are_cut_changes_no_bit() -> None:
    on_ranks(cut_up, 2)


def odd_arguments(ctx: RankContext) -> None:
    """Neither contiguous nor aligned, calls of other kinds between; a peer that does not come is an error, and NaN."""
    settings = {"transport": TRANSPORT, "workspace_bytes": 4 << 20, "min_bytes": 0, "timeout_s": 2, "check": False}
    comm = Communicator(None, "int4", device=DEVICE, algorithm="one_shot", **settings)  # type: ignore[arg-type]
    everybody = [tough((6, 513), BF16, rank) for rank in range(ctx.world)]
    residual, weight = beside((6, 512), BF16)
    total = reference.one_shot([t[:, 1:] for t in everybody], comm.format)
    want = reference.add_rms_norm(total, residual, weight, 1e-5)
    x, shifted = everybody[ctx.rank].to(ctx.device)[:, 1:], torch.empty(513, dtype=BF16, device=ctx.device)
    shifted[1:] = weight
    for _ in range(2):
        got = comm.all_reduce_add_rms_norm(x, residual.to(ctx.device).t().contiguous().t(), shifted[1:], 1e-5)
        assert same_pair(got, want)
        assert same_bits(comm.all_reduce(x).cpu(), total)
    assert comm.calls["all_reduce_add_rms_norm/fused one_shot"] == 2
    comm.synchronize()
    dist.barrier()
    if ctx.rank == 0:
        mine = [t.to(ctx.device) for t in (x, residual, weight)]
        late: list[torch.Tensor] = []
        # flags tell of the last call that had some: small all-reduces have none
        with pytest.raises(CommunicationError, match="rank 1: expected call 5, saw 3"):
            _twice(comm, mine, late)
        assert all(t.isnan().all() for t in late)
        assert len(late) == 2
    dist.barrier()
    comm.close()


def _twice(comm: Communicator, mine: list[torch.Tensor], results: list[torch.Tensor]) -> None:
    for _ in range(2):  # the second one, if not the first, finds that the first one waited in vain
        results += comm.all_reduce_add_rms_norm(*mine, 1e-5)  # type: ignore[arg-type]
        comm.synchronize()


def test_odd_arguments_and_a_rank_that_does_not_come() -> None:
    on_ranks(odd_arguments, 2)
