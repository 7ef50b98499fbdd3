"""The rows of `bench all_reduce`, and that wrong results stop it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashcomm.bench import all_reduce, baselines, timing
from flashcomm.errors import FlashcommError
from flashcomm.testing import RankContext, run
from flashcomm.wire.format import UNCOMPRESSED

BF16 = torch.bfloat16
COLUMNS = [
    *("size", "count", "type", "redop", "format", "world", "path", "mode", "transport", "time_us", "host_us", "algbw"),
    *("busbw", "wire_bytes", "error", "snr_db", "speedup", "over_backend", "note"),
]


def measured(ctx: RankContext, *args: Any) -> Any:
    only_auto = all_reduce.all_reduce(ctx, ["int8"], [4096], 576, BF16, 1, ("eager",), {"min_bytes": 0}, True)
    return all_reduce.all_reduce(ctx, *args) | {"only_auto": only_auto}


def test_rows() -> None:
    args = (["int8", "int4/int8"], [20000, 40000], 576, BF16, 2, ("eager",), {"min_bytes": 0})
    found: Any = run(measured, 3, args)
    rows = found["rows"]
    assert all(list(row) == COLUMNS for row in rows)
    for size in (20000, 40000):
        mine = [r for r in rows if r["size"] == size]
        paths = [(r["format"], r["path"]) for r in mine]
        assert sorted(paths[:3]) == [(UNCOMPRESSED, "backend"), (UNCOMPRESSED, "one_shot"), (UNCOMPRESSED, "two_shot")]
        assert paths[3:5] == [("int8", "auto"), ("int4/int8", "auto")]
        assert [r["format"] for r in mine[5:]] == ["int8", "int4/int8"]
        assert {r["path"] for r in mine[5:]} <= {"one_shot", "two_shot"}
        assert {r["note"] for r in mine[3:5]} == {"takes backend; new output"}  # below 64K
        assert {r["mode"] for r in mine} == {"eager"}

        uncompressed, by = mine[:3], {r["path"]: r for r in mine[:3]}
        best = min(uncompressed, key=lambda r: r["time_us"])
        assert [r["speedup"] for r in uncompressed] == sorted(r["speedup"] for r in uncompressed)
        assert best["speedup"] == 1.0 == by["backend"]["over_backend"]
        for row in mine:
            assert row["speedup"] == pytest.approx(best["time_us"] / row["time_us"], rel=1e-2, abs=2e-3)
            assert row["over_backend"] == pytest.approx(by["backend"]["time_us"] / row["time_us"], rel=1e-2, abs=2e-3)
        assert by["backend"]["note"] == "in place"
        assert by["backend"]["wire_bytes"] == 4 * size // 3
        assert all(r["error"] < 0.01 for r in uncompressed)
        assert mine[-1]["error"] > 0.01
    only_auto = found["only_auto"]
    assert [(r["format"], r["path"]) for r in only_auto["rows"]] == [(UNCOMPRESSED, "backend"), ("int8", "auto")]
    assert only_auto["unavailable"] == {}
    missing = found["unavailable"]
    assert set(missing) == {"symm one-shot", "symm two-shot", "vllm custom", "flashinfer fp8"}
    assert set(missing.values()) == {"for CUDA tensors only"}


def test_the_rows_of_large_messages_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "BLOCK_NUMEL", 64)
    x = all_reduce.example((5, 32), BF16, 0, 1)
    assert x.shape == (5, 32)
    assert torch.equal(x[:2], x[2:4])
    assert torch.equal(x[:1], x[4:])
    assert not torch.equal(x[0], x[1])


def wrong_on_one_rank(ctx: RankContext, whose: str) -> Any:
    cls: Any = {"ours": all_reduce.Ours, "backend": baselines.Backend}[whose]
    right = cls.run

    def off(self: Any, i: int) -> torch.Tensor:
        out = right(self, i).clone()
        out.view(-1)[7] *= 1.5 if ctx.rank == 1 else 1.0
        return out

    cls.run = off
    return all_reduce.all_reduce(ctx, ["int8"], [4096], 64, BF16, 1, ("eager",), {"min_bytes": 0})


@pytest.mark.parametrize(
    ("whose", "where"), [("ours", f"{UNCOMPRESSED} by one_shot"), ("backend", f"{UNCOMPRESSED} by backend")]
)
def test_a_wrong_result_stops_the_bench(whose: str, where: str) -> None:
    with pytest.raises(FlashcommError, match=f"{where}: . of 2048 values differ from the reference or between ranks"):
        run(wrong_on_one_rank, 2, (whose,))


def test_without_a_baseline_there_is_no_speedup() -> None:
    case = all_reduce.Case(
        baselines.FlashinferFp8.__new__(baselines.FlashinferFp8), [], timing=timing.Timing({"graph": 1e-3})
    )
    (row,) = all_reduce._rows([all_reduce.Entry(case, "fp8", "flashinfer fp8", "")], "graph", 4096, BF16, 2)
    assert (row["speedup"], row["over_backend"], row["time_us"]) == (None, None, 1000.0)
