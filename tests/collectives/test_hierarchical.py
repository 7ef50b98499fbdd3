"""All-reduce over nodes: what it returns and sends, over gloo and through host memory, and who is in which node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import N_GPUS, raise_first, run_ranks, same_bits, tough
from test_pipelined import by_hand, rounded, transform

from flashcomm import Communicator, WireFormat, reference
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.collectives import hierarchical
from flashcomm.errors import InputError, SettingsError, UnavailableError
from flashcomm.ranks.launch import RankContext, run
from flashcomm.routing import policy
from flashcomm.routing.route import Executor, Machine, Message
from flashcomm.settings import Settings
from flashcomm.setup import discovery
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT4 = WireFormat.parse("int4")
SHAPES: list[tuple[int, ...]] = [(5, 600), (2, 3, 640), (7,), (), (3, 1), (0, 64), (1, 1), (12, 512)]


def make(group: Any, fmt: str, local_world_size: int | None, **more: Any) -> Communicator:
    return Communicator(group, fmt, algorithm="hierarchical", local_world_size=local_world_size, min_bytes=0, **more)


@pytest.mark.parametrize(("world_size", "local_world_size"), [(4, 2), (6, 3), (6, 2), (8, 4)])
def test_ranks_give_the_bits_of_the_reference(world_size: int, local_world_size: int) -> None:
    """Chunks of a few rows, shards that some ranks have nothing of, all pairs of kinds of steps; bytes as foretold."""
    formats = ("int4", BF16), ("int8-g32/int5", FP32), ("bf16/int4", FP16), ("int6-had/int7-had", BF16)
    for fmt, dtype in (*formats, ("int4-had/bf16", BF16), ("bf16", FP32)):
        tensors = [[tough(shape, dtype, 10 * s + r) for r in range(world_size)] for s, shape in enumerate(SHAPES)]

        def body(group: object, rank: int, fmt: str = fmt, tensors: Any = tensors) -> list[torch.Tensor]:
            with make(group, fmt, local_world_size, chunk_bytes=2000) as comm:
                return [comm.all_reduce(per_rank[rank]) for per_rank in tensors]

        results = raise_first(run_ranks(world_size, body))
        for i, per_rank in enumerate(tensors):
            want = reference.hierarchical(per_rank, WireFormat.parse(fmt), local_world_size)
            for rank in range(world_size):
                assert same_bits(results[rank][i], want), (fmt, per_rank[0].shape, rank)


def test_it_sends_what_explain_says() -> None:
    def body(group: object, rank: int) -> tuple[int, int, str]:
        with make(group, "int4/int8", 3) as comm:
            comm.all_reduce(torch.ones(6, 512, dtype=BF16))  # two rows a shard: no rank has more than another
            return comm.transport.n_bytes_sent, sum(comm.sent.values()), str(comm.explain((6, 512), BF16))

    int4, int8 = 16 * (32 + 2), 16 * (64 + 3)  # a shard has 16 groups of 64: codes, then scale and zero
    for sent, counted, told in raise_first(run_ranks(6, body)):
        assert sent == counted == 2 * int4 + int4 + 2 * int8
        assert f"hierarchical as int4/int8 over process_group: {sent} bytes a rank" in told


@pytest.mark.parametrize(
    ("fmt", "bits", "turned"), [("int4-g16/int8-g16", (4, 8), False), ("int5-g16-had", (5, 5), True)]
)
def test_the_reference_is_what_the_method_says(fmt: str, bits: tuple[int, int], turned: bool) -> None:
    """Plain loops over nodes and ranks: values, nodes' sums and the sum are coded; the one way back is at the end."""
    tensors = [torch.randn(1, 39) * (r + 1) for r in range(6)]
    want: list[float] = []
    for begin in range(0, 39, 16):
        groups = [t[0, begin : begin + 16].tolist() for t in tensors]
        n = len(groups[0])
        turns = turned and n != 7

        def summed(parts: list[list[float]], n: int = n) -> list[float]:
            total = [0.0] * n
            for part in parts:
                coded = by_hand(part, bits[0], None)
                total = [rounded(t + v) for t, v in zip(total, coded, strict=True)]
            return total

        sent = [transform(group) if turns else group for group in groups]
        nodes = [summed(sent[i : i + 2]) for i in range(0, 6, 2)]
        coded = by_hand(summed(nodes), bits[1], None)
        want += [v / n for v in transform(coded)] if turns else coded
    assert reference.hierarchical(tensors, WireFormat.parse(fmt), 2)[0].tolist() == want


