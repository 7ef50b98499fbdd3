"""`backend="flashcomm"` in real processes: sums are low-bit, and all else is as over gloo."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm import WireFormat, reference
from flashcomm.errors import FormatError, SettingsError
from flashcomm.ranks.launch import RankContext, run

FMT = WireFormat.parse("int4")


def big(rank: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(64, 1152, generator=torch.Generator().manual_seed(rank)).to(dtype)


def use_backend(ctx: RankContext, path: str) -> None:
    """Replace the launcher's gloo group by one of our backend."""
    import flashcomm.integrations.process_group  # noqa: F401

    dist.destroy_process_group()
    dist.init_process_group(
        "flashcomm", store=dist.FileStore(path, ctx.world_size), rank=ctx.rank, world_size=ctx.world_size
    )


def c10d_sums(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    everybody = [big(r) for r in range(ctx.world_size)]
    want = reference.two_shot(everybody, FMT)
    x = everybody[ctx.rank].clone()
    assert dist.all_reduce(x) is None
    assert torch.equal(x, want)

    x = everybody[ctx.rank].clone()
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.is_completed()
    assert torch.equal(x, want)

    from torch.distributed import _functional_collectives as functional

    assert torch.equal(functional.all_reduce(everybody[ctx.rank], "sum", dist.group.WORLD), want)

    strided = everybody[ctx.rank].t().contiguous().t()
    dist.all_reduce(strided)
    assert torch.equal(strided, want)

    from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (ctx.world_size,))
    partial = DTensor.from_local(everybody[ctx.rank], mesh, [Partial()])
    assert torch.equal(partial.redistribute(mesh, [Replicate()]).to_local(), want)


