"""Measuring times when a Communicator is created. On CPUs that happens only on request."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import raise_first, run_ranks

import flashcomm
from flashcomm import Communicator
from flashcomm.errors import SettingsError
from flashcomm.routing import timings
from flashcomm.routing.timings import Timings
from flashcomm.setup import measure
from flashcomm.wire.format import WireFormat

NAME = timings.file_name("CPU", 2, "process_group")
MIB = (256, 2048), torch.bfloat16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "SIZES", (2048, 32768, 1 << 20))
    monkeypatch.setattr(measure, "_measured_anew", set())
    return tmp_path / "flashcomm" / NAME


def tables(*formats: str, **settings: Any) -> list[list[Timings | None]]:
    """For each rank the timings of Communicators of these formats, created one after the other."""

    def body(group: Any, rank: int) -> list[Timings | None]:
        found = []
        for fmt in formats:
            with Communicator(group, fmt, **settings) as comm:
                found.append(comm.machine.timings)
                assert comm.transport.n_bytes_sent < 20_000, "measuring was counted"
        return found

    return raise_first(run_ranks(2, body))


def test_a_machine_is_measured_once_and_the_table_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(measure, "measured", lambda *args: (measured.append(args), actual(*args))[1])
    random_numbers = torch.get_rng_state()
    (first, again, other), theirs = tables("int8", "int8", "int4", measure="anew")
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert first is not None
    assert again is not None
    assert other is not None
    assert [timings.as_dict(t) for t in (first, again, other)] == [timings.as_dict(t) for t in theirs]  # type: ignore[arg-type]
    assert len(measured) == 2 * 2, "each rank: the first of int8, and the first of int4"
    assert timings.as_dict(first) == timings.as_dict(again)
    assert set(first.us) == {"backend", "none one_shot", "int8 one_shot"}
    assert set(other.us) == {*first.us, "int4 one_shot"}
    assert other.us["int8 one_shot"] == first.us["int8 one_shot"]
    assert first.sizes == measure.SIZES
    assert first.at_setup
    assert first.version == flashcomm.__version__
    stored = timings.find("CPU", 2, "process_group", flashcomm.__version__)
    assert stored is not None
    assert timings.as_dict(stored) == timings.as_dict(other)
    monkeypatch.setattr(measure, "_measured_anew", set())  # as in a new process
    tables("int4", measure="anew")
    assert len(measured) == 3 * 2
    tables("int4", "int6", measure="auto")  # by default CPUs are not measured, but what is there counts
    assert len(measured) == 3 * 2


def test_no_size_is_left_out_because_the_first_call_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    run, compiled = measure._Case._run, set()

    def compile_and_run(case: Any, i: int) -> None:
        if (key := (id(case.ranks), case.key)) not in compiled:
            compiled.add(key)
            time.sleep(0.2 * measure.LIMIT_S)
        run(case, i)

    monkeypatch.setattr(measure._Case, "_run", compile_and_run)
    table = tables("int8", measure="anew")[0][0]
    assert table is not None
    assert table.sizes == measure.SIZES


actual = measure.measured


def test_the_setting_turns_it_off_and_explain_tells_of_it(cache: Path) -> None:
    assert tables("int8") == [[None], [None]], "off, as conftest sets it"
    assert tables("int8", measure="auto") == [[None], [None]], "on CPUs there is no measuring by itself"
    assert tables("int8", measure="anew", algorithm="one_shot") == [[None], [None]], "nothing to choose"
    assert not cache.exists()

    def body(group: Any, rank: int) -> str:
        with Communicator(group, "int8", measure="anew") as comm:
            return str(comm.explain(*MIB))

    here, there = raise_first(run_ranks(2, body))
    assert here == there
    assert f"(measured at set-up on 2 x CPU, torch {torch.__version__}" in here
    with pytest.raises(SettingsError, match="measure='yes': allowed are auto, off, anew"):
        tables("int8", measure="yes")


def measured_here(limit_s: float) -> list[Any]:
    def body(group: Any, rank: int) -> Any:
        with Communicator(group, "none") as comm:
            ranks = measure.Ranks(comm.transport, comm.machine, comm._executors)
            return measure.measured(ranks, [WireFormat.parse("int8")], measure.SIZES, limit_s=limit_s)

    return raise_first(run_ranks(2, body))


def test_the_slowest_rank_counts_and_of_turns_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(self: Any) -> None:
        turn = len(self.samples)
        self.samples.append(1e-6 * (100 if turn == 0 else 1 + self.ranks.transport.rank + (self.route is None)))

    monkeypatch.setattr(measure._Case, "sample", sample)
    want = measure.SIZES, {"backend": (3.0,) * 3, "int8 one_shot": (2.0,) * 3}
    assert measured_here(60) == [want, want]


def test_the_limit_leaves_out_sizes_and_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = []
    monkeypatch.setattr(measure._Case, "sample", lambda self: (samples.append(1), self.samples.append(1e-6)))
    assert measured_here(0) == [((2048,), {"backend": (1.0,), "int8 one_shot": (1.0,)})] * 2
    assert len(samples) == 2 * 2


def test_if_time_is_short_the_sizes_still_reach_far(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[int] = Counter()

    def elapsed(self: measure.Ranks, begin: float) -> float:
        calls[self.transport.rank] += 1
        return 0.0 if calls[self.transport.rank] == 1 else 99.0

    monkeypatch.setattr(measure.Ranks, "elapsed", elapsed)
    monkeypatch.setattr(measure._Case, "sample", lambda self: self.samples.append(1e-6))
    assert [sizes for sizes, _ in measured_here(1)] == [(measure.SIZES[0], measure.SIZES[2])] * 2


def test_too_little_memory_on_one_rank_leaves_rules_of_thumb(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Scarce(measure._Buffers):
        n_made = 0

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            Scarce.n_made += 1
            if Scarce.n_made == 1:
                raise RuntimeError("out of memory")

    monkeypatch.setattr(measure, "_Buffers", Scarce)
    assert tables("int8", measure="anew") == [[None], [None]]
    assert set(caplog.messages) == {"times are not measured: out of memory"}


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ((mine,), (theirs,)) = tables("int8", measure="anew")
    assert mine is not None
    assert theirs is not None
    assert timings.as_dict(mine) == timings.as_dict(theirs)
    assert len(caplog.messages) == 1
    assert "cannot be written, so these times are measured at every start" in caplog.text
