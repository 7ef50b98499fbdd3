"""All-reduce + add + RMSNorm: one definition, and the same bits on every device."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import DTYPES, N_GPUS, ranks, same_bits, tough

import flashcomm
from flashcomm import Communicator, WireFormat, ops, reference
from flashcomm.collectives import add_rms_norm
from flashcomm.errors import ClosedError, FormatError, InputError
from flashcomm.ranks.launch import RankContext

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HIDDEN = (512, 768, 4096, 5120, 1, 7, 577)


def residual_and_weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a residual like a message of this shape, and a weight."""
    generator = torch.Generator().manual_seed(900 + seed)
    weight = torch.randn(shape[-1], generator=generator) * 0.3 + 1
    return tough(shape, dtype, 500 + seed), weight.to(dtype)


def same_pair(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(same_bits(a.cpu(), b) for a, b in zip(got, want, strict=True))


def pairs(values: list[np.float32]) -> np.float32:
    """Sum as the definition says: pairs, pairs of pairs, up to the next power of two."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return np.float32(pairs(values[:half]) + pairs(values[half:]))


class TestDefinition:
    @pytest.mark.parametrize("hidden", HIDDEN)
    def test_in_single_float32_operations(self, hidden: int) -> None:
        total, (residual, weight) = tough((2, hidden), FP32, 3), residual_and_weight((2, hidden), FP32)
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
        total, (residual, weight) = tough((5, 600), dtype, 1), residual_and_weight((5, 600), dtype)
        normed, summed = reference.add_rms_norm(total, residual, weight, 1e-5)
        assert same_bits(summed, total + residual)
        y = summed.double()
        want = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        torch.testing.assert_close(normed.double(), want, rtol=2.1 * torch.finfo(dtype).eps, atol=1e-30)

    def test_rounds_before_the_weight(self) -> None:
        """The stored sum is normalized. The result is rounded, multiplied by the weight, and rounded again."""
        total, (residual, weight) = tough((1, 512), BF16, 1), residual_and_weight((1, 512), BF16)
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
        kernel = pytest.importorskip("flashcomm.gpu.add_rms_norm", reason="triton is not installed")
        device = "cuda" if N_GPUS else "cpu"
        for n_rows in (1, 3, 9):
            total, (residual, weight) = (
                tough((n_rows, hidden), dtype, n_rows),
                residual_and_weight((n_rows, hidden), dtype),
            )
            total[-1, -1] = float("nan")
            if hidden > 1:
                residual[0, 0] = float("inf")
            want = reference.add_rms_norm(total, residual, weight, 1e-6)
            got = kernel.add_rms_norm(*(t.to(device) for t in (total, residual, weight)), 1e-6)
            assert same_pair(got, want)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_blocks_of_rows_strides_and_nothing(self, dtype: torch.dtype) -> None:
        shape = (3, 50, 576)
        total, (residual, weight) = tough(shape, dtype, 2), residual_and_weight(shape, dtype)
        want = reference.add_rms_norm(total, residual, weight, 1e-5)
        assert same_pair(add_rms_norm.add_rms_norm(total, residual, weight, 1e-5), want)
        spread = torch.stack((residual, residual), -1)[..., 0]
        assert same_pair(add_rms_norm.add_rms_norm(total, spread, torch.stack((weight, weight), 1)[:, 0], 1e-5), want)
        for empty in ((0, 8), (3, 0)):
            none = torch.empty(empty, dtype=dtype)
            got = add_rms_norm.add_rms_norm(none, none, torch.empty(empty[-1], dtype=dtype), 1e-5)
            assert [t.shape for t in got] == [none.shape] * 2


class TestCommunicator:
    @pytest.mark.contract(1, 2)
    @pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", "backend"])
    @ranks(3)
    def test_equals_the_reference(self, group: dist.ProcessGroup, rank: int, algorithm: str) -> None:
        shape = (4, 3, 600)
        inputs = [tough(shape, BF16, r) for r in range(3)]
        residual, weight = residual_and_weight(shape, BF16)
        kept = [t.clone() for t in (inputs[rank], residual)]
        with Communicator(group, "int4-had", algorithm=algorithm) as comm:
            for fmt, eps in (("int4-had", 1e-5), ("int8", 0.0)):
                got = comm.all_reduce_add_rms_norm(inputs[rank], residual, weight, eps, format=fmt)
                if algorithm == "backend":
                    total = comm.all_reduce(inputs[rank])
                else:
                    total = getattr(reference, algorithm)(inputs, WireFormat.parse(fmt))
                assert same_pair(got, reference.add_rms_norm(total, residual, weight, eps)), fmt
            assert comm.calls[f"all_reduce_add_rms_norm/{algorithm}"] == 2
        assert same_bits(kept[0], inputs[rank])
        assert same_bits(kept[1], residual)

    @pytest.mark.contract(7)
    @ranks(1)
    def test_a_world_of_one_and_no_rows(self, group: dist.ProcessGroup, rank: int) -> None:
        x, (residual, weight) = tough((2, 64), FP16), residual_and_weight((2, 64), FP16)
        comm = Communicator(group, "int4")
        got = comm.all_reduce_add_rms_norm(x, residual, weight, 1e-5)
        assert same_pair(got, reference.add_rms_norm(x, residual, weight, 1e-5))
        normed, summed = comm.all_reduce_add_rms_norm(x[:0], residual[:0], weight, 1e-5)
        assert normed.shape == summed.shape == (0, 64)
        comm.close()
        with pytest.raises(ClosedError, match="all_reduce_add_rms_norm on a closed"):
            comm.all_reduce_add_rms_norm(x, residual, weight, 1e-5)

    @pytest.mark.contract(6)
    @pytest.mark.parametrize("check", [True, False])
    @ranks(2)
    def test_a_bad_argument_on_one_rank_is_an_error_on_all(
        self, group: dist.ProcessGroup, rank: int, check: bool
    ) -> None:
        """With check=False only that rank raises the error, so all ranks pass the bad argument."""
        x, (residual, weight) = tough((2, 64), BF16), residual_and_weight((2, 64), BF16)
        fine = {"x": x, "residual": residual, "weight": weight, "eps": 1e-5}
        bad: list[tuple[dict[str, object], str]] = [
            ({"x": [1.0]}, "x must be a torch.Tensor"),
            ({"residual": residual[:1]}, "residual must have x's shape"),
            ({"residual": residual.half()}, "residual must have x's shape"),
            ({"residual": None}, "residual must have x's shape"),
            ({"residual": residual.to("meta")}, "residual must have x's shape"),
            ({"weight": weight[:63]}, r"weight must have shape \(hidden,\)"),
            ({"weight": weight.float()}, r"weight must have shape \(hidden,\)"),
            ({"weight": torch.nn.Parameter(weight)}, "need no gradient"),
            ({"x": x[0, 0], "residual": residual[0, 0], "weight": weight[0]}, r"weight must have shape \(hidden,\)"),
            ({"eps": -1.0}, "eps must be a finite number"),
            ({"eps": float("nan")}, "eps must be a finite number"),
            ({"eps": "1e-5"}, "eps must be a finite number"),
        ]
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
        with torch.no_grad():  # the message is too small to be quantized
            got = comm.all_reduce_add_rms_norm(x, residual, torch.nn.Parameter(weight), 1e-5)
        assert same_pair(got, reference.add_rms_norm(x + x, residual, weight, 1e-5))


@ranks(2)
def test_as_an_op_and_compiled(ctx: RankContext) -> None:
    shape = (64, 1152)
    inputs = [tough(shape, BF16, rank) for rank in range(ctx.world_size)]
    x, (residual, weight) = inputs[ctx.rank], residual_and_weight(shape, BF16)
    want = reference.add_rms_norm(reference.one_shot(inputs, WireFormat.parse("int4")), residual, weight, 1e-5)
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

    for n_rows in (64, 50, 61):  # new memory: for the compiler a view is another kind of input
        total = reference.one_shot([t[:n_rows] * 2 for t in inputs], WireFormat.parse("int4"))
        got = block(x[:n_rows].clone(), residual[:n_rows].clone())
        assert same_pair(got, reference.add_rms_norm(total, residual[:n_rows], weight, 1e-5))
    assert graphs == 1


ON_GPUS = N_GPUS >= 2
DEVICE, TRANSPORT = ("cuda", "symmetric") if ON_GPUS else ("cpu", "cpu_shared")


@pytest.mark.skipif(
    N_GPUS == 1 or importlib.util.find_spec("triton") is None, reason="needs two GPUs, or none and triton"
)
@pytest.mark.contract(2)
@ranks(2, device=DEVICE, timeout_s=1000 if ON_GPUS else 280)
def test_over_peers_memory(ctx: RankContext) -> None:
    """After the kernel over peers' memory: rows shorter and longer than a tile, and rows that end in a short group."""
    settings = {"transport": TRANSPORT, "workspace_bytes": 4 << 20, "min_bytes": 0, "timeout_s": 60}
    for fmt, algorithm in (("int4", "one_shot"), ("int6-had/int7-had", "two_shot")):
        with Communicator(None, fmt, device=DEVICE, algorithm=algorithm, **settings) as comm:  # type: ignore[arg-type]
            for seed, shape in enumerate(((9, 512), (2, 11, 768), (1, 64), (2, 600))):
                inputs = [tough(shape, BF16, seed + 100 * rank) for rank in range(ctx.world_size)]
                residual, weight = residual_and_weight(shape, BF16, seed)
                total = getattr(reference, algorithm)(inputs, comm.format)
                want = reference.add_rms_norm(total, residual, weight, 1e-5)
                mine = [t.to(ctx.device) for t in (inputs[ctx.rank], residual, weight)]
                got = comm.all_reduce_add_rms_norm(*mine, 1e-5)  # type: ignore[arg-type]
                assert same_pair(got, want), (fmt, algorithm, shape)
            assert dict(comm.calls) == {f"all_reduce_add_rms_norm/{algorithm}": 4}
