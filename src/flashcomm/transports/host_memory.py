"""Pinned host memory, shared by the ranks of one host: for GPUs that cannot access each other's memory.

Each rank has a region that the kernels of the others write to and its own read, over PCIe. What a rank keeps for itself
stays in GPU memory. Regions have no name in the file system: nothing is left behind however the processes end.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.errors import UnavailableError
from flashcomm.transports import cpu_shared

NAME = "host_memory"
_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


def probe(device: torch.device) -> dict[str, Any]:
    """What this rank knows about whether host memory can be shared; `why_not` compares all ranks'."""
    why = ""
    if device.type != "cuda":
        why = "the tensors are not on GPUs"
    elif importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        why = "TRITON_INTERPRET=1 keeps kernels on the CPU"
    return {"host": cpu_shared.host_name(), "why": why}


why_not = cpu_shared.why_not


class HostRegion(cpu_shared.SharedRegion):
    """Zeroed host memory that the kernels of all ranks can write to, once all ranks have called `join`.

    Attributes:
        peers: int64 (world_size,), on the GPU: where this rank writes for each rank, its own GPU memory for itself.
        own: Where the others write for this rank.
        status: Pinned memory in which kernels report.

    Raises:
        UnavailableError: Memory is short or cannot be pinned.
    """

    mapped = True

    def __init__(self, device: torch.device, n_bytes: int, extra: int = 0) -> None:
        self._pinned: list[int] = []
        with _near(device):
            super().__init__(device, n_bytes, extra)
        try:
            self.status = torch.zeros(5, dtype=torch.int32).pin_memory()
            self._local = torch.zeros(self.n_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as why:
            raise UnavailableError(f"{n_bytes} bytes of GPU memory: {str(why).splitlines()[0]}") from why

    def join(self, group: dist.ProcessGroup, places: Sequence[str]) -> None:
        """Map and pin all regions. They may be used once every rank is known to have returned."""
        super().join(group, places)
        for address in self.mappings:
            if code := self._pin(address):
                raise UnavailableError(
                    f"{self.size} bytes of host memory cannot be pinned (CUDA error {code}): allow more locked "
                    "memory (`ulimit -l`, in containers --ulimit memlock=-1), or set FLASHCOMM_WORKSPACE_BYTES lower"
                )
            self._pinned.append(address)
        addresses = [*self.mappings]
        addresses[self.rank] = self._local.data_ptr()
        self.peers = torch.tensor(addresses, dtype=torch.int64).to(self.device)
        torch.cuda.synchronize(self.device)  # what is local is zero

    def close(self) -> None:
        """Wait for this rank's kernels and let go of the memory; it goes with the last process that maps it."""
        torch.cuda.synchronize(self.device)
        self._unpin()
        super().close()

    def _pin(self, address: int) -> int:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        return int(runtime.cudaHostRegister(address, self.size, _MAPPED))

    def _unpin(self) -> None:
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._pinned = []


@contextmanager
def _near(device: torch.device) -> Iterator[None]:
    """Run on the CPUs near a GPU inside a with block, so that memory allocated there lies on their NUMA node."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _cpus_near(device) & before or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpus_near(device: torch.device) -> set[int]:
    """The CPUs that Linux lists as near the GPU; none if it does not say."""
    try:
        spans = [part.split("-") for part in cpulist(device).split(",") if part]
        return {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}
    except ValueError:
        return set()


def cpulist(device: torch.device) -> str:
    """The CPUs near a GPU as Linux lists them ("0-31,64-95"), the same for GPUs of one NUMA node; "" if unknown."""
    gpu: Any = torch.cuda.get_device_properties(device)
    name = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        return Path(f"/sys/bus/pci/devices/{name}/local_cpulist").read_text().strip()
    except OSError:
        return ""


create = HostRegion
