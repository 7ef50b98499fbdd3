"""Plans that meet a budget."""

from __future__ import annotations

import itertools
import math

import pytest

from flashcomm import WireFormat
from flashcomm.accuracy import tune
from flashcomm.errors import InputError
from flashcomm.plan import Plan


def candidates() -> tune.Candidates:
    """Layers whose loss falls fourfold per bit, from different values. The first has rows twice as long."""
    formats = [WireFormat.parse(f"int{b}-had") for b in (3, 4, 5, 6)]
    heights = {"a": 8.0, "b": 1.0, "c": 0.05}
    by_layer = {n: [tune.Candidate(f, f.bits, h * 4.0**-f.reduce.bits) for f in formats] for n, h in heights.items()}
    return tune.Candidates(by_layer, {}, {"a": 2, "b": 1, "c": 1})


@pytest.mark.parametrize("bits", [3.5, 4.0, 4.6, 5.4, 6.0])
def test_the_least_loss_at_given_bits(bits: float) -> None:
    """Compare with all possible choices."""
    given = candidates()
    found = given.within(bits=bits)
    assert found.bits <= bits
    shares = [given.numel[name] / 4 for name in given.by_layer]
    every = [
        (sum(share * c.bits for share, c in zip(shares, many, strict=True)), sum(c.kl for c in many))
        for many in itertools.product(*given.by_layer.values())
    ]
    assert found.kl == min(kl for b, kl in every if b <= found.bits + 1e-9)
    assert found.bits == pytest.approx(sum(given.numel[n] * f.bits for n, f in found.formats.items()) / 4)


def test_the_fewest_bits_at_a_given_loss() -> None:
    found = candidates().within(kl=0.01)
    assert found.kl <= 0.01
    assert found.bits < 6
    assert found.formats["a"].bits > found.formats["c"].bits


def test_budgets_that_nothing_meets_give_the_nearest() -> None:
    assert candidates().within(bits=2.0).bits == pytest.approx(3.25)
    assert {str(f) for f in candidates().within(kl=0.0).formats.values()} == {"int6-had"}


def test_a_plan_whose_measured_rise_is_too_high_is_tightened() -> None:
    seen: list[float] = []

    def measured(plan: Plan) -> float:
        seen.append(sum(part.format.bits for part in plan.layers.values()))
        return 0.03 if len(seen) < 3 else 0.008

    found = tune.tune(candidates(), measured, rise=0.01)
    assert found.tries == 3
    assert seen[0] < seen[1] < seen[2]
    assert found.measured_rise == 0.008
    assert tune.tune(candidates(), lambda plan: 0.5, rise=0.01).tries == 5


def test_a_plan_far_inside_the_budget_is_loosened() -> None:
    """If rises are a tenth of those predicted, fewer bits are sent, and the budget is still met."""
    given = candidates()
    losses = {str(c.format): c.kl for c in given.by_layer["a"]}

    def measured(plan: Plan) -> float:
        return losses[str(plan.layers["a"].format)] / 10

    first = given.within(kl=math.log1p(0.01))
    found = tune.tune(given, measured, rise=0.01)
    assert found.measured_rise <= 0.01
    assert found.bits < first.bits


def test_a_measurement_that_is_no_number() -> None:
    with pytest.raises(InputError, match="is not a number: try --dtype fp32"):
        tune.tune(candidates(), lambda plan: math.nan, rise=0.01)
