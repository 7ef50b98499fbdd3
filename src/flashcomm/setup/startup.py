"""Creating a Communicator: settings, guard, transport and executors, with an error on all ranks or on none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.collectives.executors import Base
from flashcomm.errors import FlashcommError, SettingsError
from flashcomm.routing.route import Executor, Machine
from flashcomm.settings import Settings
from flashcomm.setup import call_guard, consistency, discovery
from flashcomm.transports.process_group import ProcessGroupTransport


@dataclass(frozen=True)
class Started:
    """What a Communicator consists of once its ranks have agreed."""

    group: dist.ProcessGroup
    device: torch.device
    settings: Settings
    guard: call_guard.CallGuard
    transport: ProcessGroupTransport
    machine: Machine
    executors: dict[Executor, Base]


def start(group: dist.ProcessGroup | None, device: str | None, plan: str, arguments: Mapping[str, Any]) -> Started:
    """Resolve and compare settings, find what the ranks can do together. Collective.

    Args:
        group: None is the default group.
        device: "cpu", "cuda" or None, as `Communicator` takes it.
        plan: The digest of a plan.
        arguments: Of `Settings.resolve`.

    Raises:
        FlashcommError: On every rank, whatever went wrong on one of them.
    """
    if group is None:
        if not dist.is_initialized():
            raise SettingsError("no process group: call torch.distributed.init_process_group first, or pass group=")
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):  # also GroupMember.NON_GROUP_MEMBER
        raise SettingsError("group= must be a process group that this rank is a member of: only members take part")
    try:
        where = consistency.group_device(group, device)
        mine: Settings | FlashcommError = replace(Settings.resolve(where.type, **arguments), plan=plan)
    except Exception as why:  # of this rank alone, perhaps: raised below, once every rank knows of it
        where = consistency.group_device(group, None)
        mine = why if isinstance(why, FlashcommError) else SettingsError(f"{type(why).__name__}: {why}")
    timeout_s = mine.timeout_s if isinstance(mine, Settings) else 60.0
    state = call_guard.state_of(group)
    guard = call_guard.CallGuard(state.lock if where.type == "cpu" else None, timeout_s)
    transport = ProcessGroupTransport(group, where, timeout_s)
    try:
        with guard.call("making a Communicator"):
            settings = consistency.check_settings(transport, state.n_made, mine)
            state.n_made = transport.tags.communicator + 1
            machine, executors = _connect(group, transport, settings)
    except BaseException:
        transport.close()
        raise
    return Started(group, where, settings, guard, transport, machine, executors)


def _connect(
    group: dist.ProcessGroup, transport: ProcessGroupTransport, settings: Settings
) -> tuple[Machine, dict[Executor, Base]]:
    """`discovery.connect`, so that an exception on one rank is an error on all of them."""
    try:
        found = discovery.connect(group, transport, settings)
        consistency.tell(transport, None, "finishing the Communicator")  # no rank may miss a failure
        return found
    except FlashcommError:  # on all ranks, or nobody can be told
        raise
    except Exception as why:
        consistency.tell_failure(transport, why)
        raise
