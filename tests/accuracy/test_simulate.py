"""Simulated ranks give the same results as real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_model import IDS, LAYERS, MODEL, needs_model, tiny, transformers
from torch import Tensor

from flashcomm import WireFormat, reference
from flashcomm.accuracy import simulate
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.errors import InputError, PlanError
from flashcomm.plan import LayerPlan, Plan
from flashcomm.testing import RankContext, run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, like the ranks, because kernels split their work by threads. Restored for other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_every_sum_is_the_reference_of_the_partial_sums(algorithm: str) -> None:
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


def test_uncompressed_ranks_compute_the_model_and_leave_it_as_it_was() -> None:
    model = tiny()
    with torch.inference_mode():
        want = model(IDS).logits
        with TensorParallel(model, 2) as ranks:
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
            ranks.plan = "int3"
            assert (model(IDS).logits - want).norm() > 0.01 * want.norm()
        assert torch.equal(model(IDS).logits, want)
    assert not any("forward" in vars(module) for module in model.modules())


def test_bits_are_those_on_the_wire() -> None:
    """Rows have 64 channels. Each group of 64 values adds a 16-bit word to 4 bits per value, or 24 bits to 6 or 8."""
    model = tiny()
    cases = (("int4", 4.25), ("int6-had", 6.375), ("none", 16.0), ("int4/int8", (4.25 + 8.375) / 2))
    with TensorParallel(model, 2, algorithm="two_shot") as ranks, torch.inference_mode():
        for text, bits in cases:
            ranks.plan = text
            ranks.algorithm = "backend" if text == "none" else "two_shot"
            model(torch.arange(128).view(1, 128))
            assert ranks.bits_per_value == pytest.approx(bits, rel=0.002)  # sections are padded to 16 bytes


def test_one_inside_another_is_left_as_it_was() -> None:
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


@pytest.mark.parametrize(("kv_heads", "world_size", "shards"), [(1, 4, 1), (2, 4, 2), (2, 2, 2), (4, 2, 2)])
def test_ranks_that_share_a_kv_head_compute_all_of_it(
    kv_heads: int, world_size: int, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM does: a rank never computes a part of a head."""
    model = tiny(kv_heads)
    key, seen = model.get_submodule("model.layers.0.self_attn.k_proj"), []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.untyped_storage().data_ptr() == key.weight.untyped_storage().data_ptr():
            seen.append((weight.storage_offset() // 64, len(weight)))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(simulate, "linear", linear)
    with TensorParallel(model, world_size), torch.no_grad():
        model(IDS)
    size = 16 * kv_heads // shards
    assert seen == [(i * size, size) for i in range(shards)]


def test_refusals() -> None:
    with pytest.raises(InputError, match="world_size=0: give at least 1 rank"):
        TensorParallel(tiny(), 0)
    with pytest.raises(InputError, match=r"3 ranks cannot share the inputs of model.layers.0.self_attn.o_proj \(64\)"):
        TensorParallel(tiny(), 3)
    with pytest.raises(InputError, match="Sequential has no row-parallel Linear layers"):
        TensorParallel(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2)
    with pytest.raises(PlanError, match="names layers that the model does not have"):
        TensorParallel(tiny(), 2, Plan(WireFormat.parse("int8"), layers={"x": LayerPlan(WireFormat.parse("int8"))}))


@needs_model
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_three_real_ranks_compute_the_same_bits(algorithm: str, one_thread: None) -> None:
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
    exponents = torch.randint(-3, 4, (576,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    special = LayerPlan(WireFormat.parse("int4-had/int5-had"), exponents, (exponents / 8).bfloat16())
    return Plan(WireFormat.parse("int5"), layers={"model.layers.*.mlp.down_proj": special})


def real_logits(ctx: RankContext, ids: Tensor, plans: list[Plan], algorithm: str) -> list[Any]:
    from flashcomm.accuracy.models import load_model
    from flashcomm.integrations import transformers as integration

    torch.set_num_threads(1)
    integration.enable("none", algorithm=algorithm, min_bytes=0)
    model, _ = load_model(MODEL, ctx.world_size, ctx.device, torch.float32)
    out = []
    for plan in plans:
        integration.enable(plan, algorithm=algorithm, min_bytes=0)
        with torch.inference_mode():
            out.append(model(ids).logits.tolist())
    return out
