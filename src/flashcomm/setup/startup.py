"""Creates the parts of a Communicator. An error is raised on all ranks or on none."""

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
    """The parts of a Communicator, after all ranks have compared their settings."""

    group: dist.ProcessGroup
    device: torch.device
    settings: Settings
    guard: call_guard.CallGuard
    transport: ProcessGroupTransport
    machine: Machine
    executors: dict[Executor, Base]


def start(group: dist.ProcessGroup | None, device: str | None, plan: str, arguments: Mapping[str, Any]) -> Started:
    """Resolve settings, compare them between ranks, and find transports and executors. Collective.

    Args:
        group: The process group. None: the default group.
        device: As in `Communicator`.
        plan: The digest of a plan.
        arguments: The keyword arguments of `Settings.resolve`.

    Raises:
        FlashcommError: On every rank, if creating fails on any rank.
    """
    if group is None:
        if not dist.is_initialized():
            raise SettingsError("no process group: call torch.distributed.init_process_group first, or pass group=")
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):  # such as GroupMember.NON_GROUP_MEMBER
        raise SettingsError("group= must be a process group that this rank is a member of: call this on members only")
    given, group = group, getattr(group, "backend_group", group)  # of our c10d backend, whose own sums are low-bit
    try:
        where = consistency.group_device(group, device)
        mine: Settings | FlashcommError = replace(Settings.resolve(where.type, **arguments), plan=plan)
    except Exception as why:  # perhaps only on this rank: raised by `check_settings` on all
        where = consistency.group_device(group, None)
        mine = why if isinstance(why, FlashcommError) else SettingsError(f"{type(why).__name__}: {why}")
    timeout_s = mine.timeout_s if isinstance(mine, Settings) else 60.0
    state = call_guard.state_of(group)
    guard = call_guard.CallGuard(state.lock if where.type == "cpu" else None, timeout_s)
    transport = ProcessGroupTransport(group, where, timeout_s)
    try:
        with guard.call("creating a Communicator"):
            settings = consistency.check_settings(transport, state.n_made, mine)
            state.n_made = transport.tags.communicator + 1
            machine, executors = _connect(group, transport, settings)
    except BaseException:
        transport.close()
        raise
    return Started(given, where, settings, guard, transport, machine, executors)


def _connect(
    group: dist.ProcessGroup, transport: ProcessGroupTransport, settings: Settings
) -> tuple[Machine, dict[Executor, Base]]:
    """Call `discovery.connect`. If it raises on one rank, raise an error on all ranks."""
    try:
        found = discovery.connect(group, transport, settings)
        consistency.exchange(transport, None, "creating the Communicator")  # receives failures of other ranks
        return found
    except FlashcommError:  # raised on all ranks, or they cannot be reached
        raise
    except Exception as why:
        consistency.exchange_failure(transport, why)
        raise
