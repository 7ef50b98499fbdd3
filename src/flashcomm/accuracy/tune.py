"""`flashcomm tune`: the plan that meets a budget at the fewest bits on the wire.

`accuracy.sensitivity` gives the divergence of every candidate format in every layer, from one backward pass a window.
A Lagrange multiplier then decides every layer by itself: it takes the candidate with the least KL + multiplier * bits,
and the multiplier is bisected to the budget. The plan is measured before it is called good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor

from flashcomm.accuracy.evaluate import evaluate
from flashcomm.accuracy.sensitivity import NONE, Sensitivities, condition, measure
from flashcomm.accuracy.simulate import Progress, TensorParallel, no_progress, row_parallel_layers
from flashcomm.errors import InputError
from flashcomm.plan import LayerPlan, Plan
from flashcomm.wire.format import Layout, StepFormat, WireFormat

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (32, 64, 128)
TRIES = 5


class Candidate(NamedTuple):
    """A format for one layer: bits per value on the wire, and KL divergence in nats per token."""

    format: WireFormat
    bits: float
    kl: float


class Selection(NamedTuple):
    """A format for each layer: bits per value and KL divergence in nats per token, predicted for all together."""

    formats: dict[str, WireFormat]
    bits: float
    kl: float


@dataclass
class Candidates:
    """What a plan is chosen from.

    by_layer: The candidates of each layer. vectors: Conditioning of layers that have it. numel: Length of a layer's
    row, because layers with longer rows send more.
    """

    by_layer: dict[str, list[Candidate]]
    vectors: dict[str, LayerPlan]
    numel: dict[str, int]

    def plan(self, formats: dict[str, WireFormat]) -> Plan:
        """A plan with these formats by layer, conditioned."""
        layers = {}
        for name, fmt in formats.items():
            vectors = None if fmt.uncompressed else self.vectors.get(name)
            layers[name] = LayerPlan(fmt, vectors.scale_exponents, vectors.channel_mean) if vectors else LayerPlan(fmt)
        most = max(formats.values(), key=list(formats.values()).count)
        return Plan(most, layers=layers)

    def select(self, multiplier: float) -> Selection:
        """The least KL + multiplier * bits, with a multiplier in nats per bit."""
        total, bits, kl, formats = sum(self.numel.values()), 0.0, 0.0, {}
        for name, candidates in self.by_layer.items():
            share = self.numel[name] / total
            best = min(candidates, key=lambda c: c.kl + multiplier * share * c.bits)
            formats[name], bits, kl = best.format, bits + share * best.bits, kl + best.kl
        return Selection(formats, bits, kl)

    def within(self, *, kl: float | None = None, bits: float | None = None) -> Selection:
        """The fewest bits with at most this KL, or the least KL with at most these bits; or the nearest to that."""
        low, high = 1e-12, 1e3  # a low multiplier takes many bits and loses little
        for _ in range(80):
            middle = math.sqrt(low * high)
            found = self.select(middle)
            too_lossy = found.kl > kl if kl is not None else found.bits <= (bits or 0.0)
            low, high = (low, middle) if too_lossy else (middle, high)
        return self.select(low if kl is not None else high)


def find_candidates(
    model: Any, windows: Tensor, world_size: int, *, conditioned: bool, progress: Progress = no_progress
) -> Candidates:
    """Measure every candidate in every layer.

    Args:
        model: A transformers model with a tensor-parallel plan.
        windows: Token ids (n, length) on the model's device.
        world_size: Ranks to simulate.
        conditioned: Whether channels are scaled and their means removed.
        progress: Called along the way.
    """
    vectors = condition(model, windows, world_size, progress) if conditioned else {}
    steps = [StepFormat(bits, group, hadamard=True) for bits, group in product(WIDTHS, GROUPS)]
    found = measure(model, windows, world_size, steps, vectors, progress)
    numel = {name: module.out_features for name, module in row_parallel_layers(model).items()}
    return Candidates({name: _candidates(name, row, found, steps) for name, row in numel.items()}, vectors, numel)


def _candidates(name: str, row: int, found: Sensitivities, steps: Sequence[StepFormat]) -> list[Candidate]:
    """All pairs of reduce and gather formats with one group, so that sums need no transform between the steps."""
    bits = {step: 8 * Layout(step, row, 2).nbytes(0, row * 1024) / (row * 1024) for step in steps}
    pairs = [WireFormat(a, b) for a, b in product(steps, steps) if a.group == b.group]
    return [Candidate(f, (bits[f.reduce] + bits[f.gather]) / 2, found.kl_of(name, f)) for f in pairs] + [
        Candidate(NONE, 16.0, 0.0)
    ]


@dataclass
class Tuned:
    """A plan: bits per value, KL predicted, and the rise in perplexity measured on the text it was tuned on."""

    plan: Plan
    bits: float
    predicted_kl: float
    measured_rise: float
    tries: int

    def meets(self, *, rise: float = math.inf, bits: float = math.inf) -> bool:
        """Whether the plan is within the budget."""
        return self.measured_rise <= rise and self.bits <= bits

    def row(self) -> dict[str, Any]:
        """What is shown and saved with the plan."""
        return {
            "bits": round(self.bits, 3),
            "predicted_kl": round(self.predicted_kl, 6),
            "rise_pct": round(100 * self.measured_rise, 4),
            "tries": self.tries,
        }


def measure_plan(
    model: Any, windows: Tensor, world_size: int, plan: Plan, progress: Progress = no_progress
) -> dict[str, Any]:
    """The row of `evaluate` for one plan, in two-shot."""
    ranks = TensorParallel(model, world_size, algorithm="two_shot")
    return evaluate(ranks, windows, 1, {"plan": plan}, progress=progress)[1]


def tune(
    candidates: Candidates,
    measured_rise: Callable[[Plan], float],
    *,
    rise: float | None = None,
    bits: float | None = None,
) -> Tuned:
    """The plan for a budget.

    Sensitivities are of KL divergence, and to second order. So a plan that measures above the budget is tightened and
    one far below it loosened, up to `TRIES` measurements.

    Args:
        candidates: What to choose from.
        measured_rise: Runs the model with a plan and returns the rise in perplexity; 0.01 is 1 %.
        rise: At most this rise in perplexity.
        bits: Or at most these bits per value.

    Returns:
        The plan of the fewest bits that meets the budget; if none does, the last one tried.

    Raises:
        InputError: A measurement is not a number.
    """
    if rise is None:
        found = candidates.within(bits=bits)
        plan = candidates.plan(found.formats)
        return Tuned(plan, found.bits, found.kl, measured_rise(plan), 1)
    target, best = math.log1p(rise), None
    for tries in range(1, TRIES + 1):
        found = candidates.within(kl=target)
        plan = candidates.plan(found.formats)
        last = Tuned(plan, found.bits, found.kl, measured_rise(plan), tries)
        if not math.isfinite(last.measured_rise):
            raise InputError("the model's perplexity with a plan is no number: try it with --dtype fp32")
        if last.measured_rise <= rise and (best is None or last.bits < best.bits):
            best = last
        if 0.8 * rise <= last.measured_rise <= rise:
            break
        target *= 0.95 * rise / max(last.measured_rise, rise / 4)
    return replace(best or last, tries=tries)
