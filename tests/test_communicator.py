"""A Communicator's life: what it refuses, counts and tells. What its calls promise is in contract/."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import exact_in_int4, raise_first, ranks, run_ranks, same_bits

from flashcomm import Communicator, FlashcommError, WireFormat, reference
from flashcomm.errors import ClosedError, CommunicationError, FormatError, InputError, SettingsError


@ranks(2)
def test_an_unknown_format_is_an_error_without_the_check_too(group: dist.ProcessGroup, rank: int) -> None:
    with pytest.raises(FormatError, match="9 bits asked for"):
        Communicator(group, "int4", check=False).all_reduce(exact_in_int4(64, 576), format="int9")


@ranks(3)
def test_reduce_scatter_needs_a_first_dimension_of_equal_shards(group: dist.ProcessGroup, rank: int) -> None:
    comm = Communicator(group, "int4")
    with pytest.raises(InputError, match="multiple of the world size 3"):
        comm.reduce_scatter(torch.ones(4, 2))
    with pytest.raises(InputError, match="dimension 0 must exist"):
        comm.all_gather(torch.tensor(1.0))


@ranks(2)
def test_a_closed_communicator_refuses_calls(group: dist.ProcessGroup, rank: int) -> None:
    with Communicator(group, "int4") as comm:
        assert repr(comm) == f"Communicator(rank {rank} of 2, int4, cpu)"
    comm.close()
    with pytest.raises(ClosedError, match="all_reduce on a closed Communicator: create a new one"):
        comm.all_reduce(torch.ones(3))


def test_a_communicator_needs_a_process_group_of_this_rank() -> None:
    with pytest.raises(SettingsError, match="init_process_group"):
        Communicator(None, "int4")
    with pytest.raises(SettingsError, match="a process group that this rank is a member of"):
        Communicator(dist.GroupMember.NON_GROUP_MEMBER, "int4")


def test_calls_are_counted_by_route_and_explain_foretells_their_bytes() -> None:
    def body(group: dist.ProcessGroup, rank: int) -> tuple[dict[str, int], int, int]:
        comm = Communicator(group, "int4", min_bytes=1000)
        x = torch.ones(8, 1152, dtype=torch.bfloat16)
        for _ in range(3):
            comm.all_reduce(x)
        sent = comm.transport.n_bytes_sent
        comm.all_reduce(x[:1, :100].contiguous())
        return dict(comm.calls), sent, comm.explain(x.shape, x.dtype).route.wire_bytes

    for calls, sent, planned in raise_first(run_ranks(3, body)):
        assert calls == {"all_reduce/one_shot": 3, "all_reduce/backend": 1}
        assert sent == 3 * planned == 3 * 2 * (8 * 576 + 8 * 18 * 2)


def test_sent_is_what_went_over_the_transport(caplog: pytest.LogCaptureFixture) -> None:
    """What `sent` says is what went over the transport, for each collective."""

    def body(group: dist.ProcessGroup, rank: int) -> dict[str, int]:
        comm = Communicator(group, "int4/int8", algorithm="two_shot", debug="info")
        x, before = torch.ones(9, 576, dtype=torch.bfloat16), 0
        for call in (comm.all_reduce, comm.reduce_scatter, comm.all_gather):
            for _ in range(10):
                call(x)
            sent = comm.transport.n_bytes_sent - before
            assert sent == sum(comm.sent[key] for key in comm.sent if key.startswith(call.__name__)) > 0
            before += sent
        comm.all_reduce(torch.empty(0))
        return dict(comm.sent)

    for sent in raise_first(run_ranks(3, body)):
        assert set(sent) == {"all_reduce/two_shot", "reduce_scatter/pipelined", "all_gather/pipelined"}
    told = [record.getMessage() for record in caplog.records]
    of_rank_0 = [text for text in told if text.startswith("Communicator(rank 0 of 3, int4/int8, cpu): ")]
    assert len(of_rank_0) == 6
    n_bytes = sent["all_reduce/two_shot"] // 10
    assert of_rank_0[0].endswith(f"first all_reduce goes two_shot, shape (9, 576) torch.bfloat16, {n_bytes} bytes sent")
    assert of_rank_0[1].endswith(f"10 calls of all_reduce/two_shot, {10 * n_bytes} bytes sent")


def test_all_errors_have_one_base() -> None:
    for kind in (SettingsError, FormatError, InputError, CommunicationError, ClosedError):
        assert issubclass(kind, FlashcommError)


def test_the_algorithm_that_was_asked_for_decides_the_result() -> None:
    """One-shot rounds once, two-shot twice."""
    tensors = [torch.randn(4, 576) for _ in range(2)]
    fmt = WireFormat.parse("int3")

    def body(group: dist.ProcessGroup, rank: int) -> list[torch.Tensor]:
        return [
            Communicator(group, "int3", algorithm=a).all_reduce(tensors[rank])
            for a in ("one_shot", "two_shot", "backend")
        ]

    one, two, backend = raise_first(run_ranks(2, body))[0]
    assert same_bits(one, reference.one_shot(tensors, fmt))
    assert same_bits(two, reference.two_shot(tensors, fmt))
    assert not torch.equal(one, two)
    assert torch.equal(backend, tensors[0] + tensors[1])
