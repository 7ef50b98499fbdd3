"""The sensitivity of layers, compared with hand-written code and with measured divergences."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import IDS, LAYERS, MODEL, needs_model, tiny, transformers
from torch import Tensor

from flashcomm import WireFormat, reference
from flashcomm.accuracy import sensitivity
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.wire.format import StepFormat


def test_it_is_half_the_square_of_gradient_times_error() -> None:
    """Compute it again with separate hooks, for the reduce and the gather step of one layer."""
    model, name, step = tiny(), LAYERS[2], StepFormat(3, 32, hadamard=True)
    found = sensitivity.measure(model, IDS, 2, [step])
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
        assert found.kl[name, which, step] == pytest.approx(want, rel=1e-3)
        snr = 10 * math.log10(total.square().sum() / error.square().sum())
        assert found.snr_db[name, which, step] == pytest.approx(snr, abs=0.01)
    both = found.kl[name, "reduce", step] + found.kl[name, "gather", step]
    assert found.kl_of(name, WireFormat(step, step)) == pytest.approx(both)
    assert found.kl_of(name, sensitivity.NONE) == 0.0
    assert all(p.requires_grad for p in model.parameters())


def test_conditioning_is_the_mean_and_the_balance_of_gradient_and_spread() -> None:
    """Channel 9 of a layer gets a spread 128 times as large. Its scale must show that."""
    model = tiny()
    module = model.get_submodule(LAYERS[1])
    with torch.no_grad():
        module.bias.zero_()
        module.weight[9] *= 128
    ids = torch.randint(0, 200, (4, 64))
    vectors = sensitivity.condition(model, ids, 2)
    assert set(vectors) == set(LAYERS)
    exponents = vectors[LAYERS[1]].scale_exponents
    assert exponents is not None
    assert exponents[9] <= exponents.median() - 3  # spread 2^7 larger at a like gradient: sqrt of it smaller
    assert exponents.dtype == torch.int8
    outputs: list[Tensor] = []
    with TensorParallel(model, 2, observer=lambda n, p, t: outputs.append(t) if n == LAYERS[1] else None):
        model(ids)
    rows = torch.cat(outputs).detach().flatten(0, 1)
    usual = rows[rows.norm(dim=1) <= 4 * rows.norm(dim=1).median()]
    mean = vectors[LAYERS[1]].channel_mean
    assert mean is not None
    assert torch.allclose(mean.float(), usual.mean(0), rtol=2**-8, atol=1e-6)


@needs_model
def test_it_predicts_the_measured_divergence_of_a_real_model() -> None:
    """The prediction is of second order, so it is closer with more bits. docs/accuracy.md has it on more text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.randint(1000, 40000, (2, 192), generator=torch.Generator().manual_seed(1))
    fmt = WireFormat.parse("int5-had")
    found = sensitivity.measure(model, ids, 2, [fmt.reduce])
    predicted = sum(found.kl.values())
    with torch.inference_mode():
        base = model(ids).logits.log_softmax(-1)
        with TensorParallel(model, 2, fmt, algorithm="two_shot"):
            low_bit = model(ids).logits.log_softmax(-1)
    measured = (base.exp() * (base - low_bit)).sum(-1).mean().item()
    assert 0.5 < predicted / measured < 2, (predicted, measured)
