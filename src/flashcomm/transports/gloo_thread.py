"""Lets a thread that sends through gloo finish before gloo's event thread runs on the same core.

A thread that sends holds the lock of its connection while the kernel copies the bytes. gloo's event thread, which wakes
when bytes arrive, only tries that lock: if it is taken, the thread asks for events again and at once gets the same one
(`Pair::handleEvents` in gloo/transport/tcp/pair.cc). On a core of its own it turns like that for some microseconds. But
if it has just preempted the sender, the sender cannot go on, and both lose the core's time until the scheduler's next
tick, up to 4 ms. Most small messages between ranks with one core each met that.

Under Linux's policy SCHED_BATCH a thread that wakes never preempts another one. An event thread that finds a free core
still starts at once. One that finds none waits for a time slice, as a thread of the default policy may have to.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_NAME = "gloo_tcp_loop"  # of torch 2.11 to 2.15's gloo


def never_preempt() -> None:
    """Put this process's gloo event threads under SCHED_BATCH, except those whose policy somebody has chosen.

    Where the system forbids that, they stay as they are.
    """
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended, or a sandbox forbids the call
            thread_id = int(task.name)
            if (
                task.joinpath("comm").read_text().strip() == _NAME
                and os.sched_getscheduler(thread_id) == os.SCHED_OTHER
            ):
                os.sched_setscheduler(thread_id, os.SCHED_BATCH, os.sched_param(0))
