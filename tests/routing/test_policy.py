"""The choice of routes, with and without measured times. These are pure functions, so no group is needed."""

from __future__ import annotations

import functools
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
        "none one_shot": (5.0, 14.0, 400.0),
        "none two_shot": (8.0, 13.0, 220.0),
        "int4 one_shot": (6.0, 8.0, 80.0),
        "int4 two_shot": (9.0, 9.0, 70.0),
        "int8-had one_shot": (6.0, 12.0, 300.0),
        "int8-had two_shot": (9.0, 15.0, 260.0),
    },
)
INT4 = WireFormat.parse("int4")
FAST = Machine("symmetric", TIMINGS)


def choose(
    n_bytes: int, fmt: str, machine: Machine, algorithm: str = "auto", min_bytes: int | str = "auto", row: int = 4096
) -> Choice:
    call = Message(n_bytes // 2, min(row, n_bytes // 2), 2, 2, "cuda")
    return policy.choose(call, WireFormat.parse(fmt), algorithm, min_bytes, machine)


def taken(choice: Choice) -> tuple[str, str, str]:
    return choice.route.algorithm, str(choice.route.format), choice.route.transport


def test_timings_are_read_between_and_beyond_their_sizes() -> None:
    assert TIMINGS.time("backend", 1 << 20) == pytest.approx(16.0)
    assert TIMINGS.time("backend", 10) == 9.0
    assert TIMINGS.time("backend", 1 << 28) == 1000.0
    between_steps = Timings("t", (4, 16), {"backend": (1.0, 4.0)})
    assert between_steps.time("backend", 8) == pytest.approx(2.0)


def test_the_fastest_measured_route_is_taken() -> None:
    assert taken(choose(8 << 10, "int4", FAST)) == ("one_shot", "none", "symmetric")
    assert taken(choose(1 << 20, "int4", FAST)) == ("one_shot", "int4", "symmetric")
    assert taken(choose(64 << 20, "int4", FAST)) == ("two_shot", "int4", "symmetric")
    assert taken(choose(64 << 20, "int8-had", FAST)) == ("two_shot", "none", "symmetric")
    assert taken(choose(64 << 20, "none", FAST)) == ("two_shot", "none", "symmetric")
    text = str(choose(64 << 20, "int4", FAST))
    assert "two_shot as int4 over symmetric" in text
    assert "70.0 us for 65536 KiB, the fastest measured (made up)" in text
    assert "not backend: 250.0 us" in text


def test_the_backend_is_left_only_for_a_route_that_is_clearly_faster() -> None:
    for us, algorithm in ((100.0, "backend"), (97.5, "backend"), (96.5, "one_shot")):
        close = Timings("t", (1 << 20,), {"backend": (100.0,), "int4 one_shot": (us,)})
        choice = choose(1 << 20, "int4", Machine("symmetric", close))
        assert choice.route.algorithm == algorithm, us
    assert "96.5 us for 1024 KiB, the fastest measured (t)" in str(choice)
    close = Timings("t", (1 << 20,), {"backend": (100.0,), "int4 one_shot": (97.5,)})
    text = str(choose(1 << 20, "int4", Machine("symmetric", close)))
    assert "100.0 us for 1024 KiB, less than 3% over the fastest (t)" in text
    assert "not one_shot: 97.5 us" in text


def test_settings_win_over_timings() -> None:
    assert taken(choose(8 << 10, "int4", FAST, min_bytes=0)) == ("one_shot", "int4", "symmetric")
    assert taken(choose(64 << 20, "int8-had", FAST, min_bytes=0)) == ("two_shot", "int8-had", "symmetric")
    assert taken(choose(1 << 20, "int4", FAST, min_bytes=2 << 20)) == ("two_shot", "none", "symmetric")
    assert taken(choose(8 << 10, "int4", FAST, "backend")) == ("backend", "none", "process_group")
    assert taken(choose(8 << 10, "int4", FAST, "two_shot")) == ("two_shot", "int4", "symmetric")
    assert choose(8 << 10, "int4", FAST, "two_shot").route.low_bit
    assert not choose(8 << 10, "int4", FAST).route.low_bit


def test_timings_without_low_bit_routes_do_not_overrule_min_bytes() -> None:
    bare = Machine("symmetric", Timings("bare", (1024,), {"backend": (9.0,)}))
    assert taken(choose(8 << 10, "int4", bare, min_bytes=0)) == ("one_shot", "int4", "symmetric")
    assert taken(choose(8 << 10, "int4", bare)) == ("backend", "none", "process_group")


def test_a_format_goes_by_the_nearest_one_measured() -> None:
    assert TIMINGS.nearest(WireFormat.parse("int5"), "one_shot") == "int4 one_shot"
    assert TIMINGS.nearest(WireFormat.parse("int7-had"), "two_shot") == "int8-had two_shot"
    assert TIMINGS.nearest(WireFormat.parse("none"), "two_shot") == "none two_shot"
    both = Timings("t", (4,), {"backend": (1.0,), "int6 one_shot": (1.0,), "int6-had one_shot": (2.0,)})
    assert both.nearest(WireFormat.parse("int5-had"), "one_shot") == "int6-had one_shot"
    assert both.nearest(WireFormat.parse("int5"), "one_shot") == "int6 one_shot"
    us = {"backend": (1.0,), "int4 one_shot": (1.0,), "int8 one_shot": (2.0,), "int7-had one_shot": (3.0,)}
    far = Timings("t", (4,), us)
    assert far.nearest(WireFormat.parse("int4-had"), "one_shot") == "int7-had one_shot"  # whose transform takes time
    assert far.nearest(WireFormat.parse("int6"), "one_shot") == "int8 one_shot"  # as near as int4, and not faster
    assert Timings("t", (4,), {"backend": (1.0,)}).nearest(WireFormat.parse("int4"), "one_shot") is None


def test_short_rows_are_not_quantized_whatever_timings_say() -> None:
    route = choose(1 << 20, "int4", FAST, row=1).route
    assert not route.low_bit
    assert "would send" in route.reason


def test_routes_without_timings() -> None:
    peers, group = Machine("symmetric"), Machine(rejected=(("symmetric", "on another host"),))
    assert taken(choose(8 << 10, "int4", peers)) == ("one_shot", "none", "symmetric")
    assert taken(choose(1 << 20, "int4", peers)) == ("one_shot", "int4", "symmetric")
    assert taken(choose(1 << 20, "none", peers)) == ("backend", "none", "process_group")
    assert taken(choose(64 << 10, "int4", group)) == ("backend", "none", "process_group")
    assert taken(choose(4 << 20, "int4", group)) == ("one_shot", "int4", "process_group")
    assert "not symmetric: on another host" in str(choose(4 << 20, "int4", group))


def test_own_timings_come_before_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timings, "BUILT_IN", tmp_path / "built-in")
    find = functools.partial(timings.find, "NVIDIA H200", 2, "symmetric", "1")
    assert find() is None
    name = timings.file_name("NVIDIA H200", 2, "symmetric")
    assert name == "nvidia-h200-x2-symmetric.json"
    timings.save(tmp_path / "built-in" / name, TIMINGS)
    found = find()
    assert found is not None
    assert timings.as_dict(found) == timings.as_dict(TIMINGS)
    timings.save(timings.own_directory() / name, Timings("mine", (4,), {"backend": (1.0,)}, "1"))
    own = find()
    assert own is not None
    assert own.source == "mine"
    (timings.own_directory() / name).write_text("{")
    again = find()
    assert again is not None
    assert again.source == "made up"


