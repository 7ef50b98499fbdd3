"""The bench of all-reduces: baselines, verification, growth in place, timing on GPUs (with a stand-in), pictures."""

from __future__ import annotations

import contextlib
import csv
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm.bench import all_reduce, baselines, timing
from flashcomm.bench import codec as codec_bench
from flashcomm.bench.plot import plot
from flashcomm.errors import FlashcommError, UnavailableError
from flashcomm.ranks.launch import RankContext, run
from flashcomm.wire import torch_codec

BF16 = torch.bfloat16
COLUMNS = [
    *("size", "count", "type", "redop", "format", "world", "path", "mode", "transport", "time_us", "host_us", "algbw"),
    *("busbw", "wire_bytes", "error", "snr_db", "speedup", "over_native", "note"),
]


def measured(ctx: RankContext, *args: Any) -> Any:
    return all_reduce.all_reduce(ctx, *args)


def test_rows(tmp_path: Path) -> None:
    args = (["int8", "int4/int8"], [20000, 40000], 576, BF16, 2, ("eager",), {"min_bytes": 0})
    found: Any = run(measured, 3, args)
    rows = found["rows"]
    assert all(list(row) == COLUMNS for row in rows)
    for size in (20000, 40000):
        mine = [r for r in rows if r["size"] == size]
        ways = [(r["format"], r["path"]) for r in mine]
        assert sorted(ways[:3]) == [("bf16", "native"), ("bf16", "one_shot"), ("bf16", "two_shot")]
        assert ways[3:5] == [("int8", "auto"), ("int4/int8", "auto")]
        assert [r["format"] for r in mine[5:]] == ["int8", "int4/int8"]
        assert {r["path"] for r in mine[5:]} <= {"one_shot", "two_shot"}
        assert {r["note"] for r in mine[3:5]} == {"takes native; new output"}  # below 64K
        assert {r["mode"] for r in mine} == {"eager"}

        uncompressed, by = mine[:3], {r["path"]: r for r in mine[:3]}
        best = min(uncompressed, key=lambda r: r["time_us"])
        assert [r["speedup"] for r in uncompressed] == sorted(r["speedup"] for r in uncompressed)
        assert best["speedup"] == 1.0 == by["native"]["over_native"]
        for row in mine:
            assert row["speedup"] == pytest.approx(best["time_us"] / row["time_us"], rel=1e-2, abs=2e-3)
            assert row["over_native"] == pytest.approx(by["native"]["time_us"] / row["time_us"], rel=1e-2, abs=2e-3)
        assert by["native"]["note"] == "in place"
        assert by["native"]["wire_bytes"] == 4 * size // 3
        assert all(r["error"] < 0.01 for r in uncompressed)
        assert mine[-1]["error"] > 0.01
    missing = found["unavailable"]
    assert set(missing) == {"symm one-shot", "symm two-shot", "vllm custom", "flashinfer fp8"}
    assert set(missing.values()) == {"for CUDA tensors only"}


def wrong_on_one_rank(ctx: RankContext, way: str) -> Any:
    cls: Any = {"ours": all_reduce.Ours, "native": baselines.Native}[way]
    right = cls.run

    def off(self: Any, i: int) -> torch.Tensor:
        out = right(self, i).clone()
        out.view(-1)[7] *= 1.5 if ctx.rank == 1 else 1.0
        return out

    cls.run = off
    return all_reduce.all_reduce(ctx, ["int8"], [4096], 64, BF16, 1, ("eager",), {"min_bytes": 0})


@pytest.mark.parametrize(("way", "where"), [("ours", "bf16 by one_shot"), ("native", "bf16 by native")])
def test_a_wrong_result_stops_the_bench(way: str, where: str) -> None:
    with pytest.raises(FlashcommError, match=f"{where}: . of 2048 values differ from the reference or between ranks"):
        run(wrong_on_one_rank, 2, (way,))


def grown(ctx: RankContext, dtype: torch.dtype) -> list[float]:
    """The largest value after as many sums in place as the bench makes, and after two more."""
    way = baselines.Native()
    way.load([torch.full((64,), 31.0, dtype=dtype)])
    way.refill(baselines.SMALL)
    for _ in range(baselines.growth(dtype, ctx.world_size)):
        last = way.run(0)
    most = float(last.max())
    way.run(0)
    return [most, float(way.run(0).max())]


@pytest.mark.parametrize(("dtype", "world_size"), [(BF16, 2), (torch.float16, 2), (torch.float16, 3)])
def test_sums_in_place_stay_finite(dtype: torch.dtype, world_size: int) -> None:
    most, two_more = run(grown, world_size, (dtype,))  # type: ignore[misc]
    assert 0 < most < float("inf")
    assert two_more == float("inf")  # so the limit is no lower than it must be


