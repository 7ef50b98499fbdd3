"""The policy with a machine: transports, measured tables, where tables lie. Pure functions, so no group is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashcomm import WireFormat
from flashcomm.routing import policy, timings
from flashcomm.routing.route import Choice, Machine, Message
from flashcomm.routing.timings import Timings

TIMINGS = Timings(
    "made up",
    (1 << 13, 1 << 20, 1 << 26),
    {
        "backend": (9.0, 16.0, 250.0),
        "bf16 one_shot": (5.0, 14.0, 400.0),
        "bf16 two_shot": (8.0, 13.0, 220.0),
        "int4 one_shot": (6.0, 8.0, 80.0),
        "int4 two_shot": (9.0, 9.0, 70.0),
        "int8-had one_shot": (6.0, 12.0, 300.0),
        "int8-had two_shot": (9.0, 15.0, 260.0),
    },
)
FAST = Machine("symmetric", TIMINGS)


def choose(
    n_bytes: int, fmt: str, machine: Machine, algorithm: str = "auto", min_bytes: int | str = "auto", row: int = 4096
) -> Choice:
    call = Message(n_bytes // 2, min(row, n_bytes // 2), 2, 2, "cuda")
    return policy.choose(call, WireFormat.parse(fmt), algorithm, min_bytes, machine)


def way(choice: Choice) -> tuple[str, str, str]:
    return choice.route.algorithm, str(choice.route.format), choice.route.transport


def test_a_table_is_read_between_and_beyond_its_sizes() -> None:
    assert TIMINGS.time("backend", 1 << 20) == pytest.approx(16.0)
    assert TIMINGS.time("backend", 10) == 9.0
    assert TIMINGS.time("backend", 1 << 28) == 1000.0
    between_steps = Timings("t", (4, 16), {"backend": (1.0, 4.0)})
    assert between_steps.time("backend", 8) == pytest.approx(2.0)


def test_the_fastest_way_of_the_table_is_taken() -> None:
    assert way(choose(8 << 10, "int4", FAST)) == ("one_shot", "bf16", "symmetric")
    assert way(choose(1 << 20, "int4", FAST)) == ("one_shot", "int4", "symmetric")
    assert way(choose(64 << 20, "int4", FAST)) == ("two_shot", "int4", "symmetric")
    assert way(choose(64 << 20, "int8-had", FAST)) == ("two_shot", "bf16", "symmetric")
    assert way(choose(64 << 20, "bf16", FAST)) == ("two_shot", "bf16", "symmetric")
    text = str(choose(64 << 20, "int4", FAST))
    assert "two_shot as int4 over symmetric" in text
    assert "70.0 us for 65536 KiB, fastest of those measured (made up)" in text
    assert "not backend: 250.0 us" in text


def test_settings_win_over_the_table() -> None:
    assert way(choose(8 << 10, "int4", FAST, min_bytes=0)) == ("one_shot", "int4", "symmetric")
    assert way(choose(64 << 20, "int8-had", FAST, min_bytes=0)) == ("two_shot", "int8-had", "symmetric")
    assert way(choose(1 << 20, "int4", FAST, min_bytes=2 << 20)) == ("two_shot", "bf16", "symmetric")
    assert way(choose(8 << 10, "int4", FAST, "backend")) == ("backend", "bf16", "process_group")
    assert way(choose(8 << 10, "int4", FAST, "two_shot")) == ("two_shot", "int4", "symmetric")
    assert choose(8 << 10, "int4", FAST, "two_shot").route.low_bit
    assert not choose(8 << 10, "int4", FAST).route.low_bit


def test_a_table_without_coded_ways_does_not_overrule_min_bytes() -> None:
    bare = Machine("symmetric", Timings("bare", (1024,), {"backend": (9.0,)}))
    assert way(choose(8 << 10, "int4", bare, min_bytes=0)) == ("one_shot", "int4", "symmetric")
    assert way(choose(8 << 10, "int4", bare)) == ("backend", "bf16", "process_group")


def test_a_format_goes_by_the_nearest_one_measured() -> None:
    assert TIMINGS.nearest(WireFormat.parse("int5"), "one_shot") == "int4 one_shot"
    assert TIMINGS.nearest(WireFormat.parse("int7-had"), "two_shot") == "int8-had two_shot"
    assert TIMINGS.nearest(WireFormat.parse("bf16"), "two_shot") == "bf16 two_shot"
    both = Timings("t", (4,), {"backend": (1.0,), "int6 one_shot": (1.0,), "int6-had one_shot": (2.0,)})
    assert both.nearest(WireFormat.parse("int5-had"), "one_shot") == "int6-had one_shot"
    assert both.nearest(WireFormat.parse("int5"), "one_shot") == "int6 one_shot"
    assert Timings("t", (4,), {"backend": (1.0,)}).nearest(WireFormat.parse("int4"), "one_shot") is None


def test_short_rows_are_not_coded_whatever_the_table_says() -> None:
    route = choose(1 << 20, "int4", FAST, row=1).route
    assert not route.low_bit
    assert "would send" in route.reason


def test_without_a_table() -> None:
    peers, group = Machine("symmetric"), Machine(rejected=(("symmetric", "on another host"),))
    assert way(choose(8 << 10, "int4", peers)) == ("one_shot", "bf16", "symmetric")
    assert way(choose(1 << 20, "int4", peers)) == ("one_shot", "int4", "symmetric")
    assert way(choose(1 << 20, "bf16", peers)) == ("backend", "bf16", "process_group")
    assert way(choose(64 << 10, "int4", group)) == ("backend", "bf16", "process_group")
    assert way(choose(4 << 20, "int4", group)) == ("one_shot", "int4", "process_group")
    assert "not symmetric: on another host" in str(choose(4 << 20, "int4", group))


def test_own_tables_come_before_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timings, "BUILT_IN", tmp_path / "built-in")
    assert timings.find("NVIDIA H200", 2, "symmetric") is None
    name = timings.file_name("NVIDIA H200", 2, "symmetric")
    assert name == "nvidia-h200-x2-symmetric.json"
    timings.save(tmp_path / "built-in" / name, TIMINGS)
    found = timings.find("NVIDIA H200", 2, "symmetric")
    assert found is not None
    assert timings.as_dict(found) == timings.as_dict(TIMINGS)
    timings.save(timings.own_directory() / name, Timings("mine", (4,), {"backend": (1.0,)}))
    own = timings.find("NVIDIA H200", 2, "symmetric")
    assert own is not None
    assert own.source == "mine"
    (timings.own_directory() / name).write_text("{")
    again = timings.find("NVIDIA H200", 2, "symmetric")
    assert again is not None
    assert again.source == "made up"


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "s", "sizes": [], "us": {"backend": []}},
        {"source": "s", "sizes": [2, 1], "us": {"backend": [1, 1]}},
        {"source": "s", "sizes": [1], "us": {"int4 one_shot": [1]}},
        {"source": "s", "sizes": [1, 2], "us": {"backend": [1]}},
        {"source": "s", "sizes": [1], "us": {"backend": [0]}},
    ],
)
def test_what_is_no_table(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="timings need"):
        timings.from_dict(wrong)
