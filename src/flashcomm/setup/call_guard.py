"""One call at a time on a process group, and no call after one that an exception left halfway.

A call that Ctrl-C, a time limit or an allocation failure leaves has sent some of its messages and not the others. Its
peers cannot know, so this rank must not go on as if nothing had happened: the Communicator refuses every later call.
The guard fails safe. A call marks itself as running before it sends anything and clears the mark at its very end, so
that an exception at any instant in between, also one that no `except` sees, leaves the mark.
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
    "another thread of this process is in a call on this process group. Use a group, and a Communicator, for each "
    "thread, or one thread at a time"
)
# Raised before anything is sent, or after all ranks exchanged that they raise it.
_CLEAN = (InputError, FormatError, ClosedError)


class GroupState:
    """What the Communicators of one process group share in this process.

    Attributes:
        lock: Held during a call on CPUs: two threads would take each other's messages.
        n_made: How many Communicators were made, as all ranks agreed.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_made = 0


_states: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupState] = weakref.WeakKeyDictionary()


def state_of(group: dist.ProcessGroup) -> GroupState:
    """The state of this group, made at its first use."""
    return _states.setdefault(group, GroupState())


class CallGuard:
    """A context manager around each call of one Communicator.

        with guard.call("all_reduce"):
            ...

    Attributes:
        busy: A call is running, or was left by an exception.
    """

    def __init__(self, group_lock: threading.Lock | None, timeout_s: float) -> None:
        self._lock, self._group_lock, self._timeout_s = threading.Lock(), group_lock, timeout_s
        self._closing = False
        self._pid, self._owner, self._what, self._left = os.getpid(), 0, "", ""
        self.busy = False

    def call(self, what: str) -> CallGuard:
        """Mark a call as running.

        Args:
            what: The call, for error messages.

        Raises:
            CommunicationError: An earlier call was left by an exception, or this process is a fork of the one that made
                the Communicator.
            InputError: Another thread is in a call.
            ClosedError: Another thread is closing the Communicator.
        """
        if os.getpid() != self._pid:
            raise CommunicationError(
                f"{what}: this process was forked from the one that made the Communicator. Make a process group and a "
                "Communicator of its own after the fork"
            )
        if self._left:
            raise CommunicationError(f"{what}: {self._left}")
        if not self._lock.acquire(blocking=False):
            if self._owner == threading.get_ident():
                raise CommunicationError(f"{what}: {_left(self._what, 'an exception or a signal handler')}")
            if self._closing:
                raise ClosedError(f"{what} on a Communicator that is being closed: make a new one")
            raise InputError(f"{what}: {_BUSY}")
        if self._group_lock and not self._group_lock.acquire(blocking=False):
            self._lock.release()
            raise InputError(f"{what}: {_BUSY}")
        self._owner = threading.get_ident()
        if self.busy:  # left so abruptly that `__exit__` did not note it
            self._left = _left(self._what or "a call", "an exception")
            self._release()
            raise CommunicationError(f"{what}: {self._left}")
        self._what, self.busy = what, True
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or issubclass(kind, _CLEAN):
            self.busy = False
        else:
            by = f"{kind.__name__}: {why}" if issubclass(kind, CommunicationError) else kind.__name__
            self._left = _left(self._what, by)
        self._release()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Wait until no other thread is in a call, at most for the time-out, and keep calls out meanwhile."""
        mine = self._owner == threading.get_ident()  # a signal handler, in the middle of the call
        self._closing = True
        held = os.getpid() == self._pid and not mine and self._lock.acquire(timeout=self._timeout_s)
        try:
            yield
        finally:
            if held:
                self._lock.release()

    def _release(self) -> None:
        self._owner = 0
        if self._group_lock:
            self._group_lock.release()
        self._lock.release()


def _left(what: str, by: str) -> str:
    return (
        f"this Communicator cannot be used any more: {what} was left by {by}. Peers may wait for the rest of it. "
        "Make the process group and the Communicator anew on all ranks"
    )
