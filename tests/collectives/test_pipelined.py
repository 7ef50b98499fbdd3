"""Collectives over real gloo, ranks as threads: equal to the reference bit for bit, the same bits on every rank."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from support import gloo_group, raise_first, run_ranks, same_bits, tough

from flashcomm import Communicator, WireFormat, reference
from flashcomm.transports.process_group import ProcessGroupTransport
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat

SHAPES = [(5, 600), (2, 3, 640), (1, 2880), (7,), (), (3, 1), (0, 64), (4, 0), (1, 1)]


def all_reduce_everywhere(
    world_size: int, fmt: str, algorithm: str, tensors: list[list[torch.Tensor]], **settings: object
) -> list[list[torch.Tensor]]:
    """Per rank its results for each list of per-rank tensors, all through one Communicator."""

    def body(group: object, rank: int) -> list[torch.Tensor]:
        with Communicator(group, fmt, algorithm=algorithm, **settings) as comm:  # type: ignore[arg-type]
            return [comm.all_reduce(per_rank[rank]) for per_rank in tensors]

    return raise_first(run_ranks(world_size, body))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_all_reduce_equals_the_reference(world_size: int, algorithm: str) -> None:
    formats = ("int4", torch.bfloat16), ("int5-g32/int8", torch.float16), ("bf16", torch.float32)
    for fmt, dtype in (*formats, ("int4-had/int6-had", torch.bfloat16), ("int3-g32-had/int8-had", torch.float32)):
        tensors = [[tough(shape, dtype, 10 * s + r) for r in range(world_size)] for s, shape in enumerate(SHAPES)]
        results = all_reduce_everywhere(world_size, fmt, algorithm, tensors, chunk_bytes=2000)
        for i, per_rank in enumerate(tensors):
            want = getattr(reference, algorithm)(per_rank, WireFormat.parse(fmt))
            for rank in range(world_size):
                assert same_bits(results[rank][i], want), (fmt, per_rank[0].shape, rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_reduce_scatter_and_all_gather_equal_the_reference(world_size: int) -> None:
    fmt = "int4/int8"
    shapes = [(2, 576), (1, 7), (3,), (2, 0), (4, 3, 130)]
    for s, shape in enumerate(shapes):
        whole = [tough((shape[0] * world_size, *shape[1:]), torch.bfloat16, 10 * s + r) for r in range(world_size)]
        parts = [tough(shape, torch.bfloat16, 99 * s + r) for r in range(world_size)]

        def body(
            group: object, rank: int, whole: list[torch.Tensor] = whole, parts: list[torch.Tensor] = parts
        ) -> tuple[torch.Tensor, torch.Tensor]:
            with Communicator(group, fmt, chunk_bytes=500) as comm:  # type: ignore[arg-type]
                return comm.reduce_scatter(whole[rank]), comm.all_gather(parts[rank])

        results = raise_first(run_ranks(world_size, body))
        scattered = reference.reduce_scatter(whole, WireFormat.parse(fmt))
        gathered = reference.all_gather(parts, WireFormat.parse(fmt))
        for rank in range(world_size):
            assert same_bits(results[rank][0], scattered[rank])
            assert same_bits(results[rank][1], gathered)


def test_how_a_message_is_cut_does_not_matter() -> None:
    """Chunks of any size, one or three ranks' shards: the same bits."""
    tensors = [[tough((9, 1000), torch.bfloat16, r) for r in range(3)]]
    want = reference.two_shot(tensors[0], WireFormat.parse("int4"))
    for chunk_bytes in (1, 300, 2000, 5001, 1 << 30):
        for result in all_reduce_everywhere(3, "int4", "two_shot", tensors, chunk_bytes=chunk_bytes):
            assert same_bits(result[0], want)


def test_a_row_does_not_depend_on_its_batch() -> None:
    batch = [tough((8, 576), torch.bfloat16, r) for r in range(3)]
    alone = [x[5:6].clone() for x in batch]
    for algorithm in ("one_shot", "two_shot"):
        whole, row = all_reduce_everywhere(3, "int4", algorithm, [batch, alone])[0]
        assert same_bits(whole[5:6], row)


