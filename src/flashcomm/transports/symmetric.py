"""GPU memory of peers: a region per rank that kernels of every rank write to, made by torch's symmetric memory.

Our kernels only write to the memory of peers; they read their own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.errors import UnavailableError
from flashcomm.transports import cpu_shared

NAME = "symmetric"


def probe(device: torch.device) -> dict[str, Any]:
    """What this rank knows about whether its GPU can write to those of its peers; `why_not` compares all ranks'."""
    why = ""
    if device.type != "cuda":
        why = "the tensors are not on GPUs"
    elif os.environ.get("NCCL_P2P_DISABLE") == "1":
        why = "NCCL_P2P_DISABLE=1 forbids peer access"
    elif importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        why = "TRITON_INTERPRET=1 keeps kernels on the CPU"
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    blind = [i for i in range(count) if i != device.index and not torch.cuda.can_device_access_peer(device.index, i)]
    return {"host": cpu_shared.host_name(), "device": device.index, "blind": blind, "why": why}


def why_not(probes: Sequence[dict[str, Any]]) -> str:
    """Why ranks with these probes cannot write to each other's memory, or ""."""
    if why := cpu_shared.why_not(probes):  # what any shared memory needs
        return why
    for rank, mine in enumerate(probes):
        for other, theirs in enumerate(probes):
            if theirs["device"] in mine["blind"]:
                return f"GPU {mine['device']} (rank {rank}) has no peer access to GPU {theirs['device']} (rank {other})"
    return ""


class SymmetricRegion:
    """Zeroed GPU memory that every rank's kernels can write to, once all ranks have called `join`.

    Attributes:
        peers: int64 (world_size,), on the GPU: the addresses of all regions as this GPU sees them.
        status: Pinned memory in which kernels report.

    Raises:
        UnavailableError: Memory is short, or torch cannot map that of the peers.
    """

    mapped = False

    def __init__(self, device: torch.device, n_bytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._symmetric, self.device, self.n_bytes, self.place = symmetric, device, n_bytes, ""
        try:
            self._buffer = symmetric.empty(n_bytes, dtype=torch.uint8, device=device).zero_()
            self.status = torch.zeros(5, dtype=torch.int32).pin_memory()
        except RuntimeError as why:
            raise UnavailableError(f"{n_bytes} bytes of symmetric memory: {str(why).splitlines()[0]}") from why

    def join(self, group: dist.ProcessGroup, places: Sequence[str]) -> None:
        """Map the peers' regions. Collective; they may be used once every rank is known to have returned."""
        self.rank, self.world_size = group.rank(), group.size()
        try:
            torch.cuda.synchronize(self.device)  # the region is zero before a peer sees it
            self._handle = self._symmetric.rendezvous(self._buffer, group.group_name)
            if getattr(self._handle, "offset", 0):
                raise RuntimeError("torch gave memory inside a larger block, whose addresses ranks may not share")
            addresses = list(self._handle.buffer_ptrs)
            self.own = addresses[self.rank]
            self.peers = torch.tensor(addresses, dtype=torch.int64).to(self.device)
        except RuntimeError as why:
            raise UnavailableError(f"torch symmetric memory: {str(why).splitlines()[0]}") from why

    def close(self) -> None:
        """Wait for this rank's kernels; the memory goes when the region does."""
        torch.cuda.synchronize(self.device)


create = SymmetricRegion
