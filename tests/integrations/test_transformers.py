"""The transformers integration, in real processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm import WireFormat, reference
from flashcomm.errors import FormatError, PlanError, SettingsError, UnavailableError
from flashcomm.ranks.launch import RankContext, run

FMT = WireFormat.parse("int4")


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


def equals_by_hand(ctx: RankContext, path: str) -> None:
    """Each layer has two all-reduces, which equal the reference's sum of the partial sums, plus the bias."""
    from flashcomm.integrations import transformers as integration

    integration.enable("int4", min_bytes=0)
    model = load(path)
    partials: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    reduce = integration.RowwiseAllReduce.__call__

    def spy(self: Any, partial: torch.Tensor, mesh: Any, layer: str) -> torch.Tensor:
        partials.append(partial.clone())
        outputs.append(reduce(self, partial, mesh, layer))
        return outputs[-1].clone()

    integration.RowwiseAllReduce.__call__ = spy  # type: ignore[method-assign]
    with torch.inference_mode():
        model(IDS)
    assert len(partials) == 4
    for mine, out in zip(partials, outputs, strict=True):
        inputs = [torch.empty_like(mine) for _ in range(ctx.world_size)]
        dist.all_gather(inputs, mine)
        assert torch.equal(out, reference.one_shot(inputs, FMT))
        assert not torch.equal(out, sum(inputs))  # type: ignore[arg-type]
    (comm,) = integration.communicators()
    assert comm.calls == {"all_reduce/one_shot": 4}
    route = comm.explain(partials[0].shape, partials[0].dtype).route
    assert route.transport == "process_group"
    assert comm.sent == {"all_reduce/one_shot": 4 * route.wire_bytes}


