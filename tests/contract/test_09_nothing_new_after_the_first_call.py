"""Point 9 of the contract: after the first call of a kind over peers' memory, only the result is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import N_GPUS, ranks

from flashcomm import Communicator
from flashcomm.ranks.launch import RankContext

pytestmark = pytest.mark.contract(9)


pytest.importorskip("triton", reason="triton is not installed")


def shared_mappings() -> int:
    """Return how many regions of the ranks' shared memory this process maps."""
    return Path("/proc/self/maps").read_text().count("/memfd:flashcomm")


@pytest.mark.skipif(N_GPUS > 0, reason="kernels are not interpreted where there are GPUs")
@ranks(2)
def test_no_memory_is_shared_after_the_first_call(ctx: RankContext) -> None:
    """Uses the memory of CPU processes, in Triton's interpreter. gpu/test_on_gpus.py has the tests that need GPUs."""
    settings = {"transport": "cpu_shared", "workspace_bytes": 4 << 20, "min_bytes": 0, "timeout_s": 60}
    with Communicator(None, "int4", algorithm="one_shot", device="cpu", **settings) as comm:
        before = shared_mappings()
        assert before
        for n_rows in (1, 3, 2, 9):
            comm.all_reduce(torch.ones(n_rows, 640, dtype=torch.bfloat16))
            assert shared_mappings() == before
        assert dict(comm.calls) == {"all_reduce/one_shot": 4}
        assert comm.explain((9, 640), torch.bfloat16).route.transport == "cpu_shared"
