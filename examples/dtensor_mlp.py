"""A tensor-parallel MLP of DTensor with a low-bit all-reduce, on two CPU processes."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from flashcomm import ops
from flashcomm.integrations.dtensor import FlashRowwiseParallel


def rank_main(rank, world_size, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(576, 1536), torch.nn.ReLU(), torch.nn.Linear(1536, 576))
    x = torch.randn(512, 576)
    with torch.no_grad():
        exact = mlp(x)
        parallelize_module(mlp, mesh, {"0": ColwiseParallel(), "2": FlashRowwiseParallel(format="int6-had")})
        error = (mlp(x) - exact).norm() / exact.norm()
    (comm,) = ops.communicators()
    if rank == 0:
        print(f"relative error {error:.2f}; calls {dict(comm.calls)}; bytes sent {dict(comm.sent)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (2, tempfile.mktemp()), nprocs=2)
