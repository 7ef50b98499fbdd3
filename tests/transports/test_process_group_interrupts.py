"""An exception may leave a call at any instant. Every rank then has the right result or an error, and goes on living.

Real processes over gloo. A timer's signal handler raises in the middle of a call on one rank; the ranks then call
again. A rank that is aborted, or that hangs, fails the run itself.

FLASHCOMM_TEST_THOROUGH=1 in the environment takes 200 instants for each kind of call instead of a few. (It is no setting
of flashcomm, and is read before the settings are cleared.)
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import gloo_group, same_bits

from flashcomm import Communicator, reference
from flashcomm.errors import FlashcommError
from flashcomm.ranks.launch import RankContext, run

THOROUGH = os.environ.get("FLASHCOMM_TEST_THOROUGH") == "1"
SHAPE, FORMAT = (256, 1152), "int4"
TIMEOUT_S = 1.0


class TooSlow(Exception):
    """What a program's own time limit raises."""


def too_slow(number: int, frame: object) -> None:
    raise TooSlow


def message(rank: int, turn: int) -> torch.Tensor:
    """Of another turn: other values of the same size, so that what is left over shows."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * turn + rank))
    return (x * (1 + 3 * turn)).bfloat16()


def wanted(kind: str, comm: Communicator, rank: int, turn: int, world_size: int) -> torch.Tensor:
    everybody = [message(r, turn) for r in range(world_size)]
    if kind == "hierarchical":
        return reference.hierarchical(everybody, comm.format, 2)
    if kind == "reduce_scatter":
        return reference.reduce_scatter(everybody, comm.format)[rank]
    result: torch.Tensor = getattr(reference, kind)(everybody, comm.format)
    return result


def make(group: dist.ProcessGroup, kind: str, chunk_bytes: int) -> Communicator:
    algorithm = kind if kind in ("one_shot", "two_shot", "hierarchical") else "two_shot"
    return Communicator(
        group,
        FORMAT,
        algorithm=algorithm,
        min_bytes=0,
        chunk_bytes=chunk_bytes,
        timeout_s=TIMEOUT_S,
        local_world_size=2,
    )


def call(comm: Communicator, kind: str, x: torch.Tensor) -> torch.Tensor:
    if kind in ("reduce_scatter", "all_gather"):
        result: torch.Tensor = getattr(comm, kind)(x)
        return result
    return comm.all_reduce(x)


def interrupted(ctx: RankContext, kind: str, chunk_bytes: int, trials: int, seed: int) -> dict[str, int]:
    """`trials` groups, each with one interrupted call; what became of the calls, on rank 0 and on the others."""
    signal.signal(signal.SIGALRM, too_slow)
    store, rng, seen = dist.group.WORLD.get_group_store(), random.Random(seed), Counter[str]()  # type: ignore[union-attr]
    for trial in range(trials):
        victim, part = rng.randrange(ctx.world_size), rng.uniform(0.0, 1.2)
        group = gloo_group(dist.PrefixStore(f"{kind}{chunk_bytes}trial{trial}", store), ctx.rank, ctx.world_size)
        comm = make(group, kind, chunk_bytes)
        want = [wanted(kind, comm, ctx.rank, turn, ctx.world_size) for turn in range(4)]
        for _ in range(2):
            begin = time.perf_counter()
            assert same_bits(call(comm, kind, message(ctx.rank, 0)), want[0])
            seconds = time.perf_counter() - begin
        dist.barrier()
        for turn in (1, 2, 3):
            outcome = "right"
            try:
                if turn == 1 and ctx.rank == victim:
                    signal.setitimer(signal.ITIMER_REAL, max(1e-6, seconds * part))
                got = call(comm, kind, message(ctx.rank, turn))
                signal.setitimer(signal.ITIMER_REAL, 0)
                if not same_bits(got, want[turn]):
                    outcome = "wrong"
            except (TooSlow, FlashcommError) as why:
                signal.setitimer(signal.ITIMER_REAL, 0)
                outcome = "interrupted" if isinstance(why, TooSlow) else "error"
            seen[outcome] += 1
        dist.barrier()  # nobody leaves a group that others still wait in
        comm.close()
    ctx.emit(dict(seen))
    return {}


CASES = [
    ("one_shot", 2, 1 << 30),
    ("two_shot", 2, 1 << 30),
    ("two_shot", 3, 1 << 14),
    ("reduce_scatter", 2, 1 << 30),
    ("all_gather", 2, 1 << 14),
    ("hierarchical", 4, 1 << 14),
]
if THOROUGH:
    CASES = [
        (kind, 4 if kind == "hierarchical" else 2 + (chunk > 1 << 20), chunk)
        for kind in ("one_shot", "two_shot", "reduce_scatter", "all_gather", "hierarchical")
        for chunk in (1 << 30, 1 << 14)
    ]
    CASES = [(kind, 2 if kind in ("reduce_scatter", "all_gather") else world, chunk) for kind, world, chunk in CASES]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "world_size", "chunk_bytes"), CASES)
def test_right_or_an_error_on_every_rank(kind: str, world_size: int, chunk_bytes: int) -> None:
    total, told = Counter[str](), []
    trials = 20 if THOROUGH else 4
    seed = int(os.environ.get("FLASHCOMM_TEST_SEED", "0")) + world_size
    run(interrupted, world_size, (kind, chunk_bytes, trials, seed), on_event=told.append, timeout_s=1500)
    for one in told:
        total.update(one)
    print(kind, world_size, chunk_bytes, dict(total))
    assert len(told) == world_size
    assert sum(total.values()) == 3 * trials * world_size
    assert total["wrong"] == 0
    assert total["interrupted"] > 0, "no signal came in the middle of a call"
