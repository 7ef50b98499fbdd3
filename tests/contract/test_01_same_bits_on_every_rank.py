"""Point 1 of the contract: the same bits on every rank.

The owner of a shard returns what it decodes from its own wire bytes.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import raise_first, ranks, run_ranks, same_bits, tough

from flashcomm import Communicator, WireFormat, reference

pytestmark = pytest.mark.contract(1)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", "hierarchical"])
@pytest.mark.parametrize("fmt", ["int4", "int6-had/int7-had"])
def test_every_rank_returns_the_same_bits(algorithm: str, fmt: str) -> None:
    tensors = [tough((9, 600), torch.bfloat16, rank) for rank in range(4)]

    def body(group: dist.ProcessGroup, rank: int) -> torch.Tensor:
        comm = Communicator(group, fmt, algorithm=algorithm, min_bytes=0, local_world_size=2, chunk_bytes=2000)
        return comm.all_reduce(tensors[rank])

    first, *others = raise_first(run_ranks(4, body))
    assert all(same_bits(other, first) for other in others)
    assert not same_bits(first, sum(tensors))  # quantized; otherwise the test would prove little


@ranks(3)
def test_the_owner_of_a_shard_returns_what_it_decodes(group: dist.ProcessGroup, rank: int) -> None:
    x = tough((4, 600), torch.bfloat16, rank)
    with Communicator(group, "int4/int8") as comm:
        own = comm.all_gather(x)[4 * rank : 4 * rank + 4]
    decoded = reference.quantized_sum([x], WireFormat.parse("int4/int8").gather).to(x.dtype).view(x.shape)
    assert same_bits(own, decoded)
    assert not same_bits(own, x)