def c10d_plan(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    everybody = [big(r) for r in range(ctx.world_size)]
    x = everybody[ctx.rank].clone()
    dist.all_reduce(x)
    assert torch.equal(x, reference.two_shot(everybody, FMT))
    one_token = [t[:, None] for t in everybody]
    x = one_token[ctx.rank].clone()
    dist.all_reduce(x)
    assert torch.equal(x, reference.two_shot(one_token, WireFormat.parse("int6-had")))


def c10d_passes_the_rest_through(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    world_size, rank = ctx.world_size, ctx.rank
    group: Any = dist.group.WORLD
    exact = torch.stack([big(r, torch.float32) for r in range(world_size)])

    small = torch.full((7,), 0.1 * (rank + 1))
    dist.all_reduce(small)
    torch.testing.assert_close(small, torch.full((7,), 0.1 * sum(range(1, world_size + 1))), rtol=1e-6, atol=0)

    whole = torch.arange(100_000) * (rank + 1)
    dist.all_reduce(whole)
    assert torch.equal(whole, torch.arange(100_000) * sum(range(1, world_size + 1)))

    double = exact[rank].double()
    dist.all_reduce(double)
    torch.testing.assert_close(double, exact.double().sum(0), rtol=1e-12, atol=1e-12)

    largest = exact[rank].clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    assert torch.equal(largest, exact.amax(0))

    mine = torch.full((3,), rank)
    gathered = torch.empty(3 * world_size, dtype=mine.dtype)
    dist.all_gather_into_tensor(gathered, mine)
    assert gathered.tolist() == [r for r in range(world_size) for _ in range(3)]
    told = mine.clone()
    dist.broadcast(told, 1)
    assert told.tolist() == [1, 1, 1]
    dist.barrier()
    objects: list[Any] = [None] * world_size
    dist.all_gather_object(objects, {"rank": rank})
    assert [o["rank"] for o in objects] == list(range(world_size))
    if rank == 0:
        dist.send(torch.tensor([5.0]), 1)
    elif rank == 1:
        got = torch.empty(1)
        dist.recv(got, 0)
        assert got.item() == 5.0
    assert not any(c.calls for c in group._communicators.values()), "nothing of this was low-bit"


def c10d_settings_differ(ctx: RankContext, path: str) -> None:
    os.environ["FLASHCOMM_MIN_BYTES"] = "1M" if ctx.rank else "64K"
    use_backend(ctx, path)


def c10d_stress(ctx: RankContext, path: str) -> None:
    """Many collectives whose tensors die at once, each followed by a barrier: where the GIL was held, this hung."""
    use_backend(ctx, path)
    for i in range(400):
        gathered = torch.empty(ctx.world_size * 3)
        dist.all_gather_into_tensor(gathered, torch.full((3,), float(i)), async_op=True).wait()
        assert gathered.tolist() == [float(i)] * 3 * ctx.world_size
        dist.broadcast(torch.ones(2), 0, async_op=True)
        dist.barrier()


def c10d_sub_group(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    pair = dist.new_group([0, 2], backend="flashcomm")
    if ctx.rank in (0, 2):
        x = big(ctx.rank)
        dist.all_reduce(x, group=pair)
        assert torch.equal(x, reference.one_shot([big(0), big(2)], FMT))
    dist.barrier()


class TestProcessGroup:
    @pytest.fixture(autouse=True)
    def _format(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")

    def test_large_sums_are_low_bit(self, tmp_path: Path) -> None:
        run(c10d_sums, 3, (str(tmp_path / "store"),))

    def test_everything_else_is_passed_through(self, tmp_path: Path) -> None:
        run(c10d_passes_the_rest_through, 3, (str(tmp_path / "store"),))

    def test_many_small_collectives(self, tmp_path: Path) -> None:
        run(c10d_stress, 2, (str(tmp_path / "store"),), timeout_s=60)

    def test_every_collective_is_passed_on(self) -> None:
        """Nothing that torch could call on a group is left to the inherited method, which would hold the GIL."""
        from flashcomm.integrations.process_group import FlashProcessGroup

        names = {n for n in vars(torch.distributed.ProcessGroup) if "gather" in n or "reduce" in n or "all_to_all" in n}
        names |= {"broadcast", "scatter", "send", "recv", "recv_anysource", "alltoall", "alltoall_base", "barrier"}
        assert {n for n in names if n not in vars(FlashProcessGroup)} == set()

    def test_sub_groups(self, tmp_path: Path) -> None:
        run(c10d_sub_group, 3, (str(tmp_path / "store"),))

    def test_settings_that_differ_between_ranks(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"FLASHCOMM_\* settings differ between ranks"):
            run(c10d_settings_differ, 2, (str(tmp_path / "store"),), timeout_s=60)

    def test_a_plan_gives_its_format_and_that_for_decoding(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = {"flashcomm_plan": 1, "format": "int4", "decode": "int6-had", "layers": {"*": "int2"}}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        monkeypatch.setenv("FLASHCOMM_FORMAT", str(tmp_path / "plan.json"))
        monkeypatch.setenv("FLASHCOMM_MIN_BYTES", "0")
        run(c10d_plan, 3, (str(tmp_path / "store"),))

    def test_unknown_format_at_init(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int1")
        with pytest.raises(FormatError, match="1 bits asked for, 2 to 8 are allowed"):
            run(c10d_sums, 2, (str(tmp_path / "store"),))


def c10d_asynchronous(ctx: RankContext, path: str) -> None:
    """A sum that is not waited for must not wait: the peer does something else first."""
    use_backend(ctx, path)
    everybody = [big(r) for r in range(ctx.world_size)]
    want = reference.one_shot(everybody, FMT)
    for _ in range(3):
        x = everybody[ctx.rank].clone()
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
    # Many at once, among others: in the order of their calls.
    xs = [everybody[ctx.rank] * i for i in range(6)]
    works = []
    for x in xs:
        works += [dist.all_reduce(x, async_op=True), dist.all_reduce(torch.ones(3), async_op=True)]
    done = [work.get_future().then(lambda f: f.value()[0]) for work in works[::2]]
    for i, future in enumerate(done):
        assert torch.equal(future.wait(), reference.one_shot([t * i for t in everybody], FMT))
    for work in works:
        work.wait()


def c10d_a_failed_sum(ctx: RankContext, path: str) -> None:
    """The error is raised by `wait`, and by the future."""
    use_backend(ctx, path)
    work = dist.all_reduce(big(ctx.rank)[: 64 - 8 * ctx.rank].contiguous(), async_op=True)
    with pytest.raises(RuntimeError, match="did not make the same valid call"):
        work.wait()
    assert not work.is_success()
    with pytest.raises(RuntimeError, match="did not make the same valid call"):
        work.get_future().wait()


def c10d_inference(ctx: RankContext, path: str) -> None:
    use_backend(ctx, path)
    everybody = [big(r) for r in range(ctx.world_size)]
    want = reference.one_shot(everybody, FMT)
    with torch.inference_mode():
        x = everybody[ctx.rank].clone()
        inside = x.clone()
        dist.all_reduce(inside)
    dist.all_reduce(x)  # made in inference mode, outside of it
    assert x.is_inference()
    assert torch.equal(x, want)
    assert torch.equal(inside, want)
    negative = torch._neg_view(-everybody[ctx.rank])
    dist.all_reduce(negative)
    assert torch.equal(negative, want)


def c10d_gradients(ctx: RankContext, path: str, exact: bool) -> None:
    """Of DDP, whose buckets are large enough, and of a sum that the autograd engine makes."""
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
    """What a program may do with a group, by name; each returns what can be compared."""
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
    told: dict[str, dict[int, dict[str, str]]] = {}
    for backend in ("gloo", "flashcomm"):
        events: list[Any] = []
        run(outcomes, 2, (str(tmp_path / "store"), backend), on_event=events.append, timeout_s=200)
        told[backend] = dict(events)
    assert len(told["gloo"][0]) > 140
    for rank in range(2):
        differ = {
            name: (text, told["flashcomm"][rank][name])
            for name, text in told["gloo"][rank].items()
            if told["flashcomm"][rank][name] != text
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
