"""Baselines: sums in place stay finite, and ranks agree on what is unavailable."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm.bench import all_reduce, baselines, timing
from flashcomm.testing import RankContext, run

BF16 = torch.bfloat16


def grown(ctx: RankContext, dtype: torch.dtype) -> list[float]:
    """Return the largest value after as many sums in place as the benchmark runs, and after two more."""
    impl = baselines.Backend()
    impl.load([torch.full((64,), 31.0, dtype=dtype)])
    impl.refill(baselines.SMALL)
    for _ in range(baselines.max_sums_in_place(dtype, ctx.world_size)):
        last = impl.run(0)
    most = float(last.max())
    impl.run(0)
    return [most, float(impl.run(0).max())]


@pytest.mark.parametrize(("dtype", "world_size"), [(BF16, 2), (torch.float16, 2), (torch.float16, 3)])
def test_sums_in_place_stay_finite(dtype: torch.dtype, world_size: int) -> None:
    most, two_more = run(grown, world_size, (dtype,))  # type: ignore[misc]
    assert 0 < most < float("inf")
    assert two_more == float("inf")  # so the limit is not lower than necessary


def buffers_after_timing(ctx: RankContext) -> tuple[int, list[float]]:
    """Return the most calls per sample in fp16, and the contents of the buffers after them."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        measure = timing.measure
        patch.setattr(timing, "measure", lambda *args: (seen.append(args), measure(*args))[1])
        patch.setattr(time, "perf_counter", lambda: 0.0)  # so that every sample has the most calls
        patch.setattr(all_reduce, "_rows", lambda *args: [])
        all_reduce.all_reduce(ctx, [], [256], 64, torch.float16, 3, ("eager",), {})
    backend = seen[0][1][0]
    return seen[0][4], [float(b.abs().max()) for b in backend.buffers]


def test_timing_in_place_stays_finite() -> None:
    calls, largest = run(buffers_after_timing, 2)  # type: ignore[misc]
    assert calls == 2 * 18
    assert all(100 < most < float("inf") for most in largest)


def differ(ctx: RankContext) -> list[str | None]:
    mine = [None, "no" if ctx.rank == 2 else None, f"rank {ctx.rank}" if ctx.rank else None]
    found = [baselines.first_reason(why) for why in mine]
    everywhere: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(everywhere, found)
    assert everywhere == [found] * ctx.world_size
    return found


def test_ranks_agree_on_what_is_unavailable() -> None:
    assert run(differ, 3) == [None, "no", "rank 1"]
