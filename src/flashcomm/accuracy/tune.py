"""`flashcomm tune`: finds the plan that meets a budget with the fewest bits on the wire.

`accuracy.sensitivity` gives the divergence of every candidate format in every layer, from one backward pass per batch
of windows. Each layer then gets the candidate with the least KL + multiplier * bits. The Lagrange multiplier is found
by bisection, to meet the budget. Finally the model runs with the plan, to measure the rise in perplexity.
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
    """A format for one layer, with its bits per value on the wire and its KL divergence in nats per token."""

    format: WireFormat
    bits: float
    kl: float


class Selection(NamedTuple):
    """A format for each layer, with the bits per value and the predicted KL divergence of all of them together."""

    formats: dict[str, WireFormat]
    bits: float
    kl: float


@dataclass
class Candidates:
    """The formats that a plan is chosen from.

    Attributes:
        by_layer: The candidates of each layer.
        vectors: The per-channel scaling and mean removal of layers that have them.
        numel: The row length of each layer, because layers with longer rows send more.
    """

    by_layer: dict[str, list[Candidate]]
    vectors: dict[str, LayerPlan]
    numel: dict[str, int]

    def plan(self, formats: dict[str, WireFormat]) -> Plan:
        """Return a plan with these formats by layer, and with the layers' vectors."""
        layers = {}
        for name, fmt in formats.items():
            vectors = None if fmt.uncompressed else self.vectors.get(name)
            layers[name] = LayerPlan(fmt, vectors.scale_exponents, vectors.channel_mean) if vectors else LayerPlan(fmt)
        most = max(formats.values(), key=list(formats.values()).count)
        return Plan(most, layers=layers)

    def select(self, multiplier: float) -> Selection:
        """Return the formats with the least KL + multiplier * bits. The multiplier is in nats per bit."""
        total, bits, kl, formats = sum(self.numel.values()), 0.0, 0.0, {}
        for name, candidates in self.by_layer.items():
            share = self.numel[name] / total
            best = min(candidates, key=lambda c: c.kl + multiplier * share * c.bits)
            formats[name], bits, kl = best.format, bits + share * best.bits, kl + best.kl
        return Selection(formats, bits, kl)

    def within(self, *, kl: float | None = None, bits: float | None = None) -> Selection:
        """Return the fewest bits with at most this KL, or the least KL with at most these bits.

        If no selection meets the limit, return the one that comes nearest.
        """
        low, high = 1e-12, 1e3  # a low multiplier gives many bits and a low KL
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
        progress: Called after each step.
    """
    vectors = condition(model, windows, world_size, progress) if conditioned else {}
    steps = [StepFormat(bits, group, hadamard=True) for bits, group in product(WIDTHS, GROUPS)]
    found = measure(model, windows, world_size, steps, vectors, progress)
    numel = {name: module.out_features for name, module in row_parallel_layers(model).items()}
    return Candidates({name: _candidates(name, row, found, steps) for name, row in numel.items()}, vectors, numel)


def _candidates(name: str, row: int, found: Sensitivities, steps: Sequence[StepFormat]) -> list[Candidate]:
    """Return all pairs of reduce and gather formats of one group size, which need no transform between the steps."""
    bits = {step: 8 * Layout(step, row, 2).nbytes(0, row * 1024) / (row * 1024) for step in steps}
    pairs = [WireFormat(a, b) for a, b in product(steps, steps) if a.group == b.group]
    return [Candidate(f, (bits[f.reduce] + bits[f.gather]) / 2, found.kl_of(name, f)) for f in pairs] + [
        Candidate(NONE, 16.0, 0.0)
    ]


@dataclass
class Tuned:
    """A plan, with its bits per value, predicted KL, and rise in perplexity on the text that it was tuned on."""

    plan: Plan
    bits: float
    predicted_kl: float
    measured_rise: float
    tries: int

    def meets(self, *, rise: float = math.inf, bits: float = math.inf) -> bool:
        """Return whether the plan is within the budget."""
        return self.measured_rise <= rise and self.bits <= bits

    def row(self) -> dict[str, Any]:
        """Return the figures to show and to save with the plan."""
        return {
            "bits": round(self.bits, 3),
            "predicted_kl": round(self.predicted_kl, 6),
            "rise_pct": round(100 * self.measured_rise, 4),
            "tries": self.tries,
        }


def measure_plan(
    model: Any, windows: Tensor, world_size: int, plan: Plan, progress: Progress = no_progress
) -> dict[str, Any]:
    """Return the row of `evaluate` for one plan, in two-shot."""
    ranks = TensorParallel(model, world_size, algorithm="two_shot")
    return evaluate(ranks, windows, 1, {"plan": plan}, progress=progress)[1]


def tune(
    candidates: Candidates,
    measured_rise: Callable[[Plan], float],
    *,
    rise: float | None = None,
    bits: float | None = None,
) -> Tuned:
    """Find the plan for a budget.

    Sensitivities predict KL divergence, to second order only. So the plan is measured. If its rise in perplexity is
    above the budget or far below, the limit on KL is adjusted, and another plan measured, up to `TRIES` times.

    Args:
        candidates: The formats to choose from.
        measured_rise: Runs the model with a plan and returns the rise in perplexity; 0.01 is 1 %.
        rise: The most rise in perplexity. None: the budget is `bits`.
        bits: The most bits per value.

    Returns:
        The plan with the fewest bits that meets the budget. If none does, the last one tried.

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
            raise InputError("the model's perplexity with a plan is not a number: try --dtype fp32")
        if last.measured_rise <= rise and (best is None or last.bits < best.bits):
            best = last
        if 0.8 * rise <= last.measured_rise <= rise:
            break
        target *= 0.95 * rise / max(last.measured_rise, rise / 4)
    return replace(best or last, tries=tries)
