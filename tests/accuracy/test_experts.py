"""Simulated expert parallelism, on a tiny mixture of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_model import IDS, tiny, transformers

from flashcomm import reference
from flashcomm.accuracy.evaluate import evaluate
from flashcomm.accuracy.experts import ExpertParallel
from flashcomm.errors import InputError
from flashcomm.plan import Plan
from flashcomm.wire.format import WireFormat


def tiny_mixture() -> Any:
    """A Mixtral with random weights: 2 layers, 64 channels, 4 experts, 2 of them for each token."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=200, initializer_range=0.2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


@torch.no_grad()
def test_experts_get_what_a_dispatch_delivers_and_a_combine_adds_their_results() -> None:
    model, fmt = tiny_mixture(), WireFormat.parse("int8/int4")
    experts = model.model.layers[0].mlp.experts
    x, weights = torch.randn(10, 64), torch.rand(10, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    delivered = reference.all_gather([x[:7], x[7:]], fmt)
    partials = [experts(delivered, index, weights * (index // 2 == rank)) for rank in range(2)]
    want = torch.cat(reference.reduce_scatter(partials, fmt, (7, 3)))
    exact = experts(x, index, weights)
    with ExpertParallel(model, 2, fmt) as ranks:
        assert torch.equal(experts(x, index, weights), want)
        assert 8 + 4 < 2 * ranks.bits_per_value < 8 + 4 + 2
        ranks.plan = Plan.of("none")
        torch.testing.assert_close(experts(x, index, weights), exact)
    assert torch.equal(experts(x, index, weights), exact), "the model is as before"


@torch.no_grad()
def test_evaluate_compares_formats_of_experts() -> None:
    plans = {name: Plan.of(name) for name in ("int8", "int8/int2", "int2")}
    base, *rows = evaluate(ExpertParallel(tiny_mixture(), 2), IDS, 100, plans)
    assert base["format"] == "none"
    assert [row["format"] for row in rows] == list(plans)
    int8, dispatch_int2, int2 = (row["kl"] for row in rows)
    assert 0 < int8 < dispatch_int2
    assert int8 < int2
    assert [round(row["bits"]) for row in rows] == [8, 5, 2]


def test_models_that_cannot_be_simulated() -> None:
    with pytest.raises(InputError, match=r"3 ranks cannot share the 4 experts of model\.layers\.0\.mlp\.experts"):
        ExpertParallel(tiny_mixture(), 3)
    with pytest.raises(InputError, match="LlamaForCausalLM has no mixture of experts"):
        ExpertParallel(tiny(), 2)
