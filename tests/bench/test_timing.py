"""Timing on GPUs by events and graphs, with a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm.bench import all_reduce, baselines, timing
from flashcomm.errors import FlashcommError
from flashcomm.setup import measure
from flashcomm.testing import RankContext, run
from flashcomm.wire.format import UNCOMPRESSED

BF16 = torch.bfloat16


class StandIn:
    """The parts of torch.cuda that timing uses, on a CPU: work runs at once, and a graph is a list of runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[Callable[[], None]] | None = None
        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": self.graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: None)
        for cls in (
            all_reduce.Ours,
            baselines.Backend,
            baselines.SymmOneShot,
            baselines.SymmTwoShot,
            baselines.FlashinferFp8,
        ):
            monkeypatch.setattr(cls, "run", self.recording(cls.run))
        monkeypatch.setattr(timing, "measure", timing.by_events)

    @contextlib.contextmanager
    def graph(self, graph: Graph, capture_error_mode: str) -> Iterator[None]:
        self.captured = graph.runs
        try:
            yield
        finally:
            self.captured = None

    def recording(self, run: Any) -> Any:
        def recorded(impl: Any, i: int) -> torch.Tensor:
            if self.captured is None:
                return run(impl, i)
            out = impl.buffers[i] if impl.in_place else torch.empty_like(impl.inputs[i])
            self.captured.append(lambda: run(impl, i) if impl.in_place else out.copy_(run(impl, i)))
            return out

        return recorded


class Graph:
    def __init__(self) -> None:
        self.runs: list[Any] = []

    def replay(self) -> None:
        for again in self.runs:
            again()


class Event:
    clock_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock_ms += 1.0
        self.at_ms = Event.clock_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


def on_a_stand_in(ctx: RankContext, what: str = "") -> Any:
    with pytest.MonkeyPatch.context() as patch:
        others_on_a_stand_in(ctx, patch)
        stand_in = StandIn(patch)
        patch.setattr(all_reduce, "sets_for", lambda n_bytes, device: 3)
        patch.setattr(all_reduce, "MOST_HOST_CALLS", 10)
        if what == "replays do nothing":
            patch.setattr(Graph, "replay", lambda self: None)
        if what == "rank 1 cannot capture" and ctx.rank == 1:
            two_shot = baselines.SymmTwoShot.run

            def fail(impl: Any, i: int) -> torch.Tensor:
                if stand_in.captured is not None:
                    raise RuntimeError("not while capturing\nand more")
                return two_shot(impl, i)

            patch.setattr(baselines.SymmTwoShot, "run", fail)
        return all_reduce.all_reduce(ctx, ["int8"], [16384], 64, BF16, 2, ("eager", "graph"), {"min_bytes": 0})


def others_on_a_stand_in(ctx: RankContext, patch: pytest.MonkeyPatch) -> None:
    """Provide symmetric memory that gloo sums, and a flashinfer whose results differ between ranks."""

    def in_place(x: torch.Tensor, op: str, group_name: str) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def low_bit(x: torch.Tensor, group: Any) -> torch.Tensor:
        return in_place(x.to(torch.float8_e4m3fn).to(x.dtype), "sum", "") * (1 + 0.01 * ctx.rank)

    ops, flashinfer = torch.ops.symm_mem, types.SimpleNamespace(quantized_all_reduce=low_bit)
    patch.setattr(ops, "one_shot_all_reduce", lambda x, *how: in_place(x.clone(), *how), raising=False)
    patch.setattr(ops, "two_shot_all_reduce_", in_place, raising=False)
    patch.setattr(baselines, "_no_symm", lambda *args: None)
    patch.setattr(baselines, "_symmetric", lambda ctx, numel, dtype: torch.empty(numel, dtype=dtype))
    patch.setattr(baselines, "_no_flashinfer", lambda *args: None)
    patch.setitem(sys.modules, "flashinfer.comm", flashinfer)  # type: ignore[arg-type]


def test_timing_by_events_and_graphs() -> None:
    """A sample of ten calls takes one unit of the stand-in's clock, 1 ms. The route of `auto` is measured, too."""
    found: Any = run(on_a_stand_in, 2, ())
    rows = found["rows"]
    assert set(found["unavailable"]) == {"vllm custom"}
    for mode in timing.MODES:
        mine = [r for r in rows if r["mode"] == mode]
        by_path = {r["path"]: r for r in mine}
        assert [r["format"] for r in mine] == [*[UNCOMPRESSED] * 5, "fp8", "int8", "int8"]
        assert set(by_path) == {
            "backend",
            "symm one-shot",
            "symm two-shot",
            "one_shot",
            "two_shot",
            "flashinfer fp8",
            "auto",
        }
        assert {r["time_us"] for r in mine} == {100.0}
        assert {r["speedup"] for r in mine} == {1.0}
        assert all((r["host_us"] is None) == (mode == "graph") for r in mine)
        assert [by_path[p]["wire_bytes"] for p in ("backend", "symm one-shot", "flashinfer fp8")] == [
            16384,
            16384,
            8320,
        ]
        assert by_path["symm two-shot"]["note"] == "in place in symmetric memory, no copy timed; ranks equal"
        assert by_path["flashinfer fp8"]["note"] == "new output; ranks differ"
        assert 0.01 < by_path["flashinfer fp8"]["error"] < 0.1


def test_what_cannot_be_captured_on_one_rank_has_no_graph_on_any() -> None:
    found: Any = run(on_a_stand_in, 2, ("rank 1 cannot capture",))
    mine = [r for r in found["rows"] if r["path"] == "symm two-shot"]
    assert [r["mode"] for r in mine] == ["eager"]
    assert mine[0]["note"].endswith("ranks equal; no graph: RuntimeError: not while capturing")
    assert {r["path"] for r in found["rows"] if r["mode"] == "graph"} > {"backend", "symm one-shot", "auto"}
    assert found["unavailable"][f"{UNCOMPRESSED} by symm two-shot in a graph"] == "RuntimeError: not while capturing"


def test_replays_are_compared_with_eager_calls() -> None:
    with pytest.raises(
        FlashcommError, match=f"{UNCOMPRESSED} by backend: a replay gives other values than an eager call"
    ):
        run(on_a_stand_in, 2, ("replays do nothing",))


def test_calls_in_a_sample() -> None:
    """There are ten, or fewer for huge messages, but each set of inputs is used at least once."""
    assert measure.sets_for(1 << 20, torch.device("cpu")) == 2
    assert [measure.calls_for(n << 20, 2) for n in (1, 64, 128, 256, 1024)] == [10, 10, 5, 2, 2]
    assert measure.calls_for(1 << 16, 16) == 16
