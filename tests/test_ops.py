"""flashcomm.all_reduce, reduce_scatter and all_gather, and torch.ops.flashcomm.*, in processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import ranks

import flashcomm
from flashcomm import WireFormat, ops, reference
from flashcomm.errors import InputError, SettingsError
from flashcomm.ranks.launch import RankContext


def inputs(rows: int, world_size: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, 1152, generator=generator, dtype=torch.float32).to(torch.bfloat16) for _ in range(world_size)
    ]


@ranks(3)
def test_all_reduce_as_a_function_and_as_an_op(ctx: RankContext) -> None:
    fmt = WireFormat.parse("int4")
    per_rank = inputs(64, ctx.world_size)
    x, kept = per_rank[ctx.rank], per_rank[ctx.rank].clone()
    want = reference.two_shot(per_rank, fmt)  # what the policy picks for this size and three ranks
    assert torch.equal(flashcomm.all_reduce(x, "int4"), want)
    assert torch.equal(x, kept)
    assert torch.equal(torch.ops.flashcomm.all_reduce(x, ops.op_name("int4")), want)
    flashcomm.all_reduce(x, "int4")
    assert len(ops._communicators) == 1, "the same group and format share a Communicator"
    small = torch.ones(3)
    assert flashcomm.all_reduce(small).tolist() == [float(ctx.world_size)] * 3  # default format; below min_bytes: exact

    with pytest.raises(InputError):  # on all ranks, and the next call works
        flashcomm.all_reduce([1.0] if ctx.rank == 1 else small)  # type: ignore[arg-type]
    assert flashcomm.all_reduce(small).tolist() == [float(ctx.world_size)] * 3

    pair = dist.new_group([0, 1])
    lonely = dist.new_group([2])
    group = pair if ctx.rank < 2 else lonely
    want = reference.one_shot(per_rank[:2], fmt) if ctx.rank < 2 else x
    assert torch.equal(flashcomm.all_reduce(x, "int4", group), want)
    with pytest.raises(SettingsError, match="no process group named 'nobody'"):
        torch.ops.flashcomm.all_reduce(x, "nobody")


@ranks(3)
def test_reduce_scatter_and_all_gather_as_functions_and_as_ops(ctx: RankContext) -> None:
    fmt = WireFormat.parse("int4/int8")
    per_rank = inputs(6, ctx.world_size)
    x, kept = per_rank[ctx.rank], per_rank[ctx.rank].clone()
    name, world_size = ops.op_name("int4/int8"), ctx.world_size
    shard, whole = reference.reduce_scatter(per_rank, fmt)[ctx.rank], reference.all_gather(per_rank, fmt)
    assert not torch.equal(whole, torch.cat(per_rank))
    assert torch.equal(flashcomm.reduce_scatter(x, "int4/int8"), shard)
    assert torch.equal(flashcomm.all_gather(x, fmt), whole)
    assert torch.equal(torch.ops.flashcomm.reduce_scatter(x, name, world_size), shard)
    assert torch.equal(torch.ops.flashcomm.all_gather(x, name, world_size), whole)
    assert torch.equal(x, kept)
    (comm,) = ops.communicators()
    assert dict(comm.calls) == {"reduce_scatter/pipelined": 2, "all_gather/pipelined": 2}

    pair, lonely = dist.new_group([0, 1]), dist.new_group([2])
    shard, whole = reference.reduce_scatter(per_rank[:2], fmt), reference.all_gather(per_rank[:2], fmt)
    group = pair if ctx.rank < 2 else lonely
    assert torch.equal(flashcomm.reduce_scatter(x, fmt, group), shard[ctx.rank] if ctx.rank < 2 else x)
    assert torch.equal(flashcomm.all_gather(x, fmt, group), whole if ctx.rank < 2 else x)
    with pytest.raises(
        SettingsError, match=r"world_size=2 was given for group .*, which has 3 ranks: pass world_size=3"
    ):
        torch.ops.flashcomm.all_gather(x, name, 2)


@ranks(2)
def test_pieces_of_any_size_as_functions_and_in_one_graph(ctx: RankContext) -> None:
    fmt, counting = WireFormat.parse("int4/int8"), Counting()

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def block(x: torch.Tensor, a: int) -> torch.Tensor:
        sizes = [a, x.shape[0] - a]
        return flashcomm.all_gather(flashcomm.reduce_scatter(x * 2, fmt_text, sizes=sizes), fmt_text, sizes=sizes)

    fmt_text = "int4/int8"
    for seed, (rows, a) in enumerate(((64, 7), (66, 50), (101, 3))):
        per_rank = inputs(rows, ctx.world_size, seed)
        shards = reference.reduce_scatter([t * 2 for t in per_rank], fmt, (a, rows - a))
        want = reference.all_gather(shards, fmt)
        assert torch.equal(block(per_rank[ctx.rank], a), want)
        shard = flashcomm.reduce_scatter(per_rank[ctx.rank] * 2, fmt, sizes=(a, rows - a))
        assert torch.equal(flashcomm.all_gather(shard, fmt, sizes=(a, rows - a)), want)
    assert counting.graphs == 1
    with pytest.raises(SettingsError, match="pass that"):
        torch.ops.flashcomm.reduce_scatter_v(per_rank[0], ops.op_name(fmt), (3, rows - 3), 1 - ctx.rank)


@ranks(2)
def test_all_to_all_as_a_function_and_in_one_graph(ctx: RankContext) -> None:
    fmt, counting = WireFormat.parse("int4/int8"), Counting()

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def block(x: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        return flashcomm.all_to_all_single(x * 2, received, sent, "int4/int8") + 1

    for seed, splits in enumerate((((5, 9), (3, 7)), ((1, 2), (30, 4)))):
        per_rank = [inputs(sum(splits[r]), 2, seed)[r] for r in range(2)]
        want = reference.all_to_all_single([x * 2 for x in per_rank], fmt, splits)[ctx.rank]
        x, sent, received = per_rank[ctx.rank], list(splits[ctx.rank]), [s[ctx.rank] for s in splits]
        assert torch.equal(flashcomm.all_to_all_single(x * 2, received, sent, fmt), want)
        assert torch.equal(block(x, received, sent), want + 1)
    assert counting.graphs == 1
    ids = torch.arange(4) + 10 * ctx.rank
    assert flashcomm.all_to_all_single(ids).tolist() == [[0, 1, 10, 11], [2, 3, 12, 13]][ctx.rank]


@pytest.mark.thorough
@ranks(2)
def test_opcheck_of_reduce_scatter_and_all_gather(ctx: RankContext) -> None:
    name = ops.op_name("int4")
    for x in (inputs(64, ctx.world_size)[ctx.rank], torch.randn(6, 4).t(), torch.empty(0, 8), torch.randn(4, 3, 64)):
        torch.library.opcheck(torch.ops.flashcomm.reduce_scatter.default, (x, name, ctx.world_size))
        torch.library.opcheck(torch.ops.flashcomm.all_gather.default, (x, name, ctx.world_size))
    x, splits = torch.randn(6, 64), [[1, 5], [5, 1]][ctx.rank]
    for given in (None, splits):
        torch.library.opcheck(torch.ops.flashcomm.all_to_all_single.default, (x, given, given, name))
    torch.library.opcheck(torch.ops.flashcomm.all_gather_v.default, (x[: 3 + ctx.rank], name, [3, 4]))
    torch.library.opcheck(torch.ops.flashcomm.reduce_scatter_v.default, (x, name, [2, 4], ctx.rank))


class Counting:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        self.graphs += 1
        return module.forward


@ranks(2)
def test_reduce_scatter_and_all_gather_compile_to_one_graph_for_all_lengths(ctx: RankContext) -> None:
    fmt, counting = WireFormat.parse("int4/int8"), Counting()

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def block(x: torch.Tensor) -> torch.Tensor:
        return flashcomm.all_gather(flashcomm.reduce_scatter(x * 2, "int4/int8") + 1, "int4/int8")

    for seed, rows in enumerate((64, 66, 100, 332)):
        per_rank = inputs(rows, ctx.world_size, seed)
        shards = [shard + 1 for shard in reference.reduce_scatter([t * 2 for t in per_rank], fmt)]
        assert torch.equal(block(per_rank[ctx.rank]), reference.all_gather(shards, fmt))
    assert counting.graphs == 1


@ranks(2)
def test_opcheck_of_all_reduce(ctx: RankContext) -> None:
    name = ops.op_name("int4")
    for x in (inputs(64, ctx.world_size)[ctx.rank], torch.randn(6, 4).t(), torch.empty(0, 8)):
        torch.library.opcheck(torch.ops.flashcomm.all_reduce.default, (x, name))


@ranks(2)
def test_all_reduce_compiles_to_one_graph_for_all_lengths(ctx: RankContext) -> None:
    fmt, counting = WireFormat.parse("int4"), Counting()

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def block(x: torch.Tensor) -> torch.Tensor:
        return flashcomm.all_reduce(x * 2, "int4") + 1

    for seed, rows in enumerate((64, 65, 100, 333)):
        per_rank = inputs(rows, ctx.world_size, seed)
        want = reference.one_shot([t * 2 for t in per_rank], fmt)
        assert torch.equal(block(per_rank[ctx.rank]), want + 1)
    assert counting.graphs == 1


@pytest.mark.thorough
@ranks(2)
def test_inductor_generates_code_around_the_op(ctx: RankContext) -> None:
    per_rank = inputs(64, ctx.world_size)

    @torch.compile(fullgraph=True, dynamic=True)
    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.flashcomm.all_reduce(x, ops.op_name("int4")) * 2

    assert torch.equal(block(per_rank[ctx.rank]), reference.one_shot(per_rank, WireFormat.parse("int4")) * 2)


@ranks(2)
def test_a_new_group_of_an_old_name_has_a_communicator_of_its_own(ctx: RankContext, tmp_path: Path) -> None:
    x = inputs(64, ctx.world_size)[ctx.rank]
    first = flashcomm.all_reduce(x, "int4")
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), ctx.world_size), rank=ctx.rank, world_size=ctx.world_size
    )
    assert torch.equal(flashcomm.all_reduce(x, "int4"), first)


def test_without_a_process_group_calls_say_what_to_do() -> None:
    with pytest.raises(SettingsError, match="init_process_group"):
        flashcomm.all_reduce(torch.ones(3), "int4")
