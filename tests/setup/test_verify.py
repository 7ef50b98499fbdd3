"""FLASHCOMM_VERIFY=N: every Nth call is compared with the reference, and a wrong result is an error on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import errors_of, raise_first, run_ranks, tough

from flashcomm import Communicator
from flashcomm.collectives import executors
from flashcomm.errors import CommunicationError, SettingsError
from flashcomm.setup import verify

SHAPE = (4, 640)


def corrupt(monkeypatch: pytest.MonkeyPatch, rank: int, calls: set[int]) -> None:
    """Change one value of this rank's result in these calls, counted from 1."""
    run = executors.Pipelined.run
    counts: dict[int, int] = {}

    def wrong(self: Any, route: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        run(self, route, x, out)
        mine = self.context.transport.rank
        counts[mine] = counts.get(mine, 0) + 1
        if mine == rank and counts[mine] in calls:
            out.view(-1)[5] += 1

    monkeypatch.setattr(executors.Pipelined, "run", wrong)


def calls_until_an_error(every: int | str, n_calls: int) -> list[Any]:
    def body(group: Any, rank: int) -> int:
        with Communicator(group, "int8", min_bytes=0, verify=every) as comm:
            done = 0
            try:
                for i in range(n_calls):
                    comm.all_reduce(tough(SHAPE, torch.bfloat16, 10 * i + rank))
                    done += 1
            except CommunicationError as why:
                with pytest.raises(CommunicationError, match="cannot be used any more"):
                    comm.all_reduce(torch.ones(SHAPE))
                raise why from None
            return done

    return run_ranks(2, body)


def test_a_wrong_result_is_an_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, 1, {2})
    (text,) = errors_of(calls_until_an_error(2, 4), CommunicationError)
    assert "FLASHCOMM_VERIFY: call 2, all_reduce by one_shot as int8 over process_group" in text
    assert "differs from the reference: rank 1: 1 of 2560 values. " in text


def test_only_every_nth_call_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, 0, {1, 2, 4, 5})
    verified = []
    monkeypatch.setattr(
        verify.Verifier, "verify", lambda self, *args: (verified.append(self.n_calls), actual(self, *args))
    )
    assert raise_first(calls_until_an_error("3", 5)) == [5, 5]
    assert verified == [3, 3]


actual = verify.Verifier.verify


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_collective_passes_in_place_strided_and_not_finite(world_size: int) -> None:
    def body(group: Any, rank: int) -> dict[str, int]:
        algorithm = "hierarchical" if world_size == 4 else "two_shot"
        settings: dict[str, Any] = {"algorithm": algorithm, "local_world_size": 2, "min_bytes": 0}
        x = tough((4, 640), torch.bfloat16, rank)
        x[1, 3] = float("inf")
        with Communicator(group, "int4/int8", verify=1, **settings) as comm:
            comm.all_reduce(x.t().contiguous().t())
            comm.all_reduce(x.clone()[:2], whole=x.numel())
            comm.reduce_scatter(x)
            comm.all_gather(x)
            comm.all_reduce_add_rms_norm(x, x, torch.ones(640, dtype=torch.bfloat16), 1e-5)
            comm.all_reduce(x, out=x)
            sent = comm.transport.n_bytes_sent
        with Communicator(group, "int4/int8", **settings) as plain:
            for _ in range(3):
                plain.all_reduce(x)
            assert sent < 4 * plain.transport.n_bytes_sent, "verifying was counted"
        return dict(comm.calls)

    assert all(sum(calls.values()) == 6 for calls in raise_first(run_ranks(world_size, body)))


def test_wrong_settings() -> None:
    for value in (-1, "often", True, 0.5):
        with pytest.raises(SettingsError, match="give N to verify every Nth call, or 0"):
            raise_first(run_ranks(1, lambda g, r, value=value: Communicator(g, verify=value)))