def test_a_group_never_reaches_into_the_next_row() -> None:
    x = torch.zeros(2, 600)
    x[1] = 1000.0  # a neighbor that would ruin the scale
    x[0, 576:] = 0.001
    got = all_reduce_everywhere(2, "int4", "one_shot", [[x, x]])[0][0]
    assert torch.allclose(got[0, 576:], torch.tensor(0.002), rtol=1 / 30)  # half a step


def rounded(x: float) -> float:
    """To float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def by_hand(values: list[float], bits: int, part: float | None) -> list[float]:
    """A group of values or of transforms, coded and decoded: docs/wire-format.md in plain numbers."""
    cut, levels = 1 << (15 + bits if bits <= 5 else 16), 2**bits - 1

    def coded(low: float, high: float) -> tuple[float, list[float]]:
        needed = max(rounded(rounded(high - low) / levels), 2.0**-110)
        bits_of_scale = -(-struct.unpack("<I", struct.pack("<f", needed))[0] // cut) * cut
        scale = struct.unpack("<f", struct.pack("<I", bits_of_scale))[0]
        inverse = rounded(1 / scale)
        zero = -round(rounded(low * inverse))
        codes = [min(max(round(rounded(v * inverse)) + zero, 0), levels) for v in values]
        return inverse, [scale * (code - zero) for code in codes]

    low, high = min(*values, 0.0), max(*values, 0.0)
    inverse, whole = coded(low, high)
    if part is None:
        return whole

    def error(decoded: list[float]) -> int:
        errors = (rounded(rounded(v - d) * inverse) for v, d in zip(values, decoded, strict=True))
        return sum(round(16 * e) ** 2 for e in errors)

    smaller = coded(rounded(low * part), rounded(high * part))[1]
    return smaller if error(smaller) < error(whole) else whole


def transform(values: list[float]) -> list[float]:
    y, h = list(values), 1
    while h < len(y):
        y = [rounded(y[i ^ h] - y[i]) if i & h else rounded(y[i] + y[i ^ h]) for i in range(len(y))]
        h *= 2
    return y


@pytest.mark.parametrize(
    ("fmt", "bits", "turned", "parts"),
    [
        ("int4-g16/int8-g16", (4, 8), False, (None, None)),
        ("int6-g16-had/int8-g16-had", (6, 8), True, (None, None)),
        ("int4-g16-had/int3-g16-had", (4, 3), True, (29 / 32, 13 / 16)),
        ("int5-g16-had", (5, 5), True, (None, None)),
    ],
)
def test_the_reference_is_what_the_method_says(
    fmt: str, bits: tuple[int, int], turned: bool, parts: tuple[float | None, float | None]
) -> None:
    """Plain loops over values and ranks, sharing no code with the codec: the definition once more, by hand.

    What is summed and coded again are transforms, and there is one way back, at the end. Rows end in a group of 8,
    which is transformed, or of 7, which is not.
    """
    for row in (40, 39):
        tensors = [torch.randn(1, row) * (r + 1) for r in range(3)]
        want: list[float] = []
        for begin in range(0, row, 16):
            groups = [t[0, begin : begin + 16].tolist() for t in tensors]
            n = len(groups[0])
            turns = turned and n != 7
            total = [0.0] * n
            for group in groups:
                coded = by_hand(transform(group) if turns else group, bits[0], parts[0] if turns else None)
                total = [rounded(t + v) for t, v in zip(total, coded, strict=True)]
            coded = by_hand(total, bits[1], parts[1] if turns else None)
            want += [v / n for v in transform(coded)] if turns else coded
        assert reference.two_shot(tensors, WireFormat.parse(fmt))[0].tolist() == want


@pytest.mark.parametrize("fmt", ["int4-had", "int6-g32-had/int8-g32-had"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_shot_has_no_transform_between_its_steps(fmt: str, dtype: torch.dtype) -> None:
    """Step by step: decoded rotated, the sum is coded rotated; the last decoder turns it back."""
    parsed, tensors = WireFormat.parse(fmt), [tough((6, 600), dtype, r) for r in range(3)]
    in_hadamard_domain = [replace(step, in_hadamard_domain=True) for step in (parsed.reduce, parsed.gather)]
    n = tensors[0].numel()

    def encoded(x: torch.Tensor, step: StepFormat) -> torch.Tensor:
        layout = Layout(step, 600, dtype.itemsize)
        wire = torch.empty(layout.nbytes(0, n), dtype=torch.uint8)
        torch_codec.encode(x.view(-1), layout, 0, n, wire)
        return wire

    wires, total = torch.stack([encoded(t, parsed.reduce) for t in tensors]), torch.empty(n)
    torch_codec.decode_sum(wires, Layout(in_hadamard_domain[0], 600, dtype.itemsize), 0, n, total, dtype)
    again, want = encoded(total, in_hadamard_domain[1]), torch.empty(n, dtype=dtype)
    torch_codec.decode_sum(again[None], Layout(parsed.gather, 600, dtype.itemsize), 0, n, want, dtype)
    assert same_bits(reference.two_shot(tensors, parsed).view(-1), want)
    group = parsed.reduce.group
    turned_back = torch_codec.hadamard(total.view(6, 600)[:, :576].reshape(-1, group)).view(6, 576) / group
    assert same_bits(turned_back, reference.quantized_sum(tensors, parsed.reduce).view(6, 600)[:, :576].contiguous())


def test_error_of_two_steps_is_within_the_sum_of_bounds() -> None:
    """Contract 4: half a step for every rank, half a step for the second pass, one rounding to the dtype."""
    fmt = WireFormat.parse("int4/int6")
    tensors = [tough((6, 576), torch.float32, r) for r in range(4)]
    layout = Layout(fmt.reduce, 576, 4)
    limit = sum(torch_codec.error_bound(t.view(-1), layout, 0, t.numel()) for t in tensors)
    first = reference.one_shot(tensors, fmt)
    limit = limit + torch_codec.error_bound(first.view(-1), Layout(fmt.gather, 576, 4), 0, first.numel())
    exact = torch.stack([t.double() for t in tensors]).sum(0)
    error = (reference.two_shot(tensors, fmt).double() - exact).abs().view(-1)
    rounding = torch.stack([t.double().abs() for t in tensors]).sum(0).view(-1) * 4 * 2**-23
    assert (error <= limit.double() + rounding).all()
    assert (error / limit).max() > 0.7


def test_input_is_not_touched_and_strides_do_not_matter() -> None:
    base = [tough((576, 6), torch.bfloat16, r) for r in range(2)]
    views = [x.t() for x in base]
    kept = [x.clone() for x in base]
    want = reference.one_shot([v.contiguous() for v in views], WireFormat.parse("int4"))
    for result in all_reduce_everywhere(2, "int4", "one_shot", [views]):
        assert same_bits(result[0], want)
        assert result[0].is_contiguous()
    assert all(same_bits(x, k) for x, k in zip(base, kept, strict=True))


def test_inference_mode_and_its_absence_on_one_workspace() -> None:
    tensors = [tough((40, 576), torch.bfloat16, r) for r in range(2)]
    want = reference.two_shot(tensors, WireFormat.parse("int4"))

    def body(group: object, rank: int) -> None:
        with Communicator(group, "int4", algorithm="two_shot") as comm:  # type: ignore[arg-type]
            for inference in (True, False, True):
                with torch.inference_mode(inference):
                    assert same_bits(comm.all_reduce(tensors[rank].clone()), want)

    raise_first(run_ranks(2, body))


@pytest.mark.parametrize("algorithm", ["backend", "one_shot", "two_shot"])
def test_out_may_be_the_input(algorithm: str) -> None:
    tensors = [tough((5, 1152), torch.float32, r) for r in range(3)]

    def body(group: object, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Communicator(group, "int4", algorithm=algorithm, chunk_bytes=1000) as comm:  # type: ignore[arg-type]
            want = comm.all_reduce(tensors[rank])
            x = tensors[rank].clone()
            assert comm.all_reduce(x, out=x) is x
            return x, want

    for x, want in raise_first(run_ranks(3, body)):
        assert same_bits(x, want)


def test_the_way_over_the_cpu_that_gpu_tensors_take_without_nccl() -> None:
    """The way itself; here the tensors are on the CPU already."""

    def body(group: object, rank: int) -> tuple[list[int], list[int], list[int], int]:
        outer, inner = (ProcessGroupTransport(group, torch.device("cpu"), 30) for _ in range(2))  # type: ignore[arg-type]
        outer._by_cpu = inner
        mine = (torch.arange(6, dtype=torch.uint8) + 10 * rank).view(3, 2)
        exchanged, gathered, total = torch.zeros_like(mine), torch.zeros_like(mine), torch.ones(2) * rank
        outer.all_to_all(exchanged, mine, "exchange").wait()
        outer.all_gather(gathered, mine[0], "gather").wait()
        outer.all_reduce_native(total, "sum").wait()
        outer.close()
        if rank != 1:
            pair = ProcessGroupTransport(group, torch.device("cpu"), 30, [0, 2])  # type: ignore[arg-type]
            pair._by_cpu, of_two = pair.among([0, 2]), torch.zeros(2, 2, dtype=torch.uint8)
            pair.all_gather(of_two, mine[1], "gather of two").wait()
            assert of_two.tolist() == [[2, 3], [22, 23]]
        return exchanged.flatten().tolist(), gathered.flatten().tolist(), total.tolist(), outer.n_bytes_sent

    for rank, got in enumerate(raise_first(run_ranks(3, body))):
        exchanged = [10 * r + 2 * rank + i for r in range(3) for i in range(2)]
        assert got == (exchanged, [0, 1, 10, 11, 20, 21], [3.0, 3.0], 4 + 4 + 10)


def test_sub_groups_of_a_larger_world() -> None:
    """Four ranks, of which {0, 1, 3} and {2} are groups: each sums its own."""
    import torch.distributed as dist

    store = dist.HashStore()
    tensors = [tough((4, 576), torch.bfloat16, r) for r in range(4)]
    members = {0: [0, 1, 3], 1: [0, 1, 3], 2: [2], 3: [0, 1, 3]}

    def body(_: object, rank: int) -> torch.Tensor:
        mine = members[rank]
        group = gloo_group(dist.PrefixStore(str(mine), store), mine.index(rank), len(mine))
        return Communicator(group, "int4", min_bytes=0).all_reduce(tensors[rank])

    results = raise_first(run_ranks(4, body))
    fmt = WireFormat.parse("int4")
    three = [tensors[r] for r in (0, 1, 3)]
    assert all(same_bits(results[r], reference.one_shot(three, fmt)) for r in (0, 1, 3))
    assert same_bits(results[2], tensors[2])


def test_alternating_shapes_back_to_back() -> None:
    """Two hundred calls whose shapes change call by call, on one workspace."""
    shapes = [(1, 576), (33, 576), (2, 64), (17, 130), (1, 1), (8, 2880)]
    tensors = [
        [[tough(s, torch.bfloat16, 7 * i + r + k) for r in range(2)] for i, s in enumerate(shapes)] for k in range(2)
    ]
    fmt = WireFormat.parse("int4")
    want = [[reference.two_shot(per_rank, fmt) for per_rank in group] for group in tensors]

    def body(group: object, rank: int) -> int:
        with Communicator(group, "int4", algorithm="two_shot", check=False, chunk_bytes=3000) as comm:  # type: ignore[arg-type]
            for call in range(200):
                k, i = call // 6 % 2, call % 6
                assert same_bits(comm.all_reduce(tensors[k][i][rank]), want[k][i]), call
        return 1

    assert raise_first(run_ranks(2, body)) == [1, 1]
