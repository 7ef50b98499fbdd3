"""Discovery of the transports, nodes and executors that the ranks of a group can use.

It is collective and runs when a Communicator is created. Every rank exchanges what it has, so that all ranks reach the
same result.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flashcomm.codecs import codec_for
from flashcomm.collectives import executors
from flashcomm.collectives.pipelined import Context, Transport, Workspace
from flashcomm.compat import name_of
from flashcomm.errors import SettingsError, UnavailableError
from flashcomm.routing import policy
from flashcomm.routing.route import Executor, Machine
from flashcomm.settings import Settings
from flashcomm.setup import consistency, measure, self_test, verify
from flashcomm.transports import cpu_shared, host_memory, symmetric
from flashcomm.transports.process_group import ProcessGroupTransport, has_nccl

if TYPE_CHECKING:
    from flashcomm.gpu.launch import KernelCollectives

HOST_LL_WORKSPACE = 8 << 20  # bytes of host memory for small messages
HOST_WORKSPACE = 64 << 20  # the most bytes of host memory for all other messages

log = logging.getLogger("flashcomm")


def connect(
    group: dist.ProcessGroup, transport: ProcessGroupTransport, settings: Settings
) -> tuple[Machine, dict[Executor, executors.Base]]:
    """Find the group's transport, nodes and timings, and create its executors. Collective.

    If `transport` is "auto" and a faster transport is not available, rank 0 logs why.

    Args:
        group: The process group.
        transport: The transport over that group.
        settings: The settings, equal on all ranks.

    Returns:
        The machine, and an object for each executor.

    Raises:
        SettingsError: On every rank, if the transport is not for this device, or the group cannot have such nodes.
        UnavailableError: On every rank, if a transport was requested and is not available.
    """
    device = transport.device
    local_world_size = _local_world_size(transport, settings)
    nodes = _nodes(transport, local_world_size) if settings.algorithm == "hierarchical" else ()
    name, kernels, rejected = _kernels(group, transport, settings)
    if device.type == "cuda" and name == "process_group" and transport.world_size > 1 and not has_nccl(group):
        rejected += (("nccl", "the group has another backend, so messages go through the CPU, slowly"),)
    if rejected and transport.rank == 0:
        log.warning("transport %s: %s", name, "; ".join(f"not {other}: {why}" for other, why in rejected))
    machine = Machine(name, None, rejected, local_world_size, settings.chunk_bytes)
    found = _executors(transport, settings, kernels, nodes)
    timings = measure.timings_of(measure.Ranks(transport, machine, found), settings, machine_name(device))
    if settings.verify:
        found = verify.Verifier(transport, settings.verify, local_world_size).around(found)
    return replace(machine, timings=timings), found


def _nodes(transport: ProcessGroupTransport, local_world_size: int) -> tuple[range, ...]:
    """Return the ranks of this node, and the ranks with the same place in their nodes; () if nodes save no bytes."""
    if not policy.nodes_pay(transport.world_size, local_world_size):
        return ()
    begin, place = transport.rank // local_world_size * local_world_size, transport.rank % local_world_size
    return range(begin, begin + local_world_size), range(place, transport.world_size, local_world_size)


def _kernels(
    group: dist.ProcessGroup, transport: ProcessGroupTransport, settings: Settings
) -> tuple[str, KernelCollectives | None, tuple[tuple[str, str], ...]]:
    """Return the best transport whose memory all ranks can write to, its kernels, and why better ones were rejected."""
    rejected: tuple[tuple[str, str], ...] = ()
    for kind in candidates(transport.device.type, settings.transport) if transport.world_size > 1 else ():
        region, why = _rendezvous(group, transport, settings, kind)
        if region is not None:
            kernels = _kernels_over(region, transport, settings)
            why = self_test.why_not(transport, kernels, settings.format, kind.NAME) if kind.SELF_TEST else ""
            if not why:
                return kind.NAME, kernels, rejected
            kernels.close()
        if settings.transport != "auto":
            raise UnavailableError(f"transport={settings.transport!r} was requested and is not available: {why}")
        rejected += ((kind.NAME, why),)
    return "process_group", None, rejected


def _kernels_over(region: Any, transport: ProcessGroupTransport, settings: Settings) -> KernelCollectives:
    """Return the kernels that work over a region. Collective."""
    from flashcomm.gpu.host_launch import HostCollectives, most_workers
    from flashcomm.gpu.launch import KernelCollectives

    if not isinstance(region, host_memory.HostRegion):
        return KernelCollectives(region, settings.timeout_s)
    smallest = min(consistency.exchange(transport, _multiprocessors(transport.device), "counting multiprocessors"))
    most = most_workers(settings.host_workers, smallest, transport.world_size)
    return HostCollectives(region, _host_workspace(settings), settings.timeout_s, most)


def _executors(
    transport: ProcessGroupTransport, settings: Settings, kernels: KernelCollectives | None, nodes: tuple[range, ...]
) -> dict[Executor, executors.Base]:
    """Create an object for every executor that routes on this machine can have."""
    device = transport.device
    context = Context(settings.format, codec_for(device.type), transport, Workspace(device), settings.chunk_bytes)
    across: tuple[Transport, Transport] | None = None
    if nodes:
        across = transport.among(nodes[0]), transport.among(nodes[1])
    found: dict[Executor, executors.Base] = {
        Executor.COPY: executors.Copy(),
        Executor.BACKEND: executors.Backend(transport),
        Executor.PIPELINED: executors.Pipelined(replace(context, nodes=across)),
    }
    if kernels is not None:
        found[Executor.KERNEL] = executors.Kernel(kernels, executors.StreamOrder(kernels, device))
    return found


def _local_world_size(transport: ProcessGroupTransport, settings: Settings) -> int:
    """Return the number of consecutive ranks per node, as set or as found; 0 if ranks are not ordered by node."""
    if settings.local_world_size:
        return asked_local_world_size(settings, transport.world_size)
    places = consistency.exchange(transport, locality(transport.device), "looking for nodes")
    found = node_size(places)
    if not found and settings.algorithm == "hierarchical":
        raise UnavailableError(
            "algorithm='hierarchical' needs nodes with equal numbers of consecutive ranks; these ranks are at "
            f"{', '.join(' '.join(place).strip() for place in places)}: order the ranks by node, or set "
            "local_world_size"
        )
    return found


def asked_local_world_size(settings: Settings, world_size: int) -> int:
    """Return the setting `local_world_size`, at most world_size; 0 if not set, or if world_size is not divisible by it.

    Raises:
        SettingsError: world_size is not divisible by it, and the algorithm is `hierarchical`.
    """
    asked = min(settings.local_world_size, world_size)
    if asked and world_size % asked:
        if settings.algorithm == "hierarchical":
            raise SettingsError(
                f"local_world_size={asked}: {world_size} ranks cannot be divided into nodes of that size; set a "
                f"number that divides {world_size}"
            )
        return 0
    return asked


def locality(device: torch.device) -> list[str]:
    """Return the host, and the CPUs near this rank's GPU. The ranks of a node have these in common."""
    return [cpu_shared.host_name(), host_memory.cpulist(device) if device.type == "cuda" else ""]


