"""Pieces of any size: `sizes=` of reduce_scatter and all_gather, on every executor, and all-to-all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import N_GPUS, over_cuda, ranks, same_bits, tough

from flashcomm import Communicator, reference
from flashcomm.errors import CommunicationError, InputError
from flashcomm.ranks.launch import RankContext
from flashcomm.routing import policy
from flashcomm.routing.route import Machine, Message
from flashcomm.wire.format import WireFormat
from flashcomm.wire.split import Split

SIZES = [(3, 0, 5), (0, 0, 1), (7, 7, 6), (2, 2, 2), (0, 0, 0)]
RESTS = [(600,), (2, 130), (), (0,)]


def check(comm: Communicator, sizes: tuple[int, ...], rest: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compare both collectives with the reference. Collective."""
    world_size, rank = comm.world_size, comm.rank
    messages = [tough((sum(sizes), *rest), dtype, r) for r in range(world_size)]
    want = reference.reduce_scatter(messages, comm.format, sizes)[rank]
    assert same_bits(comm.reduce_scatter(messages[rank], sizes=sizes), want), (sizes, rest)
    parts = [tough((n, *rest), dtype, 9 + r) for r, n in enumerate(sizes)]
    want, out = reference.all_gather(parts, comm.format), torch.empty((sum(sizes), *rest), dtype=dtype)
    assert comm.all_gather(parts[rank], out, sizes=sizes) is out
    assert same_bits(out, want), (sizes, rest)


@pytest.mark.contract(2)
@pytest.mark.parametrize(("fmt", "chunk_bytes"), [("int4/int8", 1 << 20), ("none", 300)])
@ranks(3)
def test_pieces_equal_the_reference(group: dist.ProcessGroup, rank: int, fmt: str, chunk_bytes: int) -> None:
    with Communicator(group, fmt, chunk_bytes=chunk_bytes) as comm:
        for sizes in SIZES:
            for rest in RESTS:
                check(comm, sizes, rest, torch.bfloat16)
        assert comm.transport.n_bytes_sent <= sum(comm.sent.values()) + 16 * 60 * 40, "paddings aside"


def test_the_reference_of_pieces_is_that_of_each_piece() -> None:
    fmt, messages = WireFormat.parse("int4-had"), [tough((8, 96), torch.float32, r) for r in range(3)]
    first, second, third = reference.reduce_scatter(messages, fmt, (3, 0, 5))
    assert same_bits(first, reference.one_shot([m[:3] for m in messages], fmt))
    assert second.shape == (0, 96)
    assert same_bits(third, reference.one_shot([m[3:] for m in messages], fmt))
    even = reference.reduce_scatter([m[:6] for m in messages], fmt)
    assert all(map(same_bits, even, reference.reduce_scatter([m[:6] for m in messages], fmt, (2, 2, 2))))


@pytest.mark.thorough
@pytest.mark.contract(2)
@ranks(2)
def test_kernels_take_padded_pieces(ctx: RankContext) -> None:
    """Over shared memory, or the GPUs there are."""
    pytest.importorskip("triton")
    shared = {"transport": "cpu_shared", "workspace_bytes": 4 << 20}
    with over_cuda("int4/int8") if N_GPUS else Communicator(None, "int4/int8", **shared) as comm:  # type: ignore[arg-type]
        sizes = (3, 2)
        messages = [tough((5, 128), torch.bfloat16, r) for r in range(2)]
        got = comm.reduce_scatter(messages[ctx.rank].to(ctx.device), sizes=sizes)
        assert same_bits(got.cpu(), reference.reduce_scatter(messages, comm.format, sizes)[ctx.rank])
        parts = [message[:n] for message, n in zip(messages, sizes, strict=True)]
        got = comm.all_gather(parts[ctx.rank].to(ctx.device), sizes=sizes)
        assert same_bits(got.cpu(), reference.all_gather(parts, comm.format))
        assert dict(comm.calls) == {"reduce_scatter/kernel": 1, "all_gather/kernel": 1}


def test_routes_of_pieces() -> None:
    fmt, machine = WireFormat.parse("int4/int8"), Machine("symmetric")

    def route(op: str, sizes: tuple[int, ...], rest: tuple[int, ...] = (128,)) -> tuple[str, str]:
        rows = sizes[0] if op == "all_gather" else sum(sizes)
        message = Message.of(op, (rows, *rest), torch.bfloat16, (len(sizes), "cuda", 0), split=Split(sizes))
        choice = policy.choose(message, fmt, machine=machine)
        return choice.route.executor.value, str(choice)

    executor, text = route("all_gather", (3, 2, 4))
    assert executor == "kernel"
    assert "pieces of 2 to 4 rows, padded to the largest" in text
    executor, text = route("reduce_scatter", (9, 0, 0))
    assert executor == "pipelined"
    assert "not symmetric: pieces of 0 to 9 rows: padded to the largest, they would be more than 2 times" in text
    assert route("all_gather", (3, 2, 4), ())[0] == "pipelined", "a vector's pieces are rows of different lengths"
    assert f"{9 * 64 + 48} bytes a rank" in route("reduce_scatter", (9, 0, 0))[1]
    assert f"{2 * (9 * 128 + 48 + 32)} bytes a rank" in route("all_gather", (9, 0, 0))[1]


