"""Point 3 of the contract: sums run in float32 in rank order, and a group never crosses the end of a row.

Therefore the result of a row does not depend on its batch.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import ranks, same_bits, tough

from flashcomm import Communicator, WireFormat

pytestmark = pytest.mark.contract(3)


@ranks(3)
def test_sums_run_in_float32_in_rank_order(group: dist.ProcessGroup, rank: int) -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in this order, 1 in another, and 1 in float64."""
    for order, want in (([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)):
        for algorithm in ("one_shot", "two_shot"):
            with Communicator(group, WireFormat.parse("none"), algorithm=algorithm) as comm:
                assert comm.all_reduce(torch.full((3, 64), order[rank])).unique().tolist() == [want]


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@ranks(3)
def test_a_row_does_not_depend_on_its_batch(group: dist.ProcessGroup, rank: int, algorithm: str) -> None:
    batch = tough((8, 576), torch.bfloat16, rank)
    with Communicator(group, "int4", algorithm=algorithm) as comm:
        assert same_bits(comm.all_reduce(batch)[5:6], comm.all_reduce(batch[5:6].clone()))


@ranks(2)
def test_a_group_never_reaches_into_the_next_row(group: dist.ProcessGroup, rank: int) -> None:
    x = torch.zeros(2, 600)
    x[1] = 1000.0  # a neighbor that would ruin the scale
    x[0, 576:] = 0.001
    with Communicator(group, "int4", algorithm="one_shot") as comm:
        got = comm.all_reduce(x)
    assert torch.allclose(got[0, 576:], torch.tensor(0.002), rtol=1 / 30)  # half a step
