"""gloo's event threads run under SCHED_BATCH, unless somebody chose another policy: so none preempts a sender."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import raise_first, run_ranks

from flashcomm.ranks.launch import RankContext, run
from flashcomm.transports.process_group import ProcessGroupTransport

pytestmark = pytest.mark.skipif(torch.__version__ < "2.13", reason="gloo's event thread has no name in this torch")


def event_threads() -> set[int]:
    """The ids of this process's gloo event threads. Other tests may have left some."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name) for task in tasks if task.joinpath("comm").read_text() == "gloo_tcp_loop\n"}


def policies(_: RankContext | None = None, others: frozenset[int] = frozenset()) -> set[int]:
    return {os.sched_getscheduler(thread_id) for thread_id in event_threads() - others}


def sum_of_ranks(group: dist.ProcessGroup, rank: int) -> None:
    transport = ProcessGroupTransport(group, torch.device("cpu"), 30)
    out = torch.zeros((2, 1), dtype=torch.uint8)
    transport.all_gather(out, torch.tensor([rank + 5], dtype=torch.uint8), "the test", overlap=False).wait()
    assert out.tolist() == [[5], [6]]


def test_with_a_transport() -> None:
    others = frozenset(event_threads())

    def body(group: dist.ProcessGroup, rank: int) -> None:
        assert policies(others=others) == {os.SCHED_OTHER}
        group.barrier().wait()  # rank 1's transport would change the policy of all
        sum_of_ranks(group, rank)
        assert policies(others=others) == {os.SCHED_BATCH}
        group.barrier().wait()

    raise_first(run_ranks(2, body))


def test_without_one() -> None:
    assert run(policies, 2) == {os.SCHED_BATCH}


def test_a_chosen_policy_stays() -> None:
    others = frozenset(event_threads())

    def body(group: dist.ProcessGroup, rank: int) -> None:
        for thread_id in event_threads() - others:
            os.sched_setscheduler(thread_id, os.SCHED_IDLE, os.sched_param(0))
        group.barrier().wait()
        sum_of_ranks(group, rank)
        assert policies(others=others) == {os.SCHED_IDLE}
        group.barrier().wait()

    raise_first(run_ranks(2, body))


def test_a_system_that_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    raise_first(run_ranks(2, sum_of_ranks))
