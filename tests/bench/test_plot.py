"""Plots of CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashcomm.bench import records
from flashcomm.bench.plot import plot
from flashcomm.errors import InputError
from flashcomm.wire.format import UNCOMPRESSED

RESULTS = Path(__file__).parent.parent.parent / "results"


def drawn(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path) -> dict[str, Any]:
    """Return the line style and the times in us of each line of the left panel, by label."""
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot([source], target)
    lines = figures[0].axes[0].get_lines()
    return {line.get_label(): (line.get_linestyle(), list(line.get_ydata())) for line in lines}


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    common = {"type": "bfloat16", "world": 2, "over_backend": 1.0}
    rows = []
    for size in (1024, 2048):
        for mode, us in (("eager", 1000 * size), ("graph", size)):
            for fmt, path in (
                (UNCOMPRESSED, "backend"),
                (UNCOMPRESSED, "one_shot"),
                ("int4", "auto"),
                ("int4", f"path of {size}"),
            ):
                rows.append({"size": size, "format": fmt, "path": path, "mode": mode, "time_us": us, **common})
        rows.append({"size": size, "format": "fp8", "path": "flashinfer fp8", "mode": "eager", "time_us": 7, **common})
    source = tmp_path / "new.csv"
    records.write_csv(source, rows)
    lines = drawn(monkeypatch, source, tmp_path / "new.svg")
    assert lines == {
        "gloo": ("--", [1024, 2048]),
        "uncompressed one_shot": (":", [1024, 2048]),
        "int4": ("-", [1024, 2048]),
        "flashinfer fp8 (eager)": ("-.", [7, 7]),
    }


def test_a_picture_of_vllm_has_a_bar_for_each_measurement_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot([RESULTS / "vllm-h200x2-no-peer-access.csv"], tmp_path / "vllm.svg")
    rows = [r for r in records.read_csv(RESULTS / "vllm-h200x2-no-peer-access.csv") if r["format"] != "unset"]
    axis = figures[0].axes[0]
    assert sorted(bar.get_width() for bar in axis.patches) == sorted(float(r["over_vllm"]) for r in rows)
    assert [line.get_xdata() for line in axis.get_lines()] == [[1.0, 1.0]], "vLLM alone"


def test_pictures_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    lines = drawn(monkeypatch, RESULTS / "allreduce-2ranks-1gbit.csv", tmp_path / "cpu.svg")
    uncompressed = {"gloo", "uncompressed one_shot", "uncompressed two_shot"}
    assert set(lines) == {*uncompressed, "int8", "int6-had", "int4-had", "int4"}
    lines = drawn(monkeypatch, RESULTS / "h200x2-nvlink.csv", tmp_path / "gpu.svg")
    assert lines["NCCL"][0] == "--"
    assert {"uncompressed one_shot", "symm two-shot", "int4"} < set(lines)


def test_a_part_of_a_file_for_dark_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    source, where = RESULTS / "ttft-h200x2-no-peer-access.csv", {"model": "llama-3.2-1b", "overlap": "False"}
    for dark in (False, True):
        plot([source], tmp_path / f"{dark}.svg", where, dark)
    for figure, text in zip(figures, ("black", "white"), strict=True):
        (axis,) = figure.axes
        assert [label.get_text() for label in axis.get_yticklabels()] == ["bf16, NCCL", "int4-had"]
        assert [label.get_color() for label in axis.get_yticklabels()] == [text, text]
    with pytest.raises(InputError, match="has no rows"):
        plot([source], tmp_path / "x.svg", {"model": "gpt-2"})


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv cannot be read"):
        plot([tmp_path / "none.csv"], tmp_path / "x.svg")
    with pytest.raises(InputError, match=r"give a name that ends in \.svg or \.png"):
        plot([RESULTS / "allreduce-2ranks-1gbit.csv"], tmp_path / "x.pdf")
    with pytest.raises(InputError, match="has no rows of `flashcomm bench`"):
        plot([RESULTS / "codec-1-thread.csv"], tmp_path / "x.svg")
