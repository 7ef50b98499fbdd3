"""`backend="flashcomm"` in real processes: all-reduces are low-bit, and everything else is as with gloo."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_c10d_backend import FMT, big, use_backend

from flashcomm import reference
from flashcomm.ranks.launch import RankContext, run


def c10d_asynchronous(ctx: RankContext, path: str) -> None:
    """An asynchronous all-reduce must return at once, while the peer does something else first."""
    use_backend(ctx, path)
    inputs = [big(r) for r in range(ctx.world_size)]
    want = reference.one_shot(inputs, FMT)
    for _ in range(3):
        x = inputs[ctx.rank].clone()
        if ctx.rank == 0:
            work = dist.all_reduce(x, async_op=True)
            assert not work.is_completed()
            with pytest.raises(RuntimeError, match=r"not done within 0.05 s"):
                work.wait(timedelta(seconds=0.05))
            dist.send(torch.ones(2), 1)
            assert work.wait(timedelta(seconds=60))
            assert work.is_completed()
            assert work.is_success()
            assert torch.equal(work.result()[0], want)
        else:
            dist.recv(torch.empty(2), 0)
            dist.all_reduce(x)
        assert torch.equal(x, want)
    # Many at once, with other collectives in between: they run in the order of their calls.
    xs = [inputs[ctx.rank] * i for i in range(6)]
    works = []
    for x in xs:
        works += [dist.all_reduce(x, async_op=True), dist.all_reduce(torch.ones(3), async_op=True)]
    done = [work.get_future().then(lambda f: f.value()[0]) for work in works[::2]]
    for i, future in enumerate(done):
        assert torch.equal(future.wait(), reference.one_shot([t * i for t in inputs], FMT))
    for work in works:
        work.wait()


def c10d_a_failed_sum(ctx: RankContext, path: str) -> None:
    """`wait` and the future both raise the error."""
    use_backend(ctx, path)
    work = dist.all_reduce(big(ctx.rank)[: 64 - 8 * ctx.rank].contiguous(), async_op=True)
    with pytest.raises(RuntimeError, match="did not make the same valid call"):
        work.wait()
    assert not work.is_success()
    with pytest.raises(RuntimeError, match="did not make the same valid call"):
        work.get_future().wait()


def c10d_inference(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    inputs = [big(r) for r in range(ctx.world_size)]
    want = reference.one_shot(inputs, FMT)
    with torch.inference_mode():
        x = inputs[ctx.rank].clone()
        inside = x.clone()
        dist.all_reduce(inside)
    dist.all_reduce(x)  # created in inference mode, used outside of it
    assert x.is_inference()
    assert torch.equal(x, want)
    assert torch.equal(inside, want)
    negative = torch._neg_view(-inputs[ctx.rank])
    dist.all_reduce(negative)
    assert torch.equal(negative, want)


def c10d_gradients(ctx: RankContext, path: str, exact: bool) -> None:
    """Gradients of DDP, whose buckets are large enough, and all-reduces in a backward pass are exact."""
    use_backend(ctx, path)
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 256)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(ctx.rank))
    model(x).square().sum().backward()
    mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    every = [[torch.empty_like(g) for _ in range(ctx.world_size)] for g in mine]
    for g, rows in zip(mine, every, strict=True):
        dist.all_gather(rows, g)
    model.zero_grad()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    ddp(x).square().sum().backward()
    means = [torch.stack(rows).sum(0) / ctx.world_size for rows in every]
    near = [
        torch.allclose(p.grad, mean, rtol=1e-5, atol=1e-6)
        for p, mean in zip(model.parameters(), means, strict=True)
        if p.grad is not None
    ]
    assert all(near) == exact
    forward = big(ctx.rank, torch.float32)
    dist.all_reduce(forward)
    assert torch.equal(forward, reference.one_shot([big(r, torch.float32) for r in range(ctx.world_size)], FMT))


REDUCTIONS = ("SUM", "PRODUCT", "MIN", "MAX", "AVG", "BAND", "BOR", "BXOR")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8)


def operations(rank: int, world_size: int) -> dict[str, Callable[[], Any]]:
    """Use a group in every way that a program may. Each case returns a value to compare."""
    group: Any = dist.group.WORLD
    other = 1 - rank

    def of(dtype: torch.dtype, n: int = 6) -> torch.Tensor:
        return (torch.arange(n) % 3 + 1 + rank).to(dtype)

    def in_place(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
        work = call(x)
        if work is not None and hasattr(work, "wait"):
            work.wait()
        return x

    def listed(n: int) -> list[torch.Tensor]:
        return [torch.zeros(n) for _ in range(world_size)]

    def objects(call: Callable[[list[Any]], Any], n: int) -> list[Any]:
        found: list[Any] = [None] * n
        call(found)
        return found

    def pairs() -> Any:
        got = torch.zeros(4)
        ops = [dist.P2POp(dist.isend, of(torch.float32, 4), other), dist.P2POp(dist.irecv, got, other)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return got

    def passed(tag: int) -> Any:
        got = torch.zeros(4)
        if rank == 0:
            dist.send(of(torch.float32, 4), 1, tag=tag)
            return None
        source = dist.recv(got, None if tag == 7 else 0, tag=tag)
        return got, source

    def coalesced(asynchronous: bool) -> Any:
        xs = [of(torch.float32), of(torch.float32, 9)]
        with dist._coalescing_manager(async_ops=asynchronous) as manager:
            for x in xs:
                dist.all_reduce(x)
        if asynchronous:
            manager.wait()
        return xs

    def gathered(n: int) -> Any:
        out = torch.zeros(world_size * n)
        dist.all_gather_into_tensor(out, of(torch.float32, n))
        return out

    def scattered(op: Any) -> Any:
        out = torch.zeros(3)
        dist.reduce_scatter_tensor(out, of(torch.float32, 3 * world_size), op=op)
        return out

    def exchanged(uneven: bool) -> Any:
        mine = of(torch.float32, 6)
        ins, outs = ([2, 4], [2, 2] if rank == 0 else [4, 4]) if uneven else ([3, 3], [3, 3])
        out = torch.zeros(sum(outs))
        dist.all_to_all_single(out, mine, outs, ins)
        return out

    def sub_group() -> Any:
        alone = dist.new_subgroups(1)[0]
        x = of(torch.float32)
        dist.all_reduce(x, group=alone)
        return x, dist.get_world_size(alone)

    from torch.distributed import _functional_collectives as functional

    made: dict[str, Callable[[], Any]] = {}
    for name in REDUCTIONS:
        for dtype in DTYPES:
            op = getattr(dist.ReduceOp, name)
            made[f"all_reduce {name} {dtype}"] = lambda op=op, d=dtype: in_place(
                lambda x: dist.all_reduce(x, op), of(d)
            )
            made[f"async {name} {dtype}"] = lambda op=op, d=dtype: in_place(
                lambda x: dist.all_reduce(x, op, async_op=True), of(d)
            )
    for name in ("SUM", "MAX"):
        op = getattr(dist.ReduceOp, name)
        made[f"reduce {name}"] = lambda op=op: (
            in_place(lambda x: dist.reduce(x, 0, op), of(torch.float32))
            if rank == 0
            else dist.reduce(of(torch.float32), 0, op)
        )
        made[f"reduce_scatter_tensor {name}"] = lambda op=op: scattered(op)
        made[f"all_reduce of many {name}"] = lambda op=op: in_place(
            lambda x: dist.all_reduce(x, op), of(torch.int64, 1 << 16)
        )
    made |= {
        "all_reduce of nothing": lambda: in_place(dist.all_reduce, torch.empty(0)),
        "all_reduce of float64": lambda: in_place(dist.all_reduce, of(torch.float64, 1 << 15)),
        "all_reduce strided": lambda: in_place(dist.all_reduce, of(torch.float32, 12).view(3, 4).t()),
        "all_reduce of complex": lambda: in_place(dist.all_reduce, of(torch.complex64)),
        "all_reduce of bool": lambda: in_place(dist.all_reduce, of(torch.bool)),
        "all_reduce of a list": lambda: dist.all_reduce([of(torch.float32)]),
        "all_reduce of sparse": lambda: in_place(dist.all_reduce, of(torch.float32).to_sparse()).to_dense(),
        "coalesced": lambda: coalesced(False),
        "coalesced, asynchronous": lambda: coalesced(True),
        "broadcast": lambda: in_place(lambda x: dist.broadcast(x, 1), of(torch.float32)),
        "all_gather": lambda: (lambda out: (dist.all_gather(out, of(torch.float32, 3)), out))(listed(3)),
        "all_gather_into_tensor": lambda: gathered(3),
        "gather": lambda: (lambda out: (dist.gather(of(torch.float32, 3), out or None, 0), out))(
            listed(3) if rank == 0 else []
        ),
        "scatter": lambda: in_place(
            lambda x: dist.scatter(x, [torch.ones(3), 2 * torch.ones(3)] if rank == 0 else None, 0), torch.zeros(3)
        ),
        "all_to_all_single": lambda: exchanged(False),
        "all_to_all_single, uneven": lambda: exchanged(True),
        "batch_isend_irecv": pairs,
        "send and recv": lambda: passed(0),
        "send and recv with a tag": lambda: passed(5),
        "recv from any": lambda: passed(7),
        "barrier": dist.barrier,
        "monitored_barrier": dist.monitored_barrier,
        "monitored_barrier with a time-out": lambda: dist.monitored_barrier(group, timedelta(seconds=30), True),
        "monitored_barrier of one": lambda: dist.monitored_barrier(dist.new_subgroups(1)[0]),
        "monitored_barrier of no member": lambda: dist.monitored_barrier(dist.GroupMember.NON_GROUP_MEMBER),
        "barrier, asynchronous": lambda: dist.barrier(async_op=True).wait(),
        "all_gather_object": lambda: objects(lambda found: dist.all_gather_object(found, {"rank": rank}), world_size),
        "gather_object": lambda: objects(
            lambda found: dist.gather_object(rank, found if rank == 0 else None, 0), world_size
        ),
        "broadcast_object_list": lambda: (lambda x: (dist.broadcast_object_list(x, 1), x))([rank, str(rank)]),
        "scatter_object_list": lambda: objects(
            lambda found: dist.scatter_object_list(found, ["a", "b"] if rank == 0 else None, 0), 1
        ),
        "sequence number": lambda: isinstance(group._get_sequence_number_for_group(), int),
        "rank and size": lambda: (group.rank(), group.size(), dist.get_rank(), dist.get_world_size()),
        "sub-group": sub_group,
        "functional all_reduce": lambda: functional.all_reduce(of(torch.float32), "sum", group) + 0,
        "functional all_gather": lambda: functional.all_gather_tensor(of(torch.float32), 0, group) + 0,
        "functional reduce_scatter": lambda: functional.reduce_scatter_tensor(of(torch.float32), "sum", 0, group) + 0,
        "functional broadcast": lambda: functional.broadcast(of(torch.float32), 0, group) + 0,
        "functional all_to_all": lambda: functional.all_to_all_single(of(torch.float32), [3, 3], [3, 3], group) + 0,
        "work of a small sum": lambda: dist.all_reduce(of(torch.float32), async_op=True).wait(timedelta(seconds=9)),
        "work of a large sum": lambda: dist.all_reduce(of(torch.float32, 1 << 15), async_op=True).wait(
            timedelta(seconds=60)
        ),
        "future": lambda: dist.all_reduce(of(torch.float32), async_op=True).get_future().wait(),
    }
    return made


def outcomes(ctx: RankContext, path: str, backend: str) -> dict[str, str]:
    if backend == "flashcomm":
        use_backend(ctx, path)
    found = {}
    for name, call in operations(ctx.rank, ctx.world_size).items():
        try:
            found[name] = str(call())
        except Exception as why:
            found[name] = f"{type(why).__name__}: {str(why).splitlines()[0]}"
    ctx.emit((ctx.rank, found))
    return found


def test_the_same_script_over_gloo_and_over_flashcomm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCOMM_FORMAT", "int8")
    events_of: dict[str, dict[int, dict[str, str]]] = {}
    for backend in ("gloo", "flashcomm"):
        events: list[Any] = []
        run(outcomes, 2, (str(tmp_path / "store"), backend), on_event=events.append, timeout_s=200)
        events_of[backend] = dict(events)
    assert len(events_of["gloo"][0]) > 140
    for rank in range(2):
        differ = {
            name: (text, events_of["flashcomm"][rank][name])
            for name, text in events_of["gloo"][rank].items()
            if events_of["flashcomm"][rank][name] != text
        }
        assert not differ, differ


class TestAsGloo:
    @pytest.fixture(autouse=True)
    def _format(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")

    def test_an_asynchronous_sum_does_not_wait(self, tmp_path: Path) -> None:
        begin = time.monotonic()
        run(c10d_asynchronous, 2, (str(tmp_path / "store"),), timeout_s=200)
        assert time.monotonic() - begin < 200

    def test_a_failed_sum(self, tmp_path: Path) -> None:
        run(c10d_a_failed_sum, 2, (str(tmp_path / "store"),), timeout_s=200)

    def test_inference_tensors_and_negative_views(self, tmp_path: Path) -> None:
        run(c10d_inference, 2, (str(tmp_path / "store"),), timeout_s=200)

    @pytest.mark.parametrize("asked", ["", "1"])
    def test_gradients_are_exact_unless_asked_for(
        self, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FLASHCOMM_GRADIENTS", asked)
        run(c10d_gradients, 2, (str(tmp_path / "store"), asked != "1"), timeout_s=200)
