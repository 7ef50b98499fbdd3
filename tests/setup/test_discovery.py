"""Discovery: which ranks form a node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import raise_first, run_ranks

from flashcomm import Communicator
from flashcomm.errors import SettingsError, UnavailableError
from flashcomm.settings import Settings
from flashcomm.setup import discovery


def make(group: Any, local_world_size: int | None) -> Communicator:
    return Communicator(group, "int4", algorithm="hierarchical", local_world_size=local_world_size, min_bytes=0)


def found(monkeypatch: pytest.MonkeyPatch, places: list[tuple[str, str]], **given: Any) -> int:
    transport: Any = type("Transport", (), {"world_size": len(places), "device": torch.device("cpu")})()
    monkeypatch.setattr(discovery.consistency, "exchange", lambda *_: [list(place) for place in places])
    return discovery._local_world_size(transport, Settings.resolve("cpu", {}, **given))


def test_the_setting_counts_for_groups_that_make_such_nodes() -> None:
    """The setting applies to all groups of a process, which may differ in size."""
    for world_size, found in ((1, 1), (2, 2), (4, 4), (8, 4), (6, 0)):
        assert discovery.asked_local_world_size(Settings.resolve("cpu", {}, local_world_size=4), world_size) == found, (
            world_size
        )


def test_a_node_is_a_host_or_what_is_near_to_the_same_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, [("a", ""), ("a", ""), ("b", ""), ("b", "")]) == 2
    assert found(monkeypatch, [("a", "0-7"), ("a", "0-7"), ("a", "8-15"), ("a", "8-15")]) == 2
    assert found(monkeypatch, [("a", "0-7"), ("a", "8-15"), ("b", "0-7"), ("b", "8-15")]) == 2  # hosts first
    assert found(monkeypatch, [("a", ""), ("a", ""), ("a", "")]) == 3
    assert found(monkeypatch, [("a", ""), ("b", ""), ("a", ""), ("b", "")]) == 0
    assert found(monkeypatch, [("a", ""), ("b", ""), ("b", "")]) == 0


@pytest.mark.contract(11)
def test_nodes_that_are_asked_for_and_cannot_be_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [("a", ""), ("b", ""), ("a", ""), ("b", "")]
    assert found(monkeypatch, mixed, local_world_size=2) == 2
    with pytest.raises(UnavailableError, match=r"these ranks are at a, b, a, b: order the ranks by node"):
        found(monkeypatch, mixed, algorithm="hierarchical")
    with pytest.raises(SettingsError, match="local_world_size=3: 4 ranks cannot be divided into nodes of that size"):
        found(monkeypatch, mixed, local_world_size=3, algorithm="hierarchical")
    for wrong in (0, -1, "two", 1.5):
        with pytest.raises(SettingsError, match=r"local_world_size=.*give the number of ranks"):
            Settings.resolve("cpu", {}, local_world_size=wrong)


def test_the_ranks_of_one_host_are_one_node() -> None:
    def body(group: object, rank: int) -> tuple[int, str]:
        with make(group, None) as comm:
            return comm.machine.local_world_size, comm.explain((64, 512), torch.bfloat16).route.algorithm

    assert raise_first(run_ranks(2, body)) == [(2, "two_shot")] * 2


@pytest.mark.contract(5)
def test_node_sizes_that_differ_are_an_error_on_all_ranks() -> None:
    got = run_ranks(4, lambda group, rank: make(group, 2 if rank else 4))
    assert all(isinstance(why, SettingsError) and "local_world_size: rank 0 4, rank 1 2" in str(why) for why in got)
