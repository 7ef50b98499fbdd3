"""The recommendation in the last line of `eval`."""

from __future__ import annotations

from typing import Any

import pytest

from flashcomm.accuracy.recommend import implausible, recommendation


def row(name: str, bits: float, kl_high: float | None, low_pct: float | None = -1.0, world: int = 2) -> dict[str, Any]:
    return {"format": name, "bits": bits, "kl_high": kl_high, "low_pct": low_pct, "rise_pct": 0.1, "world": world}


def test_the_fewest_bits_that_keep_one_percent_at_all_numbers_of_ranks() -> None:
    rows = [
        row("none", 16, None, None),
        row("int8", 8.375, 0.002),
        row("int6", 6.375, 0.009),
        row("int6", 6.375, 0.011, world=4),  # its interval does not exclude 1.1 %
        row("int7-had", 7.375, 0.006),
        row("int5-had", 5.25, 0.008, 1.2),  # this text shows more than 1 %
    ]
    expected = "Recommendation for m: int7-had, 7.38 bits a value, with a loss of at most 0.6 %."
    assert recommendation(rows, "m").startswith(expected)


def test_no_recommendation_without_evidence() -> None:
    assert "none of these formats is shown to keep 1 %" in recommendation([row("int4", 4.25, 0.3)], "m")
    assert "need two windows" in recommendation([row("int4", 4.25, None, None)], "m")


@pytest.mark.parametrize(("bits", "warned"), [(0.4, False), (1.1, False), (2.0, False), (2.5, True), (11.9, True)])
def test_a_model_that_does_not_know_the_text(bits: float, warned: bool) -> None:
    assert bool(implausible(bits)) == warned
