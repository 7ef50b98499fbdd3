"""The recommendation in the last line of `eval`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from flashcomm import WireFormat
from flashcomm.accuracy.recommend import evidence, implausible, is_safe, recommendation
from flashcomm.bench.records import read_csv

RESULTS = Path(__file__).parent.parent.parent / "results"


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


def test_what_is_called_safe_is_what_was_measured() -> None:
    """Compare with every row of `eval` in results/: two-shot, all models and numbers of ranks."""
    rows = [
        r
        for path in RESULTS.glob("accuracy-*.csv")
        for r in read_csv(path)
        if "perplexity" in r and r["algorithm"] == "two_shot" and not r["format"].endswith(".json")
    ]
    lost: dict[str, float] = {}
    for r in rows:
        lost[r["format"]] = max(lost.get(r["format"], 0.0), math.expm1(float(r["kl"])))
    assert len(lost) > 10
    for name, most in lost.items():
        assert not is_safe(WireFormat.parse(name)) or most < 0.01, (name, most)
    safe = {name for name in lost if is_safe(WireFormat.parse(name))}
    assert safe >= {"int8", "int8-had", "int6-had/int7-had"}


def test_evidence_names_the_formats_of_the_paper() -> None:
    assert evidence(WireFormat.parse("none")) == "no loss"
    assert evidence(WireFormat.parse("int4")).startswith("a plain format, as in the paper")
    assert evidence(WireFormat.parse("int4-had")).startswith("raised perplexity by more than 1 % on some models")
    assert not is_safe(WireFormat.parse("int8-g256"))
