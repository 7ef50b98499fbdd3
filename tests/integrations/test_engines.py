"""The seams: the c10d backend and transformers, in real processes over gloo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm import WireFormat, reference
from flashcomm.errors import FormatError, PlanError, SettingsError, UnavailableError
from flashcomm.ranks.launch import RankContext, run

FMT = WireFormat.parse("int4")


def big(rank: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(64, 1152, generator=torch.Generator().manual_seed(rank)).to(dtype)


def use_backend(ctx: RankContext, path: str) -> None:
    """Replace the launcher's gloo group by one of our backend."""
    import flashcomm.integrations.process_group  # noqa: F401

    dist.destroy_process_group()
    dist.init_process_group(
        "flashcomm", store=dist.FileStore(path, ctx.world_size), rank=ctx.rank, world_size=ctx.world_size
    )


def c10d_sums(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    everybody = [big(r) for r in range(ctx.world_size)]
    want = reference.two_shot(everybody, FMT)
    x = everybody[ctx.rank].clone()
    assert dist.all_reduce(x) is None
    assert torch.equal(x, want)

    x = everybody[ctx.rank].clone()
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.is_completed()
    assert torch.equal(x, want)

    from torch.distributed import _functional_collectives as functional

    assert torch.equal(functional.all_reduce(everybody[ctx.rank], "sum", dist.group.WORLD), want)

    strided = everybody[ctx.rank].t().contiguous().t()
    dist.all_reduce(strided)
    assert torch.equal(strided, want)

    from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (ctx.world_size,))
    partial = DTensor.from_local(everybody[ctx.rank], mesh, [Partial()])
    assert torch.equal(partial.redistribute(mesh, [Replicate()]).to_local(), want)


