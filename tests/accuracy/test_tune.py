"""Plans that meet a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from tiny_model import tiny

from flashcomm import WireFormat
from flashcomm.accuracy import evaluate, tune
from flashcomm.accuracy.intervals import Interval
from flashcomm.accuracy.simulate import TensorParallel
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


def of(mean: float, half: float) -> Interval:
    return Interval(mean, mean - half, mean + half)


def kl_of(given: tune.Candidates, plan: Plan) -> float:
    """The divergence of a plan by its candidates."""
    by_name = {n: {str(c.format): c.kl for c in many} for n, many in given.by_layer.items()}
    return sum(by_name[name][str(part.format)] for name, part in plan.layers.items())


def stub(
    given: tune.Candidates, *, over: float = 1.0, half: float = 0.1, rise: Interval | None = None
) -> Callable[[Plan], tune.Measured]:
    """Measure `over` times the predicted divergence, with an interval of +-half of it."""

    def measure(plan: Plan) -> tune.Measured:
        kl = over * kl_of(given, plan)
        return tune.Measured(of(kl, half * kl), rise or of(math.expm1(kl), 0.02), 16)

    return measure


@pytest.mark.parametrize("over", [0.1, 0.7, 1.0, 1.6, 2.9])
def test_a_plan_is_fitted_to_the_divergence_that_is_measured(over: float) -> None:
    """Predictions may be off by a factor. The upper end of the interval comes within the budget, and near it."""
    given, target = candidates(), math.log1p(0.01)
    found = tune.tune(given, stub(given, over=over, half=0.5), rise=0.01)
    assert not found.why_not
    assert found.measured.kl.high <= target
    inside = [
        s.bits
        for s in (given.select(10 ** (-k / 50)) for k in range(600))
        if 1.5 * over * kl_of(given, given.plan(s.formats)) <= target
    ]
    assert found.bits <= min(inside) + 0.5  # one step of one layer


@pytest.mark.parametrize("seed", range(5))
def test_a_rise_in_perplexity_that_is_pure_noise_steers_nothing(seed: int) -> None:
    """The noise is 50 times the budget. Bits, tries and verdict are those without it."""
    given, random = candidates(), Random(seed)
    quiet = stub(given, over=1.5)

    def noisy(plan: Plan) -> tune.Measured:
        return quiet(plan)._replace(rise=of(random.gauss(0.0, 0.2), 0.5))

    expected, found = (tune.tune(given, measure, rise=0.01) for measure in (quiet, noisy))
    assert (found.bits, found.tries, found.why_not) == (expected.bits, expected.tries, "")
    assert math.expm1(1.5 * kl_of(given, found.plan)) <= 0.01


def test_a_divergence_that_is_pure_noise_meets_no_budget() -> None:
    """The interval is 100 times as wide as the budget whatever the plan: the verdict says how many windows it takes."""
    found = tune.tune(candidates(), lambda plan: tune.Measured(of(0.005, 1.0), of(0.0, 1.0), 16), rise=0.01)
    needed = math.ceil(16 * (1.0 / (math.log1p(0.01) - 0.005)) ** 2)
    assert f"16 windows do not show that it is kept: {needed} would be needed" in found.why_not
    assert not found.row()["met"]


def test_a_plan_that_costs_more_than_the_budget_is_not_met() -> None:
    given = candidates()
    found = tune.tune(given, stub(given, over=1000.0), rise=0.01)
    assert found.why_not.startswith("it costs ")
    over = tune.tune(given, stub(given, over=0.1, rise=of(0.1, 0.02)), rise=0.01)  # text shows 8 % at the least
    assert over.why_not == "it costs 8 %"


def test_measurements_that_are_no_numbers() -> None:
    nan = of(math.nan, math.nan)
    with pytest.raises(InputError, match="are not numbers: try --dtype fp32"):
        tune.tune(candidates(), lambda plan: tune.Measured(nan, nan, 16), rise=0.01)


def test_a_budget_below_what_8_bits_can_do() -> None:
    def measure(plan: Plan) -> tune.Measured:
        assert str(plan.format) == "int8-g32-had"
        return tune.Measured(of(0.002, 0.001), of(0.0, 0.1), 8)

    with pytest.raises(InputError, match=r"no plan meets a budget of 0.05 %: int8-g32-had in every layer costs 0.3 %"):
        tune.check_budget(measure, 0.0005)
    tune.check_budget(measure, 0.002)  # the interval does not exclude it


def test_more_windows_are_taken_until_the_divergence_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with `evaluate` on the same windows, and with a text of too few windows."""
    monkeypatch.setitem(evaluate.BATCH_TOKENS, "cpu", 96)  # four windows
    monkeypatch.setattr(tune, "NARROW", 0.045)
    model, windows = tiny(), torch.randint(0, 200, (200, 24), generator=torch.Generator().manual_seed(0))
    plan = Plan.of("int3")
    sample = tune.Sample(model, windows, 2)
    found = sample.measure(plan)
    assert sample.n == found.windows > tune.LEAST_WINDOWS
    assert found.kl.high - found.kl.mean <= tune.NARROW * found.kl.mean
    ranks = TensorParallel(model, 2, algorithm="two_shot")
    row = evaluate.evaluate(ranks, windows[: found.windows], 1, {"x": plan})[1]
    measured = found.row()
    assert measured.pop("check_windows") == found.windows
    assert measured == {key: pytest.approx(row[key], rel=1e-3, abs=1e-4) for key in measured}
    few = tune.Sample(model, windows[:8], 2).measure(plan)
    assert few.windows == 8
    assert few.kl.high - few.kl.mean > tune.NARROW * few.kl.mean


def test_loss_is_the_worse_of_what_the_intervals_do_not_exclude() -> None:
    assert tune.Measured(of(0.01, 0.002), of(0.0, 0.5), 8).loss == pytest.approx(0.012)
    assert tune.Measured(of(0.01, 0.002), of(0.05, 0.01), 8).loss == pytest.approx(math.log1p(0.04))