@pytest.mark.parametrize("fault", ["version", "no version", "file", "folder", "unreadable", "large", "cut off"])
def test_an_own_file_of_no_use_is_ignored_with_one_line(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timings.own_directory() / timings.file_name("CPU", 2, "process_group")
    version = {"version": "0.9", "no version": ""}.get(fault, "1")
    timings.save(path, Timings("mine", (4,), {"backend": (1.0,)}, version))
    assert path.stat().st_mode & 0o777 == 0o644
    if fault == "file":
        path.chmod(0o646)
    elif fault == "folder":
        path.parent.chmod(0o777)
    elif fault == "unreadable":  # also for root, who may read any file
        path.unlink()
        path.mkdir()
    elif fault == "large":
        path.write_text(path.read_text() + " " * timings.MOST_BYTES)
    elif fault == "cut off":
        path.write_text(path.read_text()[:-9])
    assert timings.find("CPU", 2, "process_group", "1") is None
    (line,) = caplog.messages
    expected = {
        "version": "flashcomm 0.9 measured it and this is 1; run `flashcomm calibrate` again",
        "no version": "flashcomm of an unknown version measured it",
        "file": f"every user may write to it; run chmod o-w {path}",
        "folder": f"every user may write to its folder; run chmod o-w {path.parent}",
        "unreadable": "Is a directory",
        "large": f"more than {timings.MOST_BYTES} bytes",
        "cut off": "delimiter",
    }
    assert line.startswith(f"{path} is not a valid file of timings and is ignored: ")
    assert expected[fault] in line


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
def test_malformed_timings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="timings need"):
        timings.from_dict(wrong)


# On CPUs, without measured times


def choose_on_cpus(
    numel: int, world_size: int, fmt: str = "int4", algorithm: str = "auto", row: int = 576, min_bytes: int = 65536
) -> Choice:
    """Choose for gloo, without measured times."""
    return policy.choose(Message(numel, row, 2, world_size, "cpu"), WireFormat.parse(fmt), algorithm, min_bytes)