def switches_formats(ctx: RankContext, path: str) -> None:
    """Uncompressed, disabled and training equal transformers alone. int8 is close to it. Formats can be switched."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel

    from flashcomm.integrations import transformers as integration

    plain = load(path)
    integration.enable("none")
    ours = load(path)
    with torch.inference_mode():
        want, got = plain(IDS).logits, ours(IDS).logits
        assert torch.equal(want, got)
        integration.enable("int8", min_bytes=0)
        low_bit = ours(IDS).logits
        assert not torch.equal(want, low_bit)
        assert ((want - low_bit).norm() / want.norm()).item() < 0.05
        assert torch.equal(plain(IDS).logits, want), "models loaded before are left alone"
        with integration.without_all_reduce():
            assert not torch.equal(ours(IDS).logits, want)
        integration.enable("none")
        assert torch.equal(ours(IDS).logits, want)
    with torch.enable_grad():
        torch.testing.assert_close(ours(IDS).logits.detach(), want, rtol=1e-4, atol=1e-4)
    integration.disable()
    assert type(ALL_PARALLEL_STYLES["rowwise"]) is RowwiseParallel
    with torch.inference_mode():
        assert torch.equal(load(path)(IDS).logits, want)


def takes_a_plan(ctx: RankContext, path: str, plan_file: str) -> None:
    """Each layer uses its format and scaling of the plan. Single tokens use the decode format."""
    from flashcomm.integrations import transformers as integration
    from flashcomm.plan import Plan

    plan = Plan.load(Path(plan_file))
    integration.enable(plan_file, min_bytes=0)
    model = load(path)
    integration.check_plan(model)
    seen: list[tuple[torch.Tensor, str, torch.Tensor]] = []
    reduce = integration.RowwiseAllReduce.__call__

    def spy(self: Any, partial: torch.Tensor, mesh: Any, layer: str) -> torch.Tensor:
        seen.append((partial.clone(), layer, reduce(self, partial, mesh, layer).clone()))
        return seen[-1][2].clone()

    integration.RowwiseAllReduce.__call__ = spy  # type: ignore[method-assign]
    with torch.inference_mode():
        model(IDS)
        model(IDS[:, :1])
    assert len(seen) == 8
    for mine, layer, out in seen:
        inputs = [torch.empty_like(mine) for _ in range(ctx.world_size)]
        dist.all_gather(inputs, mine)
        formats = {plan.format_of(layer, x) for x in inputs}
        want = "int8" if mine.shape[1] == 1 else "int3-had" if layer == "model.layers.1.mlp.down_proj" else "int6-g32"
        assert {str(f) for f in formats} == {want}
        total = reference.one_shot(
            [plan.before_reduce(layer, x, ctx.world_size) for x in inputs], WireFormat.parse(want)
        )
        assert torch.equal(out, plan.after_reduce(layer, total, ctx.world_size, total.dtype))


def plans_differ(ctx: RankContext, path: str) -> None:
    from flashcomm.integrations import transformers as integration
    from flashcomm.plan import LayerPlan, Plan

    shift = torch.full((64,), 2 * ctx.rank, dtype=torch.int8)
    integration.enable(Plan(FMT, layers={"*": LayerPlan(FMT, shift, torch.zeros(64).bfloat16())}), min_bytes=0)
    message = r"settings differ between ranks; use the same on all ranks:\n  plan: rank 0"
    with torch.inference_mode(), pytest.raises(SettingsError, match=message):
        load(path)(IDS)


def leaves_uncompressed_sums_alone(ctx: RankContext, path: str) -> None:
    """Messages that are not low-bit are not scaled: below min_bytes the logits are those without a plan."""
    from flashcomm.integrations import transformers as integration
    from flashcomm.plan import LayerPlan, Plan

    integration.enable("none")
    model = load(path)
    with torch.inference_mode():
        want = model(IDS).logits
        vectors = LayerPlan(FMT, torch.ones(64, dtype=torch.int8), torch.full((64,), 0.3).bfloat16())
        integration.enable(Plan(FMT, layers={"*": vectors}), min_bytes="1M")
        assert torch.equal(model(IDS).logits, want)
    assert [set(comm.calls) for comm in integration.communicators()] == [{"all_reduce/backend"}] * 2


def compiles(ctx: RankContext, path: str) -> None:
    """A compiled model, biases included, has the bits of the uncompiled one, also after a change of format."""
    from flashcomm.integrations import transformers as integration
    from flashcomm.plan import LayerPlan, Plan

    plan = Plan(WireFormat.parse("int6-g32"), layers={"*.1.mlp.down_proj": LayerPlan(WireFormat.parse("int3-had"))})
    integration.enable(plan, min_bytes=0)
    model = load(path)
    compiled = torch.compile(model, backend="eager")
    for chosen in (plan, "int4"):
        integration.enable(chosen, min_bytes=0)
        with torch.inference_mode():
            want = model(IDS, use_cache=False).logits
            assert torch.equal(compiled(IDS, use_cache=False).logits, want)
    assert [comm.calls for comm in integration.communicators()] == [{"all_reduce/one_shot": 8}] * 2


class TestTransformers:
    def test_compiled(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        run(compiles, 2, (str(tmp_path),))

    def test_plans_that_differ_between_ranks(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        run(plans_differ, 2, (str(tmp_path),))

    def test_what_is_not_low_bit_is_not_scaled(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        run(leaves_uncompressed_sums_alone, 2, (str(tmp_path),))

    def test_a_plan_in_place_of_a_format(self, tmp_path: Path) -> None:
        from flashcomm.plan import LayerPlan, Plan

        tiny_llama(tmp_path)
        shift = torch.randint(-3, 4, (64,), dtype=torch.int8)
        special = LayerPlan(WireFormat.parse("int3-had"), shift, torch.randn(64).bfloat16())
        plan = Plan(WireFormat.parse("int6-g32"), WireFormat.parse("int8"), {"*.1.mlp.down_proj": special})
        plan.save(tmp_path / "plan.json")
        run(takes_a_plan, 2, (str(tmp_path), str(tmp_path / "plan.json")))

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
        run(equals_by_hand, 2, (str(tmp_path),))

    def test_uncompressed_is_transformers_own_and_formats_switch(self, tmp_path: Path) -> None:
        tiny_llama(tmp_path)
        run(switches_formats, 2, (str(tmp_path),))

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
