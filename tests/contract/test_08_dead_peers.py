"""Point 8 of the contract: a dead or stuck peer is a CommunicationError within the time-out.

It names the rank and the phase.
"""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist
from support import exact_in_int4, gloo_group, raise_first, ranks, run_ranks

from flashcomm import Communicator
from flashcomm.errors import CommunicationError

pytestmark = pytest.mark.contract(8)


def test_a_peer_that_never_comes_is_an_error_within_the_timeout() -> None:
    begin, ended = time.monotonic(), threading.Semaphore(0)

    def body(group: dist.ProcessGroup, rank: int) -> None:
        if rank == 0:  # it keeps its group: if it dropped it, a rank could lose the connection to one that lost it
            assert all(ended.acquire(timeout=20) for _ in range(2))
            return
        try:
            Communicator(group, "int4", timeout_s=2)
        finally:
            ended.release()

    results = run_ranks(3, body)
    assert time.monotonic() - begin < 20
    for rank in (1, 2):
        assert isinstance(results[rank], CommunicationError)
        assert f"rank {rank} of 3: the consistency check of creating a Communicator failed" in str(results[rank])
        assert "rank 0" in str(results[rank])


def test_a_peer_that_dies_in_a_call_is_an_error_and_a_new_group_works() -> None:
    store = dist.HashStore()

    def body(group: dist.ProcessGroup, rank: int) -> torch.Tensor | None:
        comm = Communicator(group, "int4", min_bytes=0, timeout_s=2)
        if rank == 0:
            return None  # leaves
        with pytest.raises(CommunicationError, match=f"rank {rank} of 3: the consistency check of all_reduce failed"):
            comm.all_reduce(torch.ones(4, 576))
        fresh = gloo_group(dist.PrefixStore("fresh", store), rank - 1, 2)
        return Communicator(fresh, "int4", min_bytes=0).all_reduce(exact_in_int4(4, 576))

    results = raise_first(run_ranks(3, body))
    for result in results[1:]:
        assert result is not None
        assert torch.equal(result, 2 * exact_in_int4(4, 576))


@ranks(3)
def test_a_peer_that_leaves_between_chunks_is_an_error(group: dist.ProcessGroup, rank: int) -> None:
    """The exchange then runs on the transport's thread. Its error must still reach the caller."""
    comm = Communicator(group, "int4", algorithm="two_shot", check=False, chunk_bytes=4000, timeout_s=2)
    comm.all_reduce(torch.ones(40, 576))
    if rank:
        with pytest.raises(CommunicationError, match=f"rank {rank} of 3: two-shot reduce, chunk 1/23 failed"):
            comm.all_reduce(torch.ones(40, 576))
