"""`flashcomm plot`: draws a CSV file of `bench`, `ttft` or `eval`, or of scripts/bench-vllm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashcomm.bench.records import BACKEND, human_bytes, read_csv
from flashcomm.bench.ttft import label_of
from flashcomm.errors import InputError, UnavailableError
from flashcomm.wire.format import UNCOMPRESSED

Rows = Sequence[Mapping[str, str]]


def plot(sources: Sequence[Path], target: Path, where: Mapping[str, str] | None = None, dark: bool = False) -> None:
    """Draw CSV files.

    The kind of plot depends on their columns: time and speed-up by size; time to first token by format, with a panel
    for each model, link and batch; KL divergence by bits on the wire; sensitivity by layer; vLLM with flashcomm over
    vLLM alone.

    Args:
        sources: CSV files. Several are allowed only for `flashcomm ttft`.
        target: The file to write, .svg or .png.
        where: Draw only rows that have these values in these columns.
        dark: Draw in light colors on no background, for dark pages.

    Raises:
        InputError: The files have no rows to draw, or cannot be drawn together.
        UnavailableError: matplotlib is not installed.
    """
    import_pyplot(target)
    rows = [row for source in sources for row in read_csv(source)]
    rows = [row for row in rows if all(row.get(key) == value for key, value in (where or {}).items())]
    if len(sources) > 1 and not all("ttft_s" in row for row in rows):
        raise InputError(
            f"{len(sources)} files: several files can be drawn together only if all are of `flashcomm ttft`"
        )
    from matplotlib import style

    with style.context("dark_background" if dark else "default"):
        _draw(rows, sources, target)


def import_pyplot(target: Path) -> Any:
    """Import matplotlib's pyplot to draw into a file, without a display.

    Raises:
        InputError: The file's name ends in neither .svg nor .png.
        UnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as why:
        raise UnavailableError("plotting needs matplotlib: pip install 'flashcomm[plot]'") from why
    if target.suffix not in (".svg", ".png"):
        raise InputError(f"{target}: give a name that ends in .svg or .png")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, target: Path) -> None:
    """Write a figure to a file and close it. The same figure gives the same file."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "flashcomm"
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure.savefig(target, metadata=metadata, dpi=150, transparent=_is_dark())
    pyplot.close(figure)


def _draw(rows: Rows, sources: Sequence[Path], target: Path) -> None:
    """Draw the kind of plot that the columns of the rows allow, into a file."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    if rows and "time_us" in rows[0]:
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
        _bench(rows, *axes)
        labels = axes[0].get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=min(5, -(-len(labels[0]) // 2)), fontsize=8)
    elif rows and "ttft_s" in rows[0]:
        cases: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
        for row in rows:
            cases.setdefault(tuple(row.get(key, "") for key in _PANEL), []).append(row)
        columns = min(2, len(cases))
        lines = -(-len(cases) // columns)
        most = max(len(mine) for mine in cases.values())
        size = (7.0 if columns == 1 else 6.0 * columns, lines * max(2.5, 0.3 * most + 1.2) + 0.3)
        figure, axes = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        for spare in axes.flat[len(cases) :]:
            spare.set_axis_off()
        for mine, axis in zip(cases.values(), axes.flat, strict=False):
            _ttft(mine, axis)
        colors = {
            "compute": _gray(0.7),
            f"all-reduces by {_backend(rows)}": _gray(0.4),
            "all-reduces by flashcomm": "C0",
        }
        patches = [Patch(color=color, label=label) for label, color in colors.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8)
    elif rows and "rise_pct" in rows[0]:
        worlds = list(dict.fromkeys(row["world"] for row in rows))
        size = (4.5 * len(worlds) + 0.5, 4.5)
        figure, panels = pyplot.subplots(1, len(worlds), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for world_size, axis in zip(worlds, panels[0], strict=True):
            _pareto([row for row in rows if row["world"] == world_size], axis)
    elif rows and "layer" in rows[0]:
        figure, axis = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
        _layers(rows, axis)
    elif rows and "over_vllm" in rows[0]:
        figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        _vllm(rows, axis)
    else:
        raise InputError(
            f"{', '.join(map(str, sources))} has no rows of `flashcomm bench`, `ttft` or `eval`: write one with --csv"
        )
    where = rows[0]
    source = f"{where['machine']}, torch {where['torch']}, {where['date']}"
    figure.suptitle(source, x=0.995, ha="right", fontsize=6, color="0.5")  # a title has a line of its own
    save(figure, target)


def _bench(rows: Rows, time_axis: Any, speed_axis: Any) -> None:
    """Draw time and speed-up by size: a line for each format, and a gray, dashed line for each baseline.

    A line has the rows of CUDA graphs, if there are any. The route of `auto` is one of the other lines, so it is left
    out.
    """
    lines: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        if row["path"] != "auto":
            lines.setdefault(_line_of(row), []).append(row)
    has_graphs = any(row.get("mode") == "graph" for row in rows)
    for name in sorted(lines, key=lambda name: name not in _GRAYS):  # the baselines first, below the others
        mine = lines[name]
        graphs = [row for row in mine if row.get("mode") == "graph"]
        label = _backend(rows) if name == BACKEND else name
        label += " (eager)" if has_graphs and not graphs else ""
        mine = graphs or mine
        sizes = [int(row["size"]) for row in mine]
        color, dashes = _GRAYS.get(name, (None, "-"))
        style = {"color": color and _gray(color), "linestyle": dashes, "linewidth": 1.0 if color else 1.5}
        time_axis.plot(sizes, [float(row["time_us"]) for row in mine], marker=".", label=label, **style)
        speed_axis.plot(sizes, [float(row["over_backend"] or "nan") for row in mine], marker=".", label=label, **style)
    time_axis.set(yscale="log", ylabel="time, us")
    time_axis.yaxis.set_major_formatter("{x:,.0f}")
    speed_axis.set(ylabel=f"speed-up over {_backend(rows)}", ylim=(0, None))
    powers = sorted({int(row["size"]).bit_length() - 1 for row in rows})
    ticks = [1 << power for power in range(powers[0] + powers[0] % 2, powers[-1] + 1, 2)]
    for axis in (time_axis, speed_axis):
        axis.set(xscale="log", xlabel="message of bf16" if rows[0]["type"] == "bfloat16" else "message")
        axis.set_xticks(ticks, [_size(n) for n in ticks], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    link = "" if rows[0].get("link", "none") == "none" else f" over {rows[0]['link']}"
    mode = ", CUDA graphs" if has_graphs else ""
    time_axis.set_title(f"{rows[0].get('op', 'all-reduce')}, {rows[0]['world']} ranks{link}{mode}", loc="left")


def _size(n_bytes: int) -> str:
    """Return a power of two as people write it, such as 64 KB."""
    return f"{n_bytes >> 20} MB" if n_bytes >= 1 << 20 else f"{n_bytes >> 10} KB" if n_bytes >= 1024 else f"{n_bytes} B"


def _backend(rows: Rows) -> str:
    """Return the name of the backend that the rows were measured with."""
    return "NCCL" if "NVIDIA" in rows[0]["machine"] else "gloo"


def _is_dark() -> bool:
    from matplotlib import rcParams

    return bool(rcParams["text.color"] == "white")


def _gray(level: float) -> str:
    """Return matplotlib's name of a gray, 0 being the color of text and 1 that of the page."""
    return f"{1 - level if _is_dark() else level:.2f}"


_GRAYS = {  # baselines
    BACKEND: (0.2, "--"),
    "symm one-shot": (0.7, "--"),
    "symm two-shot": (0.5, "--"),
    "vllm custom": (0.4, "-."),
    "flashinfer fp8": (0.75, "-."),
    "uncompressed one_shot": (0.6, ":"),
    "uncompressed two_shot": (0.4, ":"),
}


def _line_of(row: Mapping[str, str]) -> str:
    """Return the name of the line that a row of `bench` belongs to."""
    if row["format"] != UNCOMPRESSED:
        return row["path"] if row["path"] in _GRAYS else row["format"]
    return f"uncompressed {row['path']}" if row["path"] in ("one_shot", "two_shot") else row["path"]


_PANEL = ("model", "layers", "link", "batch", "tokens", "compiled")


def _ttft(rows: Rows, axis: Any) -> None:
    """Draw a bar for each row: the time to compute, and the rest, the time of all-reduces."""
    is_baseline = [r.get("path", BACKEND) == BACKEND and r["format"] == UNCOMPRESSED for r in rows]
    formats = [Path(r["format"]).name if r["format"].endswith(".json") else r["format"] for r in rows]
    formats = [f"bf16, {_backend(rows)}" if b else fmt for b, fmt in zip(is_baseline, formats, strict=True)]
    names = [label_of(fmt, "auto", r.get("overlap") == "True") for fmt, r in zip(formats, rows, strict=True)]
    unit, scale = ("ms", 1e3) if max(float(row["ttft_s"]) for row in rows) < 1 else ("s", 1.0)
    compute = [scale * float(row["compute_s"]) for row in rows]
    total = [scale * float(row["ttft_s"]) for row in rows]
    rest = [max(0.0, t - c) for t, c in zip(total, compute, strict=True)]
    places = range(len(rows))
    colors = [_gray(0.4) if baseline else "C0" for baseline in is_baseline]
    axis.barh(places, [t - r for t, r in zip(total, rest, strict=True)], color=_gray(0.7))
    axis.barh(places, rest, left=compute, color=colors)
    axis.set_yticks(places, names)
    for y, row in enumerate(rows):
        time = f"{total[y]:.1f} ms" if unit == "ms" else f"{total[y]:.2f} s"
        text = f" {time}, {float(row['speedup']):.2f}x, {human_bytes(float(row['wire_bytes']))}"
        axis.text(total[y], y, text, va="center", fontsize=8 if len(rows) < 8 else 7)
    axis.set(xlabel=f"time to first token, {unit}; speed-up; bytes a rank sends", xlim=(0, max(total) * 1.9))
    axis.invert_yaxis()
    first = rows[0]
    link = "" if first["link"] == "none" else f", {first['link']}"
    cut = (
        "" if first.get("layers") == first.get("all_layers") else f", {first['layers']} of {first['all_layers']} layers"
    )
    batch = f"{first['batch']} x " if first.get("batch", "1") != "1" else ""
    compiled = ", compiled" if first.get("compiled") == "True" else ""
    title = f"{first['model']}{cut}, {batch}{first['tokens']} tokens,\n{first['world']} ranks{link}{compiled}"
    axis.set_title(title, loc="left", fontsize=10)


def _vllm(rows: Rows, axis: Any) -> None:
    """Draw what vLLM gains: for each measurement a bar for each format, and a line at vLLM alone."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows if row["format"] != "unset"))
    for i, fmt in enumerate(formats):
        mine = {row["cell"]: row for row in rows if row["format"] == fmt}
        places = [cells.index(cell) + 0.8 * (i / len(formats) - 0.5) + 0.4 / len(formats) for cell in mine]
        gains = [float(row["over_vllm"]) for row in mine.values()]
        axis.barh(places, gains, height=0.75 / len(formats), color=f"C{i}", label=fmt)
        for y, x, row in zip(places, gains, mine.values(), strict=True):
            axis.text(x, y, f" {x:.2f}x, {_median(row)}", va="center", fontsize=8)
    alone = {row["cell"]: row for row in rows if row["format"] == "unset"}
    names = [f"{cell}\nalone {_median(alone[cell])}" for cell in cells]
    axis.set_yticks(range(len(cells)), names, fontsize=8)
    axis.axvline(1.0, color=_gray(0.4), linestyle="--", linewidth=1.0)
    axis.set(xlabel="speed-up over vLLM alone", xlim=(0, 1.35 * max(float(row["over_vllm"]) for row in rows)))
    axis.invert_yaxis()
    first = rows[0]
    axis.set_title(f"vLLM {first['vllm']}, {first['model']}, {first['link']}, {first['mode']}", loc="left", fontsize=10)
    axis.legend(fontsize=8, loc="center right")


def _median(row: Mapping[str, str]) -> str:
    return f"{float(row['median']):,.{1 if row['unit'] == 'ms' else 0}f} {row['unit']}"


def _pareto(rows: Rows, axis: Any) -> None:
    """Draw KL divergence by bits per value, with a line for each family. Each point shows the rise in perplexity."""
    families = {"plans": "-o", "-had formats": "--s", "plain formats": ":^"}
    for family, style in families.items():
        mine = [r for r in rows if _family(r["format"]) == family and float(r["kl"]) > 0]
        mine.sort(key=lambda r: float(r["bits"]))
        if not mine:
            continue
        bits, loss = [float(r["bits"]) for r in mine], [float(r["kl"]) for r in mine]
        axis.plot(bits, loss, style, label=family, markersize=4)
        for row, x, y in zip(mine, bits, loss, strict=True):
            text = f"{row['format'].removesuffix('.json')} {float(row['rise_pct']):+.2g} %"
            above = family != "plans"
            place = {"xytext": (3, 3) if above else (-3, -4), "textcoords": "offset points"}
            axis.annotate(
                text, (x, y), fontsize=5, ha="left" if above else "right", va="bottom" if above else "top", **place
            )
    axis.set(yscale="log", xlabel="bits per value on the wire, all included")
    axis.margins(x=0.15)
    axis.set_title(f"{rows[0]['world']} ranks, {rows[0]['algorithm']}", loc="left")
    axis.grid(alpha=0.3)
    if axis.get_subplotspec().is_first_col():
        axis.set_ylabel("KL divergence, nats per token")
        axis.legend()


def _family(fmt: str) -> str:
    if fmt.endswith(".json"):
        return "plans"
    return "-had formats" if "-had" in fmt else "plain formats"


def _layers(rows: Rows, axis: Any) -> None:
    """Draw KL divergence if one layer is quantized alone, by layer. Colors show formats, markers kinds of layers."""
    names = list(dict.fromkeys(row["layer"] for row in rows))
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for i, fmt in enumerate(dict.fromkeys(row["format"] for row in rows)):
        for kind, marker in zip(kinds, "ov^sD*", strict=False):
            mine = [r for r in rows if r["format"] == fmt and r["layer"].endswith(kind)]
            places = [int("0" + "".join(c for c in r["layer"] if c.isdigit())) for r in mine]
            label = f"{fmt}, {kind}"
            axis.plot(places, [float(r["kl"]) for r in mine], marker, color=f"C{i}", markersize=4, label=label)
    axis.set(yscale="log", xlabel="layer", ylabel="KL divergence, nats per token, that layer alone")
    axis.set_title(f"{rows[0]['model']}, {rows[0]['world']} ranks", loc="left")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
