"""flashcomm.all_reduce and torch.ops.flashcomm.all_reduce, in real processes over a registered group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import flashcomm
from flashcomm import WireFormat, ops, reference
from flashcomm.cli.launch import RankContext, run
from flashcomm.errors import SettingsError


def inputs(rows: int, world: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 1152, generator=generator, dtype=torch.float32).to(torch.bfloat16) for _ in range(world)]


def functional(ctx: RankContext) -> None:
    fmt = WireFormat.parse("int4")
    per_rank = inputs(64, ctx.world)
    x, kept = per_rank[ctx.rank], per_rank[ctx.rank].clone()
    want = reference.two_shot(per_rank, fmt)  # what the policy picks for this size and three ranks
    assert torch.equal(flashcomm.all_reduce(x, "int4"), want)
    assert torch.equal(x, kept)
    assert torch.equal(torch.ops.flashcomm.all_reduce(x, ops.op_name("int4")), want)
    flashcomm.all_reduce(x, "int4")
    assert len(ops._table) == 1, "the same group and format share a Communicator"
    small = torch.ones(3)
    assert flashcomm.all_reduce(small).tolist() == [float(ctx.world)] * 3  # default format; below min_bytes: exact

    pair = dist.new_group([0, 1])
    lonely = dist.new_group([2])
    group = pair if ctx.rank < 2 else lonely
    want = reference.one_shot(per_rank[:2], fmt) if ctx.rank < 2 else x
    assert torch.equal(flashcomm.all_reduce(x, "int4", group), want)
    with pytest.raises(SettingsError, match="no process group named 'nobody'"):
        torch.ops.flashcomm.all_reduce(x, "nobody")


def opcheck(ctx: RankContext) -> None:
    name = ops.op_name("int4")
    for x in (inputs(64, ctx.world)[ctx.rank], torch.randn(6, 4).t(), torch.empty(0, 8)):
        torch.library.opcheck(torch.ops.flashcomm.all_reduce.default, (x, name))


def compiled(ctx: RankContext) -> int:
    fmt = WireFormat.parse("int4")
    graphs = 0

    def backend(module: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def block(x: torch.Tensor) -> torch.Tensor:
        return flashcomm.all_reduce(x * 2, "int4") + 1

    for seed, rows in enumerate((64, 65, 100, 333)):
        per_rank = inputs(rows, ctx.world, seed)
        want = reference.one_shot([t * 2 for t in per_rank], fmt)
        assert torch.equal(block(per_rank[ctx.rank]), want + 1)
    return graphs


def inductor(ctx: RankContext) -> None:
    """The default backend too: real code is generated around the op."""
    per_rank = inputs(64, ctx.world)

    @torch.compile(fullgraph=True, dynamic=True)
    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.flashcomm.all_reduce(x, ops.op_name("int4")) * 2

    assert torch.equal(block(per_rank[ctx.rank]), reference.one_shot(per_rank, WireFormat.parse("int4")) * 2)


def remade(ctx: RankContext, path: str) -> None:
    """A group made anew under the name of a destroyed one gets a Communicator of its own."""
    x = inputs(64, ctx.world)[ctx.rank]
    first = flashcomm.all_reduce(x, "int4")
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(path, ctx.world), rank=ctx.rank, world_size=ctx.world)
    assert torch.equal(flashcomm.all_reduce(x, "int4"), first)


def test_functional() -> None:
    run(functional, 3)


def test_opcheck() -> None:
    run(opcheck, 2)


def test_compile_without_breaks_or_recompiles() -> None:
    assert run(compiled, 2) == 1, "one graph for all lengths"


def test_inductor() -> None:
    run(inductor, 2)


def test_a_new_group_with_an_old_name(tmp_path: Path) -> None:
    run(remade, 2, (str(tmp_path / "store"),))


def test_without_a_group() -> None:
    with pytest.raises(SettingsError, match="init_process_group"):
        flashcomm.all_reduce(torch.ones(3), "int4")
