"""Memory of CPU processes, shared by the ranks of one host: what `symmetric` is for GPUs, for Triton's interpreter.

The fused kernels run on it as they are, flags and all, with TRITON_INTERPRET=1: a test double, public so that a change
to a kernel can be tried on any machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.errors import UnavailableError

NAME = "cpu_shared"


def host_name() -> str:
    """What ranks compare to know that they are on one host: its name and this boot of it."""
    try:
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return socket.gethostname()


def probe(device: torch.device) -> dict[str, Any]:
    """What this rank has to say on whether shared memory can be used; `why_not` compares them."""
    why = ""
    if device.type != "cpu":
        why = "the tensors are not on the CPU"
    elif os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        why = "it is for Triton's interpreter: install triton and set TRITON_INTERPRET=1 before Python starts"
    return {"host": host_name(), "why": why}


def why_not(everybody: Sequence[dict[str, Any]]) -> str:
    """Why ranks of these facts cannot share memory, or ""."""
    for rank, mine in enumerate(everybody):
        if mine["why"]:
            return f"rank {rank}: {mine['why']}"
        if mine["host"] != everybody[0]["host"]:
            return f"rank {rank} is on another host than rank 0"
    return ""


class SharedRegion:
    """`n_bytes` of zeroed memory, and `extra`, that, once all ranks have called `join`, every rank reads and writes.

    peers: int64 (world,), the addresses of everybody's region in this process; mappings: the same as numbers. The
    memory has no name in the file system: nothing is left behind however the processes end. Raises UnavailableError
    where there is too little.
    """

    mapped = False

    def __init__(self, device: torch.device, n_bytes: int, extra: int = 0) -> None:
        self.device, self.n_bytes = device, -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size = self.n_bytes + -(-extra // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._file = os.memfd_create("flashcomm")
            os.posix_fallocate(self._file, 0, self.size)
            self.place = f"/proc/{os.getpid()}/fd/{self._file}"
        except OSError as why:
            raise UnavailableError(
                f"{self.size} bytes of shared memory: {why.strerror}. Allow this process more memory, or set "
                "FLASHCOMM_WORKSPACE_BYTES lower"
            ) from why
        self.status = torch.zeros(5, dtype=torch.int32)

    def join(self, group: dist.ProcessGroup, places: Sequence[str]) -> None:
        """Map the regions at everybody's `place`. They may be used once every rank is known to have returned."""
        self.rank, self.world_size = group.rank(), group.size()
        try:
            files = [os.open(place, os.O_RDWR) for place in places]
            self._maps = [mmap.mmap(file, self.size) for file in files]
            for file in files:
                os.close(file)
        except OSError as why:
            raise UnavailableError(f"the memory of the other ranks cannot be opened: {why.strerror}") from why
        self.mappings = [ctypes.addressof(ctypes.c_char.from_buffer(part)) for part in self._maps]
        self.peers, self.own = torch.tensor(self.mappings, dtype=torch.int64), self.mappings[self.rank]

    def close(self) -> None:
        """Let go of the memory; it goes with the last process that maps it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


create = SharedRegion
