"""The guard of a Communicator: one call at a time on a process group, and none after an interrupted call.

If Ctrl-C, a time limit or an allocation failure interrupts a call, some of its messages were sent and others were not.
Its peers do not know that, so the Communicator refuses every later call. A call sets a mark before it sends anything
and clears it at its very end. An exception at any instant in between leaves the mark set, even one that no `except`
sees.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType

import torch.distributed as dist

from flashcomm.errors import ClosedError, CommunicationError, FormatError, InputError

_BUSY = (
    "another thread of this process is in a call on this process group. Use one thread at a time, or a process group "
    "and a Communicator for each thread"
)
_FORKED = (
    "this process was forked from the one that created the Communicator. Create a process group and a Communicator "
    "after the fork"
)
# These are raised before anything is sent, or on all ranks together.
_CLEAN = (InputError, FormatError, ClosedError)


class GroupState:
    """The state that the Communicators of one process group share in this process.

    Attributes:
        lock: Held during a call on CPUs, because two threads would receive each other's messages.
        n_made: Number of Communicators created so far, equal on all ranks.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_made = 0


_states: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupState] = weakref.WeakKeyDictionary()


def state_of(group: dist.ProcessGroup) -> GroupState:
    """Return the state of this group, created at its first use."""
    return _states.setdefault(group, GroupState())


class CallGuard:
    """A context manager around each call of one Communicator.

        with guard.call("all_reduce"):
            ...

    Attributes:
        busy: Whether a call is running, or an exception interrupted one.
        lock: Held during a call.
        owner: The thread that is in a call; 0 if none.
    """

    def __init__(self, group_lock: threading.Lock | None, timeout_s: float) -> None:
        self.lock, self._group_lock, self._timeout_s = threading.Lock(), group_lock, timeout_s
        self.busy, self.owner, self._closing = False, 0, False
        self._pid, self._what, self._refusal = os.getpid(), "", ""
        _guards.add(self)

    def call(self, what: str) -> CallGuard:
        """Mark a call as running.

        Args:
            what: The call, for error messages.

        Raises:
            CommunicationError: An exception interrupted an earlier call, or this process was forked from the one that
                created the Communicator.
            InputError: Another thread is in a call.
            ClosedError: Another thread is closing the Communicator.
        """
        if self._refusal:
            raise CommunicationError(f"{what}: {self._refusal}")
        if not self.lock.acquire(blocking=False):
            if self.owner == threading.get_ident():
                raise CommunicationError(f"{what}: {_interrupted(self._what, 'an exception or a signal handler')}")
            if self._closing:
                raise ClosedError(f"{what} on a Communicator that is being closed: create a new one")
            raise InputError(f"{what}: {_BUSY}")
        if self._group_lock and not self._group_lock.acquire(blocking=False):
            self.lock.release()
            raise InputError(f"{what}: {_BUSY}")
        self.owner = threading.get_ident()
        if self.busy:  # interrupted before `__exit__` could record it
            self._refusal = _interrupted(self._what or "a call", "an exception")
            self._release()
            raise CommunicationError(f"{what}: {self._refusal}")
        self._what, self.busy = what, True
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or issubclass(kind, _CLEAN):
            self.busy = False
        else:
            by = f"{kind.__name__}: {why}" if issubclass(kind, CommunicationError) else kind.__name__
            self._refusal = _interrupted(self._what, by)
        self._release()

    @contextlib.contextmanager
    def closing(self) -> Iterator[bool]:
        """Wait until no other thread is in a call, at most for the time-out, and block new calls meanwhile.

        Yields:
            Whether no call is running. If one is, it may still use memory of the Communicator.
        """
        mine = self.owner == threading.get_ident()  # a signal handler closes in the middle of this thread's call
        self._closing = True
        held = os.getpid() == self._pid and not mine and self.lock.acquire(timeout=self._timeout_s)
        try:
            yield held
        finally:
            if held:
                self.lock.release()

    def _release(self) -> None:
        self.owner = 0
        if self._group_lock:
            self._group_lock.release()
        self.lock.release()


_guards: weakref.WeakSet[CallGuard] = weakref.WeakSet()


def _refuse_all() -> None:
    """In a forked process: refuse all calls of the Communicators that belong to its parent."""
    for guard in _guards:
        guard.busy, guard._refusal = True, _FORKED


os.register_at_fork(after_in_child=_refuse_all)


def _interrupted(what: str, by: str) -> str:
    return (
        f"this Communicator cannot be used any more: {what} was interrupted by {by}, and peers may wait for its "
        "messages. Create a new process group and a new Communicator on all ranks"
    )
