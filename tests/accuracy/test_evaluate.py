"""The measures of `eval`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_model import tiny, transformers

from flashcomm.accuracy import evaluate, head
from flashcomm.accuracy.intervals import Interval, student
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


def test_rows_come_one_by_one_and_logits_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of 16 tokens the figures are those of one piece, and no logits of more tokens ever exist."""
    model, windows = tiny(), torch.randint(0, 200, (5, 24))
    ranks = TensorParallel(model, 2, algorithm="two_shot")
    plans = {"int3": Plan.of("int3"), "int5": Plan.of("int5")}
    events: list[Any] = []
    whole = evaluate.evaluate(ranks, windows, 1, plans, 0, lambda *step: events.append(step), events.append)
    assert [e for e in events if isinstance(e, dict)] == whole
    last = {e["format"]: events[i - 1] for i, e in enumerate(events) if isinstance(e, dict)}
    assert last == {
        "none": ("2 ranks, none", 5, 15),
        "int3": ("2 ranks, int3", 10, 15),
        "int5": ("2 ranks, int5", 15, 15),
    }
    monkeypatch.setattr(head, "PIECE_BYTES", 1)
    most: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: most.append(out.shape[-2]))
    for a, b in zip(whole, evaluate.evaluate(ranks, windows, 1, plans), strict=True):
        assert a == {k: pytest.approx(v, rel=1e-4, abs=2e-4) if isinstance(v, float) else v for k, v in b.items()}
    assert max(most) == 16


def test_logits_are_those_of_the_model_with_its_scaling() -> None:
    """Gemma 2 caps its logits behind the head."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05, initializer_range=0.5,
    )  # fmt: skip
    model, ids = transformers.Gemma2ForCausalLM(config).eval(), torch.arange(14).view(2, 7)
    both = head.Head(model)
    with torch.inference_mode():
        want = model(ids).logits
        got = both.logits(both.hidden(input_ids=ids).flatten(0, 1))
        assert torch.allclose(got.view(want.shape), want, rtol=1e-5, atol=1e-7)
        assert torch.equal(model(ids).logits, want)  # left as it was
    assert want.abs().max() <= 0.05


def test_intervals() -> None:
    """Values 0.1, 0.2, 0.3: mean 0.2, standard error 0.1/sqrt(3), t(2) = 4.303."""
    found = Interval.of([0.1, 0.2, 0.3])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert found.expm1() == pytest.approx([math.expm1(x) for x in found])
    assert found.columns("x", "low", "high", 2, 0.01) == {"x": 20.0, "low": -4.84, "high": 44.84}


def test_one_value_has_no_interval() -> None:
    found = Interval.of([0.1])
    assert found.high == math.inf
    assert found.expm1().columns("x", "low", "high", 4) == {"x": 0.1052, "low": None, "high": None}


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (63, 1.998)]
)
def test_student(freedom: int, t: float) -> None:
    """Compare with the printed table."""
    assert student(freedom) == pytest.approx(t, rel=0.01)


def test_agreement_counts_up_to_the_first_difference() -> None:
    base = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert evaluate._agreed_share(base, torch.tensor([[1, 2, 9, 4], [1, 2, 3, 4]])) == 0.75
