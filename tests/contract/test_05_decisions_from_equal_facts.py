"""Point 5 of the contract: decisions depend only on values that are equal on every rank.

Ranks compare their settings when they create a Communicator. Each checked call also compares a digest of them.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import errors_of, exact_in_int4, ranks, run_ranks, same_bits, tough

from flashcomm import Communicator, WireFormat, reference
from flashcomm.errors import InputError, SettingsError

pytestmark = pytest.mark.contract(5)


def test_formats_that_differ_are_an_error_on_all_ranks() -> None:
    messages = errors_of(run_ranks(3, lambda g, r: Communicator(g, "int4" if r else "int5")), SettingsError)
    assert len(messages) == 1
    assert "fmt: rank 0 'int5', rank 1 'int4', rank 2 'int4'" in messages.pop()


@pytest.mark.parametrize("theirs", ["int9", "int6"])
@ranks(2)
def test_formats_of_one_call_that_differ_are_an_error_and_the_group_goes_on(
    group: dist.ProcessGroup, rank: int, theirs: str
) -> None:
    """One rank has an unknown format, or a format that differs from the others'."""
    x = exact_in_int4(64, 576)
    comm = Communicator(group, "int4", min_bytes=0)
    with pytest.raises(InputError, match="did not make the same valid call"):
        comm.all_reduce(x, format=theirs if rank else "int4")
    want = reference.one_shot([0 * x, x], WireFormat.parse("int8"))
    assert torch.equal(comm.all_reduce(rank * x, format="int8"), want)


@ranks(2)
def test_calls_of_two_communicators_in_different_order_are_told_apart(group: dist.ProcessGroup, rank: int) -> None:
    """Messages of the two may have equal sizes but different formats. The comparison of settings finds that."""
    comms = [Communicator(group, fmt) for fmt in ("int4-g32", "int4-g16-had")]
    x = exact_in_int4(64, 1152)
    with pytest.raises(InputError, match="did not make the same valid call"):
        comms[rank].all_reduce(x)
    assert torch.equal(comms[0].all_reduce(x), 2 * x)


@pytest.mark.parametrize("strided", [{0, 1}, {1}], ids=["on both ranks", "on one rank"])
@ranks(2)
def test_strides_decide_nothing(group: dist.ProcessGroup, rank: int, strided: set[int]) -> None:
    """Strides may differ between ranks. The result is the same and contiguous, and the input is not modified."""
    inputs = [tough((576, 6), torch.bfloat16, r).t() for r in range(2)]
    x = inputs[rank] if rank in strided else inputs[rank].contiguous()
    kept = x.clone()
    with Communicator(group, "int4", algorithm="one_shot") as comm:
        got = comm.all_reduce(x)
    assert same_bits(got, reference.one_shot([t.contiguous() for t in inputs], WireFormat.parse("int4")))
    assert got.is_contiguous()
    assert same_bits(x, kept)