def test_the_error_is_within_the_sum_of_bounds() -> None:
    """Half a step for every rank, for every node's sum and for the sum, one rounding to the dtype."""
    tensors = [tough((6, 576), FP32, r) for r in range(4)]
    layout = Layout(INT4.reduce, 576, 4)

    def bound(x: torch.Tensor) -> torch.Tensor:
        return torch_codec.error_bound(x.reshape(-1), layout, 0, x.numel()).double()

    nodes = [reference.one_shot(tensors[i : i + 2], INT4) for i in (0, 2)]
    limit = sum(bound(t) for t in (*tensors, *nodes)) + bound(reference.one_shot(nodes, INT4))
    exact = torch.stack([t.double() for t in tensors]).sum(0)
    error = (reference.hierarchical(tensors, INT4, 2).double() - exact).abs().view(-1)
    rounding = torch.stack([t.double().abs() for t in tensors]).sum(0).view(-1) * 6 * 2**-23
    assert (error <= limit + rounding).all()
    assert (error / limit).max() > 0.5


def test_nodes_that_gain_nothing() -> None:
    """One node, nodes of one rank, and so many that less crosses in two-shot."""
    for world_size, local_world_size, way in (
        *((4, 4, "two_shot"), (4, 1, "two_shot"), (4, 0, "two_shot"), (8, 2, "two_shot")),
        *((4, 2, "hierarchical"), (6, 2, "hierarchical"), (8, 4, "hierarchical")),
    ):
        choice = policy.choose(Message(4096, 512, 2, world_size, "cpu", local_world_size), INT4, "hierarchical", 0)
        assert choice.route.algorithm == way, (world_size, local_world_size)
    for wrong in (0, 3):
        with pytest.raises(InputError, match="4 ranks do not make nodes of"):
            reference.hierarchical([torch.ones(8)] * 4, INT4, wrong)


def test_small_messages_go_to_the_backend() -> None:
    for numel, given, way in (
        (1 << 14, None, "backend"),
        (1 << 15, None, "hierarchical"),
        (1 << 14, 0, "hierarchical"),
    ):
        call = Message(numel, 512, 2, 4, "cpu", 2)
        assert policy.choose(call, INT4, "hierarchical", given).route.algorithm == way, numel
    told = str(policy.choose(Message(64, 64, 2, 4, "cpu", 2), INT4, "hierarchical", 1 << 20))
    assert "128 message bytes are fewer than min_bytes=1048576" in told


def test_a_closed_communicator_keeps_no_exchange() -> None:
    def body(group: object, rank: int) -> bool:
        comm = make(group, "int4", 2)
        had = comm._executors[Executor.PIPELINED].context.nodes is not None
        comm.close()
        return had and not comm._executors

    assert raise_first(run_ranks(4, body)) == [True] * 4


def test_what_crosses_and_what_does_not() -> None:
    """Of 8 ranks in 2 nodes: 3/4 of the message twice within the node, 1/4 once across."""
    call = Message(1 << 20, 4096, 2, 8, "cpu", 4)
    message = policy.wire_bytes("one_shot", call, INT4) // 7
    assert policy.wire_bytes("hierarchical", call, INT4) == message * (3 + 1 + 3) // 4
    assert policy.wire_bytes("two_shot", call, INT4) == message * (7 + 7) // 8
    told = str(policy.choose(call, INT4, "auto", 0, Machine(local_world_size=4)))
    crossing = f"{message // 4} bytes a rank to other nodes, two_shot {message * 4 * 2 // 8}"
    assert f"not hierarchical: a third rounding, so only if asked for: {crossing}" in told
    assert "hierarchical" not in str(policy.choose(Message(1 << 20, 4096, 2, 8, "cpu"), INT4, "auto", 0))