BAD = [
    ((3, 0, 4), "must be 3 numbers of rows"),
    ((9, 0, -1), "must be 3 numbers of rows"),
    ((3, 5), "must be 3 numbers of rows"),
    ((3, 0, 5.0), "must be 3 numbers of rows"),
    (8, "must be 3 numbers of rows"),
    ((1, 2, 5), "with other settings or another format"),
]


@pytest.mark.contract(6)
@ranks(3)
def test_bad_sizes_on_one_rank_are_an_error_on_all(group: dist.ProcessGroup, rank: int) -> None:
    comm, x = Communicator(group, "none"), torch.ones(8, 64)
    for sizes, text in BAD:
        with pytest.raises(InputError, match=text):
            comm.reduce_scatter(x, sizes=sizes if rank == 1 else (3, 0, 5))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rank 1: all_gather number 1: sizes= must be 3 numbers"):
        comm.all_gather(x[: (3, 1, 5)[rank]], sizes=(3, 0, 5))
    with pytest.raises(InputError, match="out= must be"):
        comm.all_gather(x[: (3, 0, 5)[rank]], torch.empty(8 if rank else 9, 64), sizes=(3, 0, 5))
    with pytest.raises(InputError, match="explain: sizes= must be 3 numbers"):
        comm.explain((8, 64), torch.float32, op="reduce_scatter", sizes=(8,))
    assert (comm.reduce_scatter(x, sizes=(3, 0, 5)) == 3).all()
    alone = Communicator(group, "int4", check=False)
    with pytest.raises(InputError, match="reduce_scatter: got"):
        alone.reduce_scatter(x, sizes=(3, 0, 6))


def test_a_piece_of_2_gib_is_too_large() -> None:
    assert Split((1 << 20, 0)).fits(2, 2047)
    assert not Split((1 << 20, 0)).fits(2, 2048)


@pytest.mark.contract(8)
@ranks(3)
def test_a_rank_that_does_not_come_is_named(group: dist.ProcessGroup, rank: int) -> None:
    comm = Communicator(group, "int4", timeout_s=0.5, check=False)
    if rank != 1:
        with pytest.raises(CommunicationError, match=r"rank [012] did not answer|was lost"):
            comm.all_gather(torch.ones((3, 2, 1)[rank], 64), sizes=(3, 2, 1))


SPLITS = [  # for each rank the rows that it sends to each
    ((3, 0, 5), (1, 2, 0), (0, 7, 1)),
    ((0, 0, 0), (0, 0, 0), (4, 4, 0)),
    ((2, 2, 2), (2, 2, 2), (2, 2, 2)),
    ((0, 0, 0), (0, 0, 0), (0, 0, 0)),
]


@pytest.mark.contract(2)
@pytest.mark.parametrize(("fmt", "chunk_bytes"), [("int4/int8", 1 << 20), ("int5-g32-had", 400), ("none", 300)])
@ranks(3)
def test_all_to_all_equals_the_reference(group: dist.ProcessGroup, rank: int, fmt: str, chunk_bytes: int) -> None:
    with Communicator(group, fmt, chunk_bytes=chunk_bytes) as comm:
        for splits in SPLITS:
            sent, received = splits[rank], [s[rank] for s in splits]
            for rest in ((600,), (2, 130), (), (0,), (3,)):
                xs = [tough((sum(s), *rest), torch.bfloat16, r) for r, s in enumerate(splits)]
                route_format = comm.explain(xs[0].shape, torch.bfloat16, op="all_to_all_single").route.format
                want = reference.all_to_all_single(xs, route_format, splits)[rank]
                before = comm.transport.n_bytes_sent
                got = comm.all_to_all_single(xs[rank], received, sent)
                assert same_bits(got, want), (splits, rest)
                assert comm.transport.n_bytes_sent - before <= max(1.1 * xs[rank].nbytes, 48 * 3 * len(xs[rank]))
                out = torch.empty_like(want)
                assert comm.all_to_all_single(xs[rank], received, sent, out=out) is out
                assert same_bits(out, want)
        x = tough((6, 96), torch.float16, rank)
        even = reference.all_to_all_single([tough((6, 96), torch.float16, r) for r in range(3)], comm.format)
        assert same_bits(comm.all_to_all_single(x.t().contiguous().t()), even[rank])


