"""The bars that scripts/demo draws."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def test_bars_have_the_length_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo

    rows = [
        {"format": fmt, "ttft_s": seconds, "compute_s": 1.0, "speedup": 5 / seconds, "wire_bytes": 47_185_920}
        for fmt, seconds in (("none", 5.0), ("int4-had", 2.0))
    ]
    long, short = demo.bars(rows)
    assert (long.count("█"), long.count("▒")) == (10, 40)
    assert (short.count("█"), short.count("▒")) == (10, 10)
    assert long.startswith("bf16, gloo ")
    assert short.endswith("2.00 s  2.50x  47.2 MB")


def test_equal_tokens_are_counted_to_the_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo

    assert demo.same([1, 2, 3], [1, 5, 3]) == "the first 1 of 3"
    assert demo.same([1, 2], [1, 2, 3]) == "the first 2 of 2"
