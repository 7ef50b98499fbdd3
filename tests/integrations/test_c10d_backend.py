"""The c10d backend, in real processes over gloo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm import WireFormat, reference
from flashcomm.errors import FormatError, SettingsError
from flashcomm.ranks.launch import RankContext, run

FMT = WireFormat.parse("int4")


def big(rank: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(64, 1152, generator=torch.Generator().manual_seed(rank)).to(dtype)


def use_backend(ctx: RankContext, path: str) -> None:
    """Replace the launcher's gloo group by one of the flashcomm backend."""
    import flashcomm.integrations.process_group  # noqa: F401

    dist.destroy_process_group()
    dist.init_process_group(
        "flashcomm", store=dist.FileStore(path, ctx.world_size), rank=ctx.rank, world_size=ctx.world_size
    )


def c10d_sums(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    inputs = [big(r) for r in range(ctx.world_size)]
    want = reference.two_shot(inputs, FMT)
    x = inputs[ctx.rank].clone()
    assert dist.all_reduce(x) is None
    assert torch.equal(x, want)

    x = inputs[ctx.rank].clone()
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.is_completed()
    assert torch.equal(x, want)

    from torch.distributed import _functional_collectives as functional

    assert torch.equal(functional.all_reduce(inputs[ctx.rank], "sum", dist.group.WORLD), want)

    strided = inputs[ctx.rank].t().contiguous().t()
    dist.all_reduce(strided)
    assert torch.equal(strided, want)

    from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (ctx.world_size,))
    partial = DTensor.from_local(inputs[ctx.rank], mesh, [Partial()])
    assert torch.equal(partial.redistribute(mesh, [Replicate()]).to_local(), want)


def c10d_exchanges(ctx: RankContext, path: str) -> None:
    """all_to_all_single of hidden states is low-bit, whatever its size. Others are exact."""
    use_backend(ctx, path)
    splits = [(5, 9, 0), (0, 0, 0), (3, 7, 2)]
    xs = [torch.randn(sum(s), 96, generator=torch.Generator().manual_seed(r)) for r, s in enumerate(splits)]
    sent, received = list(splits[ctx.rank]), [s[ctx.rank] for s in splits]
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.to(dtype) for x in xs]
        low_bit = reference.all_to_all_single(inputs, FMT, splits)[ctx.rank]
        exact = reference.all_to_all_single(inputs, WireFormat.parse("none"), splits)[ctx.rank]
        want = low_bit if dtype == torch.bfloat16 else exact
        out = torch.empty_like(want)
        dist.all_to_all_single(out, inputs[ctx.rank], received, sent)
        assert torch.equal(out, want)
        work = dist.all_to_all_single(out.zero_(), inputs[ctx.rank], received, sent, async_op=True)
        assert work.wait()
        assert torch.equal(out, want)
    from torch.distributed import _functional_collectives as functional

    mine = [x[:3].bfloat16() if len(x) else torch.ones(3, 96).bfloat16() for x in xs]
    want = reference.all_to_all_single(mine, FMT)[ctx.rank]
    assert torch.equal(functional.all_to_all_single(mine[ctx.rank], None, None, dist.group.WORLD), want)
    strided = torch.empty(96, 3, dtype=torch.bfloat16).t()
    dist.all_to_all_single(strided, mine[ctx.rank])
    assert torch.equal(strided, want)
    narrow = torch.rand(3, 63).bfloat16()
    dist.all_to_all_single(narrow.clone(), narrow)
    group: Any = dist.group.WORLD
    assert dict(group._planned["cpu"].comm.calls) == {"all_to_all_single/pipelined": 4}


