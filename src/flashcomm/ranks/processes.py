"""Child processes that are watched: their reports and failures come back, and none outlives its parent.

When a process of a collective dies, the others wait, often for half an hour. So the process that started them does
nothing but watch. Each child has a pipe to it, with three kinds of message:

    event    an object for the caller's `on_event`, while the child goes on
    result   the child is done
    error    the child raised: class, message and traceback, as plain strings, so that they always fit the pipe

A pipe that closes before its result is a child that died. The first error or death ends the watch: the other children
have a second to report theirs (they often have the same), then they are terminated and, if need be, killed.

No child is left behind. Children ignore Ctrl-C, which a terminal sends to the whole group: the watching process notes
it and stops them. If that process itself is killed, the kernel kills its children (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any

from flashcomm import errors
from flashcomm.errors import CommunicationError, FlashcommError

GRACE_S = 1.0  # for the other children to report after the first failure, and for a terminated one to go
_POLL_S = 0.2  # how late a signal may be noticed
_libc = ctypes.CDLL(None)

_ERRORS = {c.__name__: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FlashcommError)}

Emit = Callable[[object], None]


class RankTraceback(Exception):  # noqa: N818  (it is text to show, nobody catches it)
    """The `__cause__` of an error that a child raised; its text is the traceback in the child."""


@contextlib.contextmanager
def children(patience_s: float = GRACE_S) -> Iterator[Children]:
    """Children to start and watch; they are gone after the block, however it is left.

    A terminated child has `patience_s` seconds to exit by itself; one that has children to stop needs more.
    """
    with _deferred_signals() as check:
        family = Children(check)
        try:
            yield family
        finally:
            family.stop(patience_s)


@dataclass(frozen=True)
class _Child:
    name: str
    process: Any  # multiprocessing's process classes share no public base with a pid
    pipe: connection.Connection


@dataclass(frozen=True)
class _Failure:
    """How a child failed: the name of the error class to raise, its message, the traceback as text."""

    error: str
    message: str
    trace: str
    died: bool = False


class Children:
    """Created by `children`. `check` raises what a signal asked for."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._all: list[_Child] = []

    def start(self, method: str, name: str, body: Callable[..., object], *args: object) -> None:
        """Call `body(emit, *args)` in a child: "fork" or "spawn" it. Errors call it `name`."""
        context: Any = multiprocessing.get_context(method)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child_main, args=(os.getpid(), sender, body, *args), name=name)
        # A child inherits the signal mask, so one started while SIGINT is blocked never sees Ctrl-C. The tracker that
        # multiprocessing starts with its first child unblocks it: start that one before.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sender.close()  # the child's copy is the only one now: the pipe closes when the child dies
        self._all.append(_Child(name, process, receiver))

    def watch(self, on_event: Emit, timeout_s: float) -> list[object]:
        """Pass on events until every child has reported; return their results, or raise the error that tells most."""
        deadline = time.monotonic() + timeout_s
        results: dict[str, object] = {}
        failures: dict[str, _Failure] = {}
        while open_pipes := {c.pipe: c for c in self._all if c.name not in results and c.name not in failures}:
            self._check()
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for pipe in connection.wait(list(open_pipes), min(left, _POLL_S)):
                child = open_pipes[pipe]  # type: ignore[index]
                try:
                    kind, value = child.pipe.recv()
                except (EOFError, OSError):
                    kind, value = "error", _death(child)
                if kind == "event":
                    on_event(value)
                elif kind == "result":
                    results[child.name] = value
                else:
                    failures[child.name] = value
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise _error(failures, len(self._all))
        if open_pipes:
            late = ", ".join(child.name for child in open_pipes.values())
            raise CommunicationError(f"{late} had not finished after {timeout_s:g} s: all ranks were stopped")
        for child in self._all:
            child.process.join(3 * GRACE_S)  # it has only its exit left to do
        return [results[child.name] for child in self._all]

    def stop(self, patience_s: float) -> None:
        for stop in ("terminate", "kill"):
            for child in self._all:
                getattr(child.process, stop)()
            deadline = time.monotonic() + patience_s
            for child in self._all:
                child.process.join(max(0.0, deadline - time.monotonic()))
        for child in self._all:
            child.process.join()
            child.pipe.close()


def _child_main(parent: int, pipe: connection.Connection, body: Callable[..., object], *args: object) -> None:
    """First code of every child: tie its life to its parent's, keep stdout clean, report how `body` ended."""
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # the parent died before the line above
    os.dup2(2, 1)
    try:
        pipe.send(("result", body(lambda event: pipe.send(("event", event)), *args)))
    except BaseException as error:  # SystemExit too: whatever ended the body is the caller's to see
        name = next((c.__name__ for c in type(error).__mro__ if _ERRORS.get(c.__name__) is c), None)
        first_line = (str(error).splitlines() or [""])[0]
        message = str(error) if name else f"{type(error).__name__}: {first_line}"
        trace = "".join(traceback.format_exception(error))
        if isinstance(error.__cause__, RankTraceback):
            trace = str(error.__cause__)  # handed on by a child that watches children: the innermost is the one
        pipe.send(("error", _Failure(name or "FlashcommError", message, trace)))


def _death(child: _Child) -> _Failure:
    child.process.join(GRACE_S)
    code = child.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited early with status {code}"
    return _Failure("FlashcommError", f"{child.name} {how}", "", died=True)


def _error(failures: dict[str, _Failure], count: int) -> FlashcommError:
    """The failure to show: a death rather than what other children raised because of it, otherwise the first."""
    name, failure = next(((n, f) for n, f in failures.items() if f.died), next(iter(failures.items())))
    everywhere = len(failures) == count and len({f.message for f in failures.values()}) == 1
    message = failure.message if everywhere or failure.died else f"{name}: {failure.message}"
    error: FlashcommError = _ERRORS[failure.error](message)
    error.__cause__ = RankTraceback(failure.trace) if failure.trace else None
    return error


@contextlib.contextmanager
def _deferred_signals() -> Iterator[Callable[[], None]]:
    """Note SIGINT and SIGTERM instead of acting on them; the function that it yields raises what was noted.

    So the watching loop acts on them, and never while a child is being started or stopped. Handlers that the caller
    installed are left alone. SIGTERM becomes SystemExit(143), which is how a shell reports it.
    """
    noted: list[int] = []
    saved: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                saved[number] = signal.signal(number, lambda received, frame: noted.append(received))

    def check() -> None:
        if noted:
            raise KeyboardInterrupt if noted[0] == signal.SIGINT else SystemExit(128 + noted[0])

    try:
        yield check
    finally:
        for changed, handler in saved.items():
            signal.signal(changed, handler)
    check()  # one that came after the loop's last look