def node_size(places: Sequence[Sequence[str]]) -> int:
    """Return the number of consecutive ranks that share a `locality`; 0 if ranks are not ordered or sizes differ."""
    hosts = [name for name, _ in places]
    names = hosts if len(set(hosts)) > 1 else [cpus for _, cpus in places]
    lengths = [len(list(same)) for _, same in itertools.groupby(names)]
    return lengths[0] if len(lengths) == len(set(names)) and len(set(lengths)) == 1 else 0


def candidates(device_type: str, asked: str) -> list[ModuleType]:
    """Return the kinds of memory to try for the setting `transport`, best first.

    Raises:
        SettingsError: The transport is for another kind of device.
    """
    kinds = {kind.NAME: kind for kind in ((symmetric, host_memory) if device_type == "cuda" else (cpu_shared,))}
    if asked in kinds:
        return [kinds[asked]]
    if asked not in ("auto", "process_group"):
        names = " or ".join(map(repr, kinds))
        raise SettingsError(f"transport={asked!r} does not support tensors on {device_type}: allowed is {names}")
    return list(kinds.values()) if asked == "auto" and device_type == "cuda" else []


def machine_name(device: torch.device) -> str:
    """Return the name of this kind of machine in timings."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _host_workspace(settings: Settings) -> int:
    return min(settings.workspace_bytes, HOST_WORKSPACE)


def _sizes(settings: Settings, kind: ModuleType) -> tuple[int, ...]:
    """Return the bytes of a region and, for host memory, the additional bytes that its kernel needs."""
    from flashcomm.gpu.launch import region_bytes

    if kind is not host_memory:
        return (region_bytes(settings.workspace_bytes),)
    from flashcomm.gpu.host_launch import shared_bytes

    return region_bytes(min(settings.workspace_bytes, HOST_LL_WORKSPACE)), shared_bytes(_host_workspace(settings))


def _rendezvous(
    group: dist.ProcessGroup, transport: ProcessGroupTransport, settings: Settings, kind: ModuleType
) -> tuple[Any, str]:
    """Return a region of this kind that all ranks have mapped, or None and why not."""
    probe = kind.probe(transport.device)
    if kind.NAME == symmetric.NAME and name_of(group) is None:
        probe["why"] = probe["why"] or "the group has no name by which torch finds it"
    if why := kind.why_not(consistency.exchange(transport, probe, "looking for shared memory")):
        return None, why
    region, mine, place = None, "", ""
    try:
        from flashcomm.gpu.sync import MAX_RANKS

        if transport.world_size > MAX_RANKS:
            raise UnavailableError(f"the group has {transport.world_size} ranks, and at most {MAX_RANKS} are supported")
        region = kind.create(transport.device, *_sizes(settings, kind))
        place = region.place
    except (UnavailableError, ImportError) as error:  # perhaps only on this rank: exchanged below
        mine = str(error)
    answers = consistency.exchange(transport, (mine, place), "allocating shared memory")
    why = _first(error for error, _ in answers)
    if region is None or why:
        if region is not None:
            region.close()
        return None, why
    try:
        region.rendezvous(group, [place for _, place in answers])
    except UnavailableError as error:  # exchanged below
        mine = str(error)
    if why := _first(consistency.exchange(transport, mine, "mapping shared memory")):
        region.close()  # releases what this rank has pinned or mapped
        return None, why
    return region, ""


def _first(errors: Iterable[str]) -> str:
    return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), "")