def c10d_plan(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    everybody = [big(r) for r in range(ctx.world_size)]
    x = everybody[ctx.rank].clone()
    dist.all_reduce(x)
    assert torch.equal(x, reference.two_shot(everybody, FMT))
    one_token = [t[:, None] for t in everybody]
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
    told = mine.clone()
    dist.broadcast(told, 1)
    assert told.tolist() == [1, 1, 1]
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
    assert not group._communicators, "nothing of this was ours"


def c10d_settings_differ(ctx: RankContext, path: str) -> None:
    os.environ["FLASHCOMM_MIN_BYTES"] = "1M" if ctx.rank else "64K"
    use_backend(ctx, path)


def c10d_stress(ctx: RankContext, path: str) -> None:
    """Many collectives whose tensors die at once, each followed by a barrier: where the GIL was held, this hung."""
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

    def test_many_small_collectives(self, tmp_path: Path) -> None:
        run(c10d_stress, 2, (str(tmp_path / "store"),), timeout_s=60)

    def test_every_collective_is_passed_on(self) -> None:
        """Nothing that torch could call on a group is left to the inherited method, which would hold the GIL."""
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


def tiny_llama(path: Path, bias: bool = True) -> None:
    """A Llama with random weights that 2 ranks can share, saved to path; its row-parallel Linears have biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, attention_bias=bias, mlp_bias=bias, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)


def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    ).eval()


IDS = torch.arange(48).view(1, 48)


def seam_equals_by_hand(ctx: RankContext, path: str) -> None:
    """Two all-reduces a layer, each of them the reference's sum of what the ranks' Linears give, then the bias."""
    from flashcomm.integrations import transformers as integration

    integration.enable("int4", min_bytes=0)
    model = load(path)
    partials: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    reduce = integration.Reducer.__call__

    def spy(self: Any, partial: torch.Tensor, mesh: Any, layer: str) -> torch.Tensor:
        partials.append(partial.clone())
        outputs.append(reduce(self, partial, mesh, layer))
        return outputs[-1].clone()

    integration.Reducer.__call__ = spy  # type: ignore[method-assign]
    with torch.inference_mode():
        model(IDS)
    assert len(partials) == 4
    for mine, out in zip(partials, outputs, strict=True):
        everybody = [torch.empty_like(mine) for _ in range(ctx.world_size)]
        dist.all_gather(everybody, mine)
        assert torch.equal(out, reference.one_shot(everybody, FMT))
        assert not torch.equal(out, sum(everybody))  # type: ignore[arg-type]
    (comm,) = integration.communicators()
    assert dict(comm.calls) == {"all_reduce/one_shot": 4}


def seam_lossless_equals_transformers(ctx: RankContext, path: str) -> None:
    """bf16 (not compressed), skip, disable, training: as transformers alone; int8: close to it; switching works."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel

    from flashcomm.integrations import transformers as integration

    plain = load(path)
    integration.enable("bf16")
    ours = load(path)
    with torch.inference_mode():
        want, got = plain(IDS).logits, ours(IDS).logits
        assert torch.equal(want, got)
        integration.enable("int8", min_bytes=0)
        coded = ours(IDS).logits
        assert not torch.equal(want, coded)
        assert ((want - coded).norm() / want.norm()).item() < 0.05
        assert torch.equal(plain(IDS).logits, want), "models loaded before are left alone"
        with integration.without_all_reduce():
            assert not torch.equal(ours(IDS).logits, want)
        integration.enable("bf16")
        assert torch.equal(ours(IDS).logits, want)
    with torch.enable_grad():
        torch.testing.assert_close(ours(IDS).logits.detach(), want, rtol=1e-4, atol=1e-4)
    integration.disable()
    assert type(ALL_PARALLEL_STYLES["rowwise"]) is RowwiseParallel
    with torch.inference_mode():
        assert torch.equal(load(path)(IDS).logits, want)


def seam_takes_a_plan(ctx: RankContext, path: str, plan_file: str) -> None:
    """Each layer's format is used, conditioning as `Plan` does it, the decode format for single tokens."""
    from flashcomm.integrations import transformers as integration
    from flashcomm.plan import Plan

    plan = Plan.load(Path(plan_file))
    integration.enable(plan_file, min_bytes=0)
    model = load(path)
    integration.check_plan(model)
    seen: list[tuple[torch.Tensor, str, torch.Tensor]] = []
    reduce = integration.Reducer.__call__

    def spy(self: Any, partial: torch.Tensor, mesh: Any, layer: str) -> torch.Tensor:
        seen.append((partial.clone(), layer, reduce(self, partial, mesh, layer).clone()))
        return seen[-1][2].clone()

    integration.Reducer.__call__ = spy  # type: ignore[method-assign]
    with torch.inference_mode():
        model(IDS)
        model(IDS[:, :1])
    assert len(seen) == 8
    for mine, layer, out in seen:
        everybody = [torch.empty_like(mine) for _ in range(ctx.world_size)]
        dist.all_gather(everybody, mine)
        formats = {plan.format_of(layer, x) for x in everybody}
        want = "int8" if mine.shape[1] == 1 else "int3-had" if layer == "model.layers.1.mlp.down_proj" else "int6-g32"
        assert {str(f) for f in formats} == {want}
        total = reference.one_shot(
            [plan.before_reduce(layer, x, ctx.world_size) for x in everybody], WireFormat.parse(want)
        )
        assert torch.equal(out, plan.after_reduce(layer, total, ctx.world_size, total.dtype))


def seam_plans_differ(ctx: RankContext, path: str) -> None:
    from flashcomm.integrations import transformers as integration
    from flashcomm.plan import LayerPlan, Plan

    shift = torch.full((64,), 2 * ctx.rank, dtype=torch.int8)
    integration.enable(Plan(FMT, layers={"*": LayerPlan(FMT, shift, torch.zeros(64).bfloat16())}), min_bytes=0)
    told = r"settings differ between ranks; give all of them the same:\n  plan: rank 0"
    with torch.inference_mode(), pytest.raises(SettingsError, match=told):
        load(path)(IDS)


def seam_leaves_native_sums_alone(ctx: RankContext, path: str) -> None:
    """What is not coded is not conditioned: below min_bytes the logits are those of no plan at all."""
    from flashcomm.integrations import transformers as integration
    from flashcomm.plan import LayerPlan, Plan

    integration.enable("bf16")
    model = load(path)
    with torch.inference_mode():
        want = model(IDS).logits
        vectors = LayerPlan(FMT, torch.ones(64, dtype=torch.int8), torch.full((64,), 0.3).bfloat16())
        integration.enable(Plan(FMT, layers={"*": vectors}), min_bytes="1M")
        assert torch.equal(model(IDS).logits, want)


class TestTransformers:
    def test_plans_that_differ_between_ranks(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        run(seam_plans_differ, 2, (str(tmp_path),))

    def test_what_is_not_coded_is_not_conditioned(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        run(seam_leaves_native_sums_alone, 2, (str(tmp_path),))

    def test_a_plan_in_place_of_a_format(self, tmp_path: Path) -> None:
        from flashcomm.plan import LayerPlan, Plan

        tiny_llama(tmp_path)
        shift = torch.randint(-3, 4, (64,), dtype=torch.int8)
        special = LayerPlan(WireFormat.parse("int3-had"), shift, torch.randn(64).bfloat16())
        plan = Plan(WireFormat.parse("int6-g32"), WireFormat.parse("int8"), {"*.1.mlp.down_proj": special})
        plan.save(tmp_path / "plan.json")
        run(seam_takes_a_plan, 2, (str(tmp_path), str(tmp_path / "plan.json")))

    def test_a_plan_for_another_model(self, tmp_path: Path) -> None:
        from flashcomm.integrations import transformers as integration
        from flashcomm.plan import LayerPlan, Plan

        Plan(WireFormat.parse("int8"), None, {"h.*.c_proj": LayerPlan(FMT)}).save(tmp_path / "plan.json")
        integration.enable(str(tmp_path / "plan.json"))
        model = torch.nn.Linear(4, 4)
        model._flashcomm_layer, model.config = "model.layers.0.mlp.down_proj", None
        with pytest.raises(PlanError, match=r"names layers that the model does not have \(h\.\*\.c_proj\)"):
            integration.check_plan(model)
        integration.disable()

    def test_every_reduction_is_the_reference(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        run(seam_equals_by_hand, 2, (str(tmp_path),))

    def test_lossless_is_transformers_own_and_formats_switch(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        run(seam_lossless_equals_transformers, 2, (str(tmp_path),))

    @pytest.mark.parametrize("gone", ["transform_output_post_forward", "style 'rowwise_rep'"])
    def test_a_transformers_that_does_not_fit(self, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.distributed.tensor_parallel import RowwiseParallel

        from flashcomm.integrations import transformers as integration

        if gone.startswith("style"):
            styles = {name: RowwiseParallel for name in integration.STYLES if repr(name) not in gone}
            monkeypatch.setattr(integration, "ALL_PARALLEL_STYLES", styles)
        else:
            monkeypatch.setattr(integration, "RowwiseParallel", type("Other", (), {"validate_param": None}))
        with pytest.raises(UnavailableError, match=rf"transformers \S+ has no {gone} in its tensor parallelism"):
            integration.enable("int8")
        assert integration.communicators() == []

    def test_wrong_settings_are_refused_at_once(self) -> None:
        from flashcomm.integrations import transformers as integration

        with pytest.raises(FormatError):
            integration.enable("int12")
        with pytest.raises(SettingsError):
            integration.enable("int4", algorithm="ring")
        assert integration.communicators() == []
