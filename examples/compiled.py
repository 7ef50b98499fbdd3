"""A compiled block with a low-bit all-reduce: one graph for all lengths, the bits of eager mode."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.utils import counters

import flashcomm


def rank_main(rank, world_size, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.manual_seed(rank)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def block(x):
        return flashcomm.all_reduce(torch.relu(x), "int4-had") + x

    equal = []
    for tokens in (64, 65, 200, 513):
        x = torch.randn(tokens, 576)
        equal.append(torch.equal(block(x), flashcomm.all_reduce(torch.relu(x), "int4-had") + x))
    if rank == 0:
        print(f"equal to eager: {all(equal)}; lengths: {len(equal)}; graphs: {counters['stats']['unique_graphs']}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (2, tempfile.mktemp()), nprocs=2)