def test_the_reference_of_all_to_all_keeps_what_stays() -> None:
    fmt, xs = WireFormat.parse("int8/int2"), [tough((4, 64), torch.float32, r) for r in range(2)]
    first, second = reference.all_to_all_single(xs, fmt, ((1, 3), (2, 2)))
    assert same_bits(first[:1], xs[0][:1])
    assert same_bits(first[1:], reference.all_gather([xs[1][:2], xs[1][:0]], fmt))
    assert not same_bits(first[1:], xs[1][:2])
    assert same_bits(second[3:], xs[1][2:])


@ranks(2)
def test_all_to_all_passes_on_other_dtypes(group: dist.ProcessGroup, rank: int) -> None:
    comm = Communicator(group, "int4")
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.float64, torch.float8_e4m3fn):
        xs = [(torch.arange(4 * 64).view(4, 64) * (r + 1) % 7).to(dtype) for r in range(2)]
        got = comm.all_to_all_single(xs[rank], [2, 2], [2, 2])
        assert got.dtype == dtype
        want = torch.cat([x.view(torch.uint8).view(4, -1)[2 * rank :][:2] for x in xs])
        assert torch.equal(got.view(torch.uint8).view(4, -1), want)
    route = comm.explain((4, 64), torch.int64, op="all_to_all_single").route
    assert (route.wire_bytes, str(route.format)) == (2 * 64 * 8, "none")
    assert comm.calls == {"all_to_all_single/pipelined": 5}


def test_routes_of_all_to_all() -> None:
    fmt, only = WireFormat.parse("int8/int4"), "the only algorithm of this collective"

    def text(shape: tuple[int, ...], sizes: tuple[int, ...] | None = None) -> str:
        split = None if sizes is None else Split(sizes)
        message = Message.of("all_to_all_single", shape, torch.bfloat16, (2, "cuda", 0), split=split)
        return str(policy.choose(message, fmt, machine=Machine("symmetric")))

    assert text((4, 128)) == "all_to_all_single as int8/int4 over symmetric: 144 bytes a rank; " + only
    assert "over process_group: 144 bytes a rank; " + only in text((4, 128), (2, 2)), "peers may send other sizes"
    assert f"{3 * 64 + 16} bytes a rank" in text((4, 128), (1, 3)), "if it keeps the smaller piece"
    assert "not symmetric: its kernel takes equal pieces, without split sizes" in text((4, 128), (1, 3))
    assert "not symmetric: rows of 96 values are not a multiple of 64" in text((4, 96))
    assert "as none over process_group: 400 bytes a rank; int4 would not send fewer" in text((400,))
    assert "copy: 0 bytes a rank; no values" in text((0, 128))


@pytest.mark.contract(6)
@ranks(3)
def test_bad_splits_on_one_rank_are_an_error_on_all(group: dist.ProcessGroup, rank: int) -> None:
    comm, x, ones = Communicator(group, "none"), torch.ones(3, 64), [1, 1, 1]
    bad = [([1, 1], ones), (ones, [1, 1, 2]), ([1, -1, 3], ones), ([0, 2, 1], [2, 0, 1]), (None, ones), (ones, "abc")]
    bad += [(np.array(ones), np.array(ones))]
    for received, sent in bad:
        with pytest.raises(InputError, match=r"rank 1: .*input_split_sizes and output_split_sizes must each be 3"):
            comm.all_to_all_single(x, *((received, sent) if rank == 1 else (ones, ones)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rank 0 sends 1 rows to rank 1, which expects 2"):
        comm.all_to_all_single(x, [2, 1, 1] if rank == 1 else ones, ones)
    with pytest.raises(InputError, match=r"rank 1: .* of \(rows, 32\) float32"):
        comm.all_to_all_single(x.view(6, 32) if rank == 1 else x, *([[2] * 3] * 2 if rank == 1 else [ones] * 2))
    with pytest.raises(InputError, match=r"rank 1: .* of \(rows, 64\) int32"):
        comm.all_to_all_single(x.int() if rank == 1 else x)
    with pytest.raises(InputError, match=r"rank 1: .*input_split_sizes"):
        comm.all_to_all_single(x if rank != 1 else x[:2])
    with pytest.raises(InputError, match="out= must be"):
        comm.all_to_all_single(x, out=torch.empty(4 if rank == 1 else 3, 64))
    assert comm.all_to_all_single(x * rank)[:, 0].tolist() == [0, 1, 2]