def test_it_goes_by_exchanges_and_never_by_one_kernel() -> None:
    for transport, over in (
        ("symmetric", "process_group"),
        ("host_memory", "host_memory"),
        ("process_group", "process_group"),
    ):
        call = Message(1 << 12, 512, 2, 8, "cuda", 4)
        assert policy.choose(call, INT4, "hierarchical", 0, Machine(transport)).route.transport == over


class TestNodes:
    """Which ranks have a node together."""

    def found(self, monkeypatch: pytest.MonkeyPatch, places: list[tuple[str, str]], **given: Any) -> int:
        transport: Any = type("Transport", (), {"world_size": len(places), "device": torch.device("cpu")})()
        monkeypatch.setattr(discovery.consistency, "tell", lambda *_: [list(place) for place in places])
        return discovery._local_world_size(transport, Settings.resolve("cpu", {}, **given))

    def test_groups_of_other_sizes(self) -> None:
        """The setting is of a process, whose groups are not all alike."""
        for world_size, found in ((1, 1), (2, 2), (4, 4), (8, 4), (6, 0)):
            assert (
                discovery.asked_local_world_size(Settings.resolve("cpu", {}, local_world_size=4), world_size) == found
            ), world_size

    def test_hosts_and_what_is_near_to_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.found(monkeypatch, [("a", ""), ("a", ""), ("b", ""), ("b", "")]) == 2
        assert self.found(monkeypatch, [("a", "0-7"), ("a", "0-7"), ("a", "8-15"), ("a", "8-15")]) == 2
        assert self.found(monkeypatch, [("a", "0-7"), ("a", "8-15"), ("b", "0-7"), ("b", "8-15")]) == 2  # hosts first
        assert self.found(monkeypatch, [("a", ""), ("a", ""), ("a", "")]) == 3
        assert self.found(monkeypatch, [("a", ""), ("b", ""), ("a", ""), ("b", "")]) == 0
        assert self.found(monkeypatch, [("a", ""), ("b", ""), ("b", "")]) == 0

    def test_what_is_asked_for_and_cannot_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mixed = [("a", ""), ("b", ""), ("a", ""), ("b", "")]
        assert self.found(monkeypatch, mixed, local_world_size=2) == 2
        with pytest.raises(
            UnavailableError, match=r"consecutive ranks; these are at a, b, a, b: order the ranks by node"
        ):
            self.found(monkeypatch, mixed, algorithm="hierarchical")
        with pytest.raises(SettingsError, match="local_world_size=3: 4 ranks do not make nodes of that many"):
            self.found(monkeypatch, mixed, local_world_size=3, algorithm="hierarchical")
        for wrong in (0, -1, "two", 1.5):
            with pytest.raises(SettingsError, match=r"local_world_size=.*give the number of ranks of a node"):
                Settings.resolve("cpu", {}, local_world_size=wrong)

    def test_ranks_of_one_host(self) -> None:
        def body(group: object, rank: int) -> tuple[int, str]:
            with make(group, "int4", None) as comm:
                return comm.machine.local_world_size, comm.explain((64, 512), BF16).route.algorithm

        assert raise_first(run_ranks(2, body)) == [(2, "two_shot")] * 2

    def test_ranks_that_say_different_things(self) -> None:
        got = run_ranks(4, lambda group, rank: make(group, "int4", 2 if rank else 4))
        assert all(isinstance(why, SettingsError) and "local_world_size: rank 0 4, rank 1 2" in str(why) for why in got)


def test_simulated_ranks_do_the_same() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model.tp_plan = {"0": "rowwise"}  # type: ignore[assignment]
    tensors = [tough((4, 600), BF16, r) for r in range(4)]
    ranks = TensorParallel(model, 4, "int4", algorithm="hierarchical", local_world_size=2)
    assert same_bits(ranks.reduce(tensors, INT4), reference.hierarchical(tensors, INT4, 2))
    for wrong in (3, 0):
        with pytest.raises(
            InputError, match=f"nodes of local_world_size={wrong} ranks asked for: 4 ranks do not make such"
        ):
            TensorParallel(model, 4, algorithm="hierarchical", local_world_size=wrong)


# ------------------------------------------------------------------------------------------------ through host memory


