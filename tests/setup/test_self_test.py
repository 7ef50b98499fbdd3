"""The self-test of shared memory, in real processes: memory that loses or corrupts bytes is not used by any rank."""

from __future__ import annotations

import ctypes
import logging
import mmap
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import same_bits, tough

from flashcomm import Communicator, reference
from flashcomm.errors import UnavailableError
from flashcomm.ranks.launch import RankContext, run
from flashcomm.setup import discovery, self_test
from flashcomm.transports import cpu_shared

pytest.importorskip("triton", reason="triton is not installed")

PAGE = mmap.PAGESIZE
SETTINGS: dict[str, Any] = {"workspace_bytes": "4M", "min_bytes": 0, "algorithm": "one_shot"}


def stale(liar: int, to: int, part: str) -> type:
    """Memory in which rank `to` never sees what rank `liar` writes to it: it reads what was there before, zeros."""

    class Stale(cpu_shared.SharedRegion):
        def rendezvous(self, group: dist.ProcessGroup, places: Any) -> None:
            from flashcomm.gpu import sync
            from flashcomm.gpu.launch import KernelCollectives

            super().rendezvous(group, places)
            if self.rank == liar:
                ll = 2 * KernelCollectives(self, 1).ll_epoch_bytes
                begin, end = {
                    "LL": (sync.DATA // PAGE * PAGE, (sync.DATA + ll) // PAGE * PAGE),
                    "flags": ((sync.DATA + ll) // PAGE * PAGE, self.n_bytes),
                }[part]
                libc = ctypes.CDLL(None, use_errno=True)
                libc.mmap.restype = ctypes.c_void_p
                libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
                fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
                at = self.mappings[to] + begin
                assert libc.mmap(at, end - begin, mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0) == at

    return Stale


def kind(name: str, region: Any = cpu_shared.SharedRegion) -> Any:
    return SimpleNamespace(NAME=name, SELF_TEST=True, probe=cpu_shared.probe, why_not=cpu_shared.why_not, create=region)


def use(*kinds: Any) -> None:
    """Let Communicators of this process try these kinds of memory, and forget verdicts."""
    discovery.candidates = lambda *_: list(kinds)  # type: ignore[assignment]
    self_test._verdicts.clear()


def sums_are_right(comm: Communicator, ctx: RankContext) -> None:
    messages = [tough((2, 128), torch.bfloat16, rank) for rank in range(ctx.world_size)]
    assert same_bits(comm.all_reduce(messages[ctx.rank]), reference.one_shot(messages, comm.format))


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("flashcomm").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def wrong_bytes(ctx: RankContext) -> None:
    lines = Lines().lines
    use(kind("symmetric", stale(liar=0, to=1, part="flags")), kind("host_memory"))
    with Communicator(None, "int4", **SETTINGS) as comm:
        assert comm.machine.transport == "host_memory"
        ((name, why),) = comm.machine.rejected
        assert name == "symmetric"
        assert re.fullmatch(r"the self-test failed: rank 1 got \d+ wrong values from rank 0", why)
        assert f"not symmetric: {why}" in str(comm.explain((2, 128), torch.bfloat16))
        sums_are_right(comm, ctx)
    assert lines == ([f"transport host_memory: not symmetric: {why}"] if ctx.rank == 0 else [])


def no_words_at_all(ctx: RankContext) -> None:
    use(kind("symmetric"))
    with Communicator(None, "int4", **SETTINGS) as comm:
        assert comm.machine.transport == "symmetric"
        sums_are_right(comm, ctx)
    assert self_test._verdicts == {("symmetric", *[cpu_shared.host_name()] * 2): ""}

    self_test.TIMEOUT_S = 0.1
    use(kind("symmetric", stale(liar=1, to=0, part="LL")))
    rounds = []
    run_test = self_test._SelfTest.verdict
    self_test._SelfTest.verdict = lambda self: (rounds.append(1), run_test(self))[1]  # type: ignore[method-assign]
    for _ in range(2):  # the verdict is kept
        with Communicator(None, "int4", **SETTINGS) as comm:
            assert comm.machine.transport == "process_group"
            assert comm.machine.rejected[0][0] == "symmetric"
            assert "rank 0 waited 0.1 s for rank 1" in comm.machine.rejected[0][1]
            sums_are_right(comm, ctx)
    assert len(rounds) == 1
    if ctx.rank == 0:
        self_test._verdicts.clear()  # as in a process that was started anew
    with pytest.raises(UnavailableError, match="'cpu_shared' was requested and is not available: the self-test failed"):
        Communicator(None, "int4", transport="cpu_shared", **SETTINGS)
    assert len(rounds) == 2, "both ranks must run the test again, or both must not"


def three_ranks(ctx: RankContext) -> None:
    use(kind("symmetric", stale(liar=2, to=0, part="flags")))
    with Communicator(None, "int4", **SETTINGS) as comm:
        assert re.fullmatch(
            r"the self-test failed: rank 0 got \d+ wrong values from rank 2", comm.machine.rejected[0][1]
        )
        assert comm.machine.transport == "process_group"


def test_memory_that_lies_is_not_used_and_the_pair_is_named() -> None:
    run(wrong_bytes, 2, timeout_s=200)


@pytest.mark.thorough
def test_memory_that_delivers_nothing_is_not_used_and_the_verdict_is_kept() -> None:
    run(no_words_at_all, 2, timeout_s=200)


@pytest.mark.thorough
def test_among_three_ranks_the_liar_is_found() -> None:
    run(three_ranks, 3, timeout_s=200)


def test_messages_are_random_and_the_same_everywhere() -> None:
    cpu = torch.device("cpu")
    x = self_test.message(5, 0, (64, 256), cpu).float()
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 3**-0.5) < 0.01
    assert x.unique().numel() > 1000
    assert torch.equal(self_test.message(5, 512, (1, 256), cpu).float(), x[2:3])
    assert not torch.equal(self_test.message(6, 0, (64, 256), cpu).float(), x)
    for seed in (0, 1 << 10, 1 << 20):  # no number is too large for 64 bits
        self_test.message(seed, 0, (1, 16), cpu)
