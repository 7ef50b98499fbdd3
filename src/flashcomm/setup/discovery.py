"""What a group's ranks find that they can do together: peers' memory or not, which of them are near to each other, and
the times measured.

Collective, at set-up: facts are exchanged once, and every rank comes to the same verdict.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flashcomm.errors import SettingsError, UnavailableError
from flashcomm.routing import policy, timings
from flashcomm.routing.policy import Machine
from flashcomm.settings import Settings
from flashcomm.setup import consistency
from flashcomm.transports import cpu_shared, host_memory, symmetric
from flashcomm.transports.process_group import ProcessGroupTransport, has_nccl

if TYPE_CHECKING:
    from flashcomm.collectives.pipelined import Transport
    from flashcomm.gpu.launch import KernelCollectives
    from flashcomm.transports.staging import StagedTransport

MAPPED_WORKSPACE = 32 << 20  # of host memory for kernels: small messages only

log = logging.getLogger("flashcomm")


@dataclass(frozen=True)
class Connected:
    """What a Communicator has: the machine, as the policy sees it, and if they can be had the collectives over memory
    that peers write to, bytes through host memory, and exchanges within and across nodes."""

    machine: Machine
    fused: KernelCollectives | None
    staged: StagedTransport | None
    nodes: tuple[Transport, Transport] | None


def connect(group: dist.ProcessGroup, transport: ProcessGroupTransport, settings: Settings) -> Connected:
    """Collective. Raises, on every rank, SettingsError for a transport that is not for this device or nodes that the
    world does not have, UnavailableError for what was asked for and cannot be had. `auto` falls back, and rank 0 says
    why, once.
    """
    device, asked = transport.device, settings.transport
    fused, staged = None, None
    nodes: tuple[Transport, Transport] | None = None
    local_world_size = _local_world_size(transport, settings)
    if settings.algorithm == "hierarchical" and policy.worth_nodes(transport.world_size, local_world_size):
        begin = transport.rank // local_world_size * local_world_size
        parts = (
            range(begin, begin + local_world_size),
            range(transport.rank % local_world_size, transport.world_size, local_world_size),
        )
        nodes = transport.among(parts[0]), transport.among(parts[1])
    rejected: tuple[tuple[str, str], ...] = ()
    name = "process_group"
    for kind in candidates(device.type, asked) if transport.world_size > 1 else ():
        region, why = _join(group, transport, settings, kind, nodes is not None)
        if region is not None:
            name = kind.NAME
            fused, staged = _over(region, settings, staged=kind is host_memory)
            if staged is not None and nodes is not None:
                nodes = staged.among(parts[0], 1), staged.among(parts[1], 2)
            break
        if asked != "auto":
            raise UnavailableError(f"transport={asked!r} was asked for and cannot be had: {why}")
        rejected += ((kind.NAME, why),)
    if device.type == "cuda" and name == "process_group" and transport.world_size > 1 and not has_nccl(group):
        rejected += (("nccl", "the group has another backend, so that messages go by way of the CPU, slowly"),)
    if rejected and transport.rank == 0:
        log.warning("transport %s: %s", name, "; ".join(f"not {other}: {why}" for other, why in rejected))
    table = timings.find(machine_name(device), transport.world_size, name) if transport.rank == 0 else None
    told = consistency.tell(transport, timings.as_dict(table) if table else None, "sharing the table of times")[0]
    machine = Machine(name, timings.from_dict(told) if told else None, rejected, local_world_size)
    return Connected(machine, fused, staged, nodes)


def _local_world_size(transport: ProcessGroupTransport, settings: Settings) -> int:
    """How many consecutive ranks a node has: as the setting says, or as found; 0 where ranks have no such order."""
    if settings.local_world_size:
        return asked_local_world_size(settings, transport.world_size)
    places = consistency.tell(transport, near(transport.device), "looking for nodes")
    found = grouped(places)
    if not found and settings.algorithm == "hierarchical":
        raise UnavailableError(
            "algorithm='hierarchical' needs nodes of equally many, consecutive ranks; these are at "
            f"{', '.join(' '.join(place).strip() for place in places)}: order the ranks by node, or set local_world"
        )
    return found


def asked_local_world_size(settings: Settings, world_size: int) -> int:
    """The setting, for groups that fit into a node their size; 0 where it is not set or does not divide the world.
    Raises SettingsError in the latter case if nodes are asked for."""
    asked = min(settings.local_world_size, world_size)
    if asked and world_size % asked:
        if settings.algorithm == "hierarchical":
            raise SettingsError(f"local_world_size={asked}: {world_size} ranks do not make nodes of that many")
        return 0
    return asked


def near(device: torch.device) -> list[str]:
    """What ranks of one node have in common: the host, and on one host the CPUs near to their GPUs."""
    return [cpu_shared.host_name(), host_memory.cpulist(device) if device.type == "cuda" else ""]


def grouped(places: Sequence[Sequence[str]]) -> int:
    """How many consecutive ranks a node has, of ranks that are `near` to these; 0 where they have no such order."""
    hosts = [name for name, _ in places]
    names = hosts if len(set(hosts)) > 1 else [cpus for _, cpus in places]
    lengths = [len(list(same)) for _, same in itertools.groupby(names)]
    return lengths[0] if len(lengths) == len(set(names)) and len(set(lengths)) == 1 else 0


def candidates(device_type: str, asked: str) -> list[ModuleType]:
    """The transports to be tried, best first, for the setting `transport`. Raises SettingsError for one of another
    kind of device."""
    kinds = {kind.NAME: kind for kind in ((symmetric, host_memory) if device_type == "cuda" else (cpu_shared,))}
    if asked in kinds:
        return [kinds[asked]]
    if asked not in ("auto", "process_group"):
        names = " or ".join(map(repr, kinds))
        raise SettingsError(f"transport={asked!r} is not for tensors on {device_type}: allowed is {names}")
    return list(kinds.values()) if asked == "auto" and device_type == "cuda" else []


def machine_name(device: torch.device) -> str:
    """What tables call a machine of this kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _over(region: Any, settings: Settings, staged: bool) -> tuple[KernelCollectives, StagedTransport | None]:
    """What runs over a region that all ranks have joined."""
    from flashcomm.gpu.launch import KernelCollectives

    fused = KernelCollectives(region, settings.timeout_s)
    if not staged:
        return fused, None
    from flashcomm.transports.staging import StagedTransport

    return fused, StagedTransport(region, region.n_bytes, _slot_bytes(settings), settings.timeout_s)


