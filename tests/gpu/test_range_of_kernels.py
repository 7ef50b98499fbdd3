"""The kernels with values as large as large models have them; see tests/collectives/test_range.py."""

from __future__ import annotations

import pytest
import torch
from support import massive, same_bits
from test_host_kernel import call, on_ranks
from test_host_kernel import make as through_host_memory

from flashcomm import Communicator, WireFormat, reference
from flashcomm.gpu.launch import ALGORITHMS
from flashcomm.ranks.launch import RankContext

pytest.importorskip("triton", reason="triton is not installed")


def body(ctx: RankContext) -> None:
    host = through_host_memory(ctx)
    transport = "symmetric" if ctx.device.type == "cuda" else "cpu_shared"
    settings = {"transport": transport, "workspace_bytes": 4 << 20, "min_bytes": 0, "timeout_s": 60}
    for dtype, fmt in ((torch.bfloat16, "int6-had/int7-had"), (torch.float16, "int4-had")):
        messages = massive(dtype, ctx.world_size)
        mine, parsed = messages[ctx.rank].to(ctx.device), WireFormat.parse(fmt)
        for algorithm in ALGORITHMS:
            got, want = call(host, algorithm, messages, parsed)
            assert same_bits(got, want), (algorithm, fmt, dtype)
        for algorithm in ("one_shot", "two_shot"):
            with Communicator(None, fmt, device=ctx.device.type, algorithm=algorithm, **settings) as comm:
                want = getattr(reference, algorithm)(messages, parsed)
                assert same_bits(comm.all_reduce(mine).cpu(), want), (algorithm, fmt, dtype)
                if algorithm == "two_shot":
                    continue
                assert same_bits(comm.all_gather(mine).cpu(), reference.all_gather(messages, parsed))
                scattered = reference.reduce_scatter(messages, parsed)[ctx.rank]
                assert same_bits(comm.reduce_scatter(mine).cpu(), scattered)


@pytest.mark.thorough
def test_the_kernels_equal_the_reference() -> None:
    on_ranks(body, 2)
