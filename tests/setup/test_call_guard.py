"""Calls that a Communicator refuses: after an interrupted call, from other threads, after a fork; and its close.

Where the defect was an abort or a hang, the ranks are real processes. Then an abort or a hang fails the run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import gloo_group, raise_first, run_ranks, same_bits

import flashcomm
from flashcomm import Communicator, reference
from flashcomm.errors import ClosedError, CommunicationError, FlashcommError, InputError
from flashcomm.ranks.launch import RankContext, run


def message(rank: int, rows: int = 512) -> torch.Tensor:
    return torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rank))


class TestLeft:
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, ValueError])
    @pytest.mark.parametrize("at", ["encode", "decode_sum"])
    @pytest.mark.parametrize("chunk_bytes", [1 << 30, 1 << 14])
    def test_later_calls_raise_at_once_and_say_why(
        self, kind: type[BaseException], at: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The peer must not receive the next call's messages as those of this one."""
        from flashcomm.cpu import codec

        real, victim = getattr(codec, at), threading.local()

        def fails(*args: Any) -> None:
            if getattr(victim, "left", 0):
                victim.left -= 1
                if not victim.left:
                    raise kind("in the middle")
            real(*args)

        monkeypatch.setattr(codec, at, fails)

        def body(group: dist.ProcessGroup, rank: int) -> str:
            comm = Communicator(group, "int8", algorithm="two_shot", min_bytes=0, timeout_s=2, chunk_bytes=chunk_bytes)
            comm.all_reduce(message(rank))
            if rank:
                with pytest.raises(CommunicationError, match=r"rank 0 did not answer within 2 s|rank 0 was lost"):  # noqa: PT012
                    comm.all_reduce(message(rank))  # succeeds if the other rank was interrupted at the very end
                    comm.all_reduce(message(rank))
                return ""
            victim.left = 2 if at == "encode" else 1
            with pytest.raises(kind, match="in the middle"):
                comm.all_reduce(message(rank))
            for call in (comm.all_reduce, comm.reduce_scatter, comm.all_gather):
                begin = time.monotonic()
                with pytest.raises(CommunicationError, match=f"was interrupted by {kind.__name__}") as caught:
                    call(message(rank))
                assert time.monotonic() - begin < 1
            time.sleep(3)  # the connection stays while the peer waits
            return str(caught.value)

        error, _ = raise_first(run_ranks(2, body))
        assert "all_reduce was interrupted by" in error

    def test_errors_of_all_ranks_leave_nothing(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int8")
            for _ in range(3):
                with pytest.raises(InputError):
                    comm.all_reduce(torch.ones(4, dtype=torch.int32) if rank else torch.ones(4))
                assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4

        raise_first(run_ranks(2, body))

    def test_an_exception_that_nothing_noted(self) -> None:
        """It is raised between the mark and the `with` block."""

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int8")
            comm._guard.call("all_reduce")
            with pytest.raises(CommunicationError, match="all_reduce was interrupted by an exception"):
                comm.all_reduce(torch.ones(4))
            comm.close()

        raise_first(run_ranks(1, body))

    def test_a_call_inside_a_call(self) -> None:
        """A signal handler can do this."""

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int8")
            with comm._guard.call("all_gather"), pytest.raises(CommunicationError, match="all_gather was interrupted"):
                comm.all_reduce(torch.ones(4))
            assert comm.all_reduce(torch.ones(4)).tolist() == [1.0] * 4

        raise_first(run_ranks(1, body))


class TestThreads:
    @pytest.mark.parametrize("of_one", [True, False], ids=["one Communicator", "two of one group"])
    def test_two_threads_at_the_same_time(self, of_one: bool) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            first = Communicator(group, "int8", timeout_s=3)
            second = first if of_one else Communicator(group, "int8", timeout_s=3)
            with first._guard.call("all_reduce"):
                caught: list[BaseException] = []

                def other() -> None:
                    try:
                        second.all_reduce(torch.ones(4))
                    except BaseException as why:
                        caught.append(why)

                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            assert isinstance(caught[0], InputError)
            assert "another thread of this process is in a call" in str(caught[0])
            assert second.all_reduce(torch.ones(4)).tolist() == [2.0] * 4  # it was refused before it sent anything

        raise_first(run_ranks(2, body))

    @pytest.mark.parametrize("of_one", [True, False], ids=["one Communicator", "two of one group"])
    def test_no_rank_dies_of_it(self, of_one: bool) -> None:
        run(two_threads, 2, (of_one,), timeout_s=120)

    def test_a_group_for_each_thread(self) -> None:
        run(a_group_each, 2, timeout_s=120)


def two_threads(ctx: RankContext, of_one: bool) -> None:
    comms = [Communicator(None, "int8", algorithm="two_shot", min_bytes=0, timeout_s=2) for _ in range(2 - of_one)]
    x = [message(r, 64) for r in range(ctx.world_size)]
    want, wrong = reference.two_shot(x, comms[0].format), []

    def body(comm: Communicator) -> None:
        for _ in range(15):
            try:
                if not same_bits(comm.all_reduce(x[ctx.rank]), want):
                    wrong.append(1)
            except FlashcommError:
                pass

    threads = [threading.Thread(target=body, args=(comms[i % len(comms)],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    time.sleep(0.5)


def a_group_each(ctx: RankContext) -> None:
    store: Any = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    groups = [gloo_group(dist.PrefixStore(f"{i}", store), ctx.rank, ctx.world_size) for i in range(2)]
    comms = [Communicator(group, "int8", algorithm="two_shot", min_bytes=0, timeout_s=20) for group in groups]
    x = [message(r, 64) for r in range(ctx.world_size)]
    want, failed = reference.two_shot(x, comms[0].format), []

    def body(comm: Communicator) -> None:
        try:
            assert all(same_bits(comm.all_reduce(x[ctx.rank]), want) for _ in range(15))
        except BaseException as why:
            failed.append(why)

    threads = [threading.Thread(target=body, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    dist.barrier()


class TestClose:
    @pytest.mark.parametrize("after_s", [0.0, 0.01, 0.05, 0.2])
    def test_during_a_call_of_another_thread(self, after_s: float) -> None:
        """The call ends normally, and the next one raises that the Communicator is closed."""
        x = [message(r, 2048) for r in range(2)]
        want = reference.two_shot(x, flashcomm.WireFormat.parse("int8"))

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int8", algorithm="two_shot", min_bytes=0, timeout_s=10, chunk_bytes=1 << 14)
            comm.all_reduce(x[rank])
            if rank == 0:
                threading.Timer(after_s, comm.close).start()
            try:
                assert same_bits(comm.all_reduce(x[rank]), want)
            except ClosedError:
                assert rank == 0
            except CommunicationError:
                assert rank == 1  # the other was closed before its call began
            if rank == 0:
                time.sleep(after_s + 0.1)
                with pytest.raises(ClosedError):
                    comm.all_reduce(x[rank])

        raise_first(run_ranks(2, body))

    def test_jobs_that_will_not_run_say_so(self) -> None:
        from flashcomm.transports.process_group import Lane

        lane, running, go, ran = Lane(), threading.Event(), threading.Event(), []
        first = lane.start(lambda: (running.set(), go.wait(10), None)[2])
        second = lane.start(lambda: ran.append(1))
        assert running.wait(10)
        closing = threading.Thread(target=lane.close, args=(10,))
        closing.start()
        while not lane.closed:
            time.sleep(0.01)
        go.set()
        first()
        with pytest.raises(ClosedError, match="closed during the call"):
            second()
        with pytest.raises(ClosedError, match="closed during the call"):
            lane.start(lambda: ran.append(2))
        closing.join(10)
        assert not ran
        assert not closing.is_alive()

    def test_from_a_signal_handler_in_the_middle_of_a_call(self) -> None:
        run(closed_by_a_signal, 2, timeout_s=60)

    def test_from_another_call_that_left(self) -> None:
        """Closing after an exception does not wait for the interrupted call, which never ends."""

        def body(group: dist.ProcessGroup, rank: int) -> None:
            with pytest.raises(KeyError), Communicator(group, "int8") as comm, comm._guard.call("all_reduce"):
                raise KeyError
            assert comm.closed

        begin = time.monotonic()
        raise_first(run_ranks(1, body))
        assert time.monotonic() - begin < 20


def closed_by_a_signal(ctx: RankContext) -> None:
    comm = Communicator(None, "int8", algorithm="two_shot", min_bytes=0, timeout_s=2, chunk_bytes=1 << 14)
    comm.all_reduce(message(ctx.rank))
    if ctx.rank == 0:
        signal.signal(signal.SIGALRM, lambda *_: comm.close())
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    want = reference.two_shot([message(r) for r in range(2)], comm.format)
    try:
        while True:
            assert same_bits(comm.all_reduce(message(ctx.rank)), want)
    except ClosedError:
        assert ctx.rank == 0
    except CommunicationError:
        assert ctx.rank == 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(3)  # the other waits for an answer, and not for a lost connection
    dist.destroy_process_group()  # gloo has closed the connections of the call that failed: no barrier can follow


EXIT = """
import datetime, os, sys, threading, torch, torch.distributed as dist, flashcomm
rank, path, close = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "close"
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=30))
c = flashcomm.Communicator(timeout_s=5, algorithm="two_shot", min_bytes=0, chunk_bytes=1 << 14, format="int8")
x = torch.randn(2048, 1024)
c.all_reduce(x)
if rank == 1:
    threading.Timer(0.07, lambda: os.kill(os.getpid(), 9)).start()
try:
    while True:
        c.all_reduce(x)
except flashcomm.FlashcommError as why:
    print(why, file=sys.stderr)
    if close:
        c.close()
    sys.exit(0)
"""


@pytest.mark.parametrize("close", ["close", "leave"])
def test_a_survivor_exits_as_it_wants(close: str, tmp_path: Path) -> None:
    """Earlier its exchange thread was ended inside gloo, with SIGABRT in half of the runs."""
    for i in range(3):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", EXIT, str(rank), str(tmp_path / f"store{i}"), close],
                stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(2)
        ]  # fmt: skip
        output = [rank.communicate(timeout=100)[1] for rank in ranks]
        assert ranks[1].returncode == -9
        assert ranks[0].returncode == 0, output[0]
        assert "rank 1" in output[0]


def test_the_exchange_thread_is_joined_at_exit(tmp_path: Path) -> None:
    """The same, but deterministic: a job still runs when the program ends."""
    code = """
import threading, time
from flashcomm.transports.process_group import Lane
lane, running = Lane(), threading.Event()
lane.start(lambda: (running.set(), time.sleep(1.0), print("done", flush=True))[1])
lane.start(lambda: print("never"))
running.wait()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "done\n"


def forks(ctx: RankContext) -> None:
    comm = Communicator(None, "int8", algorithm="two_shot", min_bytes=0, timeout_s=5, chunk_bytes=1 << 14)
    x = message(ctx.rank)
    want = comm.all_reduce(x)
    if ctx.rank == 0:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for call in (comm.all_reduce, comm.all_gather):
                    try:
                        call(x)
                    except CommunicationError as why:
                        code = 0 if "was forked from the one that created the Communicator" in str(why) else 2
                comm.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert same_bits(comm.all_reduce(x), want)


def test_a_forked_child_gets_one_clear_error() -> None:
    run(forks, 2, timeout_s=60)
