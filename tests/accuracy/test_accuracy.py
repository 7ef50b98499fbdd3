"""Simulated ranks, prices of formats, budgets, and the measures of eval and probe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcomm import WireFormat, reference
from flashcomm.accuracy import evaluate, probe, sensitivity, texts, tune
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.errors import InputError, PlanError
from flashcomm.plan import LayerPlan, Plan
from flashcomm.ranks.launch import RankContext, run
from flashcomm.wire.format import StepFormat

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
MODEL = Path(__file__).parent.parent.parent / ".assets" / "smollm2-135m-instruct"
needs_model = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no model: run scripts/fetch_assets.py")
IDS = torch.arange(40).view(2, 20)


def tiny() -> Any:
    """A Llama with random weights and biases: 2 layers, 64 channels."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, attention_bias=True, mlp_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


LAYERS = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.o_proj", "mlp.down_proj")]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As on the ranks, because kernels cut their work by threads; given back, because other tests need threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestSimulation:
    @pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
    def test_every_sum_is_the_reference_of_the_partial_sums(self, algorithm: str) -> None:
        model, fmt = tiny(), WireFormat.parse("int4-g32-had/int6")
        module = model.get_submodule(LAYERS[3])
        seen: list[tuple[str, list[Tensor], Tensor]] = []
        inputs: list[Tensor] = []
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with (
            TensorParallel(model, 4, fmt, algorithm=algorithm, observer=lambda *v: seen.append(v)),
            torch.no_grad(),
        ):
            model(IDS)
        assert [name for name, *_ in seen] == LAYERS
        combine = reference.one_shot if algorithm == "one_shot" else reference.two_shot
        for _, partials, total in seen:
            assert len(partials) == 4
            assert torch.equal(total, combine(partials, fmt))
        _, partials, _ = seen[3]
        for rank, partial in enumerate(partials):
            columns = slice(32 * rank, 32 * rank + 32)
            want = inputs[0][..., columns] @ module.weight[:, columns].T
            torch.testing.assert_close(partial, want, rtol=1e-5, atol=1e-5)

    def test_lossless_ranks_compute_the_model_and_leave_it_as_it_was(self) -> None:
        model = tiny()
        with torch.inference_mode():
            want = model(IDS).logits
            with TensorParallel(model, 2) as ranks:
                torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
                ranks.plan = "int3"
                assert (model(IDS).logits - want).norm() > 0.01 * want.norm()
            assert torch.equal(model(IDS).logits, want)
        assert not any("forward" in vars(module) for module in model.modules())

    def test_bits_are_those_on_the_wire(self) -> None:
        """64 channels a row: 4 bits and a 16-bit word for 64 values; 6 bits and 24; 8 bits and 24 a gather step."""
        model = tiny()
        cases = (("int4", 4.25), ("int6-had", 6.375), ("bf16", 16.0), ("int4/int8", (4.25 + 8.375) / 2))
        with TensorParallel(model, 2, algorithm="two_shot") as ranks, torch.inference_mode():
            for text, bits in cases:
                ranks.plan = text
                ranks.algorithm = "native" if text == "bf16" else "two_shot"
                model(torch.arange(128).view(1, 128))
                assert ranks.bits_per_value == pytest.approx(bits, rel=0.002)  # sections are padded to 16 bytes

    def test_one_inside_another_is_left_as_it_was(self) -> None:
        model = tiny()
        with torch.inference_mode():
            plain = model(IDS).logits
            with TensorParallel(model, 2, "int4") as outer:
                want = model(IDS).logits
                with TensorParallel(model, 4, "int2"):
                    assert not torch.equal(model(IDS).logits, want)
                assert torch.equal(model(IDS).logits, want)
                outer.plan = "int2"
                assert not torch.equal(model(IDS).logits, want)
            assert torch.equal(model(IDS).logits, plain)

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="0 ranks asked for: at least 1"):
            TensorParallel(tiny(), 0)
        with pytest.raises(
            InputError, match=r"3 ranks cannot share the inputs of model.layers.0.self_attn.o_proj \(64\)"
        ):
            TensorParallel(tiny(), 3)
        with pytest.raises(InputError, match="Sequential has no row-parallel Linear layers"):
            TensorParallel(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2)
        with pytest.raises(PlanError, match="names layers that the model does not have"):
            TensorParallel(tiny(), 2, Plan(WireFormat.parse("int8"), layers={"x": LayerPlan(WireFormat.parse("int8"))}))

    @needs_model
    @pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
    def test_three_real_ranks_compute_the_same_bits(self, algorithm: str, one_thread: None) -> None:
        ids = torch.arange(1000, 1200).view(1, 200)
        plans = [Plan.of("int6-had"), smol_plan()]
        real = run(real_logits, 3, (ids, plans, algorithm), timeout_s=300)
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        with TensorParallel(model, 3, algorithm=algorithm) as ranks, torch.inference_mode():
            for plan, want in zip(plans, real, strict=True):
                ranks.plan = plan
                assert torch.equal(model(ids).logits, torch.tensor(want))


