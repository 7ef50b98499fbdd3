"""Means over windows of a text, with their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and its 95 % interval, from Student's t. With fewer than two values, the interval is infinite."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of the mean of independent values."""
        mean, n = statistics.fmean(values), len(values)
        half = student(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
        return cls(mean, mean - half, mean + half)

    def expm1(self) -> Interval:
        """Return e^x - 1 of all three: from a difference in nats per token to a rise in perplexity; 0.01 is 1 %."""
        return Interval(*(math.inf if x > 700 else math.expm1(x) for x in self))

    def columns(self, name: str, low: str, high: str, digits: int, unit: float = 1.0) -> dict[str, float | None]:
        """Return the columns of a row: the mean, and the ends of the interval, which are None if it is infinite."""
        ends = ((name, self.mean), (low, self.low), (high, self.high))
        exists = math.isfinite(self.high)
        return {key: round(x / unit, digits) if exists or key == name else None for key, x in ends}


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t with `freedom` degrees of freedom, to 1 %."""
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    n = freedom
    return (
        z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )  # fmt: skip


def windows_needed(n: int, now: float, wanted: float) -> int:
    """Return how many windows shrink the half-width of an interval from `now`, with n windows, to `wanted`."""
    return math.ceil(n * (now / wanted) ** 2)
