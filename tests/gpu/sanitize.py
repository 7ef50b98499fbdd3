"""Kernels for compute-sanitizer: each kind once, over GPU memory, over host memory, and the codec.

On two GPUs:

    export PYTHONPATH=src TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1      # ranks over gloo: no kernels of NCCL
    python tests/gpu/sanitize.py                                          # compiles, so that the next runs are short
    compute-sanitizer --target-processes all --error-exitcode 9 --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --target-processes all --error-exitcode 9 --tool racecheck python tests/gpu/sanitize.py
    compute-sanitizer --target-processes all --error-exitcode 9 --tool synccheck python tests/gpu/sanitize.py

Results are compared with the reference. racecheck looks at shared memory only, synccheck at barriers.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from support import expected, kernels_of, over_cuda, same_bits, tough

from flashcomm import WireFormat
from flashcomm.gpu import codec, tuning
from flashcomm.gpu.host_launch import host_tuning
from flashcomm.ranks.launch import RankContext, run
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout

BF16 = torch.bfloat16
PEERS = [
    ("one_shot", "int4", tuning.LL, (4, 512)),
    ("two_shot", "int6-had/int7-had", tuning.LL, (9, 512)),
    ("all_gather", "none", tuning.LL, (4, 512)),
    ("two_shot", "int4", tuning.FLAGS, (33, 1024)),
    ("reduce_scatter", "int4", tuning.FLAGS, (34, 1024)),
    ("all_to_all_single", "int4", tuning.LL, (4, 512)),
    ("all_to_all_single", "int4-had", tuning.FLAGS, (34, 1024)),
    ("one_shot", "int6-had/int7-had", tuning.FLAGS_IN_8_PIECES, (257, 1024)),
]
HOST = [
    ("one_shot", "int4", tuning.LL, (4, 512)),
    ("one_shot", "int4", host_tuning(WireFormat.parse("int4"), 0), (129, 1024)),
    ("two_shot", "int6-had/int7-had", host_tuning(WireFormat.parse("int6-had/int7-had"), 0), (129, 1024)),
    ("reduce_scatter", "int4", host_tuning(WireFormat.parse("int4"), 0), (130, 1024)),
    ("all_gather", "none", host_tuning(WireFormat.parse("none"), 0), (65, 1024)),
    ("all_to_all_single", "int4", host_tuning(WireFormat.parse("int4"), 0), (130, 1024)),
]


def collectives(ctx: RankContext) -> None:
    for transport, cases in (("symmetric", PEERS), ("host_memory", HOST)):
        with over_cuda("int4", transport=transport, workspace_bytes=4 << 20, timeout_s=60) as comm:
            for algorithm, name, how, shape in cases:
                fmt = WireFormat.parse(name)
                inputs = [tough(shape, BF16, rank) for rank in range(ctx.world_size)]
                want = expected(algorithm, inputs, fmt, ctx.rank)
                x, out = inputs[ctx.rank].to(ctx.device), torch.empty(want.shape, dtype=BF16, device=ctx.device)
                launch = kernels_of(comm).plan(algorithm, x, shape[-1], fmt, how)
                for _ in range(2):  # epochs of both halves
                    launch(x.data_ptr(), out.data_ptr())
                    comm.synchronize()
                assert same_bits(out.cpu(), want), (transport, algorithm, name)
    for name in ("int4", "int6-had"):
        layout, x = Layout(WireFormat.parse(name).reduce, 600, 2), tough((9, 600), BF16).view(-1)
        n, wires, outs = x.numel(), [], []
        for made, where in ((torch_codec, torch.device("cpu")), (codec, ctx.device)):
            wire = torch.zeros(layout.nbytes(0, n), dtype=torch.uint8, device=where)
            out = torch.zeros(n, dtype=BF16, device=where)
            made.encode(x.to(where), layout, 0, n, wire)
            made.decode_sum(torch.stack([wire] * 2), layout, 0, n, out, BF16)
            wires.append(wire.cpu())
            outs.append(out.cpu())
        assert torch.equal(*wires), name
        assert same_bits(*outs), name
    ctx.emit(f"rank {ctx.rank}: all as the reference")


if __name__ == "__main__":
    run(collectives, 2, device="cuda", timeout_s=300, on_event=print)
