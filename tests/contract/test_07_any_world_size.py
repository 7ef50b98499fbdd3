"""Point 7 of the contract: any number of ranks works. A group of one rank copies."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import gloo_group, raise_first, ranks, run_ranks, same_bits, tough

from flashcomm import Communicator, WireFormat, reference

pytestmark = pytest.mark.contract(7)


@ranks(1)
def test_a_world_of_one_copies(group: dist.ProcessGroup, rank: int) -> None:
    x = tough((5, 600), torch.bfloat16)
    for algorithm in ("auto", "one_shot", "two_shot"):
        with Communicator(group, "int2", algorithm=algorithm, min_bytes=0) as comm:
            for call in (comm.all_reduce, comm.reduce_scatter, comm.all_gather):
                got = call(x)
                assert same_bits(got, x), (algorithm, call)
                assert got.data_ptr() != x.data_ptr()
            assert sum(comm.sent.values()) == 0


def test_each_group_of_some_ranks_has_a_sum_of_its_own() -> None:
    """Four ranks form the groups {0, 1, 3} and {2}."""
    store = dist.HashStore()
    tensors = [tough((4, 576), torch.bfloat16, r) for r in range(4)]
    members = {0: [0, 1, 3], 1: [0, 1, 3], 2: [2], 3: [0, 1, 3]}

    def body(_: dist.ProcessGroup, rank: int) -> torch.Tensor:
        mine = members[rank]
        group = gloo_group(dist.PrefixStore(str(mine), store), mine.index(rank), len(mine))
        return Communicator(group, "int4", min_bytes=0).all_reduce(tensors[rank])

    results = raise_first(run_ranks(4, body))
    of_three = reference.one_shot([tensors[r] for r in (0, 1, 3)], WireFormat.parse("int4"))
    assert all(same_bits(results[r], of_three) for r in (0, 1, 3))
    assert same_bits(results[2], tensors[2])
