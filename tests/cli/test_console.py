"""Progress off a terminal: lines with an estimate of the time left."""

from __future__ import annotations

from unittest import mock

import pytest
from rich.console import Console

from flashcomm.cli import console


def test_a_line_every_30_seconds_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows take 4 seconds. Another total is another task, with a clock of its own."""
    monkeypatch.setattr(console, "err_console", Console(stderr=True, force_terminal=False))
    now = [100.0]
    with mock.patch.object(console.time, "monotonic", side_effect=lambda: now[0]), console.progress(True) as report:
        for done in range(21):
            report("2 ranks, int4", done, 100)
            now[0] += 4
        for done in range(0, 11, 5):
            report("2 ranks, greedy", done, 10)
            now[0] += 40
    assert capsys.readouterr().err.splitlines() == [
        "2 ranks, int4: 8 of 100, about 6 min left",
        "2 ranks, int4: 16 of 100, about 6 min left",
        "2 ranks, greedy: 5 of 10, about 40 s left",
        "2 ranks, greedy: 10 of 10, about 0 s left",
    ]