def buffers_after_timing(ctx: RankContext) -> tuple[int, list[float]]:
    """Calls a sample that the bench makes in fp16 at most, and what is in the buffers after it."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        measure = timing.measure
        patch.setattr(timing, "measure", lambda *args: (seen.append(args), measure(*args))[1])
        patch.setattr(time, "perf_counter", lambda: 0.0)  # so that every sample has as many calls as it may
        patch.setattr(all_reduce, "_rows", lambda *args: [])
        all_reduce.all_reduce(ctx, [], [256], 64, torch.float16, 3, ("eager",), {})
    native = seen[0][1][0]
    return seen[0][4], [float(b.abs().max()) for b in native.buffers]


def test_timing_in_place_stays_finite() -> None:
    calls, largest = run(buffers_after_timing, 2)  # type: ignore[misc]
    assert calls == 2 * 18
    assert all(100 < most < float("inf") for most in largest)


def differ(ctx: RankContext) -> list[str | None]:
    mine = [None, "no" if ctx.rank == 2 else None, f"rank {ctx.rank}" if ctx.rank else None]
    found = [baselines.agreed(why) for why in mine]
    everywhere: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(everywhere, found)
    assert everywhere == [found] * ctx.world_size
    return found


def test_ranks_agree_on_what_is_unavailable() -> None:
    assert run(differ, 3) == [None, "no", "rank 1"]


class StandIn:
    """torch.cuda as far as timing needs it, on a CPU: work runs at once, a graph is a list of runs to be repeated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[Callable[[], None]] | None = None
        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": self.graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: None)
        for cls in (
            all_reduce.Ours,
            baselines.Native,
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
        def recorded(way: Any, i: int) -> torch.Tensor:
            if self.captured is None:
                return run(way, i)
            out = way.buffers[i] if way.in_place else torch.empty_like(way.inputs[i])
            self.captured.append(lambda: run(way, i) if way.in_place else out.copy_(run(way, i)))
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
        patch.setattr(timing, "sets_for", lambda n_bytes, device: 3)
        patch.setattr(all_reduce, "HOST_CALLS", 10)
        if what == "replays do nothing":
            patch.setattr(Graph, "replay", lambda self: None)
        if what == "rank 1 cannot capture" and ctx.rank == 1:
            two_shot = baselines.SymmTwoShot.run

            def fail(way: Any, i: int) -> torch.Tensor:
                if stand_in.captured is not None:
                    raise RuntimeError("not while capturing\nand more")
                return two_shot(way, i)

            patch.setattr(baselines.SymmTwoShot, "run", fail)
        return all_reduce.all_reduce(ctx, ["int8"], [16384], 64, BF16, 2, ("eager", "graph"), {"min_bytes": 0})


def others_on_a_stand_in(ctx: RankContext, patch: pytest.MonkeyPatch) -> None:
    """Symmetric memory that gloo sums, and a flashinfer whose ranks differ."""

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
    """A sample is one unit of the stand-in's clock, 1 ms, for ten calls; what `auto` takes is measured, too."""
    found: Any = run(on_a_stand_in, 2, ())
    rows = found["rows"]
    assert set(found["unavailable"]) == {"vllm custom"}
    for mode in timing.MODES:
        mine = [r for r in rows if r["mode"] == mode]
        ways = {r["path"]: r for r in mine}
        assert [r["format"] for r in mine] == [*["bf16"] * 5, "fp8", "int8", "int8"]
        assert set(ways) == {
            "native",
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
        assert [ways[p]["wire_bytes"] for p in ("native", "symm one-shot", "flashinfer fp8")] == [16384, 16384, 8320]
        assert ways["symm two-shot"]["note"] == "in place in symmetric memory, no copy timed; ranks equal"
        assert ways["flashinfer fp8"]["note"] == "new output; ranks differ"
        assert 0.01 < ways["flashinfer fp8"]["error"] < 0.1


def test_a_way_that_cannot_be_captured_on_one_rank_has_no_graph_on_any() -> None:
    found: Any = run(on_a_stand_in, 2, ("rank 1 cannot capture",))
    mine = [r for r in found["rows"] if r["path"] == "symm two-shot"]
    assert [r["mode"] for r in mine] == ["eager"]
    assert mine[0]["note"].endswith("ranks equal; no graph: RuntimeError: not while capturing")
    assert {r["path"] for r in found["rows"] if r["mode"] == "graph"} > {"native", "symm one-shot", "auto"}
    assert found["unavailable"]["bf16 by symm two-shot in a graph"] == "RuntimeError: not while capturing"


def test_without_a_baseline_there_is_no_speedup() -> None:
    case = all_reduce.Case(
        baselines.FlashinferFp8.__new__(baselines.FlashinferFp8), [], timing=timing.Timing({"graph": 1e-3})
    )
    (row,) = all_reduce._rows([all_reduce.Entry(case, "fp8", "flashinfer fp8", "")], "graph", 4096, 2048, BF16, 2)
    assert (row["speedup"], row["over_native"], row["time_us"]) == (None, None, 1000.0)


def test_replays_are_compared_with_eager_calls() -> None:
    with pytest.raises(FlashcommError, match="bf16 by native: a replay gives other values than an eager call"):
        run(on_a_stand_in, 2, ("replays do nothing",))


def test_calls_in_a_sample() -> None:
    """Ten, fewer for huge messages, and each set of inputs at least once."""
    assert timing.sets_for(1 << 20, torch.device("cpu")) == 2
    assert [timing.calls_for(n << 20, 2) for n in (1, 64, 128, 256, 1024)] == [10, 10, 5, 2, 2]
    assert timing.calls_for(1 << 16, 16) == 16


def test_the_last_rows_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that is wrong far from the beginning is not timed."""

    class Wrong:
        encode = staticmethod(torch_codec.encode)

        @staticmethod
        def decode_sum(wires: Any, layout: Any, start: int, stop: int, out: torch.Tensor, dtype: torch.dtype) -> None:
            torch_codec.decode_sum(wires, layout, start, stop, out, dtype)
            out[-1] += 1

    rows = codec_bench.codec(["int4"], [1 << 17], 64, BF16, 1, 1)
    assert next(rows)["ranks"] == 4
    monkeypatch.setattr(codec_bench, "codec_for", lambda device: Wrong)
    with pytest.raises(FlashcommError, match="int4: the codec for cpu differs from the plain one"):
        next(codec_bench.codec(["int4"], [1 << 17], 64, BF16, 1, 1))


def test_codec_columns() -> None:
    row = next(codec_bench.codec(["int4"], [1 << 16], 64, BF16, 1, 2, ranks=3))
    assert row["ranks"] == 3
    assert row["device"] == "cpu"
    wire = (1 << 15) // 2 + (1 << 15) // 64 * 2  # bytes of a rank's buffer: codes and scales
    message = 1 << 16
    moved = row["encode_share"] * (message + wire) / (2 * message)
    assert row["encode_traffic_share"] == pytest.approx(moved, rel=0.02, abs=2e-3)
    moved = row["decode_share"] * (3 * wire + message) / (3 * wire) / 2
    assert row["decode_traffic_share"] == pytest.approx(moved, rel=0.02, abs=2e-3)
    assert row["encode_us"] == pytest.approx(message / row["encode"] / 1e3, rel=0.02, abs=0.1)
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="no CUDA device"):
            next(codec_bench.codec(["int4"], [1 << 16], 64, BF16, 1, 2, "cuda"))


def drawn(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path) -> dict[str, Any]:
    """The lines of the left panel by label: their line style and their times in ms."""
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot([source], target)
    lines = figures[0].axes[0].get_lines()
    return {line.get_label(): (line.get_linestyle(), list(line.get_ydata())) for line in lines}


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    common = {"type": "bfloat16", "world": 2, "speedup": 1.0, "machine": "m", "torch": "t", "date": "d"}
    rows = []
    for size in (1024, 2048):
        for mode, us in (("eager", 1000 * size), ("graph", size)):
            for fmt, path in (("bf16", "native"), ("bf16", "one_shot"), ("int4", "auto"), ("int4", f"way of {size}")):
                rows.append({"size": size, "format": fmt, "path": path, "mode": mode, "time_us": us, **common})
        rows.append({"size": size, "format": "fp8", "path": "flashinfer fp8", "mode": "eager", "time_us": 7, **common})
    source = tmp_path / "new.csv"
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = drawn(monkeypatch, source, tmp_path / "new.svg")
    assert lines == {
        "native": ("--", [1.024, 2.048]),
        "bf16 one_shot": (":", [1.024, 2.048]),
        "int4": ("-", [1.024, 2.048]),
        "flashinfer fp8 (eager)": ("-.", [0.007, 0.007]),
    }
    old = Path(__file__).parent.parent.parent / "results" / "allreduce-2ranks-1gbit.csv"
    lines = drawn(monkeypatch, old, tmp_path / "old.svg")
    assert set(lines) == {"best lossless", "int8", "int6-had", "int4-had", "int4"}