def test_auto_takes_the_algorithm_of_fewest_bytes_or_the_backend() -> None:
    assert choose_on_cpus(512 * 576, 2).route.algorithm == "one_shot"
    assert choose_on_cpus(512 * 576, 3).route.algorithm == "two_shot"
    assert choose_on_cpus(80 * 576, 3).route.algorithm == "one_shot"
    assert choose_on_cpus(576, 3).route.algorithm == "backend"
    assert choose_on_cpus(512 * 576, 3, "none").route.algorithm == "backend"
    assert choose_on_cpus(512 * 576, 3, row=1).route.algorithm == "backend"  # 3 bytes a value would be sent for 2
    assert choose_on_cpus(512 * 576, 1).route.algorithm == "copy"
    assert choose_on_cpus(0, 3, row=0).route.algorithm == "copy"


def test_a_sweep_admits_every_algorithm_somewhere() -> None:
    seen = {choose_on_cpus(n * 576, w).route.algorithm for n in (1, 80, 512) for w in range(1, 9)}
    assert seen == {"copy", "backend", "one_shot", "two_shot"}


def test_what_is_asked_for_wins() -> None:
    for algorithm in policy.CANDIDATES:
        assert choose_on_cpus(576, 3, algorithm=algorithm).route.algorithm == algorithm
    assert choose_on_cpus(576, 3, min_bytes=0).route.algorithm == "one_shot"


def test_every_route_not_taken_has_a_reason() -> None:
    for world_size in (2, 3):
        for n in (1, 80, 512):
            choice = choose_on_cpus(n * 576, world_size)
            assert {choice.route.algorithm, *(r.name for r in choice.rejected)} == set(policy.CANDIDATES)
            assert all(r.reason for r in choice.rejected)
            assert choice.route.reason
            assert f"{choice.route.wire_bytes} bytes a rank" in str(choice)


def test_wire_bytes_are_those_of_the_layout() -> None:
    """int4 over 3 ranks in two-shot: 4.25 bits per value, and each of two steps sends two thirds of the message."""
    row_bytes = 288 + 9 * 2
    assert choose_on_cpus(513 * 576, 3).route.wire_bytes == 2 * 2 * (171 * row_bytes + -171 * 18 % 16)
    assert choose_on_cpus(512 * 576, 2).route.wire_bytes == 512 * row_bytes
    assert choose_on_cpus(512 * 576, 4, "none").route.wire_bytes == 2 * 3 * 512 * 576 * 2 // 4


# Nodes


def test_hierarchical_is_two_shot_where_nodes_gain_nothing() -> None:
    """This holds for one node, for nodes of one rank, and for so many nodes that two-shot sends less between them."""
    for world_size, local_world_size, algorithm in (
        *((4, 4, "two_shot"), (4, 1, "two_shot"), (4, 0, "two_shot"), (8, 2, "two_shot")),
        *((4, 2, "hierarchical"), (6, 2, "hierarchical"), (8, 4, "hierarchical")),
    ):
        choice = policy.choose(Message(4096, 512, 2, world_size, "cpu", local_world_size), INT4, "hierarchical", 0)
        assert choice.route.algorithm == algorithm, (world_size, local_world_size)


def test_hierarchical_leaves_small_messages_to_the_backend() -> None:
    for numel, given, algorithm in (
        (1 << 14, None, "backend"),
        (1 << 15, None, "hierarchical"),
        (1 << 14, 0, "hierarchical"),
    ):
        call = Message(numel, 512, 2, 4, "cpu", 2)
        assert policy.choose(call, INT4, "hierarchical", given).route.algorithm == algorithm, numel
    output = str(policy.choose(Message(64, 64, 2, 4, "cpu", 2), INT4, "hierarchical", 1 << 20))
    assert "128 message bytes are fewer than min_bytes=1048576" in output


def test_hierarchical_sends_a_quarter_of_the_message_to_other_nodes() -> None:
    """8 ranks in 2 nodes: each rank sends 3/4 of the message twice within its node, and 1/4 once to the other."""
    call = Message(1 << 20, 4096, 2, 8, "cpu", 4)
    message = policy.wire_bytes("one_shot", call, INT4) // 7
    assert policy.wire_bytes("hierarchical", call, INT4) == message * (3 + 1 + 3) // 4
    assert policy.wire_bytes("two_shot", call, INT4) == message * (7 + 7) // 8
    output = str(policy.choose(call, INT4, "auto", 0, Machine(local_world_size=4)))
    crossing = f"{message // 4} bytes a rank to other nodes, two_shot {message * 4 * 2 // 8}"
    assert f"not hierarchical: a third rounding, so only on request; {crossing}" in output
    assert "hierarchical" not in str(policy.choose(Message(1 << 20, 4096, 2, 8, "cpu"), INT4, "auto", 0))


def test_hierarchical_goes_by_exchanges_and_never_by_one_kernel() -> None:
    for transport, over in (
        ("symmetric", "process_group"),
        ("host_memory", "process_group"),
        ("process_group", "process_group"),
    ):
        call = Message(1 << 12, 512, 2, 8, "cuda", 4)
        assert policy.choose(call, INT4, "hierarchical", 0, Machine(transport)).route.transport == over
