"""A Communicator that is dropped without `close` frees what it holds: memory, descriptors and threads.

`gpu/test_attack.py` does the same on GPUs, with calls. With FLASHCOMM_TEST_THOROUGH=1 it makes 1,000 of each kind.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import exact_in_int4, raise_first, run_ranks

from flashcomm import Communicator
from flashcomm.transports import cpu_shared, host_memory

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used where there is a GPU")
N = 1000 if os.environ.get("FLASHCOMM_TEST_THOROUGH") == "1" else 12


def held() -> tuple[int, int, int]:
    maps = Path("/proc/self/maps").read_text().count("memfd:flashcomm")
    return len(os.listdir("/proc/self/fd")), maps, threading.active_count()


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("transport", ["cpu_shared", "process_group"])
def test_nothing_is_left(transport: str) -> None:
    """Communicators are dropped, closed, or fail while they are created, and are used or not."""
    seen: list[tuple[int, int, int]] = []
    met = threading.Barrier(2)

    def body(group: dist.ProcessGroup, rank: int) -> None:
        for i in range(N):
            comm = Communicator(group, "int4", transport=transport, workspace_bytes=4 << 20, min_bytes=0)
            if transport == "process_group":  # the interpreter does not run on two threads
                assert torch.equal(comm.all_reduce(exact_in_int4(1, 64)), 2 * exact_in_int4(1, 64))
            if i % 3 == 1:
                comm.close()
            del comm
            met.wait(60)
            if i in (3, N - 1) and rank == 0:
                seen.append(held())
            met.wait(60)

    raise_first(run_ranks(2, body, timeout_s=900))
    assert seen[0] == seen[1], f"descriptors, maps and threads after 4 and after {N} Communicators"


def test_memory_that_cannot_be_had_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = held()
    monkeypatch.setattr(cpu_shared.os, "posix_fallocate", full)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="No space left on device"):
            cpu_shared.create(torch.device("cpu"), 4096)
    assert held() == before


def test_pinned_memory_is_unpinned_before_it_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what the region calls, and when."""
    done: list[Any] = []

    class Region(host_memory.HostRegion):
        def __init__(self) -> None:
            cpu_shared.SharedRegion.__init__(self, torch.device("cpu"), 4096)
            self._local = torch.zeros(8)

        def _pin(self, address: int) -> int:
            return 0

    class Group:
        rank, size = staticmethod(lambda: 0), staticmethod(lambda: 1)

    monkeypatch.setattr(host_memory.torch.cuda, "synchronize", lambda device: done.append("kernels ended"))
    monkeypatch.setattr(host_memory.torch.cuda, "cudart", lambda: Runtime())
    monkeypatch.setattr(host_memory.torch.cuda, "device", contextlib.nullcontext)

    class Runtime:
        def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
            maps = Path("/proc/self/maps").read_text()
            done.append(("unpinned", f"{address:x}-" in maps))

    before = held()
    for close in (True, False):
        region = Region()
        region.rendezvous(Group(), [region.place])  # type: ignore[arg-type]
        done.clear()
        if close:
            region.close()
            region.close()
        del region
        assert done == ["kernels ended", ("unpinned", True)], close
    assert held() == before


AT_EXIT = """
import sys
sys.path.insert(0, sys.argv[1])
import support, torch
from flashcomm import Communicator
kept = support.raise_first(support.run_ranks(2, lambda g, r: Communicator(g, "int4", transport=sys.argv[2])))
print(len(kept))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("transport", ["cpu_shared", "process_group"])
def test_at_exit(transport: str) -> None:
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", AT_EXIT, tests, transport]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ, check=False)
    assert (ended.returncode, ended.stdout) == (0, "2\n"), ended.stderr
