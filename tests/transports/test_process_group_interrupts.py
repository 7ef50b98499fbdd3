"""An exception may interrupt a call at any instant. Then every rank has the right result or an error, and none dies.

The ranks are real processes over gloo. On one rank a timer's signal handler raises in the middle of a call. Then all
ranks call again. If a rank aborts or hangs, the run fails.

With FLASHCOMM_TEST_THOROUGH=1 the test uses 200 instants instead of a few.
"""

from __future__ import annotations

import os
import random
import signal
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
from flashcomm.routing.route import Executor

THOROUGH = os.environ.get("FLASHCOMM_TEST_THOROUGH") == "1"
SHAPE, FORMAT = (256, 1152), "int4"
TIMEOUT_S = 2.0 if THOROUGH else 1.0


class TooSlow(Exception):  # noqa: N818  (as a program would name it)
    """The exception of a program's own time limit."""


def too_slow(number: int, frame: object) -> None:
    raise TooSlow


def message(rank: int, turn: int) -> torch.Tensor:
    """Return a message. Other turns have other values of the same size, so that leftovers of a call are noticed."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * turn + rank))
    return (x * (1 + 3 * turn)).bfloat16()


def wanted(kind: str, comm: Communicator, rank: int, turn: int, world_size: int) -> torch.Tensor:
    inputs = [message(r, turn) for r in range(world_size)]
    if kind == "hierarchical":
        return reference.hierarchical(inputs, comm.format, 2)
    if kind == "reduce_scatter":
        return reference.reduce_scatter(inputs, comm.format)[rank]
    result: torch.Tensor = getattr(reference, kind)(inputs, comm.format)
    return result


def make(group: dist.ProcessGroup, kind: str, chunk_bytes: int) -> Communicator:
    algorithm = kind if kind in ("one_shot", "two_shot", "hierarchical") else "two_shot"
    return Communicator(
        group,
        FORMAT,
        algorithm=algorithm,
        min_bytes=0,
        chunk_bytes=chunk_bytes,
        timeout_s=60,
        local_world_size=2,
    )


def call(comm: Communicator, kind: str, x: torch.Tensor) -> torch.Tensor:
    if kind in ("reduce_scatter", "all_gather"):
        result: torch.Tensor = getattr(comm, kind)(x)
        return result
    return comm.all_reduce(x)


def interrupted(ctx: RankContext, cases: list[tuple[str, int]], trials: int, seed: int) -> None:
    """Create `trials` groups for each kind and chunk size, each with an interrupted call and two calls after it."""
    signal.signal(signal.SIGALRM, too_slow)
    store: Any = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    rng, seen = random.Random(seed), Counter[str]()
    for case, (kind, chunk_bytes) in enumerate(cases):
        for trial in range(trials):
            victim, part = rng.randrange(ctx.world_size), rng.uniform(0.0, 1.2)
            if trial == 0:
                part = 0.3  # in the middle, even if this call takes half of the time of the one before
            group = gloo_group(dist.PrefixStore(f"case{case}trial{trial}", store), ctx.rank, ctx.world_size)
            comm = make(group, kind, chunk_bytes)
            context = comm._executors[Executor.PIPELINED].context  # type: ignore[attr-defined]
            want = [wanted(kind, comm, ctx.rank, turn, ctx.world_size) for turn in range(4)]
            seconds = TIMEOUT_S
            for _ in range(3):
                begin = time.perf_counter()
                assert same_bits(call(comm, kind, message(ctx.rank, 0)), want[0])
                seconds = min(seconds, time.perf_counter() - begin)
            dist.barrier()
            for transport in (comm.transport, *(context.nodes or ())):
                transport.timeout_s = TIMEOUT_S  # creating a Communicator may take longer
            for turn in (1, 2, 3):
                limit = max(1e-6, seconds * part) if turn == 1 and ctx.rank == victim else 0
                became = outcome(comm, kind, message(ctx.rank, turn), want[turn], limit)
                seen[became] += 1
                if became == "not begun":
                    break  # this rank is a call behind the others, through the program
                if became.startswith("wrong"):
                    ctx.emit({f"{became} {kind} {chunk_bytes}, turn {turn} on rank {ctx.rank}, {victim} at {part}": 1})
            dist.barrier()  # no rank leaves a group while others still wait in it
            comm.close()
    ctx.emit(dict(seen))


def outcome(comm: Communicator, kind: str, x: torch.Tensor, want: torch.Tensor, limit: float) -> str:
    """Return the outcome of a call that a timer's signal interrupts after `limit` seconds (0: never)."""
    before = comm._n_calls
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        got = call(comm, kind, x)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return "right" if same_bits(got, want) else f"wrong {(got != want).float().mean():.2%}"
    except TooSlow:
        if comm._guard.busy:
            return "interrupted"
        return "not begun" if comm._n_calls == before else "ended before"
    except FlashcommError:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return "error"


LARGE, SMALL = 1 << 30, 1 << 14  # one chunk, and 36
PAIRS = [
    ("one_shot", LARGE),
    ("two_shot", LARGE),
    ("two_shot", SMALL),
    ("reduce_scatter", LARGE),
    ("all_gather", SMALL),
]
FOURS = [("hierarchical", SMALL)]
if THOROUGH:
    PAIRS = [
        (kind, chunk) for kind in ("one_shot", "two_shot", "reduce_scatter", "all_gather") for chunk in (LARGE, SMALL)
    ]
    FOURS = [(kind, chunk) for kind in ("hierarchical", "two_shot") for chunk in (LARGE, SMALL)]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("world_size", "cases", "trials"), [(2, PAIRS, 20 if THOROUGH else 3), (4, FOURS, 20 if THOROUGH else 5)]
)
def test_right_or_an_error_on_every_rank(world_size: int, cases: list[tuple[str, int]], trials: int) -> None:
    total, outcomes = Counter[str](), []  # type: ignore[var-annotated]
    seed = int(os.environ.get("FLASHCOMM_TEST_SEED", "0"))
    run(interrupted, world_size, (cases, trials, seed), on_event=outcomes.append, timeout_s=2500)
    for one in outcomes:
        total.update(one)
    print(world_size, cases, trials, dict(total))
    assert not [key for key in total if key.startswith("wrong")]
    assert set(total) <= {"right", "error", "interrupted", "not begun", "ended before"}
    assert total["interrupted"] > 0, "no signal came in the middle of a call"