def _slot_bytes(settings: Settings) -> int:
    """What one chunk takes on its way through host memory, with something over for scales and padding."""
    return min(settings.workspace_bytes // 8, policy.STAGED_CHUNK_BYTES * 9 // 8) // 64 * 64


def _sizes(settings: Settings, kind: ModuleType, nodes: bool) -> tuple[int, ...]:
    """Bytes of a region, and of what staging takes besides, more of it with nodes."""
    from flashcomm.gpu.launch import region_bytes

    if kind is not host_memory:
        return (region_bytes(settings.workspace_bytes),)
    from flashcomm.transports.staging import PLACES, staging_bytes

    staging = (PLACES if nodes else 1) * staging_bytes(_slot_bytes(settings))
    return region_bytes(min(settings.workspace_bytes, MAPPED_WORKSPACE)), staging


def _join(
    group: dist.ProcessGroup, transport: ProcessGroupTransport, settings: Settings, kind: ModuleType, nodes: bool
) -> tuple[Any, str]:
    """A region of this kind that all ranks have joined, or why not."""
    facts = kind.facts(transport.device)
    if kind is symmetric and group not in dist.distributed_c10d._world.pg_names:
        facts["why"] = facts["why"] or "the group has no name in this process, being the inner one of a c10d backend"
    everybody = consistency.tell(transport, facts, "looking for peers' memory")
    if why := kind.verdict(everybody):
        return None, why
    made, mine, place = None, "", ""
    try:
        from flashcomm.gpu.sync import MAX_RANKS

        if transport.world_size > MAX_RANKS:
            raise UnavailableError(f"{transport.world_size} ranks; {MAX_RANKS} are supported")
        made = kind.make(transport.device, *_sizes(settings, kind, nodes))
        place = made.place
    except (UnavailableError, ImportError) as error:  # of this rank alone, perhaps: the others hear of it
        mine = str(error)
    told = consistency.tell(transport, (mine, place), "taking peers' memory")
    why = _first(error for error, _ in told)
    if made is None or why:
        if made is not None:
            made.close()
        return None, why
    try:
        made.join(group, [place for _, place in told])
    except UnavailableError as error:
        mine = str(error)
    if why := _first(consistency.tell(transport, mine, "mapping peers' memory")):
        made.close()  # what this rank did get is pinned, or mapped
        return None, why
    return made, ""


def _first(errors: Iterable[str]) -> str:
    return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), "")
