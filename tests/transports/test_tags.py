"""A message of another Communicator, call or exchange is never taken for the one that a rank waits for."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from support import raise_first, run_ranks

from flashcomm.errors import CommunicationError
from flashcomm.transports.process_group import ProcessGroupTransport, Tags


@pytest.mark.parametrize("other", ["communicator", "call", "exchange"])
def test_a_shorter_message_of_something_else_is_not_accepted(other: str) -> None:
    """gloo fills the beginning of a larger buffer with a shorter message, without an error."""

    def body(group: dist.ProcessGroup, rank: int) -> None:
        transport = ProcessGroupTransport(group, torch.device("cpu"), 0.3)
        transport.tags.communicator = 3 + (rank if other == "communicator" else 0)
        transport.tags.begin(7 + (rank if other == "call" else 0))
        if other == "exchange" and rank:
            transport.tags.next()
        mine = torch.full((64 >> rank,), rank + 1, dtype=torch.uint8)
        out = torch.zeros((2, mine.numel()), dtype=torch.uint8)
        with pytest.raises(CommunicationError):
            transport.all_gather(out, mine, "the test", overlap=False).wait()
        assert not out[1 - rank].any()
        time.sleep(0.6)  # the other rank waits for an answer, and not for a lost connection

    raise_first(run_ranks(2, body))


def test_tags_differ_and_leave_room_for_the_programs_own() -> None:
    seen = set()
    for communicator in (0, 1, 1023):
        tags = Tags()
        tags.communicator = communicator
        for call in (0, 1, 2047):
            tags.begin(call)
            seen |= {tags.next() for _ in range(500)}
    assert len(seen) == 3 * 3 * 500
    assert min(seen) >= 1 << 30
    assert max(seen) < 1 << 31
