"""An unchanged torch.distributed program: only the name of the backend makes its all-reduces low-bit."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flashcomm.integrations.process_group  # noqa: F401  # registers the backend


def rank_main(rank, world_size, store):
    os.environ["FLASHCOMM_FORMAT"] = "int4-had"  # or set it outside, alike on all ranks
    dist.init_process_group("flashcomm", init_method=f"file://{store}", rank=rank, world_size=world_size)
    inputs = [torch.sin(torch.arange(512.0 * 576) * (r + 1)).view(512, 576) for r in range(world_size)]
    x, exact = inputs[rank].clone(), sum(inputs)
    dist.all_reduce(x)  # in place, as always
    n = torch.tensor([rank + 1])
    dist.all_reduce(n)  # integers go to gloo, unchanged
    if rank == 0:
        print(f"relative error {(x - exact).norm() / exact.norm():.3f}; sum of integers {n.item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (2, tempfile.mktemp()), nprocs=2)
