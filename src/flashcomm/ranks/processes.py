"""Watched child processes: the parent receives their results and errors, and no child outlives it.

When a process dies in a collective, the others wait, often for half an hour. So the process that started them does
nothing but watch them. Each child has a pipe to it, with three kinds of messages:

    event    an object for the caller's `on_event`; the child continues
    result   the child is done
    error    the child raised an exception: class, message and traceback as plain strings, which can always be sent

If a pipe closes before a result, the child has died. After the first error or death the other children have a second to
report theirs, often the same one. Then they are terminated and, if necessary, killed.

Children ignore Ctrl-C, which a terminal sends to the whole process group. The watching process handles it and stops
them. If that process is killed, the kernel kills its children (PR_SET_PDEATHSIG), and those of the fork server, which
have another parent, kill themselves.

The fork server is a process of multiprocessing that has imported torch. Its children start in
milliseconds, where importing torch takes each spawned one seconds of a core.
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
from multiprocessing import connection, reduction, resource_tracker
from typing import Any

from flashcomm import errors
from flashcomm.errors import CommunicationError, FlashcommError

GRACE_S = 1.0  # time to report after the first failure, and time to exit after termination
PRELOADED = ["torch"]  # the modules that the fork server imports
_POLL_S = 0.2  # the longest delay until a signal is handled
_libc = ctypes.CDLL(None)

_ERRORS = {c.__name__: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FlashcommError)}

Emit = Callable[[object], None]


class RankTraceback(Exception):  # noqa: N818  (it is text to show, and never caught)
    """The `__cause__` of an error from a child. Its text is the child's traceback."""


@contextlib.contextmanager
def children(patience_s: float = GRACE_S) -> Iterator[Children]:
    """Yield a `Children` to start and watch child processes. All of them have ended after the with block.

    Args:
        patience_s: Seconds that a terminated child has to exit before it is killed. A child that must stop its own
            children needs more.
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
    """The failure of a child: the name of the error class to raise, its message, the traceback as text."""

    error: str
    message: str
    trace: str
    died: bool = False


class Children:
    """The child processes of a `children` block.

    Args:
        check: Raises KeyboardInterrupt or SystemExit after a signal.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._all: list[_Child] = []

    def start(self, method: str, name: str, body: Callable[..., object], *args: object) -> None:
        """Start a child that calls `body(emit, *args)`.

        Args:
            method: "fork"; "spawn"; or "forkserver", a fork of a process that has imported torch.
            name: The child's name in error messages.
            body: The function to call.
            *args: Its arguments.
        """
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(PRELOADED)  # without effect on a server that runs
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child_main, args=(_Surroundings(), sender, body, *args), name=name)
        # A child inherits the signal mask, so one started while SIGINT is blocked never receives Ctrl-C. (One of the
        # fork server sets its own.) Starting multiprocessing's resource tracker unblocks SIGINT, so it must be started
        # before.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sender.close()  # only the child's copy is left, so the pipe closes when the child dies
        self._all.append(_Child(name, process, receiver))

    def watch(self, on_event: Emit, timeout_s: float) -> list[object]:
        """Pass on events until every child has finished.

        Args:
            on_event: Called with the objects that children emit.
            timeout_s: Seconds to wait for all children.

        Returns:
            The results, in the order of the children.

        Raises:
            FlashcommError: A child failed; see `_error`.
            CommunicationError: Not all children finished in time.
        """
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
            child.process.join(3 * GRACE_S)  # it only has to exit
        return [results[child.name] for child in self._all]

    def stop(self, patience_s: float) -> None:
        """Terminate all children, and kill those that have not ended after patience_s seconds."""
        for stop in ("terminate", "kill"):
            for child in self._all:
                getattr(child.process, stop)()
            deadline = time.monotonic() + patience_s
            for child in self._all:
                child.process.join(max(0.0, deadline - time.monotonic()))
        for child in self._all:
            child.process.join()
            child.pipe.close()


class _Surroundings:
    """The environment and stderr of the process that starts a child, as the fork server's may be of an earlier time.

    They take effect as they are unpickled: before the arguments behind them, whose modules may look at them.
    """

    def __reduce__(self) -> tuple[Callable[..., None], tuple[object, ...]]:
        return _enter, (dict(os.environ), reduction.DupFd(2))


def _enter(environ: dict[str, str], stderr: Any) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.dup2(stderr.detach(), 2)


def _die_with(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _child_main(_: object, pipe: connection.Connection, body: Callable[..., object], *args: object) -> None:
    """Run a child: let it die with its parent, redirect stdout to stderr, send the outcome of `body`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent: Any = multiprocessing.parent_process()
    if os.getppid() != parent.pid:  # this is a child of the fork server, or the parent died before the line above
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    os.dup2(2, 1)
    try:
        pipe.send(("result", body(lambda event: pipe.send(("event", event)), *args)))
    except BaseException as error:  # SystemExit, too: the caller must see how the body ended
        name = next((c.__name__ for c in type(error).__mro__ if _ERRORS.get(c.__name__) is c), None)
        first_line = (str(error).splitlines() or [""])[0]
        message = str(error) if name else f"{type(error).__name__}: {first_line}"
        trace = "".join(traceback.format_exception(error))
        if isinstance(error.__cause__, RankTraceback):
            trace = str(error.__cause__)  # from a child's child: keep the innermost traceback
        pipe.send(("error", _Failure(name or "FlashcommError", message, trace)))


def _death(child: _Child) -> _Failure:
    child.process.join(GRACE_S)
    code = child.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited early with status {code}"
    return _Failure("FlashcommError", f"{child.name} {how}", "", died=True)


def _error(failures: dict[str, _Failure], count: int) -> FlashcommError:
    """Return the error to raise: for a death if there is one, because it causes other errors; else for the first."""
    name, failure = next(((n, f) for n, f in failures.items() if f.died), next(iter(failures.items())))
    everywhere = len(failures) == count and len({f.message for f in failures.values()}) == 1
    message = failure.message if everywhere or failure.died else f"{name}: {failure.message}"
    error: FlashcommError = _ERRORS[failure.error](message)
    error.__cause__ = RankTraceback(failure.trace) if failure.trace else None
    return error


@contextlib.contextmanager
def _deferred_signals() -> Iterator[Callable[[], None]]:
    """Record SIGINT and SIGTERM in a with block. The function that it yields raises an exception if there was one.

    So the watching loop handles them, and never while a child is being started or stopped. Handlers that the caller
    installed stay. SIGTERM becomes SystemExit(143), the status that shells use.
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
    check()  # for a signal after the last check of the loop
