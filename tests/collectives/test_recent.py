"""The fast path of repeated calls. On GPUs it runs in place of the normal path, so it must be guarded alike."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashcomm.collectives import recent
from flashcomm.errors import CommunicationError, InputError
from flashcomm.setup import call_guard

X = torch.ones(8)


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> call_guard.CallGuard:
    monkeypatch.setattr(recent, "current_gpu", lambda: -1)  # as `get_device` says of a CPU tensor
    return call_guard.CallGuard(None, 5)


def calls_with(guard: call_guard.CallGuard, launch: Any) -> recent.RecentCalls:
    calls = recent.RecentCalls(SimpleNamespace(index=-1), guard)  # type: ignore[arg-type]
    calls.keep(X, None, None, "all_reduce/one_shot", 8, launch)
    return calls


def test_it_repeats_a_call(guard: call_guard.CallGuard) -> None:
    seen: list[tuple[int, int]] = []
    calls = calls_with(guard, lambda source, target: seen.append((source, target)))
    got = calls.repeat(X, None, None)
    assert got is not None
    assert got[1:] == ("all_reduce/one_shot", 8)
    assert seen == [(X.data_ptr(), got[0].data_ptr())]
    assert calls.repeat(torch.ones(9), None, None) is None
    with guard.call("all_reduce"):
        assert calls.repeat(X, None, None) is None, "a call is running"
    with guard.closing():
        assert calls.repeat(X, None, None) is None, "what it needs is being freed"
    assert calls.repeat(X, None, None) is not None


def test_after_an_exception_all_calls_are_refused(guard: call_guard.CallGuard) -> None:
    def interrupted(source: int, target: int) -> None:
        raise MemoryError

    calls = calls_with(guard, interrupted)
    with pytest.raises(MemoryError):
        calls.repeat(X, None, None)
    assert calls.repeat(X, None, None) is None
    with pytest.raises(CommunicationError, match="cannot be used any more: a call was interrupted by an exception"):
        guard.call("all_reduce")


def test_another_thread_is_refused_and_close_waits(guard: call_guard.CallGuard) -> None:
    running, go, order = threading.Event(), threading.Event(), []  # type: ignore[var-annotated]

    def launch(source: int, target: int) -> None:
        running.set()
        assert go.wait(20)
        order.append("launched")

    calls = calls_with(guard, launch)

    def close() -> None:
        with guard.closing() as idle:
            calls.clear()
            order.append(("closed", idle))

    threads = [threading.Thread(target=calls.repeat, args=(X, None, None)), threading.Thread(target=close)]
    threads[0].start()
    assert running.wait(20)
    with pytest.raises(InputError, match="another thread of this process is in a call"):
        guard.call("all_reduce")
    threads[1].start()
    threads[1].join(0.1)
    go.set()
    for thread in threads:
        thread.join(20)
    assert order == ["launched", ("closed", True)]
    assert calls.repeat(X, None, None) is None


def test_close_within_a_call_says_so(guard: call_guard.CallGuard) -> None:
    """A signal handler may call it. What the call uses must stay."""

    def launch(source: int, target: int) -> None:
        with guard.closing() as idle:
            assert not idle

    assert calls_with(guard, launch).repeat(X, None, None) is not None


def test_a_forked_process_refuses(guard: call_guard.CallGuard) -> None:
    calls = calls_with(guard, lambda source, target: None)
    call_guard._refuse_all()
    assert calls.repeat(X, None, None) is None
    with pytest.raises(CommunicationError, match="was forked from the one that created the Communicator"):
        guard.call("all_reduce")
