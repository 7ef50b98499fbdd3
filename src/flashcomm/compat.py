"""The private names of torch that flashcomm uses outside `gpu/`, each behind a function of ours.

torch may change such names in any release. Then only this file needs a change. Each docstring says what the name is
for, why no public name would do, and with which releases it was tested.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed import distributed_c10d

_registered: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()  # by `register`


def process_group_named(name: str) -> dist.ProcessGroup:
    """Return the process group with this name. Operators in compiled graphs hold names: they cannot hold groups.

    `distributed_c10d._resolve_process_group`, torch 2.11, 2.13 and 2.15. torch's own functional collectives use it.

    Raises:
        RuntimeError: No group has this name.
    """
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]


def name_of(group: dist.ProcessGroup) -> str | None:
    """Return the name by which torch finds the group; None if there is none. Symmetric memory finds its ranks by it.

    `distributed_c10d._resolve_process_group`, torch 2.11, 2.13 and 2.15. `group.group_name` is the name of the group's
    backends. The inner group of a c10d backend shares them with the outer one, whose name its `group_name` is.
    """
    try:
        name = _registered.get(group) or group.group_name
        return name if process_group_named(name) is group else None
    except RuntimeError:  # it has no name, or no group is registered under it
        return None


def register(group: dist.ProcessGroup, name: str, store: distributed_c10d.Store) -> None:
    """Let torch find a group by name that torch.distributed did not create, such as the inner one of a c10d backend.

    `torch._C._distributed_c10d._register_process_group`, torch 2.11, 2.13 and 2.15: symmetric memory takes rank, size
    and store from the group of a name. Releases in which `enable_symm_mem_for_group` is not yet deprecated look them up
    in a table of their own, which that function fills for groups of torch.distributed only.

    Args:
        group: The group.
        name: A name that no group of this process has had.
        store: The store of its ranks.
    """
    _register_process_group(name, group)  # type: ignore[arg-type]  # torch's GroupName is a str
    _registered[group] = name
    module = importlib.import_module("torch.distributed._symmetric_memory")
    if not hasattr(module.enable_symm_mem_for_group, "__deprecated__"):
        module._SymmetricMemory.set_group_info(name, group.rank(), group.size(), store)
        module._group_name_to_store[name] = store


def unregister(group: dist.ProcessGroup) -> None:
    """Undo `register`. Calling it again, or after `destroy_process_group`, does nothing.

    `torch._C._distributed_c10d._unregister_process_group`, torch 2.11, 2.13 and 2.15.
    """
    if name := _registered.pop(group, None):
        _unregister_process_group(name)  # type: ignore[arg-type]


def default_store() -> distributed_c10d.Store:
    """Return the store that the ranks of the default group share.

    `distributed_c10d._get_default_store`, torch 2.11, 2.13 and 2.15. Another store would need another address.

    Raises:
        ValueError: torch.distributed is not initialized.
    """
    return distributed_c10d._get_default_store()


def current_gpu() -> int:
    """Return the index of the current GPU, without the checks of `torch.cuda.current_device`.

    `torch._C._cuda_getDevice`, torch 2.11, 2.13 and 2.15.
    """
    return torch._C._cuda_getDevice()


def current_stream_handle(device_index: int) -> int:
    """Return the CUDA handle of the current stream, without creating a `torch.cuda.Stream`.

    `torch._C._cuda_getCurrentRawStream`, torch 2.11, 2.13 and 2.15. Triton's launchers use it, too.
    """
    return torch._C._cuda_getCurrentRawStream(device_index)


def let_senders_finish() -> None:
    """Put this process's gloo event threads under SCHED_BATCH, except those whose policy somebody has chosen.

    The thread's name, "gloo_tcp_loop", torch 2.13. In torch 2.11 it has none, and stays as it is. A thread that sends
    holds its connection's lock while the kernel copies the bytes. The event thread only tries that lock, and then asks
    for events again (`Pair::handleEvents` in gloo/transport/tcp/pair.cc). If it has just preempted the sender on the
    same core, it so computes until the scheduler's next tick, up to 4 ms later. Under SCHED_BATCH a thread that wakes
    preempts no other. Where the system forbids the change, and where the thread has another name, all stays as it is.
    """
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has ended, or a sandbox forbids the call
            thread = int(name.parent.name)
            if name.read_text() == "gloo_tcp_loop\n" and os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def start_sequence_numbers(backend: Any) -> None:
    """Let a backend that was constructed directly count its collectives, as `new_group` does.

    `Backend._set_sequence_number_for_group`, torch 2.11 and 2.13. Error messages of gloo and NCCL name the count. In
    torch 2.15 all backends count, and the name only prints a warning.
    """
    if torch.__version__ < "2.15":
        backend._set_sequence_number_for_group()


def in_backward_pass() -> bool:
    """Return whether the autograd engine runs a backward pass on this thread.

    `torch._C._current_graph_task_id`, torch 2.13 and 2.15. There is no public name for it.
    """
    return torch._C._current_graph_task_id() != -1


def accept_in_monitored_barrier(kind: type[Any]) -> None:
    """Make `torch.distributed.monitored_barrier` accept groups of this class, by calling their own method.

    `distributed_c10d.monitored_barrier`, torch 2.11, 2.13 and 2.15, compares the name of the backend with "gloo" and
    raises ValueError for all others. There is no hook, so this replaces the function.
    """
    original = distributed_c10d.monitored_barrier

    @functools.wraps(original)
    def monitored_barrier(
        group: dist.ProcessGroup | None = None, timeout: timedelta | None = None, wait_all_ranks: bool = False
    ) -> None:
        found: Any = dist.group.WORLD if group is None else group
        if not isinstance(found, kind):
            original(group, timeout, wait_all_ranks)
        elif timeout is None:
            found.monitored_barrier(wait_all_ranks=wait_all_ranks)
        else:
            found.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)

    distributed_c10d.monitored_barrier = dist.monitored_barrier = monitored_barrier
