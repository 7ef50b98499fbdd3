"""Point 6 of the contract: an error is raised on all ranks or on none, and the group goes on afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support import errors_of, exact_in_int4, ranks, run_ranks

from flashcomm import Communicator
from flashcomm.errors import FormatError, InputError, SettingsError

pytestmark = pytest.mark.contract(6)


def test_a_format_that_does_not_exist_on_one_rank_is_an_error_on_all() -> None:
    messages = errors_of(run_ranks(3, lambda g, r: Communicator(g, "int9" if r == 1 else "int4")), FormatError)
    assert len(messages) == 1
    assert "rank 1: 9 bits asked for, 2 to 8 are allowed" in messages.pop()


@pytest.mark.parametrize("algorithm", ["auto", "two_shot"])
@ranks(3)
def test_shapes_that_differ_are_an_error_on_all_ranks(group: dist.ProcessGroup, rank: int, algorithm: str) -> None:
    """This includes sizes on both sides of min_bytes, where only one rank would quantize."""
    comm = Communicator(group, "int4", algorithm=algorithm)
    with pytest.raises(InputError) as caught:
        comm.all_reduce(torch.ones(200 if rank != 1 else 400, 576))
    assert "rank 1: all_reduce number 1 of (400, 576) float32" in str(caught.value)
    assert "rank 2: all_reduce number 1 of (200, 576) float32" in str(caught.value)
    assert torch.equal(comm.all_reduce(rank * exact_in_int4(100, 576)), 3 * exact_in_int4(100, 576))


@ranks(2)
def test_making_a_communicator_while_a_peer_calls_is_an_error_on_both(group: dist.ProcessGroup, rank: int) -> None:
    comm = Communicator(group, "int4")
    with pytest.raises(InputError, match="rank 1: creating a Communicator"):
        Communicator(group, "int8") if rank else comm.all_reduce(torch.ones(4))


def test_a_device_that_one_rank_cannot_have_is_an_error_on_all() -> None:
    results = run_ranks(2, lambda g, r: Communicator(g, "int4", device="tpu" if r else None))
    assert errors_of(results, SettingsError) == {"rank 1: device='tpu': allowed are 'cpu' and 'cuda'"}


@ranks(2)
def test_dtypes_and_calls_that_differ_are_errors_on_all_ranks(group: dist.ProcessGroup, rank: int) -> None:
    comm = Communicator(group, "int4")
    with pytest.raises(InputError, match="did not make the same valid call"):
        comm.all_reduce(torch.ones(4, dtype=torch.float16 if rank else torch.float32))
    with pytest.raises(InputError, match="rank 0: all_gather number 1"):
        (comm.all_reduce if rank else comm.all_gather)(torch.ones(4))


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        (torch.ones(4, dtype=torch.int32), "the dtype must be one of bfloat16, float16, float32"),
        (torch.ones(4, dtype=torch.float64), "the dtype must be one of bfloat16, float16, float32"),
        (torch.ones(4, device="meta"), "the tensor must be on cpu"),
        (torch.ones(4).to_sparse(), "the tensor must be dense"),
        (torch.ones(4, requires_grad=True), "flashcomm is for inference"),
        (torch.ones((1,) * 9), "at most 8 dimensions"),
        ([1.0, 2.0], "x must be a torch.Tensor"),
    ],
    ids=["int32", "float64", "meta", "sparse", "grad", "dims", "list"],
)
@pytest.mark.parametrize("check", [True, False])
@ranks(2)
def test_a_bad_tensor_on_one_rank_is_an_error_on_all(
    group: dist.ProcessGroup, rank: int, bad: object, advice: str, check: bool
) -> None:
    """With check=False only that rank raises the error, so all ranks pass the bad tensor."""
    comm = Communicator(group, "int4", check=check)
    with pytest.raises(InputError, match=advice):
        comm.all_reduce(bad if rank == 0 or not check else torch.ones(4))  # type: ignore[arg-type]
    assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4


@ranks(2)
def test_a_bad_out_on_one_rank_is_an_error_on_all(group: dist.ProcessGroup, rank: int) -> None:
    comm, x = Communicator(group, "int4"), torch.ones(4, 6)
    for bad in (torch.ones(6, 4), torch.ones(4, 6).half(), torch.ones(6, 4).t(), [0.0]):
        with pytest.raises(InputError, match="out= must be contiguous"):
            comm.all_reduce(x, out=bad if rank else x.clone())  # type: ignore[arg-type]
    assert (comm.all_reduce(x, out=torch.empty(4, 6)) == 2).all()
