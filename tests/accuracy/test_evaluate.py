"""The measures of `eval`."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import tiny

from flashcomm.accuracy import evaluate
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.plan import Plan


def test_rows_are_what_the_logits_say() -> None:
    """Compute perplexity, rise, KL and equal tokens again, directly from the logits."""
    model, windows = tiny(), torch.randint(0, 200, (5, 24))
    fmt = Plan.of("int3")
    rows = evaluate.evaluate(TensorParallel(model, 2, algorithm="two_shot"), windows, 700, {"int3": fmt}, 6)
    with torch.inference_mode(), TensorParallel(model, 2, algorithm="two_shot") as ranks:
        base = model(windows).logits[:, :-1].log_softmax(-1)
        ranks.plan = fmt
        low_bit = model(windows).logits[:, :-1].log_softmax(-1)
    nats = [-lp.gather(-1, windows[:, 1:, None]).mean().item() for lp in (base, low_bit)]
    assert [r["format"] for r in rows] == ["none", "int3"]
    for row, n in zip(rows, nats, strict=True):
        assert row["perplexity"] == pytest.approx(math.exp(n), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(n * 5 * 23 / math.log(2) / 700, rel=1e-4)
    assert rows[1]["rise_pct"] == pytest.approx(100 * math.expm1(nats[1] - nats[0]), abs=2e-3)
    assert rows[1]["low_pct"] < rows[1]["rise_pct"] < rows[1]["high_pct"]
    kl = (base.exp() * (base - low_bit)).sum(-1).mean().item()
    assert rows[1]["kl"] == pytest.approx(kl, rel=1e-3)
    same = (base.argmax(-1) == low_bit.argmax(-1)).float().mean().item()
    assert rows[1]["same_top1_pct"] == pytest.approx(100 * same, abs=0.01)
    assert 0 <= rows[1]["greedy_pct"] <= 100
    assert rows[0]["kl"] == rows[0]["rise_pct"] == 0


def test_intervals() -> None:
    """Differences 0.1, 0.2, 0.3 of one token each: mean 0.2, standard error 0.1/sqrt(3), t(2) = 4.303."""
    mean, low, high = evaluate.rise([1.1, 1.2, 1.3], [1.0, 1.0, 1.0], 3)
    assert mean == pytest.approx(math.expm1(0.2))
    half = 4.303 * 0.1 / math.sqrt(3)
    assert low == pytest.approx(math.expm1(0.2 - half), rel=0.2)
    assert high == pytest.approx(math.expm1(0.2 + half), rel=0.1)


@pytest.mark.parametrize(("freedom", "t"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (63, 1.998)])
def test_student(freedom: int, t: float) -> None:
    """Compare with the printed table. The expansion is accurate to 1 %."""
    assert evaluate._student(freedom) == pytest.approx(t, rel=0.01)


def test_agreement_counts_up_to_the_first_difference() -> None:
    base = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert evaluate._agreed_share(base, torch.tensor([[1, 2, 9, 4], [1, 2, 3, 4]])) == 0.75