def smol_plan() -> Plan:
    """A plan with conditioning and different formats."""
    shift = torch.randint(-3, 4, (576,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    special = LayerPlan(WireFormat.parse("int4-had/int5-had"), shift, (shift / 8).bfloat16())
    return Plan(WireFormat.parse("int5"), layers={"model.layers.*.mlp.down_proj": special})


def real_logits(ctx: RankContext, ids: Tensor, plans: list[Plan], algorithm: str) -> list[Any]:
    from flashcomm.accuracy.models import load_model
    from flashcomm.integrations import transformers as integration

    torch.set_num_threads(1)
    integration.enable("bf16", algorithm=algorithm, min_bytes=0)
    model, _ = load_model(MODEL, ctx.world_size, ctx.device, torch.float32)
    out = []
    for plan in plans:
        integration.enable(plan, algorithm=algorithm, min_bytes=0)
        with torch.inference_mode():
            out.append(model(ids).logits.tolist())
    return out


class TestSensitivity:
    def test_a_price_is_half_the_square_of_gradient_times_error(self) -> None:
        """Worked out once more, with hooks of our own: one layer, its reduce and its gather step."""
        model, name, step = tiny(), LAYERS[2], StepFormat(3, 32, hadamard=True)
        costs = sensitivity.measure(model, IDS, 2, [step])
        parts: list[Tensor] = []
        totals: list[Tensor] = []

        def observe(layer: str, partials: list[Tensor], total: Tensor) -> None:
            if layer == name:
                total.retain_grad()
                parts.extend(p.detach() for p in partials)
                totals.append(total)

        with TensorParallel(model, 2, observer=observe):
            logits = model(inputs_embeds=model.get_input_embeddings()(IDS).detach().requires_grad_()).logits
        generator = torch.Generator().manual_seed(0)
        labels = torch.multinomial(logits.flatten(0, 1).detach().softmax(-1), 1, generator=generator)[:, 0]
        (-logits.flatten(0, 1).log_softmax(-1).gather(1, labels[:, None])).sum().backward()
        gradient, total = totals[0].grad, totals[0].detach()
        reduced = sum(reference.quantized_sum([p], step).view(total.shape) for p in parts) - sum(parts)
        gathered = reference.quantized_sum([total], step).view(total.shape) - total
        for which, error in (("reduce", reduced), ("gather", gathered)):
            want = 0.5 * (gradient * error).sum(-1).square().mean().item()
            assert costs.kl[name, which, step] == pytest.approx(want, rel=1e-3)
            snr = 10 * math.log10(total.square().sum() / error.square().sum())
            assert costs.snr_db[name, which, step] == pytest.approx(snr, abs=0.01)
        both = costs.kl[name, "reduce", step] + costs.kl[name, "gather", step]
        assert costs.of(name, WireFormat(step, step)) == pytest.approx(both)
        assert costs.of(name, sensitivity.UNCOMPRESSED) == 0.0
        assert all(p.requires_grad for p in model.parameters())

    def test_conditioning_is_the_mean_and_the_balance_of_gradient_and_spread(self) -> None:
        """Channel 9 of a layer gets a spread 128 times as large, which the shift shows; the offset is the mean."""
        model = tiny()
        module = model.get_submodule(LAYERS[1])
        with torch.no_grad():
            module.bias.zero_()
            module.weight[9] *= 128
        ids = torch.randint(0, 200, (4, 64))
        vectors = sensitivity.condition(model, ids, 2)
        assert set(vectors) == set(LAYERS)
        shift = vectors[LAYERS[1]].scale_exponents
        assert shift is not None
        assert shift[9] <= shift.median() - 3  # spread 2^7 larger at a like gradient: sqrt of it smaller
        assert shift.dtype == torch.int8
        outputs: list[Tensor] = []
        with TensorParallel(model, 2, observer=lambda n, p, t: outputs.append(t) if n == LAYERS[1] else None):
            model(ids)
        rows = torch.cat(outputs).detach().flatten(0, 1)
        usual = rows[rows.norm(dim=1) <= 4 * rows.norm(dim=1).median()]
        offset = vectors[LAYERS[1]].channel_mean
        assert offset is not None
        assert torch.allclose(offset.float(), usual.mean(0), rtol=2**-8, atol=1e-6)

    @needs_model
    def test_prices_predict_the_measured_divergence_of_a_real_model(self) -> None:
        """To second order, so the more bits the nearer; docs/accuracy.md has it on more text."""
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        ids = torch.randint(1000, 40000, (2, 192), generator=torch.Generator().manual_seed(1))
        fmt = WireFormat.parse("int5-had")
        costs = sensitivity.measure(model, ids, 2, [fmt.reduce])
        predicted = sum(costs.kl.values())
        with torch.inference_mode():
            base = model(ids).logits.log_softmax(-1)
            with TensorParallel(model, 2, fmt, algorithm="two_shot"):
                coded = model(ids).logits.log_softmax(-1)
        measured = (base.exp() * (base - coded)).sum(-1).mean().item()
        assert 0.5 < predicted / measured < 2, (predicted, measured)


class TestBudgets:
    def prices(self) -> tune.Prices:
        """Layers whose loss falls fourfold a bit from different heights; the first has a row twice as long."""
        formats = [WireFormat.parse(f"int{b}-had") for b in (3, 4, 5, 6)]
        heights = {"a": 8.0, "b": 1.0, "c": 0.05}
        menu = {n: [(f, f.bits, h * 4.0**-f.reduce.bits) for f in formats] for n, h in heights.items()}
        return tune.Prices(menu, {}, {"a": 2, "b": 1, "c": 1})

    def test_the_least_loss_at_given_bits(self) -> None:
        prices = self.prices()
        for bits in (3.5, 4.0, 4.6, 5.4, 6.0):
            chosen, found, kl = prices.within(bits=bits)
            assert found <= bits
            every = itertools.product(*prices.menu.values())
            costs = [
                (
                    sum(prices.values[n] * e[1] for n, e in zip(prices.menu, many, strict=True)) / 4,
                    sum(e[2] for e in many),
                )
                for many in every
            ]
            assert kl == min(loss for b, loss in costs if b <= found + 1e-9), (
                "no other choice of so many bits loses less"
            )
            assert found == pytest.approx(sum(prices.values[n] * f.bits for n, f in chosen.items()) / 4)

    def test_the_fewest_bits_at_a_given_loss(self) -> None:
        chosen, bits, kl = self.prices().within(kl=0.01)
        assert kl <= 0.01
        assert bits < 6
        assert chosen["a"].bits > chosen["c"].bits

    def test_budgets_that_nothing_meets_give_the_nearest(self) -> None:
        assert self.prices().within(bits=2.0)[1] == pytest.approx(3.25)
        assert {str(f) for f in self.prices().within(kl=0.0)[0].values()} == {"int6-had"}

    def test_a_plan_whose_measured_rise_is_too_high_is_tightened(self) -> None:
        seen: list[float] = []

        def measured(plan: Plan) -> float:
            seen.append(sum(part.format.bits for part in plan.layers.values()))
            return 0.03 if len(seen) < 3 else 0.008

        found = tune.tune(self.prices(), measured, rise=0.01)
        assert found.tries == 3
        assert seen[0] < seen[1] < seen[2]
        assert found.measured_rise == 0.008
        assert tune.tune(self.prices(), lambda plan: 0.5, rise=0.01).tries == 5

    def test_a_plan_far_inside_the_budget_is_loosened(self) -> None:
        """Rises that are a tenth of what prices say: more is lost, fewer bits are sent, the budget still met."""
        prices = self.prices()
        losses = {str(f): loss for f, _, loss in prices.menu["a"]}

        def measured(plan: Plan) -> float:
            return losses[str(plan.layers["a"].format)] / 10

        first = prices.within(kl=math.log1p(0.01))
        found = tune.tune(prices, measured, rise=0.01)
        assert found.measured_rise <= 0.01
        assert found.bits < first[1]

    def test_a_measurement_that_is_no_number(self) -> None:
        with pytest.raises(InputError, match="is no number: try it with --dtype fp32"):
            tune.tune(self.prices(), lambda plan: math.nan, rise=0.01)


class TestEvaluate:
    def test_rows_are_what_the_logits_say(self) -> None:
        """Perplexity, rise, KL and agreement once more from the logits themselves."""
        model, windows = tiny(), torch.randint(0, 200, (5, 24))
        fmt = Plan.of("int3")
        rows = evaluate.evaluate(TensorParallel(model, 2, algorithm="two_shot"), windows, 700, {"int3": fmt}, 6)
        with torch.inference_mode(), TensorParallel(model, 2, algorithm="two_shot") as ranks:
            base = model(windows).logits[:, :-1].log_softmax(-1)
            ranks.plan = fmt
            coded = model(windows).logits[:, :-1].log_softmax(-1)
        nats = [-lp.gather(-1, windows[:, 1:, None]).mean().item() for lp in (base, coded)]
        assert [r["format"] for r in rows] == ["bf16", "int3"]
        for row, n in zip(rows, nats, strict=True):
            assert row["perplexity"] == pytest.approx(math.exp(n), rel=1e-4)
            assert row["bits_per_byte"] == pytest.approx(n * 5 * 23 / math.log(2) / 700, rel=1e-4)
        assert rows[1]["rise_pct"] == pytest.approx(100 * math.expm1(nats[1] - nats[0]), abs=2e-3)
        assert rows[1]["low_pct"] < rows[1]["rise_pct"] < rows[1]["high_pct"]
        kl = (base.exp() * (base - coded)).sum(-1).mean().item()
        assert rows[1]["kl"] == pytest.approx(kl, rel=1e-3)
        same = (base.argmax(-1) == coded.argmax(-1)).float().mean().item()
        assert rows[1]["same_top1_pct"] == pytest.approx(100 * same, abs=0.01)
        assert 0 <= rows[1]["greedy_pct"] <= 100
        assert rows[0]["kl"] == rows[0]["rise_pct"] == 0

    def test_intervals(self) -> None:
        """Differences 0.1, 0.2, 0.3 of one token each: mean 0.2, standard error 0.1/sqrt(3), t(2) = 4.303."""
        mean, low, high = evaluate.rise([1.1, 1.2, 1.3], [1.0, 1.0, 1.0], 3)
        assert mean == pytest.approx(math.expm1(0.2))
        half = 4.303 * 0.1 / math.sqrt(3)
        assert low == pytest.approx(math.expm1(0.2 - half), rel=0.2)
        assert high == pytest.approx(math.expm1(0.2 + half), rel=0.1)

    @pytest.mark.parametrize(("freedom", "t"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (63, 1.998)])
    def test_student(self, freedom: int, t: float) -> None:
        """Against the printed table; the expansion is good to 1 %."""
        assert evaluate._student(freedom) == pytest.approx(t, rel=0.01)

    def test_agreement_counts_up_to_the_first_difference(self) -> None:
        base = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
        assert evaluate._agreement(base, torch.tensor([[1, 2, 9, 4], [1, 2, 3, 4]])) == 0.75


class Words:
    """A tokenizer whose tokens are words: ids are lengths of words."""

    def __call__(self, text: str, return_tensors: str = "", add_special_tokens: bool = True) -> Any:
        ids = [len(word) for word in text.split()]
        return type("Encoding", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})


class TestTexts:
    def test_windows_are_spread_evenly_from_the_first_to_the_last_token(self, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text(" ".join("x" * (1 + i) for i in range(50)))
        windows = texts.read_windows(tmp_path / "t.txt", Words(), 10, 3)
        assert windows[:, 0].tolist() == [1, 21, 41]
        assert windows[2, -1] == 50

    def test_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("a b c")
        with pytest.raises(InputError, match=r"t\.txt has 3 tokens, 2 windows of 512 need 1024: give a longer text"):
            texts.read_windows(tmp_path / "t.txt", Words(), 512, 2)
        with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
            texts.read_windows(tmp_path / "none.txt", Words(), 8, 1)
        (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
            texts.read_windows(tmp_path / "b.txt", Words(), 8, 1)


class TestProbe:
    @pytest.mark.parametrize("depth", probe.DEPTHS)
    def test_a_haystack_has_the_needle_at_its_depth_and_the_answer_at_its_end(self, depth: float) -> None:
        hay = torch.zeros(1000, dtype=torch.int64)
        ids, n = probe._haystack(Words(), hay, 200, depth, 48213)
        assert (ids.numel(), n) == (200, 1)
        assert ids[-1] == 5  # the number, five letters long
        (first,) = (ids != 0).nonzero()[0].tolist()
        assert first == int((200 - 8 - 7 - 1) * depth)

    def test_found_means_every_token_of_the_answer(self) -> None:
        logits = torch.zeros(2, 5)
        logits[0, 3] = logits[1, 4] = 9.0
        assert probe._score(logits, torch.tensor([3, 4]))[0]
        found, nats = probe._score(logits, torch.tensor([3, 2]))
        assert not found
        assert nats == pytest.approx(2 * math.log(math.exp(9) + 4) - 9, rel=1e-4)

    def test_generation_counts_tokens_before_the_first_difference(self) -> None:
        model = tiny()
        prompts = torch.randint(0, 200, (4, 8))
        plans = {"bf16 again": Plan.of("bf16"), "int2": Plan.of("int2")}
        rows = probe.generation(model, prompts, 5, plans, 2, "two_shot", 3)
        by_name = {row["format"]: row for row in rows}
        assert set(by_name) == {"one rank", "bf16 again", "int2"}
        assert by_name["bf16 again"]["never_pct"] == 100
        assert by_name["bf16 again"]["mean_same"] == 5
        assert by_name["int2"]["mean_same"] < 5
