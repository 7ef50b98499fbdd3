"""`flashcomm tune`: finds the plan that meets a budget with the fewest bits on the wire.

`accuracy.sensitivity` gives the divergence of every candidate format in every layer, from one backward pass per batch
of windows. Each layer then gets the candidate with the least KL + multiplier * bits. The Lagrange multiplier is found
by bisection, to meet the budget. Then the model runs with the plan, on text that it was not tuned on. The plan is
tightened or loosened by the KL divergence measured there, at the upper end of its 95 % interval. A measured perplexity
steers nothing: at a rise of 1 % its noise on a few thousand tokens is larger than the rise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcomm.accuracy.evaluate import Baseline
from flashcomm.accuracy.intervals import Interval, windows_needed
from flashcomm.accuracy.sensitivity import NONE, Sensitivities, condition, measure
from flashcomm.accuracy.simulate import Progress, TensorParallel, no_progress, row_parallel_layers
from flashcomm.errors import InputError
from flashcomm.plan import LayerPlan, Plan
from flashcomm.wire.format import Layout, StepFormat, WireFormat

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (32, 64, 128)
WIDEST = WireFormat.parse("int8-g32-had")
TRIES = 6
LEAST_WINDOWS = 8  # for an interval that can be trusted
NARROW = 0.15  # the half-width of a KL divergence's interval at which no more windows are needed, relative to its mean


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


class Measured(NamedTuple):
    """A plan on text that it was not tuned on.

    Attributes:
        kl: The KL divergence in nats per token.
        rise: The rise in perplexity; 0.01 is 1 %.
        windows: The number of windows measured.
    """

    kl: Interval
    rise: Interval
    windows: int

    @property
    def loss(self) -> float:
        """The loss, in nats per token, that the budget is compared with: the upper end of the KL divergence.

        On text that the model itself could have written, the expected rise in perplexity is the KL divergence, whose
        interval is many times narrower. If the measured rise is larger even at its lower end, that counts.
        """
        return max(self.kl.high, self.least_risen)

    @property
    def least_risen(self) -> float:
        """The lower end of the rise in perplexity, in nats per token."""
        return math.log1p(max(self.rise.low, -0.99))

    def row(self) -> dict[str, Any]:
        """Return the columns to show and to save with the plan."""
        kl = self.kl.columns("kl", "kl_low", "kl_high", 6)
        return kl | self.rise.columns("rise_pct", "low_pct", "high_pct", 4, 0.01) | {"check_windows": self.windows}


class Sample:
    """Windows of a text that is not tuned on. As many are measured as the intervals need.

    Args:
        model: A transformers model with a tensor-parallel plan.
        windows: Token ids (n, length) on the model's device: all that may be used, in this order.
        world_size: Ranks to simulate.
        progress: Called after each step.
    """

    def __init__(self, model: Any, windows: Tensor, world_size: int, progress: Progress = no_progress) -> None:
        self._ranks, self.most = TensorParallel(model, world_size, algorithm="two_shot"), len(windows)
        self._baseline, self._progress, self.n = Baseline(self._ranks, windows), progress, LEAST_WINDOWS

    def measure(self, plan: Plan) -> Measured:
        """Measure a plan on as many windows as plans before, or on more, until its KL divergence is narrow."""
        while True:
            found = self.once(plan)
            if found.kl.high - found.kl.mean <= NARROW * found.kl.mean or self.n >= self.most:
                return found
            self.n = min(2 * self.n, self.most)

    def once(self, plan: Plan) -> Measured:
        """Measure a plan on as many windows as plans before."""
        self._progress("measuring a plan", 0, self.n)
        with self._ranks, torch.inference_mode():
            tally = self._baseline.tally(
                plan, self.n, lambda done: self._progress("measuring a plan", min(done, self.n), self.n)
            )
        return Measured(self._baseline.divergence(tally), self._baseline.rise(tally), len(tally.kl))


@dataclass
class Tuned:
    """A plan, with its bits per value, its predicted KL divergence, and what it was measured at.

    Attributes:
        plan: The plan.
        bits: Bits per value.
        predicted_kl: From the text that it was tuned on.
        measured: On the text that it was not tuned on.
        tries: Number of plans measured.
        why_not: Why the budget is not met; empty if it is.
    """

    plan: Plan
    bits: float
    predicted_kl: float
    measured: Measured
    tries: int
    why_not: str = ""

    def row(self) -> dict[str, Any]:
        """Return the columns to show and to save with the plan."""
        return {
            "met": not self.why_not,
            "bits": round(self.bits, 3),
            "predicted_kl": round(self.predicted_kl, 6),
            **self.measured.row(),
            "tries": self.tries,
        }


def check_budget(measure: Callable[[Plan], Measured], rise: float) -> None:
    """Raise InputError if even 8 bits in every layer cost more than a rise in perplexity (0.01 is 1 %)."""
    found = measure(Plan(WIDEST))
    if found.kl.low > math.log1p(rise):
        needed = math.expm1(found.kl.high)
        raise InputError(
            f"no plan meets a budget of {100 * rise:g} %: {WIDEST} in every layer costs {100 * needed:.2g} %; "
            "give at least that, or leave messages uncompressed (format none)"
        )


def tune(
    candidates: Candidates,
    measure: Callable[[Plan], Measured],
    *,
    rise: float | None = None,
    bits: float | None = None,
) -> Tuned:
    """Find the plan for a budget.

    Sensitivities predict KL divergence on the text that they were measured on, to second order. So a plan is measured
    on other text. The budget is met if `Measured.loss` is within it. If it is not, or if there is room for fewer bits,
    the limit on the predicted divergence is scaled by what was measured, up to `TRIES` times.

    Args:
        candidates: The formats to choose from.
        measure: Measures a plan on text that it was not tuned on, such as `Sample.measure`.
        rise: The most rise in perplexity; 0.01 is 1 %. None: the budget is `bits`.
        bits: The most bits per value.

    Returns:
        The plan with the fewest bits that meets the budget. If none does, the last one tried, which says why.

    Raises:
        InputError: A measurement is not a number.
    """
    if rise is None:
        found = candidates.within(bits=bits)
        plan = candidates.plan(found.formats)
        over = "" if found.bits <= (bits or 0) else f"the fewest possible bits are {found.bits:.2f}"
        return Tuned(plan, found.bits, found.kl, measure(plan), 1, over)
    target = math.log1p(rise)
    limit, best = 0.8 * target, None
    for tries in range(1, TRIES + 1):
        found = candidates.within(kl=limit)
        plan = candidates.plan(found.formats)
        last = Tuned(plan, found.bits, found.kl, measure(plan), tries)
        loss = last.measured.loss
        if not math.isfinite(last.measured.kl.mean):
            raise InputError("the model's outputs with a plan are not numbers: try --dtype fp32")
        if loss <= target and (best is None or last.bits < best.bits):
            best = last
        if 0.9 * target <= loss <= target or found.kl <= 0.0:
            break
        limit = found.kl * (0.95 * target / loss if math.isfinite(loss) else 0.5)
    if best is None:
        best = replace(last, why_not=_why_not(last.measured, target))
    return replace(best, tries=tries)


def _why_not(measured: Measured, target: float) -> str:
    """Say why a measurement does not show that `target` nats are kept."""
    kl, n = measured.kl, measured.windows
    least = max(kl.mean, measured.least_risen)
    if least >= target:
        return f"it costs {100 * math.expm1(least):.2g} %"
    needed = windows_needed(n, kl.high - kl.mean, target - kl.mean)
    return (
        f"{n} windows do not show that it is kept: {needed} would be needed; give a longer text or more --check-windows"
    )