def c10d_plan(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    inputs = [big(r) for r in range(ctx.world_size)]
    x = inputs[ctx.rank].clone()
    dist.all_reduce(x)
    assert torch.equal(x, reference.two_shot(inputs, FMT))
    one_token = [t[:, None] for t in inputs]
    x = one_token[ctx.rank].clone()
    dist.all_reduce(x)
    assert torch.equal(x, reference.two_shot(one_token, WireFormat.parse("int6-had")))


def c10d_passes_the_rest_through(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    world_size, rank = ctx.world_size, ctx.rank
    group: Any = dist.group.WORLD
    exact = torch.stack([big(r, torch.float32) for r in range(world_size)])

    small = torch.full((7,), 0.1 * (rank + 1))
    dist.all_reduce(small)
    torch.testing.assert_close(small, torch.full((7,), 0.1 * sum(range(1, world_size + 1))), rtol=1e-6, atol=0)

    whole = torch.arange(100_000) * (rank + 1)
    dist.all_reduce(whole)
    assert torch.equal(whole, torch.arange(100_000) * sum(range(1, world_size + 1)))

    double = exact[rank].double()
    dist.all_reduce(double)
    torch.testing.assert_close(double, exact.double().sum(0), rtol=1e-12, atol=1e-12)

    largest = exact[rank].clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    assert torch.equal(largest, exact.amax(0))

    mine = torch.full((3,), rank)
    gathered = torch.empty(3 * world_size, dtype=mine.dtype)
    dist.all_gather_into_tensor(gathered, mine)
    assert gathered.tolist() == [r for r in range(world_size) for _ in range(3)]
    output = mine.clone()
    dist.broadcast(output, 1)
    assert output.tolist() == [1, 1, 1]
    dist.barrier()
    objects: list[Any] = [None] * world_size
    dist.all_gather_object(objects, {"rank": rank})
    assert [o["rank"] for o in objects] == list(range(world_size))
    if rank == 0:
        dist.send(torch.tensor([5.0]), 1)
    elif rank == 1:
        got = torch.empty(1)
        dist.recv(got, 0)
        assert got.item() == 5.0
    assert not any(planned.comm.calls for planned in group._planned.values()), "nothing of this was low-bit"


def c10d_settings_differ(ctx: RankContext, path: str) -> None:
    os.environ["FLASHCOMM_MIN_BYTES"] = "1M" if ctx.rank else "64K"
    use_backend(ctx, path)


def c10d_stress(ctx: RankContext, path: str) -> None:
    """Run collectives whose tensors are freed at once, each followed by a barrier. With the GIL held, this hung."""
    use_backend(ctx, path)
    for i in range(400):
        gathered = torch.empty(ctx.world_size * 3)
        dist.all_gather_into_tensor(gathered, torch.full((3,), float(i)), async_op=True).wait()
        assert gathered.tolist() == [float(i)] * 3 * ctx.world_size
        dist.broadcast(torch.ones(2), 0, async_op=True)
        dist.barrier()


def c10d_sub_group(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    pair = dist.new_group([0, 2], backend="flashcomm")
    if ctx.rank in (0, 2):
        x = big(ctx.rank)
        dist.all_reduce(x, group=pair)
        assert torch.equal(x, reference.one_shot([big(0), big(2)], FMT))
    dist.barrier()


class TestProcessGroup:
    @pytest.fixture(autouse=True)
    def _format(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")

    def test_large_sums_are_low_bit(self, tmp_path: Path) -> None:
        run(c10d_sums, 3, (str(tmp_path / "store"),))

    def test_everything_else_is_passed_through(self, tmp_path: Path) -> None:
        run(c10d_passes_the_rest_through, 3, (str(tmp_path / "store"),))

    def test_exchanges_of_hidden_states_are_low_bit(self, tmp_path: Path) -> None:
        run(c10d_exchanges, 3, (str(tmp_path / "store"),))

    def test_many_small_collectives(self, tmp_path: Path) -> None:
        run(c10d_stress, 2, (str(tmp_path / "store"),), timeout_s=60)

    def test_every_collective_is_passed_on(self) -> None:
        """No collective uses the inherited method, which would hold the GIL."""
        from flashcomm.integrations.process_group import FlashProcessGroup

        names = {n for n in vars(torch.distributed.ProcessGroup) if "gather" in n or "reduce" in n or "all_to_all" in n}
        names |= {"broadcast", "scatter", "send", "recv", "recv_anysource", "alltoall", "alltoall_base", "barrier"}
        assert {n for n in names if n not in vars(FlashProcessGroup)} == set()

    def test_sub_groups(self, tmp_path: Path) -> None:
        run(c10d_sub_group, 3, (str(tmp_path / "store"),))

    def test_settings_that_differ_between_ranks(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"FLASHCOMM_\* settings differ between ranks"):
            run(c10d_settings_differ, 2, (str(tmp_path / "store"),), timeout_s=60)

    def test_a_plan_gives_its_format_and_that_for_decoding(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = {"flashcomm_plan": 1, "format": "int4", "decode": "int6-had", "layers": {"*": "int2"}}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        monkeypatch.setenv("FLASHCOMM_FORMAT", str(tmp_path / "plan.json"))
        monkeypatch.setenv("FLASHCOMM_MIN_BYTES", "0")
        run(c10d_plan, 3, (str(tmp_path / "store"),))

    def test_unknown_format_at_init(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int1")
        with pytest.raises(FormatError, match="1 bits asked for, 2 to 8 are allowed"):
            run(c10d_sums, 2, (str(tmp_path / "store"),))
