"""Point 10 of the contract: non-finite input makes its group NaN, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import ranks, same_bits, tough

from flashcomm import Communicator

pytestmark = pytest.mark.contract(10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", "hierarchical"])
@pytest.mark.parametrize("fmt", ["int4", "int6-had/int7-had"])
@ranks(4)
def test_its_group_is_nan_on_every_rank_and_nothing_else(
    group: dist.ProcessGroup, rank: int, fmt: str, algorithm: str, bad: float
) -> None:
    x = tough((3, 256), torch.float32, rank)
    with Communicator(group, fmt, algorithm=algorithm, min_bytes=0, local_world_size=2) as comm:
        clean = comm.all_reduce(x)
        if rank == 1:
            x[1, 70] = bad  # in the second group of 64 values
        got = comm.all_reduce(x)
    hit = torch.zeros(x.shape, dtype=torch.bool)
    hit[1, 64:128] = True
    assert got[hit].isnan().all()
    assert same_bits(got[~hit], clean[~hit])
    assert clean.isfinite().all()
