"""Pinned host memory, shared by the ranks of one host, for GPUs that cannot access each other's memory.

Each rank has a region. The kernels of other ranks write to it over PCIe, and its own kernels read it. Data that a rank
writes for itself stays in GPU memory. Regions have no name in the file system, so that nothing is left behind, however
the processes end.
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
from flashcomm.transports.symmetric import wait_for_kernels

NAME = "host_memory"
SELF_TEST = True
_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


def probe(device: torch.device) -> dict[str, Any]:
    """Return this rank's host, and why it cannot share memory or "". `why_not` compares the probes of all ranks."""
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
    """Zeroed host memory that the kernels of all ranks can write to, once all ranks have called `rendezvous`.

    Attributes:
        peers: int64 (world_size,), on the GPU: the addresses that this rank writes to, one for each rank. The one for
            itself is in GPU memory.
        own: The address of the memory that the other ranks write to for this rank.
        status: int32 (5,), pinned: kernels report errors here.

    Raises:
        UnavailableError: The memory cannot be allocated or pinned.
    """

    def __init__(self, device: torch.device, n_bytes: int, extra: int = 0) -> None:
        with _on_local_cpus(device):
            super().__init__(device, n_bytes, extra)
        try:
            self.status = torch.zeros(5, dtype=torch.int32).pin_memory()
            self._local = torch.zeros(self.n_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as why:
            raise UnavailableError(
                f"cannot allocate {n_bytes} bytes of GPU memory: {str(why).splitlines()[0]}"
            ) from why

    def rendezvous(self, group: dist.ProcessGroup, places: Sequence[str]) -> None:
        """Map and pin all ranks' regions. Use them only after every rank has returned from this."""
        super().rendezvous(group, places)
        for address in self.mappings:
            if code := self._pin(address):
                raise UnavailableError(
                    f"{self.size} bytes of host memory cannot be pinned (CUDA error {code}): allow more locked "
                    "memory (`ulimit -l`, in containers --ulimit memlock=-1), or lower FLASHCOMM_WORKSPACE_BYTES"
                )
            self._held.callback(_unpin, os.getpid(), self.device, address)
        addresses = [*self.mappings]
        addresses[self.rank] = self._local.data_ptr()
        self.peers = torch.tensor(addresses, dtype=torch.int64).to(self.device)
        torch.cuda.synchronize(self.device)  # the local memory is zeroed before a kernel writes to it
        self._held.callback(
            wait_for_kernels, os.getpid(), self.device
        )  # the first to run: kernels may still use the memory

    def _pin(self, address: int) -> int:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        return int(runtime.cudaHostRegister(address, self.size, _MAPPED))


def _unpin(pid: int, device: torch.device, address: int) -> None:
    if os.getpid() == pid:  # in a forked process CUDA does not work
        with torch.cuda.device(device):  # another thread than the one that pinned it may have another current device
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


@contextmanager
def _on_local_cpus(device: torch.device) -> Iterator[None]:
    """Run a with block on the CPUs near a GPU, so that memory allocated in it lies on their NUMA node."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _local_cpus(device) & before or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _local_cpus(device: torch.device) -> set[int]:
    """Return the CPUs that Linux lists as near the GPU; an empty set if it lists none."""
    try:
        spans = [part.split("-") for part in cpulist(device).split(",") if part]
        return {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}
    except ValueError:
        return set()


def cpulist(device: torch.device) -> str:
    """Return the CPUs near a GPU as Linux lists them, such as "0-31,64-95"; "" if unknown.

    GPUs of one NUMA node have the same list.
    """
    gpu: Any = torch.cuda.get_device_properties(device)
    name = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        return Path(f"/sys/bus/pci/devices/{name}/local_cpulist").read_text().strip()
    except OSError:
        return ""


create = HostRegion
