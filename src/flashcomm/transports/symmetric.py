"""GPU memory that peers can access: torch's symmetric memory, with one region per rank.

The kernels of every rank write to the regions of their peers and read only their own.
"""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.compat import name_of
from flashcomm.errors import UnavailableError
from flashcomm.transports import cpu_shared

NAME = "symmetric"
SELF_TEST = True  # drivers may claim peer access that does not work (`setup.self_test`)


def probe(device: torch.device) -> dict[str, Any]:
    """Return this rank's host and GPU, the GPUs without peer access, and why this rank cannot use any or "".

    `why_not` compares the probes of all ranks.
    """
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
    """Return why ranks with these probes cannot write to each other's memory, or ""."""
    if why := cpu_shared.why_not(probes):  # the requirements of any shared memory
        return why
    for rank, mine in enumerate(probes):
        for other, theirs in enumerate(probes):
            if theirs["device"] in mine["blind"]:
                return f"GPU {mine['device']} (rank {rank}) has no peer access to GPU {theirs['device']} (rank {other})"
    return ""


class SymmetricRegion:
    """Zeroed GPU memory that every rank's kernels can write to, once all ranks have called `rendezvous`.

    Attributes:
        peers: int64 (world_size,), on the GPU: the addresses of all ranks' regions in this process.
        status: int32 (5,), pinned: kernels report errors here.

    Raises:
        UnavailableError: The memory cannot be allocated, or torch cannot map that of the peers.
    """

    def __init__(self, device: torch.device, n_bytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._symmetric, self.device, self.n_bytes, self.place = symmetric, device, n_bytes, ""
        self._release = weakref.finalize(self, wait_for_kernels, os.getpid(), device)
        self._release.atexit = False
        try:
            self._buffer = symmetric.empty(n_bytes, dtype=torch.uint8, device=device).zero_()
            self.status = torch.zeros(5, dtype=torch.int32).pin_memory()
        except RuntimeError as why:
            raise UnavailableError(
                f"cannot allocate {n_bytes} bytes of symmetric memory: {str(why).splitlines()[0]}"
            ) from why

    def rendezvous(self, group: dist.ProcessGroup, places: Sequence[str]) -> None:
        """Map the peers' regions. Collective. Use them only after every rank has returned from this."""
        self.rank, self.world_size = group.rank(), group.size()
        try:
            torch.cuda.synchronize(self.device)  # the region is zero before a peer sees it
            self._handle = self._symmetric.rendezvous(self._buffer, name_of(group) or "")  # type: ignore[arg-type]
            if getattr(self._handle, "offset", 0):
                raise RuntimeError("the memory is part of a larger block, and its offset may differ between ranks")
            addresses = list(self._handle.buffer_ptrs)
            self.own = addresses[self.rank]
            self.peers = torch.tensor(addresses, dtype=torch.int64).to(self.device)
        except RuntimeError as why:
            raise UnavailableError(f"torch cannot map symmetric memory: {str(why).splitlines()[0]}") from why

    def close(self) -> None:
        """Wait for this rank's kernels. torch frees the memory with the region."""
        self._release()


def wait_for_kernels(pid: int, device: torch.device) -> None:
    """Wait for the kernels of process `pid`, before the memory that they use is freed."""
    if os.getpid() == pid:  # in a forked process CUDA does not work
        torch.cuda.synchronize(device)


create = SymmetricRegion
