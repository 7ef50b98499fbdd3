"""Collectives over the memory of peers: on GPUs if there are two, else in Triton's interpreter, in real processes.

Both run the same tests. What the interpreter cannot show (graphs, streams, thousands of calls) is in test_on_gpus.py.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
from support import N_GPUS, SHORT_S, expected, kernels_of, raise_first, run_ranks, same_bits, tough, wait_at_most

from flashcomm import Communicator, WireFormat, reference
from flashcomm.errors import CommunicationError, FlashcommError, InputError, SettingsError, UnavailableError
from flashcomm.gpu import collective_kernel, compat, launch, tuning
from flashcomm.ranks import processes
from flashcomm.ranks.launch import RankContext, run
from flashcomm.routing.route import Machine
from flashcomm.transports import cpu_shared, symmetric

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

ON_GPUS = N_GPUS >= 2
DEVICE, TRANSPORT = ("cuda", "symmetric") if ON_GPUS else ("cpu", "cpu_shared")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def on_ranks(body: object, world_size: int, *args: object) -> object:
    if ON_GPUS and world_size > N_GPUS:
        pytest.skip(f"{N_GPUS} CUDA devices, {world_size} are needed")
    limit_s = 1000 if ON_GPUS else 250  # on GPUs the longest test compiles some 40 kernels
    return run(body, world_size, args, device=DEVICE, timeout_s=limit_s)  # type: ignore[arg-type]


def make(fmt: str, algorithm: str = "auto", **more: object) -> Communicator:
    settings = {"transport": TRANSPORT, "workspace_bytes": 4 << 20, "min_bytes": 0, "timeout_s": 60} | more
    return Communicator(None, fmt, device=DEVICE, algorithm=algorithm, **settings)  # type: ignore[arg-type]


def use_protocol(comm: Communicator, ll: bool) -> None:
    """From now on send messages by the LL protocol, or else with flags."""
    kernels_of(comm).tuning = lambda *_: tuning.LL if ll else tuning.FLAGS  # type: ignore[method-assign]


def same_as_reference(comm: Communicator, messages: list[torch.Tensor], algorithm: str, device: torch.device) -> None:
    got = comm.all_reduce(messages[comm.rank].to(device)).cpu()
    want = getattr(reference, algorithm)(messages, comm.format)
    assert same_bits(got, want), (str(comm.format), algorithm, tuple(want.shape), want.dtype, comm.rank)


def all_reduces(ctx: RankContext, formats: list[tuple[str, torch.dtype]], shapes: list[tuple[int, ...]]) -> None:
    for fmt, dtype in formats:
        for algorithm in ("one_shot", "two_shot"):
            with make(fmt, algorithm) as comm:
                for seed, shape in enumerate(shapes):
                    use_protocol(comm, (seed % 2 == 0) == (algorithm == "one_shot"))
                    messages = [tough(shape, dtype, seed + 100 * rank) for rank in range(ctx.world_size)]
                    if seed % 2 and messages[1].numel():
                        messages[1].view(-1)[-1] = float("inf")
                    same_as_reference(comm, messages, algorithm, ctx.device)
                assert set(comm.calls) <= {f"all_reduce/{algorithm}"}
                assert comm.machine.transport == TRANSPORT


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_all_reduce_equals_the_reference(world_size: int) -> None:
    """Many formats, and messages of whole groups, with a tail, of one value and of none."""
    formats = {
        2: [("int4", BF16), ("int8/int5", FP32), ("int6-had/int7-had", BF16), ("none", BF16), ("none/int2-had", FP16)],
        3: [("int4-g32/int8-g128", FP16), ("int3-g32-had/int4-g64-had", BF16), ("none", FP32)],
        4: [("int6-had/int7-had", BF16), ("int4/none", FP32)],
        8: [("int4", BF16)],
    }
    shapes: list[tuple[int, ...]] = [(5, 640), (2, 3, 640), (3, 128), (9, 384), (0, 64), (5, 600), ()]
    on_ranks(all_reduces, world_size, formats[world_size], shapes if world_size < 8 else [(9, 512), (1, 64)])


def slices(ctx: RankContext) -> None:
    for fmt in ("int4/int8", "int3-g32-had/int6-had", "none"):
        with make(fmt) as comm:
            for i, shape in enumerate(((2, 576), (1, 64), (192,), (2, 0), (1, 640))):
                use_protocol(comm, i % 2 == 0)
                whole = [tough((shape[0] * ctx.world_size, *shape[1:]), BF16, r) for r in range(ctx.world_size)]
                parts = [tough(shape, BF16, 99 + r) for r in range(ctx.world_size)]
                got = comm.reduce_scatter(whole[ctx.rank].to(ctx.device)).cpu()
                assert same_bits(got, reference.reduce_scatter(whole, comm.format)[ctx.rank]), (fmt, shape)
                got = comm.all_gather(parts[ctx.rank].to(ctx.device)).cpu()
                assert same_bits(got, reference.all_gather(parts, comm.format)), (fmt, shape)
                got = comm.all_to_all_single(whole[ctx.rank].to(ctx.device)).cpu()
                copied = len(shape) == 1 or not whole[0].numel()  # vectors are not quantized
                fmt_sent = WireFormat.parse("none") if copied else comm.format
                assert same_bits(got, reference.all_to_all_single(whole, fmt_sent)[ctx.rank]), (fmt, shape)
            ops = ("reduce_scatter", "all_gather", "all_to_all_single")
            assert set(comm.calls) >= {f"{op}/kernel" for op in ops}


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_of_shards_equal_the_reference(world_size: int) -> None:
    on_ranks(slices, world_size)


def make_kernels(ctx: RankContext, workspace: int) -> launch.KernelCollectives:
    region = (symmetric if ON_GPUS else cpu_shared).create(ctx.device, launch.region_bytes(workspace))
    places: list[str] = [""] * ctx.world_size
    dist.all_gather_object(places, region.place)
    region.rendezvous(dist.group.WORLD, places)
    dist.barrier()
    return launch.KernelCollectives(region, 60)


def cut_up(ctx: RankContext, tunings: list[tuning.Tuning], workspace: int) -> None:
    """All ways to cut a message into tiles, waves and launches give the same bits. The workspace has a few tiles."""
    kernels = make_kernels(ctx, workspace)
    for fmt in (WireFormat.parse("int4"), WireFormat.parse("int6-had/int7-had")):
        for how in tunings if str(fmt) == "int4" else tunings[1:2]:
            for shape in ((12, 512), (3, 640), (1, 4032)):
                messages = [tough(shape, BF16, rank) for rank in range(ctx.world_size)]
                x = messages[ctx.rank].to(ctx.device)
                for algorithm in ("one_shot", "two_shot"):
                    buffer = torch.full((x.numel() + 8192,), 7, dtype=BF16, device=ctx.device)
                    kernels.plan(algorithm, x, shape[-1], fmt, how)(x.data_ptr(), buffer.data_ptr())
                    want = getattr(reference, algorithm)(messages, fmt)
                    assert same_bits(buffer[: x.numel()].view(shape).cpu(), want), (str(fmt), how, shape, algorithm)
                    assert (buffer[x.numel() :] == 7).all(), "stored behind the end of the message"
    kernels.check()
    kernels.close()


@pytest.mark.parametrize("ll", [False, True])
def test_how_a_message_is_cut_changes_no_bit(ll: bool) -> None:
    flags = [tuning.Tuning(1024, 0), tuning.Tuning(512, 3), tuning.Tuning(1024, 99)]
    inside = [tuning.Tuning(2048, 0, True), tuning.Tuning(2048, 1, True), tuning.Tuning(4096, 0, True)]
    on_ranks(cut_up, 2, *((inside, 250_000) if ll else (flags, 40_000)))


def turn_by_turn(ctx: RankContext, calls: int, delay: int) -> None:
    """Kinds, sizes, dtypes and both protocols alternate in one region. Every second rank is slow."""
    kernels, fmts = make_kernels(ctx, 1 << 20), [WireFormat.parse(f) for f in ("int4", "none", "int8-g128/int5-g16")]
    kernels.delay = delay if ctx.rank % 2 else 0
    for call in range(calls):
        algorithm = launch.ALGORITHMS[call * 7 // 2 % 5]
        fmt, dtype = fmts[call // 2 % 3], (BF16, FP32, FP16)[call % 3]
        shape = ((2, 256), (6, 512), (4, 384))[call * 5 // 3 % 3]
        if launch.ALGORITHMS.index(algorithm) in launch.SHARDED:
            shape = (shape[0] * ctx.world_size, shape[1])
        messages = [tough(shape, dtype, call + 100 * rank) for rank in range(ctx.world_size)]
        x, want = messages[ctx.rank].to(ctx.device), expected(algorithm, messages, fmt, ctx.rank)
        out = torch.empty(want.shape, dtype=dtype, device=ctx.device)
        how = tuning.LL if call * 3 // 2 % 2 else tuning.FLAGS
        kernels.plan(algorithm, x, shape[-1], fmt, how)(x.data_ptr(), out.data_ptr())
        assert same_bits(out.cpu(), want), (call, algorithm, str(fmt), dtype, shape, how)
    kernels.check()
    kernels.close()


def test_calls_of_all_kinds_with_and_without_flags_take_turns() -> None:
    on_ranks(turn_by_turn, 2, 300 if ON_GPUS else 48, 5000 if ON_GPUS else 100)


def in_turn(ctx: RankContext, calls: int) -> None:
    """Shapes and dtypes change from call to call without a pause. In short runs each result is compared."""
    shapes, seen = [(1, 64), (9, 576), (2, 640), (1, 2048), (3, 128)], 0
    with make("int4-had", "one_shot") as comm:
        messages = [
            [tough(s, (BF16, FP32)[i % 2], i + 50 * r) for r in range(ctx.world_size)] for i, s in enumerate(shapes)
        ]
        want = [reference.one_shot(xs, comm.format) for xs in messages]
        mine = [xs[ctx.rank].to(ctx.device) for xs in messages]
        want = [w.to(ctx.device) for w in want]
        for call in range(calls):
            i = (call * call + call // 3) % len(shapes)
            got = comm.all_reduce(mine[i])
            if call % 7 == 0 or calls < 1000:
                assert same_bits(got, want[i]), call
                seen += 1
        assert sum(comm.calls.values()) == calls
        assert seen > calls // 8


def test_calls_of_alternating_shapes() -> None:
    on_ranks(in_turn, 2, 50_000 if ON_GPUS else 40)


def slow_reader(ctx: RankContext, delay: int, how: tuning.Tuning) -> None:
    """Rank 0 is slow between its wait and its read. No peer may overwrite what it is going to read."""
    with make("int8", timeout_s=15) as comm:
        assert comm._executors
        kernels_of(comm).delay = delay if ctx.rank == 0 else 0
        for call in range(8):
            messages = [tough((4, 512), BF16, call + 100 * rank) for rank in range(ctx.world_size)]
            algorithm = ("one_shot", "two_shot")[call % 2]
            same_as_reference_by(comm, messages, algorithm, ctx.device, how)


def same_as_reference_by(
    comm: Communicator, messages: list[torch.Tensor], algorithm: str, device: torch.device, how: tuning.Tuning
) -> None:
    x = messages[comm.rank].to(device)
    out = torch.empty_like(x)
    kernels_of(comm).plan(algorithm, x, x.shape[-1], comm.format, how)(x.data_ptr(), out.data_ptr())
    assert same_bits(out.cpu(), getattr(reference, algorithm)(messages, comm.format)), algorithm


@pytest.mark.parametrize("how", [tuning.FLAGS, tuning.LL], ids=["flags", "ll"])
def test_a_slow_reader_reads_what_was_meant_for_it(how: tuning.Tuning) -> None:
    on_ranks(slow_reader, 2, 20_000 if ON_GPUS else 500, how)


def _calls(comm: Communicator, x: torch.Tensor, out: torch.Tensor) -> None:
    for _ in range(2):  # the second call reports that the first one timed out, if that has not done so itself
        comm.all_reduce(x, out)
        comm.synchronize()


ONE_CALL_BEHIND = r"of rank (\d+): expected call (\d+), saw (\d+)"


def one_behind(error: BaseException) -> int:
    """Return the rank that the error says is one call behind. The calls of the self-test on GPUs count, too."""
    found = re.search(ONE_CALL_BEHIND, str(error))
    assert found
    assert int(found[2]) == int(found[3]) + 1
    return int(found[1])


def a_rank_is_gone(ctx: RankContext, fmt: str, ll: bool) -> None:
    with make(fmt, "one_shot", check=False) as comm:
        use_protocol(comm, ll)
        x = tough((4, 512), BF16, ctx.rank).to(ctx.device)
        comm.all_reduce(x)
        wait_at_most(comm, SHORT_S)
        if ctx.rank == ctx.world_size - 1:
            dist.barrier()  # its memory stays mapped
            return
        out = torch.zeros_like(x)
        with pytest.raises(CommunicationError, match=ONE_CALL_BEHIND) as raised:
            _calls(comm, x, out)
        assert one_behind(raised.value) == ctx.world_size - 1
        assert str(raised.value).startswith(f"rank {ctx.rank} of {ctx.world_size}: waited {SHORT_S:g} s")
        assert out.isnan().all()
        assert comm._executors
        assert set(kernels_of(comm).region.peers.tolist()) == {
            kernels_of(comm).local
        }  # from now on it writes only to its own memory
        with pytest.raises(CommunicationError, match="Make a new Communicator"):
            comm.all_reduce(x)
        dist.barrier()


@pytest.mark.parametrize(("fmt", "ll"), [("int4", False), ("int4", True), ("none", True)])
def test_a_rank_that_does_not_come_is_an_error_that_names_it(fmt: str, ll: bool) -> None:
    on_ranks(a_rank_is_gone, 2, fmt, ll)


class Roles(NamedTuple):
    FIRST: int
    SECOND: int
    THIRD: int


@triton.jit
def list_places(out, message, roles: tl.constexpr):
    role, index, tile = collective_kernel.place(tl.program_id(0), message, roles.FIRST, roles.SECOND, roles.THIRD)
    at = out + 3 * tl.program_id(0)
    tl.store(at, role)
    tl.store(at + 1, index)
    tl.store(at + 2, tile)


def test_programs_are_numbered_by_wave_and_role() -> None:
    nothing = collective_kernel.Message(*[0] * 8)
    for roles in (Roles(1, 1, 0), Roles(3, 1, 0), Roles(1, 3, 0), Roles(2, 1, 2)):
        for n, lag in ((1, 0), (1, 1), (5, 0), (5, 2), (5, 3), (5, 5), (6, 3)):
            want = [
                [role, index, wave - role * lag]
                for wave in range(n + 2 * lag)
                for role, count in enumerate(roles)
                for index in range(count)
                if 0 <= wave - role * lag < n
            ]
            got = torch.full((len(want), 3), -1, dtype=torch.int32, device=DEVICE)
            message = nothing._replace(n_tiles=n, stage_lag=lag)
            compat.launcher(list_places, len(want), (torch.int32,), (message,), (roles,), num_warps=1, device=0)(
                got.data_ptr()
            )
            assert got.tolist() == want, (roles, n, lag)


def test_small_messages_take_the_ll_protocol_and_fit() -> None:
    for world_size in (2, 16):
        region = SimpleNamespace(rank=0, world_size=world_size, n_bytes=launch.region_bytes(256 << 20))
        region.peers, region.status = torch.zeros(world_size, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
        kernels = launch.KernelCollectives(region, 1)
        for name, algorithm in itertools.product(("int4", "none", "int8-g16/int5-g16"), launch.ALGORITHMS):
            fmt = WireFormat.parse(name)
            chosen = [kernels.tuning(algorithm, 1 << n, fmt, 2) for n in range(7, 24)]
            assert chosen[0] == tuning.LL
            assert chosen[-1].stage_lag
            first = [how.ll for how in chosen].index(False)
            assert not any(how.ll for how in chosen[first:])
            shards = world_size if launch.ALGORITHMS.index(algorithm) in launch.SHARDED else 1
            units = (1 << (7 + first - 1)) // fmt.unit // shards
            assert units <= kernels.capacity(algorithm, fmt, 2, tuning.LL)


def killed(ctx: RankContext) -> None:
    """The last rank is killed between two calls. The others raise an error, and go on in a group of their own."""
    with make("int4", "one_shot", check=False) as comm:
        x = tough((4, 512), BF16, ctx.rank).to(ctx.device)
        comm.all_reduce(x)
        wait_at_most(comm, SHORT_S)
        if ctx.rank == ctx.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        out = torch.zeros_like(x)
        with pytest.raises(CommunicationError, match=ONE_CALL_BEHIND) as raised:
            _calls(comm, x, out)
        assert one_behind(raised.value) == ctx.world_size - 1
        assert out.isnan().all()
    if not ON_GPUS:
        survivors = dist.new_group(list(range(ctx.world_size - 1)), use_local_synchronization=True)
        with Communicator(survivors, "int4", algorithm="one_shot", device=DEVICE, transport=TRANSPORT) as fresh:
            messages = [tough((4, 512), BF16, rank) for rank in range(ctx.world_size - 1)]
            same_as_reference(fresh, messages, "one_shot", ctx.device)
    ctx.emit(("fine", ctx.rank))


def test_a_killed_peer_and_a_fresh_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs the fresh Communicator is in fresh processes, as NCCL's groups do not survive the death of a rank."""
    monkeypatch.setattr(processes, "GRACE_S", 60.0)  # time for what the other ranks do afterwards
    world_size, events = 2 if ON_GPUS else 3, []
    with pytest.raises(FlashcommError, match=f"rank {world_size - 1} was killed by SIGKILL"):
        run(killed, world_size, device=DEVICE, timeout_s=120, on_event=events.append)
    assert sorted(events) == [("fine", rank) for rank in range(world_size - 1)]
    if ON_GPUS:
        on_ranks(all_reduces, 2, [("int4", BF16)], [(5, 600)])