def staged(ctx: RankContext, local_world_size: int, timeout_s: float) -> tuple[Any, torch.Tensor]:
    """A context whose nodes have slots of their own in shared memory."""
    from dataclasses import replace

    from test_staging import staged

    context, status = staged(ctx, 4096, timeout_s, exchanges=3)
    begin = ctx.rank // local_world_size * local_world_size
    inner: Any = context.transport
    nodes = (
        inner.among(range(begin, begin + local_world_size), 1),
        inner.among(range(ctx.rank % local_world_size, ctx.world_size, local_world_size), 2),
    )
    return replace(context, nodes=nodes, chunk_bytes=3000), status


def over_shared_memory(ctx: RankContext, local_world_size: int) -> None:
    context, status = staged(ctx, local_world_size, 60)
    for seed, (fmt, dtype) in enumerate((("int4", BF16), ("int6-had/int7-had", BF16), ("bf16/int4", FP32))):
        context.fmt = WireFormat.parse(fmt)
        for shape in ((5, 600), (1, 7)) if ctx.world_size == 4 else ((5, 600),):
            everybody = [tough(shape, dtype, seed + 100 * rank) for rank in range(ctx.world_size)]
            out = torch.empty(shape, dtype=dtype)
            hierarchical.hierarchical(everybody[ctx.rank], out, context)
            assert same_bits(out, reference.hierarchical(everybody, context.fmt, local_world_size)), (fmt, shape)
    assert status.tolist() == [0] * 5


def a_rank_is_gone(ctx: RankContext) -> None:
    """Rank 2 is the first of the second node, and the second of its column. Rank 1 waits for none but 0 and 3."""
    context, status = staged(ctx, 2, 1)
    x = tough((2, 512), BF16, ctx.rank)
    out = torch.empty_like(x)
    hierarchical.hierarchical(x, out, context)
    if ctx.rank == 2:
        return
    hierarchical.hierarchical(x, out.fill_(7), context)
    assert out.isnan().any()
    assert status[0] == 1
    ctx.emit((ctx.rank, int(status[2])))


needs_interpreter = pytest.mark.skipif(N_GPUS > 0, reason="flags are not interpreted where there are GPUs")


@needs_interpreter
@pytest.mark.parametrize(("world_size", "local_world_size"), [(4, 2), (6, 3)])
def test_through_shared_memory(world_size: int, local_world_size: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run(over_shared_memory, world_size, (local_world_size,), timeout_s=250)


@needs_interpreter
def test_a_rank_that_is_gone_is_named_by_its_place_among_all() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    told: list[Any] = []
    run(a_rank_is_gone, 4, on_event=told.append, timeout_s=200)
    assert dict(told) == {0: 2, 1: 3, 3: 2}  # 3 gave up, and rank 1 only knows it


# --------------------------------------------------------------------------------------------------------- on four GPUs


def on_gpus(ctx: RankContext, transport: str) -> None:
    """Twice as they are, then as one graph launch a call; small messages go the same way."""
    shapes: list[tuple[int, ...]] = [(700, 4096), (5, 600), (3, 64), (0, 64)]
    for fmt in ("int4", "int6-had/int7-had", "bf16"):
        with make(None, fmt, 2, device="cuda", transport=transport, timeout_s=30) as comm:
            for turn in range(5):
                for i, shape in enumerate(shapes):
                    everybody = [tough(shape, BF16, 100 * turn + 10 * i + r) for r in range(ctx.world_size)]
                    got = comm.all_reduce(everybody[ctx.rank].to(ctx.device)).cpu()
                    want = reference.hierarchical(everybody, comm.format, 2)
                    assert same_bits(got, want), (fmt, shape, turn)
            assert set(comm.calls) == {"all_reduce/hierarchical"}
            assert comm.explain((700, 4096), BF16).route.transport == transport


@pytest.mark.skipif(N_GPUS < 4, reason=f"{N_GPUS} CUDA devices, 4 are needed")
@pytest.mark.parametrize("transport", ["host_memory", "process_group"])
def test_on_four_gpus(transport: str) -> None:
    run(on_gpus, 4, (transport,), device="cuda")
