"""Sum tensors of three CPU processes, low-bit: how far the sum is from exact, and how the message travelled."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flashcomm


def rank_main(rank, world_size, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    inputs = [torch.sin(torch.arange(512.0 * 576) * (r + 1)).view(512, 576).bfloat16() for r in range(world_size)]
    x, exact = inputs[rank], sum(inputs[1:], inputs[0].float())
    y = flashcomm.all_reduce(x)  # a new tensor, the same bits on every rank
    if rank == 0:
        print(f"relative error {(y - exact).norm() / exact.norm():.3f}")
        print(flashcomm.ops.communicators()[0].explain(x.shape, x.dtype))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (3, tempfile.mktemp()), nprocs=3)