def only_aligned(plan: Callable[..., launch.Launch]) -> Callable[..., launch.Launch]:
    """Return the same plan, whose launches check that addresses are aligned, as kernels on GPUs require."""

    def checked(*args: object) -> launch.Launch:
        launch = plan(*args)

        def run(source: int, target: int) -> None:
            assert (source % 16, target % 16) == (0, 0)
            launch(source, target)

        return run

    return checked


def odd_tensors(ctx: RankContext) -> None:
    with make("int4", "one_shot") as comm:
        kernels_of(comm).plan = only_aligned(kernels_of(comm).plan)  # type: ignore[method-assign]
        wide = [tough((6, 577), BF16, rank) for rank in range(ctx.world_size)]
        messages = [x[:, 1:].contiguous() for x in wide]
        want = reference.one_shot(messages, comm.format)
        assert same_bits(
            comm.all_reduce(wide[ctx.rank].to(ctx.device)[:, 1:]).cpu(), want
        )  # neither contiguous nor aligned
        x = messages[ctx.rank].to(ctx.device)
        flat = torch.cat((torch.zeros(1, dtype=BF16, device=ctx.device), x.reshape(-1)))[1:].view(6, 576)
        assert flat.data_ptr() % 16
        assert same_bits(comm.all_reduce(flat).cpu(), want)  # contiguous, not aligned
        assert same_bits(comm.all_reduce(torch._neg_view(-flat)).cpu(), want)
        assert comm.all_reduce(flat, out=flat) is flat
        assert same_bits(flat.cpu(), want)
        square = [tough((64, 128), BF16, rank) for rank in range(ctx.world_size)]
        want = reference.one_shot([t.t() for t in square], comm.format)
        assert same_bits(comm.all_reduce(square[ctx.rank].to(ctx.device).t()).cpu(), want)
        with pytest.raises(InputError, match="dtype must be one of"):
            comm.all_reduce(x.double())
        mesh = dist.init_device_mesh(DEVICE, (ctx.world_size,))
        with pytest.raises(InputError, match=r"of a DTensor give \.to_local\(\)"):
            comm.all_reduce(dist.tensor.DTensor.from_local(x, mesh, [dist.tensor.Replicate()]))
        if ON_GPUS:
            with pytest.raises(InputError, match="must be on cuda"):
                comm.all_reduce(x.cpu())


