"""A test double of `symmetric` on CPUs: memory shared by the processes of one host, for Triton's interpreter.

The GPU kernels run on it unchanged, flags included, with TRITON_INTERPRET=1, so that they can be tested on any machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import os
import socket
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.errors import UnavailableError

NAME = "cpu_shared"
SELF_TEST = False  # of a test double


def host_name() -> str:
    """Return the name of this host and the id of its boot. Ranks with equal values are on one host."""
    try:
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return socket.gethostname()


def probe(device: torch.device) -> dict[str, Any]:
    """Return this rank's host, and why it cannot share memory or "". `why_not` compares the probes of all ranks."""
    why = ""
    if device.type != "cpu":
        why = "the tensors are not on the CPU"
    elif os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        why = "it is for Triton's interpreter: install triton and set TRITON_INTERPRET=1 before Python starts"
    return {"host": host_name(), "why": why}


def why_not(probes: Sequence[dict[str, Any]]) -> str:
    """Return why ranks with these probes cannot share memory, or ""."""
    for rank, mine in enumerate(probes):
        if mine["why"]:
            return f"rank {rank}: {mine['why']}"
        if mine["host"] != probes[0]["host"]:
            return f"rank {rank} is on another host than rank 0"
    return ""


class SharedRegion:
    """Zeroed memory that every rank can read and write, once all ranks have called `rendezvous`.

    It has no name in the file system, so that nothing is left behind, however the processes end. `close` releases what
    this rank holds of it; so does the garbage collector.

    Attributes:
        peers: int64 (world_size,), the addresses of all ranks' regions in this process.
        mappings: The same addresses, as a list.

    Raises:
        UnavailableError: The memory cannot be allocated.
    """

    def __init__(self, device: torch.device, n_bytes: int, extra: int = 0) -> None:
        self.device, self.n_bytes = device, -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size = self.n_bytes + -(-extra // mmap.PAGESIZE) * mmap.PAGESIZE
        self._held = contextlib.ExitStack()  # releases what was acquired, the last first
        self._release = weakref.finalize(self, self._held.close)
        self._release.atexit = False  # the system does it
        try:
            file = os.memfd_create("flashcomm")
            self._held.callback(os.close, file)
            os.posix_fallocate(file, 0, self.size)
        except OSError as why:
            raise UnavailableError(
                f"cannot allocate {self.size} bytes of shared memory: {why.strerror}. Allow this process more memory, "
                "or lower FLASHCOMM_WORKSPACE_BYTES"
            ) from why
        self.place = f"/proc/{os.getpid()}/fd/{file}"
        self.status = torch.zeros(5, dtype=torch.int32)

    def rendezvous(self, group: dist.ProcessGroup, places: Sequence[str]) -> None:
        """Map all ranks' regions, given their `place`. Use them only after every rank has returned from this."""
        self.rank, self.world_size = group.rank(), group.size()
        self.mappings: list[int] = []
        try:
            for place in places:
                with open(place, "r+b") as file:
                    part = mmap.mmap(file.fileno(), self.size)
                self._held.callback(part.close)
                self.mappings.append(ctypes.addressof(ctypes.c_char.from_buffer(part)))
        except OSError as why:
            raise UnavailableError(f"cannot open the shared memory of the other ranks: {why.strerror}") from why
        self.peers, self.own = torch.tensor(self.mappings, dtype=torch.int64), self.mappings[self.rank]

    def close(self) -> None:
        """Wait for this rank's kernels and release the memory. It is freed with the last process that maps it."""
        self._release()


create = SharedRegion
