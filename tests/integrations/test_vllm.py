"""The vLLM integration in real ranks: with a stand-in for vLLM, and with vLLM itself under `scripts/test-vllm`."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import vllm_standin as standin

import flashcomm
from flashcomm import WireFormat, reference
from flashcomm.errors import FlashcommError, FormatError, PlanError, SettingsError, UnavailableError
from flashcomm.plan import LayerPlan, Plan
from flashcomm.ranks.launch import RankContext, run
from flashcomm.wire.format import Layout

ROOT = Path(__file__).parent.parent.parent
HIDDEN = 192
INT4, INT6 = WireFormat.parse("int4"), WireFormat.parse("int6-g32")


def start(hidden: int = HIDDEN, **setting: str) -> tuple[Any, Any]:
    """Start the stand-in with flashcomm's plugins and these FLASHCOMM_* settings. Return platform and config."""
    os.environ.update({f"FLASHCOMM_{name.upper()}": value for name, value in setting.items()})
    standin.install()
    from flashcomm.integrations import vllm as integration

    platform, config = standin.start({"flashcomm": integration.platform_plugin}), standin.make_config(hidden)
    platform.apply_config_platform_defaults(config)
    integration.layer_plugin()
    return platform, config


def all_inputs(ctx: RankContext, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Return the inputs of all ranks."""
    return [torch.randn(shape, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(ctx.world_size)]


# ------------------------------------------------------------------------------------------------------- in real ranks


def low_bit_and_own(ctx: RankContext) -> None:
    _, config = start(format="int4")
    group = standin.make_group(config, dist.group.WORLD)
    flash = group.device_communicator.flashcomm
    assert isinstance(group.device_communicator, standin.CpuCommunicator), "graph capture asserts the subclass"
    assert standin.own_sums == []
    for tokens, way in ((200, "one_shot"), (500, "two_shot"), (200, "one_shot")):
        given = all_inputs(ctx, (tokens, HIDDEN))
        x = given[ctx.rank].clone()
        assert torch.equal(group.all_reduce(x), getattr(reference, way)(given, INT4))
        assert torch.equal(x, given[ctx.rank]), "the op contract: inputs stay"
    strided = torch.empty(HIDDEN, 200, dtype=torch.bfloat16).t().copy_(all_inputs(ctx, (200, HIDDEN))[ctx.rank])
    assert torch.equal(group.all_reduce(strided), reference.one_shot(all_inputs(ctx, (200, HIDDEN)), INT4))
    assert standin.own_sums == []
    others = [(8, HIDDEN), (200, 2 * HIDDEN), (200 * HIDDEN,), (2, 100, HIDDEN)]
    for shape in others:
        x = torch.full(shape, ctx.rank + 1.0, dtype=torch.bfloat16)
        assert torch.equal(group.all_reduce(x), torch.full(shape, 6.0, dtype=torch.bfloat16))
        assert torch.equal(x, torch.full(shape, ctx.rank + 1.0, dtype=torch.bfloat16))
    for dtype in (torch.float32, torch.int64):
        assert group.all_reduce(torch.ones(200, HIDDEN, dtype=dtype)).unique().tolist() == [3]
    assert standin.own_sums == [*others, (200, HIDDEN), (200, HIDDEN)]
    comm = flash.planned.comm
    routes = [comm.explain((tokens, HIDDEN), torch.bfloat16).route for tokens in (200, 500)]
    assert [(route.algorithm, route.transport) for route in routes] == [
        ("one_shot", "process_group"),
        ("two_shot", "process_group"),
    ]
    assert flash.report() == {
        "rank": ctx.rank,
        "world_size": 3,
        "format": "int4",
        "low_bit": {
            "all_reduce/one_shot": {"calls": 3, "sent_bytes": 3 * routes[0].wire_bytes},
            "all_reduce/two_shot": {"calls": 1, "sent_bytes": routes[1].wire_bytes},
        },
        "own": {"too small to pay": 1, "not hidden states": 5},
    }, "what warmed it up is not counted"
    assert min(route.wire_bytes for route in routes) > 0
    assert comm.settings.workspace_bytes == 4 << 20, "512 tokens need less than the least"
    assert comm.settings.timeout_s == 600, "a rank may compile the model while the others wait"
    sums = torch.compile(lambda x: group.all_reduce(x * 2), fullgraph=True, dynamic=True, backend="eager")
    for tokens, way in ((500, reference.two_shot), (9, None), (200, reference.one_shot)):
        given = [x * 2 for x in all_inputs(ctx, (tokens, HIDDEN))]
        got = sums(all_inputs(ctx, (tokens, HIDDEN))[ctx.rank])  # the route is chosen at run time, not while tracing
        assert torch.equal(got, way(given, INT4)) if way else len(standin.own_sums) == len(others) + 3


def other_groups_are_left_alone(ctx: RankContext) -> None:
    _, config = start(format="int4", min_bytes="0")
    group = standin.make_group(config, dist.group.WORLD, "dp")
    given = all_inputs(ctx, (200, HIDDEN))
    torch.testing.assert_close(group.all_reduce(given[ctx.rank]), sum(given))  # type: ignore[arg-type]
    assert group.device_communicator.flashcomm is None
    alone = dist.new_group([ctx.rank], use_local_synchronization=True)
    assert standin.make_group(config, alone).all_reduce(given[ctx.rank]) is given[ctx.rank]


def experts(ctx: RankContext) -> None:
    """What vLLM's manager `allgather_reducescatter` calls: a combine and a dispatch, with formats of their own."""
    _, config = start(format="none", expert_format="int8/int4", min_bytes="0")
    device = standin.make_group(config, dist.group.WORLD, "ep").device_communicator
    fmt, sizes = WireFormat.parse("int8/int4"), [3, 0, 5]
    tokens = [x[:n] for x, n in zip(all_inputs(ctx, (5, HIDDEN)), sizes, strict=True)]
    weights, ids = torch.rand(sizes[ctx.rank], 4), torch.full((sizes[ctx.rank], 4), ctx.rank)
    hidden, got_weights, got_ids = device.all_gatherv([tokens[ctx.rank], weights, ids], dim=0, sizes=sizes)
    assert torch.equal(hidden, reference.all_gather(tokens, fmt))
    assert torch.equal(device.all_gatherv(tokens[ctx.rank], sizes=sizes), hidden)
    assert got_ids[:, 0].tolist() == [0] * 3 + [2] * 5
    assert torch.equal(got_weights[got_ids[:, 0] == ctx.rank], weights)
    assert standin.own_sums == [weights.shape, ids.shape]

    sums = all_inputs(ctx, (8, HIDDEN))
    want = reference.reduce_scatter(sums, fmt, sizes)[ctx.rank]
    assert torch.equal(device.reduce_scatterv(sums[ctx.rank], dim=0, sizes=sizes), want)
    for out in (torch.empty_like(want), torch.empty(HIDDEN, len(want), dtype=want.dtype).t()):
        device.reduce_scatterv_into_output(sums[ctx.rank], out, 0, sizes)
        assert torch.equal(out, want)
    assert len(standin.own_sums) == 2
    even = [x[:6] for x in sums]
    assert torch.equal(device.reduce_scatterv(even[ctx.rank], 0), reference.reduce_scatter(even, fmt)[ctx.rank])

    logits = torch.ones(sizes[ctx.rank], HIDDEN, dtype=torch.float32)  # other dtypes, widths and dimensions
    device.all_gatherv([logits, weights], 0, sizes)
    device.reduce_scatterv(torch.ones(8, 64).bfloat16(), 0, sizes)
    device.reduce_scatterv(torch.ones(8, HIDDEN).bfloat16(), -1)
    assert len(standin.own_sums) == 6
    assert device.flashcomm_experts.comm.calls == {"all_gather/pipelined": 2, "reduce_scatter/pipelined": 4}
    assert device.flashcomm is None
    device.destroy()
    assert device.flashcomm_experts.comm.closed


def experts_of_small_batches(ctx: RankContext) -> None:
    _, config = start(format="int4", expert_format="int8")
    device = standin.make_group(config, dist.group.WORLD, "dp").device_communicator
    least = (64 << 10) // (2 * HIDDEN) + 1
    for tokens, n_own in ((least - 1, 1), (least, 1)):
        device.all_gatherv(torch.ones([tokens, 0][ctx.rank], HIDDEN).bfloat16(), 0, [tokens, 0])
        assert len(standin.own_sums) == n_own, "smaller batches are vLLM's own"
    os.environ["FLASHCOMM_EXPERT_FORMAT"] = ["int8", "int6"][ctx.rank]
    with pytest.raises(UnavailableError, match=r"rank 0: .* experts int8; rank 1: .* experts int6"):
        standin.make_group(config, dist.group.WORLD, "ep")
    os.environ["FLASHCOMM_EXPERT_FORMAT"] = ""
    assert standin.make_group(config, dist.group.WORLD, "pcp").device_communicator.flashcomm_experts is None


def a_group_of_some(ctx: RankContext) -> None:
    """Two groups of TP 2 in 4 ranks: each reduces its own messages."""
    _, config = start(format="int4", min_bytes="0")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = standin.make_group(config, pairs[ctx.rank // 2])
    given = all_inputs(ctx, (9, HIDDEN))[ctx.rank // 2 * 2 :][:2]
    assert torch.equal(group.all_reduce(given[ctx.rank % 2].clone()), reference.one_shot(given, INT4))
    dist.barrier()


def workspace_of_the_config(ctx: RankContext) -> None:
    _, config = start(4096, format="int4")
    config.scheduler_config.max_num_batched_tokens = 1000
    flash = standin.make_group(config, dist.group.WORLD).device_communicator.flashcomm
    assert flash.planned.comm.settings.workspace_bytes == 2 * 1000 * 4096 * 2
    config.scheduler_config.max_num_batched_tokens = 1 << 20
    dist.barrier()
    standin.make_group(config, dist.new_group([0, 1]), "tp")
    assert standin._state["tp"].device_communicator.flashcomm.planned.comm.settings.workspace_bytes == 256 << 20


class Two(torch.nn.Module):
    """Two row-parallel layers and one that keeps its partial sums."""

    def __init__(self) -> None:
        super().__init__()
        kind = importlib.import_module("vllm.model_executor.layers.linear").RowParallelLinear
        more = {"params_dtype": torch.bfloat16}
        self.first = kind(256, HIDDEN, bias=True, prefix="model.layers.0.mlp.down_proj", **more)
        self.second = kind(256, HIDDEN, bias=False, prefix="model.layers.1.mlp.down_proj", return_bias=False, **more)
        self.partial = kind(256, HIDDEN, bias=False, reduce_results=False, prefix="model.layers.1.partial", **more)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.first(x)[0], self.second(x), self.partial(x)[0]


def a_plan_by_layer(ctx: RankContext, path: str) -> None:
    _, config = start(format=path, min_bytes="0")
    group = standin.make_group(config, dist.group.WORLD)
    torch.manual_seed(0)
    model = Two()
    for weight in model.parameters():
        weight.data.normal_()
    plan = Plan.load(Path(path))
    inputs = [
        torch.randn(40, 128, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(ctx.world_size)
    ]
    linear = torch.nn.functional.linear
    first = [linear(x, model.first.weight, model.first.bias if r == 0 else None) for r, x in enumerate(inputs)]
    second = [linear(x, model.second.weight) for x in inputs]
    name = "model.layers.1.mlp.down_proj"
    total = reference.one_shot([plan.before_reduce(name, x, ctx.world_size) for x in second], WireFormat.parse("int8"))
    want = reference.one_shot(first, INT6), plan.after_reduce(name, total, ctx.world_size, torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.inference_mode():
        for run_it in (model, compiled):
            got = run_it(inputs[ctx.rank])
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
            assert torch.equal(got[2], linear(inputs[ctx.rank], model.partial.weight))
        assert torch.equal(compiled(inputs[ctx.rank][:7])[0], want[0][:7]), "another length, the same graph"
    flash = group.device_communicator.flashcomm
    assert flash.layers == ["model.layers.0.mlp.down_proj", name]
    assert model.second.flashcomm_name == f"vllm/tp:0/{name}", "cached graphs hold it: the same in every run"
    given = all_inputs(ctx, (40, HIDDEN))
    assert torch.equal(group.all_reduce(given[ctx.rank]), reference.one_shot(given, INT6)), "a message without a layer"
    assert torch.equal(group.all_reduce(given[ctx.rank][:1]), reference.one_shot([x[:1] for x in given], INT4))
    with torch.inference_mode(), standin.forward_context({"attn": SimpleNamespace(max_query_len=1)}):
        for run_it in (model, compiled):
            got = run_it(inputs[ctx.rank])
            assert torch.equal(got[0], reference.one_shot(first, INT4)), (
                "the batch decides, not the one it compiled for"
            )
            assert torch.equal(got[1], reference.one_shot(second, INT4)), "and so is its scaling"
    assert standin.own_sums == []


def the_decode_format(ctx: RankContext, path: str) -> None:
    _, config = start(format=path, min_bytes="0")
    config.num_speculative_tokens = 2
    group = standin.make_group(config, dist.group.WORLD)
    given = all_inputs(ctx, (9, HIDDEN))
    no, yes = reference.one_shot(given, INT6), reference.one_shot(given, INT4)
    assert torch.equal(group.all_reduce(given[ctx.rank]), no), "outside of a batch"
    for metadata, want in (
        (None, no),  # vLLM's profiling run
        ({}, no),
        ({"a": SimpleNamespace(max_query_len=1)}, yes),
        ({"a": SimpleNamespace(max_query_len=3)}, yes),  # speculative decoding of two tokens
        ({"a": SimpleNamespace(max_query_len=4)}, no),
        ({"a": SimpleNamespace(num_prefills=0), "b": SimpleNamespace(max_query_len=4)}, yes),
        ({"a": SimpleNamespace(), "b": SimpleNamespace(num_prefills=1)}, no),
        ([{"a": SimpleNamespace(max_query_len=1)}], no),  # dual-batch overlap
    ):
        with standin.forward_context(metadata):
            assert torch.equal(group.all_reduce(given[ctx.rank]), want), metadata
    with standin.forward_context({"a": SimpleNamespace(max_query_len=1)}):
        part = group.reduce_scatter(given[ctx.rank][:8], 0)
    assert torch.equal(part, reference.reduce_scatter([x[:8] for x in given], INT4)[ctx.rank])
    assert torch.equal(group.all_gather(part, 0), reference.all_gather(list(yes[:8].chunk(2)), INT4))


def sequence_parallelism(ctx: RankContext) -> None:
    fmt = WireFormat.parse("int4/int8")
    _, config = start(format="int4/int8")
    group = standin.make_group(config, dist.group.WORLD)
    flash = group.device_communicator.flashcomm
    given, normed = all_inputs(ctx, (600, HIDDEN)), all_inputs(ctx, (200, HIDDEN))
    x, mine, exact = given[ctx.rank], normed[ctx.rank], torch.cat(normed)
    for _ in range(2):  # two layers
        kept = x.clone()
        assert torch.equal(group.reduce_scatter(x, 0), reference.reduce_scatter(given, fmt)[ctx.rank])
        assert torch.equal(x, kept), "the op contract: inputs stay"
        assert torch.equal(group.all_gather(mine, 0), reference.all_gather(normed, fmt))
    assert not torch.equal(exact, reference.all_gather(normed, fmt))
    assert standin.own_sums == [], "all were low-bit"
    assert torch.equal(group.all_gather(mine, 0), exact), "it follows no reduce-scatter"
    group.reduce_scatter(x, 0)
    logits = torch.arange(600).view(200, 3) + ctx.rank  # on another dimension: not this reduce-scatter's
    assert torch.equal(group.all_gather(logits, -1), torch.cat([logits + r - ctx.rank for r in range(3)], -1))
    assert torch.equal(group.all_gather(mine[:100], 0), exact.view(3, 200, -1)[:, :100].reshape(300, -1))
    assert torch.equal(group.all_gather(mine.float(), 0), exact.float()), "vLLM has quantized it itself, for instance"
    assert torch.equal(group.all_gather(mine, 0), exact), "only one follows"
    ones = torch.full((9, HIDDEN), ctx.rank + 1.0, dtype=torch.bfloat16)
    assert group.reduce_scatter(ones, 0).unique().tolist() == [6]
    assert torch.equal(
        group.all_gather(ones[:3], 0), ones.new_tensor([1, 2, 3]).repeat_interleave(3)[:, None] + ones * 0
    )
    assert group.reduce_scatter(torch.ones(600, 2 * HIDDEN), 0).unique().tolist() == [3]
    report = flash.report()
    assert {op: n["calls"] for op, n in report["low_bit"].items()} == {
        "reduce_scatter/pipelined": 3,
        "all_gather/pipelined": 2,
    }
    assert all(
        n["sent_bytes"] == n["calls"] * flash.planned.comm.explain(shape, x.dtype, op=op.split("/")[0]).route.wire_bytes
        for (op, n), shape in zip(report["low_bit"].items(), (x.shape, mine.shape), strict=True)
    )
    assert report["own"] == {
        "all_gather: not after a low-bit reduce_scatter": 4,
        "all_gather: not hidden states": 2,
        "reduce_scatter: too small to pay": 1,
        "reduce_scatter: not hidden states": 1,
    }


def an_exact_gather(ctx: RankContext) -> None:
    _, config = start(format="int4/none", min_bytes="0")
    group = standin.make_group(config, dist.group.WORLD)
    given = all_inputs(ctx, (8, HIDDEN))
    part = group.reduce_scatter(given[ctx.rank], 0)
    assert torch.equal(part, reference.reduce_scatter(given, INT4)[ctx.rank])
    assert torch.equal(group.all_gather(part, 0), torch.cat(reference.reduce_scatter(given, INT4)))
    assert standin.own_sums == [(4, HIDDEN)], "as int4/none says, the gather is vLLM's own"


def rows_do_not_depend_on_their_batch(ctx: RankContext, path: str) -> None:
    standin.envs.VLLM_BATCH_INVARIANT = True
    _, config = start(format=path, min_bytes="1000000")
    group = standin.make_group(config, dist.group.WORLD)
    way = reference.one_shot if ctx.world_size == 2 else reference.two_shot
    given = all_inputs(ctx, (504, HIDDEN))
    x, want = given[ctx.rank], way(given, INT6)
    for begin, end in ((7, 8), (7, 9), (0, 8), (5, 70), (3, 504), (0, 504)):
        with standin.forward_context({"a": SimpleNamespace(max_query_len=1 if end < 9 else 500)}):
            got = group.all_reduce(x[begin:end])
        assert torch.equal(got[7 - begin], want[7]), (begin, end)
        assert torch.equal(got, want[begin:end])
    part = group.reduce_scatter(x, 0)
    assert torch.equal(part, want.chunk(ctx.world_size)[ctx.rank]), "as in batches without sequence parallelism"
    assert part.untyped_storage().nbytes() == part.nbytes, "the rest of the sum is not kept"
    assert standin.own_sums == []
    assert torch.equal(group.all_gather(part, 0), want), "exact"
    os.environ["FLASHCOMM_EXPERT_FORMAT"] = "int8"
    assert standin.make_group(config, dist.group.WORLD, "dp").device_communicator.flashcomm_experts is None
    config.model_config.get_hidden_size = lambda: 200
    ragged = standin.make_group(config, dist.new_group(list(range(ctx.world_size))))
    assert ragged.device_communicator.flashcomm is None


def batch_invariance_on_one_rank_only(ctx: RankContext) -> None:
    _, config = start(format="int4")
    standin.envs.VLLM_BATCH_INVARIANT = ctx.rank == 1
    message = r"give all its workers the same: rank 0: flashcomm .*, plan \w+; rank 1: .*, plan \w+, batch-invariant"
    with pytest.raises(UnavailableError, match=message):
        standin.make_group(config, dist.group.WORLD)


def a_plan_for_other_layers(ctx: RankContext, path: str) -> None:
    _, config = start(format=path)
    standin.make_group(config, dist.group.WORLD)
    with pytest.raises(PlanError, match=r"names layers that the model does not have \(h\.\*\)"):
        Two()(torch.zeros(4, 128).bfloat16())


def a_plan_without_the_layer_plugin(ctx: RankContext, path: str) -> None:
    standin.install()
    os.environ["FLASHCOMM_FORMAT"] = path
    from flashcomm.integrations import vllm as integration

    platform, config = standin.start({"flashcomm": integration.platform_plugin}), standin.make_config(HIDDEN)
    platform.apply_config_platform_defaults(config)
    group = standin.make_group(config, dist.group.WORLD)
    with pytest.raises(PlanError, match="no layer of vLLM uses them: add flashcomm to VLLM_PLUGINS"):
        group.all_reduce(torch.zeros(4, HIDDEN).bfloat16())


def one_lacks_the_package(ctx: RankContext) -> None:
    _, config = start(format="int4", timeout_s="2")
    if ctx.rank == 1:
        standin._state["platform"] = standin.CpuPlatform()
        standin.make_group(config, dist.group.WORLD)
        return
    with pytest.raises(UnavailableError, match=r"rank 1 of .* did not come .* within 2 s: all workers need"):
        standin.make_group(config, dist.group.WORLD)


def workers_differ(ctx: RankContext, mine: list[str], message: str) -> None:
    _, config = start(format="int4")
    os.environ["FLASHCOMM_FORMAT"] = mine[ctx.rank]
    with pytest.raises(UnavailableError, match=message):
        standin.make_group(config, dist.group.WORLD)


def versions_differ(ctx: RankContext) -> None:
    _, config = start(format="int4")
    flashcomm.__version__ = f"0.{ctx.rank}"
    message = r"give all its workers the same: rank 0: flashcomm 0\.0, plan .*; rank 1: flashcomm 0\.1, plan"
    with pytest.raises(UnavailableError, match=message):
        standin.make_group(config, dist.group.WORLD)


def debug_tells_of_each_route(ctx: RankContext) -> None:
    messages: list[str] = []
    logger, handler = logging.getLogger("flashcomm"), logging.Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    _, config = start(format="int4", debug="info")
    group = standin.make_group(config, dist.group.WORLD)
    messages.clear()
    for tokens in (200, 1, 1, 1):
        group.all_reduce(torch.ones(tokens, HIDDEN, dtype=torch.bfloat16))
    group.all_reduce(torch.ones(7))
    low_bit, *own = messages
    assert "one_shot" in low_bit, "the Communicator's own line"
    assert own == [
        f"vLLM's own all-reduce: first message too small to pay: (1, {HIDDEN}) torch.bfloat16",
        "vLLM's own all-reduce: first message not hidden states: (7,) torch.float32",
    ]


class TestInRanks:
    def test_hidden_states_go_low_bit_and_nothing_else(self) -> None:
        run(low_bit_and_own, 3)

    def test_other_groups_are_left_alone(self) -> None:
        run(other_groups_are_left_alone, 2)

    def test_experts_exchange_hidden_states_low_bit_and_nothing_else(self) -> None:
        run(experts, 3)

    @pytest.mark.thorough
    def test_experts_of_small_batches_and_of_other_settings(self) -> None:
        run(experts_of_small_batches, 2)

    def test_groups_of_some_ranks(self) -> None:
        run(a_group_of_some, 4)

    def test_the_workspace_is_sized_from_the_config(self) -> None:
        run(workspace_of_the_config, 2)

    def test_formats_by_layer_eager_and_compiled(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        vectors = torch.randint(-3, 4, (HIDDEN,), dtype=torch.int8), torch.randn(HIDDEN).bfloat16()
        Plan(INT6, INT4, {"*.1.mlp.down_proj": LayerPlan(WireFormat.parse("int8"), *vectors)}).save(tmp_path / "p.json")
        run(a_plan_by_layer, 2, (str(tmp_path / "p.json"),))

    def test_the_decode_format_is_for_batches_that_only_decode(self, tmp_path: Path) -> None:
        Plan(INT6, INT4).save(tmp_path / "p.json")
        run(the_decode_format, 2, (str(tmp_path / "p.json"),))

    def test_sequence_parallelism(self) -> None:
        run(sequence_parallelism, 3)

    def test_sequence_parallelism_with_an_exact_gather(self) -> None:
        run(an_exact_gather, 2)

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_batch_invariance(self, tmp_path: Path, world_size: int) -> None:
        Plan(INT6, INT4).save(tmp_path / "p.json")
        run(rows_do_not_depend_on_their_batch, world_size, (str(tmp_path / "p.json"),))

    def test_batch_invariance_on_one_rank_only(self) -> None:
        run(batch_invariance_on_one_rank_only, 2)

    def test_plans_that_cannot_be_followed(self, tmp_path: Path) -> None:
        Plan(INT6, None, {"h.*": LayerPlan(INT4)}).save(tmp_path / "p.json")
        run(a_plan_for_other_layers, 2, (str(tmp_path / "p.json"),))
        run(a_plan_without_the_layer_plugin, 2, (str(tmp_path / "p.json"),))

    def test_a_worker_without_the_package(self) -> None:
        run(one_lacks_the_package, 2)

    def test_workers_that_differ(self) -> None:
        run(
            workers_differ,
            2,
            (["int4", "int8"], r"rank 1: this worker's FLASHCOMM_FORMAT='int8' differs from that of vLLM's"),
        )
        run(workers_differ, 2, (["int12", "int4"], r"cannot use flashcomm: rank 0: 12 bits asked for"))
        run(versions_differ, 2)

    def test_debug_info(self) -> None:
        run(debug_tells_of_each_route, 2)


# --------------------------------------------------------------------------------------------------------- at start-up


@pytest.fixture
def integration(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import `flashcomm.integrations.vllm` again, in a process with a stand-in for vLLM."""
    before = set(sys.modules)
    standin.install()
    made = importlib.reload(importlib.import_module("flashcomm.integrations.vllm"))
    for name in ("FlashPlatform", "FlashDeviceCommunicator"):
        vars(made).pop(name, None)
    yield made
    standin.op_registry_oot.clear()
    standin.envs.VLLM_BATCH_INVARIANT = False
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "vllm":
            del sys.modules[name]


class TestStartUp:
    def test_nothing_happens_unless_asked(self, integration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for value in (None, "", " "):
            monkeypatch.delenv("FLASHCOMM_FORMAT", raising=False)
            if value is not None:
                monkeypatch.setenv("FLASHCOMM_FORMAT", value)
            assert integration.platform_plugin() is None
            integration.layer_plugin()
        assert standin.op_registry_oot == {}
        assert type(standin.start({"flashcomm": integration.platform_plugin})) is standin.CpuPlatform

    def test_importing_it_imports_no_vllm(self) -> None:
        code = (
            "import sys, torch, flashcomm.integrations.vllm as plugin; assert plugin.platform_plugin() is None; "
            "plugin.layer_plugin(); assert 'vllm' not in sys.modules; assert not torch.cuda.is_initialized()"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

    def test_the_platform_is_a_subclass_of_vllms(self, integration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
        assert integration.platform_plugin() == "flashcomm.integrations.vllm.FlashPlatform"
        platform = standin.start({"flashcomm": integration.platform_plugin})
        assert isinstance(platform, standin.CpuPlatform)
        assert standin.resolve("flashcomm.integrations.vllm.FlashPlatform") is type(platform)
        communicator = standin.resolve(platform.get_device_communicator_cls())
        assert issubclass(communicator, standin.CpuCommunicator)
        assert "FLASHCOMM_FORMAT" in platform.additional_env_vars
        assert standin.Platform.additional_env_vars == []
        with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
            integration.Nonsense  # noqa: B018

    @pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0"])
    def test_versions_not_tested(
        self, integration: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
    ) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "plan.json")  # does not exist, and is not read
        standin.install(version)
        assert integration.platform_plugin() is None
        assert integration.platform_plugin() is None
        integration.layer_plugin()
        assert [r.message for r in caplog.records] == [
            f"FLASHCOMM_FORMAT is set, but vLLM {version} is not one of those it was tested with (0.26 to 0.33): "
            "vLLM's own all-reduce is used"
        ]

    def test_a_platform_without_flashcomm(
        self, integration: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        standin.start({"flashcomm": integration.platform_plugin})
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")  # as Ray does, after its workers know their platform
        integration.layer_plugin()
        assert "vLLM chose its platform without flashcomm: vLLM's own all-reduce is used." in caplog.text
        caplog.clear()
        integration._warned.clear()
        standin.start({"flashcomm": integration.platform_plugin})
        integration.layer_plugin()
        assert not caplog.records

    def test_neither_cuda_nor_cpu(
        self, integration: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
        sys.modules["vllm.platforms"].builtin_platform_plugins["cpu"] = lambda: None  # type: ignore[attr-defined]
        assert integration.platform_plugin() is None
        assert "does not run on CUDA or a CPU" in caplog.text

    @pytest.mark.parametrize(
        ("text", "error"), [("int12", FormatError), ("no.json", PlanError), ("none/int4x", FormatError)]
    )
    def test_wrong_formats_stop_the_front_end(
        self, integration: Any, monkeypatch: pytest.MonkeyPatch, text: str, error: type[FlashcommError]
    ) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", text)
        platform = standin.start({"flashcomm": integration.platform_plugin})
        with pytest.raises(error):
            platform.apply_config_platform_defaults(standin.make_config(HIDDEN))

    def test_other_wrong_settings_stop_it_too(self, integration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
        platform = standin.start({"flashcomm": integration.platform_plugin})
        config = standin.make_config(HIDDEN)
        config.additional_config = object()
        with pytest.raises(SettingsError, match=r"additional_config=.* must be a dict"):
            platform.apply_config_platform_defaults(config)
        monkeypatch.setenv("FLASHCOMM_ALGORITHM", "ring")
        with pytest.raises(SettingsError, match="algorithm='ring'"):
            platform.apply_config_platform_defaults(standin.make_config(HIDDEN))

    @pytest.mark.parametrize(
        ("fmt", "before", "after"), [("int4", None, False), ("int4", True, True), ("none", None, None)]
    )
    def test_flashinfers_fusion(
        self,
        integration: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        fmt: str,
        before: bool | None,
        after: bool | None,
    ) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", fmt)
        config = standin.make_config(HIDDEN)
        config.compilation_config.pass_config.fuse_allreduce_rms = before
        standin.start({"flashcomm": integration.platform_plugin}).apply_config_platform_defaults(config)
        assert config.compilation_config.pass_config.fuse_allreduce_rms is after
        assert ("messages that FlashInfer fuses with RMSNorm are not low-bit" in caplog.text) == bool(before)

    def test_graphs_are_cached_by_format(self, integration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        marks = set()
        for fmt in ("int4", "int8", "int4/int8"):
            monkeypatch.setenv("FLASHCOMM_FORMAT", fmt)
            config = standin.make_config(HIDDEN)
            standin.start({"flashcomm": integration.platform_plugin}).apply_config_platform_defaults(config)
            marks.add(json.dumps(config.additional_config))  # what vLLM hashes
        assert len(marks) == 3

    def test_when_vllm_keeps_its_sums(self, integration: Any) -> None:
        from flashcomm.integrations.vllm_group import why_not

        assert why_not(standin.make_config(HIDDEN)) == ""
        assert "bfloat16 and float16" in why_not(standin.make_config(HIDDEN, dtype=torch.float32))
        assert "DBO" in why_not(standin.make_config(HIDDEN, use_ubatching=True))
        assert "no model config" in why_not(None)
        standin.envs.VLLM_BATCH_INVARIANT = True
        assert why_not(standin.make_config(HIDDEN), Plan(INT4, INT6, {"*": LayerPlan(INT6)})) == ""
        ragged, plain = standin.make_config(200), WireFormat.parse("none")
        for plan in (Plan(INT4), Plan(plain, INT4), Plan(plain, None, {"*.down_proj": LayerPlan(INT4)})):
            assert why_not(ragged, plan) == (
                "batch-invariant mode is on, but the hidden size 200 is no multiple of 64, the group size of int4"
            )
        assert why_not(ragged, Plan(plain)) == ""
        standin.envs.VLLM_BATCH_INVARIANT = False
        assert why_not(ragged, Plan(INT4)) == ""

    def test_the_route_is_fixed_in_batch_invariant_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from flashcomm.integrations.vllm_group import fixed_route

        assert fixed_route(2) == {"min_bytes": 0, "algorithm": "one_shot"}
        assert fixed_route(8) == {"min_bytes": 0, "algorithm": "two_shot"}
        monkeypatch.setenv("FLASHCOMM_ALGORITHM", "hierarchical")
        assert fixed_route(8) == {"min_bytes": 0}, "the user's choice"

    @pytest.mark.parametrize("op", ["reduce_scatter", "all_gather"])
    def test_models_that_ask_for_a_custom_kernel_first(self, op: str) -> None:
        from flashcomm.integrations.vllm_group import LowBitCommunicator

        takes: list[Any] = [None, "custom"]
        own = type("Own", (), {f"custom_{op}": lambda self, x: takes[-1], op: lambda self, x, dim: ("own", dim)})
        made: Any = object.__new__(type("Made", (LowBitCommunicator, own), {}))
        plain: Any = object.__new__(type("Plain", (LowBitCommunicator, type("Old", (), {})), {}))
        x, made.flashcomm, plain.flashcomm = torch.zeros(4, 4), None, None
        assert getattr(made, f"custom_{op}")(x) == "custom", "as without flashcomm"
        assert getattr(plain, f"custom_{op}")(x) is None, "older releases have no such kernel"
        assert getattr(made, op)(x, 0) == ("own", 0)
        answers: list[Any] = [None, "low-bit"]
        made.flashcomm = SimpleNamespace(sequence=SimpleNamespace(**{op: lambda x, dim: answers[-1]}))
        assert getattr(made, f"custom_{op}")(x) is None, "the model then calls the op, also when it is compiled"
        assert getattr(made, op)(x, 0) == "low-bit"
        answers.pop()
        assert getattr(made, op)(x, 0) == "custom", "a message that is not low-bit takes the kernel as before"
        assert getattr(made, op)(x, 1) == ("own", 1)
        takes.pop()
        assert getattr(made, op)(x, 0) == ("own", 0), "the kernel did not take it"

    def test_cuda_graphs_with_the_decode_format(self, integration: Any) -> None:
        from flashcomm.integrations.vllm_sequence import only_decodes

        config, decoding = standin.make_config(HIDDEN), {"a": SimpleNamespace(max_query_len=1)}
        for graphs, separate, want in (("FULL", True, True), ("FULL", False, False), ("PIECEWISE", True, False)):
            config.compilation_config.cudagraph_mode.separate_routine = lambda separate=separate: separate
            with standin.forward_context(decoding, graphs):
                assert only_decodes(config, captured=True) == want
                assert only_decodes(config, captured=False)

    def test_two_plugins_for_the_layers(
        self, integration: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        Plan(INT6, None, {"*": LayerPlan(INT4)}).save(tmp_path / "p.json")
        monkeypatch.setenv("FLASHCOMM_FORMAT", str(tmp_path / "p.json"))
        integration.layer_plugin()
        ours = standin.op_registry_oot["RowParallelLinear"]
        integration.layer_plugin()  # vLLM calls it in every process, sometimes twice
        assert standin.op_registry_oot == {"RowParallelLinear": ours}
        standin.op_registry_oot["RowParallelLinear"] = type("Theirs", (standin.RowParallelLinear,), {})
        with pytest.raises(SettingsError, match=r"another vLLM plugin .* took RowParallelLinear: choose one"):
            integration.layer_plugin()

    def test_two_plugins_for_the_platform(self, integration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
        with pytest.raises(RuntimeError, match=r"Only one platform plugin .*'flashcomm', 'other'"):
            standin.start({"flashcomm": integration.platform_plugin, "other": lambda: "a.B"})

    def test_entry_points_lead_to_functions(self) -> None:
        text = (ROOT / "pyproject.toml").read_text()
        for kind in ("platform_plugins", "general_plugins"):
            found = re.search(rf'\[project\.entry-points\."vllm\.{kind}"\]\nflashcomm = "([\w.]+):(\w+)"', text)
            assert found
            assert callable(getattr(importlib.import_module(found[1]), found[2]))


# ---------------------------------------------------------------------------------------------------------- vLLM itself

PYTHON = os.environ.get("TEST_VLLM_PYTHON", "")
only_asked = pytest.mark.skipif(not PYTHON, reason="vLLM itself, heavy: run scripts/test-vllm")


@only_asked
def test_the_stand_in_has_vllms_signatures() -> None:
    """vLLM's classes have every parameter of the stand-in's classes."""
    wanted = {
        "vllm.platforms.interface.Platform": standin.Platform,
        "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator": standin.CpuCommunicator,
        "vllm.model_executor.layers.linear.RowParallelLinear": standin.RowParallelLinear,
        "vllm.model_executor.custom_op.PluggableLayer": standin.PluggableLayer,
    }
    methods = {
        path: {
            name: list(inspect.signature(method).parameters)
            for name in ("__init__", "all_reduce", "destroy", "forward", "register_oot", *vars(standin.Platform))
            if callable(method := getattr(cls, name, None)) and name in vars(cls)
        }
        for path, cls in wanted.items()
    }
    code = (
        "import inspect, json, sys\n"
        "from vllm.utils.import_utils import resolve_obj_by_qualname as get\n"
        "asked = json.loads(sys.argv[1])\n"
        "print('RESULT', json.dumps({p: {n: list(inspect.signature(getattr(get(p), n)).parameters) for n in names}"
        " for p, names in asked.items()}))\n"
    )
    done = subprocess.run([PYTHON, "-c", code, json.dumps(methods)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.rpartition("RESULT ")[2]) == methods


@only_asked
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_vllm_generates_with_low_bit_all_reduces(how: str) -> None:
    command = [PYTHON, str(ROOT / "scripts" / "vllm_run.py"), "--json", "--formats", "none,int8"]
    done = subprocess.run(command + ["--compiled"] * (how == "compiled"), capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr
    plain, bf16, int8 = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps([bf16["report"], int8["report"]], indent=1))
    assert plain["report"] == {}, "without FLASHCOMM_FORMAT nothing is there"
    assert bf16["tokens"] == plain["tokens"], "bf16 is vLLM's own"
    assert not bf16["report"]["low_bit"]
    low_bit, own = int8["report"]["low_bit"]["all_reduce/one_shot"], int8["report"]["own"]
    assert low_bit["calls"] == 2 * 61, "two a layer and the embedding, for each prompt"
    assert 0.5 < low_bit["sent_bytes"] / (61 * sum(int8["prompt_tokens"]) * 576 * 2) < 0.54
    assert own["too small to pay"] >= 2 * 61 * 31
    agree = [
        next((i for i, (a, b) in enumerate(zip(*t, strict=True)) if a != b), len(t[0]))
        for t in zip(plain["tokens"], int8["tokens"], strict=True)
    ]
    print("tokens as without flashcomm:", agree)
    assert min(agree) >= 1, "greedy texts part at a near tie, but not at once"
    assert max(agree) == 32


@only_asked
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_vllm_decodes_in_the_decode_format(how: str, tmp_path: Path) -> None:
    Plan(WireFormat.parse("none"), WireFormat.parse("int8")).save(tmp_path / "p.json")
    command = [PYTHON, str(ROOT / "scripts" / "vllm_run.py"), "--json", "--together", "--formats"]
    command += [str(tmp_path / "p.json")] + ["--compiled"] * (how == "compiled")
    env = {**os.environ, "FLASHCOMM_MIN_BYTES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])[1]["report"]
    low_bit = report["low_bit"]["all_reduce/one_shot"]
    assert low_bit["calls"] == 31 * 61, "every step after the prompts"
    mixed = report["own"]["too small to pay"] // 61 - 1  # 1 if vLLM began before it had the second prompt
    assert mixed in (0, 1)
    assert report["own"]["too small to pay"] == 61 * (1 + mixed), "the batches with prompts"
    one, two = (Layout(WireFormat.parse("int8").reduce, 576, 2).nbytes(0, n * 576) for n in (1, 2))
    assert low_bit["sent_bytes"] == 61 * ((31 - mixed) * two + mixed * one), "of two sequences, or of the last"


@only_asked
@pytest.mark.timeout(1500)
def test_perplexity_rises_as_eval_predicts() -> None:
    """The intervals overlap. vLLM sums embeddings, too, which the simulator does not."""
    command = [PYTHON, str(ROOT / "scripts" / "vllm_run.py"), "--json", "--windows", "12", "--formats", "int8,int4-had"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    assert [row["format"] for row in rows] == ["int8", "int4-had"]
    for row in rows:
        print(row)
        assert row["low_bit_calls"] == 12 * 61
        assert row["low_pct"] < row["predicted_high_pct"]
        assert row["high_pct"] > row["predicted_low_pct"]
    assert rows[1]["low_pct"] > rows[0]["high_pct"] > 0
