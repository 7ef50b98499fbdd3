"""`flashcomm plot`: a picture of a CSV that `bench` or `ttft` wrote. It draws figures and measures none."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashcomm.cli.report import human
from flashcomm.errors import InputError, UnavailableError

Rows = Sequence[Mapping[str, str]]


def plot(source: Path, target: Path) -> None:
    """Draw source (a CSV) into target (.svg or .png): time and speed-up by size, or time to first token by format.

    Raises InputError for a file that is neither; UnavailableError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as why:
        raise UnavailableError("plotting needs matplotlib: pip install 'flashcomm[plot]'") from why
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flashcomm"  # the same rows give the same file
    from matplotlib import pyplot

    try:
        with source.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as why:
        raise InputError(f"{source} cannot be read: {why.strerror}") from why
    if target.suffix not in (".svg", ".png"):
        raise InputError(f"{target}: give a name that ends in .svg or .png")
    if rows and "time_us" in rows[0]:
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        _bench(rows, *axes)
    elif rows and "ttft_s" in rows[0]:
        figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
        _ttft(rows, axis)
    else:
        raise InputError(f"{source} holds no rows of `flashcomm bench` or `flashcomm ttft`: write one with --csv")
    where = rows[0]
    figure.text(0.005, 0.005, f"{where['machine']}, torch {where['torch']}, {where['date']}", fontsize=6, color="0.5")
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=150)
    pyplot.close(figure)


def _bench(rows: Rows, time_axis: Any, speed_axis: Any) -> None:
    for fmt in dict.fromkeys(row["format"] for row in rows):
        mine = [row for row in rows if row["format"] == fmt]
        sizes = [int(row["size"]) for row in mine]
        label = "best lossless" if fmt == "bf16" else fmt
        time_axis.plot(sizes, [float(row["time_us"]) / 1e3 for row in mine], marker=".", label=label)
        speed_axis.plot(sizes, [float(row["speedup"]) for row in mine], marker=".", label=label)
    time_axis.set(yscale="log", ylabel="time, ms")
    speed_axis.set(ylabel="speed-up over the best lossless path", ylim=(0, None))
    for axis in (time_axis, speed_axis):
        axis.set(xscale="log", xlabel="message, bytes of bf16" if rows[0]["type"] == "bfloat16" else "message, bytes")
        axis.grid(alpha=0.3)
        axis.legend()
    link = "" if rows[0].get("link", "none") == "none" else f" over {rows[0]['link']}"
    time_axis.set_title(f"all-reduce, {rows[0]['world']} ranks{link}", loc="left")


def _ttft(rows: Rows, axis: Any) -> None:
    names = [row["format"] for row in rows]
    compute = [float(row["compute_s"]) for row in rows]
    total = [float(row["ttft_s"]) for row in rows]
    rest = [t - c for t, c in zip(total, compute, strict=True)]
    axis.barh(names, compute, color="0.7", label="compute")
    axis.barh(names, rest, left=compute, label="all-reduces")
    for y, row in enumerate(rows):
        text = f" {total[y]:.2f} s, {float(row['speedup']):.2f}x, {human(float(row['wire_bytes']))} a rank"
        axis.text(total[y], y, text, va="center", fontsize=8)
    axis.set(xlabel="time to first token, s", xlim=(0, max(total) * 1.5))
    axis.invert_yaxis()
    link = "" if rows[0]["link"] == "none" else f" over {rows[0]['link']}"
    axis.set_title(f"{rows[0]['model']}, {rows[0]['tokens']} tokens, {rows[0]['world']} ranks{link}", loc="left")
    axis.legend(loc="lower right")
