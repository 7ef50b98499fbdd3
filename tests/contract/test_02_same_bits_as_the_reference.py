"""Point 2 of the contract: the same bits as `flashcomm.reference`, with chunks of any size."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import ranks, same_bits, tough

from flashcomm import Communicator, reference

FORMATS = [
    ("int4", torch.bfloat16),
    ("int5-g32/int8", torch.float16),
    ("none", torch.float32),
    ("int4-had/int6-had", torch.bfloat16),
    ("int3-g32-had/int8-had", torch.float32),
]
SHAPES = [(5, 600), (2, 3, 640), (1, 2880), (7,), (), (3, 1), (0, 64), (4, 0), (1, 1)]

pytestmark = pytest.mark.contract(2)


@pytest.mark.contract(7)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize(("fmt", "dtype"), FORMATS)
@ranks()
def test_all_reduce_equals_the_reference(
    group: dist.ProcessGroup, rank: int, world_size: int, algorithm: str, fmt: str, dtype: torch.dtype
) -> None:
    with Communicator(group, fmt, algorithm=algorithm, chunk_bytes=2000) as comm:
        for s, shape in enumerate(SHAPES):
            tensors = [tough(shape, dtype, 10 * s + r) for r in range(world_size)]
            want = getattr(reference, algorithm)(tensors, comm.format)
            assert same_bits(comm.all_reduce(tensors[rank]), want), shape


@pytest.mark.contract(7)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@ranks()
def test_reduce_scatter_and_all_gather_equal_the_reference(
    group: dist.ProcessGroup, rank: int, world_size: int
) -> None:
    with Communicator(group, "int4/int8", chunk_bytes=500) as comm:
        for s, shape in enumerate([(2, 576), (1, 7), (3,), (2, 0), (4, 3, 130)]):
            whole = [tough((shape[0] * world_size, *shape[1:]), torch.bfloat16, 10 * s + r) for r in range(world_size)]
            parts = [tough(shape, torch.bfloat16, 99 * s + r) for r in range(world_size)]
            scattered = reference.reduce_scatter(whole, comm.format)[rank]
            assert same_bits(comm.reduce_scatter(whole[rank]), scattered), shape
            assert same_bits(comm.all_gather(parts[rank]), reference.all_gather(parts, comm.format)), shape


@pytest.mark.parametrize("chunk_bytes", [1, 300, 2000, 5001, 1 << 30])
@ranks(3)
def test_the_size_of_chunks_changes_no_bit(group: dist.ProcessGroup, rank: int, chunk_bytes: int) -> None:
    """Chunk sizes from less than one shard to several."""
    tensors = [tough((9, 1000), torch.bfloat16, r) for r in range(3)]
    with Communicator(group, "int4", algorithm="two_shot", chunk_bytes=chunk_bytes) as comm:
        assert same_bits(comm.all_reduce(tensors[rank]), reference.two_shot(tensors, comm.format))
