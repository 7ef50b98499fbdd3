"""The private names of torch that flashcomm uses outside `gpu/`, each behind a function of ours.

torch may change such names in any release. Then only this file needs a change. Each docstring says what the name is
for, why no public name would do, and with which releases it was tested.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def process_group_named(name: str) -> dist.ProcessGroup:
    """Return the process group with this name. Operators in compiled graphs hold names: they cannot hold groups.

    `distributed_c10d._resolve_process_group`, torch 2.11 and 2.13. torch's own functional collectives use it.

    Raises:
        RuntimeError: No group has this name.
    """
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]


def is_registered(group: dist.ProcessGroup) -> bool:
    """Return whether torch.distributed knows the group. If not, symmetric memory cannot find its ranks by its name.

    `distributed_c10d._world.pg_names`, torch 2.11 and 2.13. Public functions raise for a group that is not registered,
    such as the inner one of a c10d backend.
    """
    return group in distributed_c10d._world.pg_names


def default_store() -> distributed_c10d.Store:
    """Return the store that the ranks of the default group share.

    `distributed_c10d._get_default_store`, torch 2.11 and 2.13. Another store would need another address.

    Raises:
        ValueError: torch.distributed is not initialized.
    """
    return distributed_c10d._get_default_store()


def current_gpu() -> int:
    """Return the index of the current GPU, without the checks of `torch.cuda.current_device`.

    `torch._C._cuda_getDevice`, torch 2.11 and 2.13.
    """
    return torch._C._cuda_getDevice()


def current_stream_handle(device_index: int) -> int:
    """Return the CUDA handle of the current stream, without creating a `torch.cuda.Stream`.

    `torch._C._cuda_getCurrentRawStream`, torch 2.11 and 2.13. Triton's launchers use it, too.
    """
    return torch._C._cuda_getCurrentRawStream(device_index)


def start_sequence_numbers(backend: Any) -> None:
    """Let a backend that was constructed directly count its collectives, as `new_group` does.

    `Backend._set_sequence_number_for_group`, torch 2.11 and 2.13. Error messages of gloo and NCCL name the count.
    """
    backend._set_sequence_number_for_group()


def in_backward_pass() -> bool:
    """Return whether the autograd engine runs a backward pass on this thread.

    `torch._C._current_graph_task_id`, torch 2.13. There is no public name for it.
    """
    return torch._C._current_graph_task_id() != -1


def accept_in_monitored_barrier(kind: type[Any]) -> None:
    """Make `torch.distributed.monitored_barrier` accept groups of this class, by calling their own method.

    `distributed_c10d.monitored_barrier`, torch 2.11 and 2.13, compares the name of the backend with "gloo" and raises
    ValueError for all others. There is no hook, so this replaces the function.
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