def test_strided_misaligned_and_refused_tensors() -> None:
    on_ranks(odd_tensors, 2)


def subgroups(ctx: RankContext) -> None:
    """Two Communicators for each of the groups of ranks {0, 1} and {0, 2} make calls in turn."""
    pairs = [dist.new_group([0, 1]), dist.new_group([0, 2])]
    members = [[0, 1], [0, 2]]
    mine = [i for i, ranks in enumerate(members) if ctx.rank in ranks]
    settings = {"transport": TRANSPORT, "workspace_bytes": 4 << 20, "min_bytes": 0}
    comms = {(i, f): Communicator(pairs[i], f, device=DEVICE, **settings) for i in mine for f in ("int4", "int8")}  # type: ignore[arg-type]
    for turn in range(3):
        for (i, fmt), comm in comms.items():
            messages = [tough((3, 192), BF16, turn + 10 * rank) for rank in members[i]]
            want = reference.one_shot(messages, WireFormat.parse(fmt))
            assert same_bits(comm.all_reduce(messages[comm.rank].to(ctx.device)).cpu(), want)
    for comm in comms.values():
        comm.close()


def test_subgroups_and_several_communicators() -> None:
    on_ranks(subgroups, 3)


def test_a_transport_that_cannot_be_had_is_an_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(transport: str) -> list[object]:
        return run_ranks(2, lambda group, rank: Communicator(group, "int4", transport=transport))

    for got in body("symmetric"):
        assert isinstance(got, SettingsError)
        assert "allowed is 'cpu_shared'" in str(got)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for got in body("cpu_shared"):
        assert isinstance(got, UnavailableError)
        assert "rank 0: it is for Triton's interpreter" in str(got)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with monkeypatch.context() as without:  # Triton is installed but cannot be imported
        without.delattr("flashcomm.gpu.launch")
        without.setitem(sys.modules, "flashcomm.gpu.launch", None)
        for got in body("cpu_shared"):
            assert isinstance(got, UnavailableError)
            assert "rank 0: " in str(got)
    monkeypatch.setattr(cpu_shared.os, "posix_fallocate", _full)
    for got in body("cpu_shared"):
        assert isinstance(got, UnavailableError)
        assert "of shared memory: No space left on device" in str(got)
    for comm in raise_first(body("auto")):
        assert comm.machine == Machine(local_world_size=2)  # type: ignore[attr-defined]
        comm.close()  # type: ignore[attr-defined]


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_peers_memory_needs() -> None:
    fine = {"host": "a", "device": 0, "blind": [], "why": ""}
    assert symmetric.why_not([fine, fine | {"device": 1}]) == ""
    assert symmetric.why_not([fine, fine | {"host": "b"}]) == "rank 1 is on another host than rank 0"
    assert "no peer access to GPU 0 (rank 0)" in symmetric.why_not([fine, fine | {"device": 1, "blind": [0]}])
    assert symmetric.why_not([fine, fine | {"why": "no triton"}]) == "rank 1: no triton"
    if not ON_GPUS:
        assert symmetric.probe(torch.device("cuda", 0))["why"] == "TRITON_INTERPRET=1 keeps kernels on the CPU"


def test_messages_are_cut_without_gaps() -> None:
    for n_units, capacity in ((448, 100), (90, 25), (10, 10), (7, 1)):
        at = 0
        for first, count in tuning.cut(n_units, capacity):
            assert first == at
            assert 0 < count <= capacity
            at += count
        assert at == n_units


def test_rows_that_are_not_whole_units_are_refused() -> None:
    region = SimpleNamespace(rank=0, world_size=2, n_bytes=launch.region_bytes(4 << 20))
    region.peers, region.status = torch.zeros(2, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    kernels = launch.KernelCollectives(region, 1)
    with pytest.raises(InputError, match="whole units of 64 values, got 600"):
        kernels.plan("one_shot", torch.zeros(2, 600), 600, WireFormat.parse("int4"))
