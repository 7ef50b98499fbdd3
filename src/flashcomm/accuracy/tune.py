"""`flashcomm tune`: the plan that meets a budget at the fewest bits on the wire.

Prices come from `accuracy.sensitivity`: one backward pass a window, all formats at once. A price of bits (a Lagrange
multiplier) then decides every layer by itself: of the formats on the menu the one with the least loss + price * bits;
the multiplier is bisected to the budget. What was predicted is measured before a plan is called good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import Tensor

from flashcomm.accuracy.sensitivity import UNCOMPRESSED, Costs, condition, measure
from flashcomm.accuracy.simulate import row_parallel_layers
from flashcomm.errors import InputError
from flashcomm.plan import LayerPlan, Plan
from flashcomm.wire.format import Layout, StepFormat, WireFormat

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (32, 64, 128)
TRIES = 5
Progress = Callable[[str, int, int], None]


@dataclass
class Prices:
    """What there is to choose from: per layer, formats with bits per value and KL divergence in nats per token."""

    menu: dict[str, list[tuple[WireFormat, float, float]]]
    vectors: dict[str, LayerPlan]
    values: dict[str, int]  # per layer, the length of its row: layers with longer rows send more

    def plan(self, chosen: dict[str, WireFormat]) -> Plan:
        layers = {}
        for name, fmt in chosen.items():
            vectors = None if fmt.uncompressed else self.vectors.get(name)
            layers[name] = LayerPlan(fmt, vectors.scale_exponents, vectors.channel_mean) if vectors else LayerPlan(fmt)
        most = max(chosen.values(), key=list(chosen.values()).count)
        return Plan(most, layers=layers)

    def at(self, price: float) -> tuple[dict[str, WireFormat], float, float]:
        """(format by layer, bits per value, KL) with bits at this price in nats per bit."""
        total, bits, kl, chosen = sum(self.values.values()), 0.0, 0.0, {}
        for name, entries in self.menu.items():
            share = self.values[name] / total
            fmt, b, loss = min(entries, key=lambda e: e[2] + price * share * e[1])
            chosen[name], bits, kl = fmt, bits + share * b, kl + loss
        return chosen, bits, kl

    def within(
        self, *, kl: float | None = None, bits: float | None = None
    ) -> tuple[dict[str, WireFormat], float, float]:
        """The fewest bits with at most this KL, or the least KL with at most these bits; or the nearest to that."""
        low, high = 1e-12, 1e3  # at the low price bits are cheap: many bits, little loss
        for _ in range(80):
            between_steps = math.sqrt(low * high)
            found = self.at(between_steps)
            too_lossy = found[2] > kl if kl is not None else found[1] <= (bits or 0.0)
            low, high = (low, between_steps) if too_lossy else (between_steps, high)
        return self.at(low if kl is not None else high)


def price(
    model: Any, windows: Tensor, world_size: int, *, conditioned: bool, progress: Progress = lambda *_: None
) -> Prices:
    """Price every -had format of the menu in every layer of the model as `world` ranks, on token ids (n, length)."""
    vectors = condition(model, windows, world_size, progress) if conditioned else {}
    steps = [StepFormat(bits, group, hadamard=True) for bits, group in product(WIDTHS, GROUPS)]
    costs = measure(model, windows, world_size, steps, vectors, progress)
    layers = row_parallel_layers(model)
    values = {name: module.out_features for name, module in layers.items()}
    return Prices({name: _menu(name, values[name], costs, steps) for name in layers}, vectors, values)


def _menu(name: str, row: int, costs: Costs, steps: Sequence[StepFormat]) -> list[tuple[WireFormat, float, float]]:
    """All pairs of reduce and gather formats with one group, so that sums need no transform between the steps."""
    bits = {step: 8 * Layout(step, row, 2).nbytes(0, row * 1024) / (row * 1024) for step in steps}
    pairs = [WireFormat(a, b) for a, b in product(steps, steps) if a.group == b.group]
    return [(f, (bits[f.reduce] + bits[f.gather]) / 2, costs.of(name, f)) for f in pairs] + [(UNCOMPRESSED, 16.0, 0.0)]


@dataclass
class Tuned:
    """A plan and what is known of it: bits per value, KL predicted and rise measured on the text tuned on."""

    plan: Plan
    bits: float
    predicted_kl: float
    measured_rise: float
    tries: int


def tune(
    prices: Prices,
    measured_rise: Callable[[Plan], float],
    *,
    rise: float | None = None,
    bits: float | None = None,
) -> Tuned:
    """The plan for a budget: at most this rise in perplexity (0.01 is 1 %), or at most these bits per value.

    measured_rise(plan) runs it. Prices are of KL divergence, and to second order: a plan that measures above the budget
    is tightened and one far below it loosened, up to `TRIES` measurements. Returned is the one of the fewest bits that
    meets the budget, or else the last, whose `measured_rise` then says so. Raises InputError where a measurement is no
    number.
    """
    if rise is None:
        chosen, b, kl = prices.within(bits=bits)
        plan = prices.plan(chosen)
        return Tuned(plan, b, kl, measured_rise(plan), 1)
    target, best = math.log1p(rise), None
    for tries in range(1, TRIES + 1):
        chosen, b, kl = prices.within(kl=target)
        plan = prices.plan(chosen)
        last = Tuned(plan, b, kl, measured_rise(plan), tries)
        if not math.isfinite(last.measured_rise):
            raise InputError("the model's perplexity with a plan is no number: try it with --dtype fp32")
        if last.measured_rise <= rise and (best is None or b < best.bits):
            best = last
        if 0.8 * rise <= last.measured_rise <= rise:
            break
        target *= 0.95 * rise / max(last.measured_rise, rise / 4)
    return replace(best or last, tries=tries)
