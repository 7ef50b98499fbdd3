"""`flashcomm predict`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from flashcomm.bench.records import human_bytes
from flashcomm.cli import options
from flashcomm.cli.console import console, print_notes, print_table, write_rows
from flashcomm.errors import SettingsError
from flashcomm.predict import fit, machines, model, report
from flashcomm.settings import DEFAULT_FORMAT


def predict(
    model_: Annotated[
        str, typer.Option("--model", help="A shape that `flashcomm ttft` knows, or the path of a config.json.")
    ] = "llama-3-8b",
    gpu: Annotated[str, typer.Option(help=f"{', '.join(machines.GPUS)}; or another name with its rates.")] = "h200",
    world_size: options.World = 2,
    link: Annotated[
        str,
        typer.Option(
            help="Between the ranks of a host: nvlink; host-memory (no peer access); auto: nvlink if there is one."
        ),
    ] = "auto",
    hosts: Annotated[int, typer.Option(min=1, help="Number of hosts with equally many ranks.")] = 1,
    host_link: Annotated[str, typer.Option(help="Between hosts: the rate of Ethernet, of each host.")] = "25gbit",
    shared: Annotated[int, typer.Option(min=1, help="Ranks that share one link, as behind one PCIe switch.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Prompt length.")] = 1024,
    formats: Annotated[
        str, typer.Option(help="Formats, separated by commas.")
    ] = f"none,int8,{DEFAULT_FORMAT},int4-had,int4",
    tflops: Annotated[float | None, typer.Option(min=1, help="Dense bf16 TFLOPS of the GPU.")] = None,
    memory_gbs: Annotated[float | None, typer.Option(min=1, help="GB/s of the GPU's memory.")] = None,
    link_gbs: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s each way of the link, by its data sheet.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Instead, predict every measurement in this folder of CSV files.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the gain against link and ranks, into an .svg or .png.")
    ] = None,
    csv: options.Csv = None,
    json: options.Json = False,
) -> None:
    """Predict all-reduces and time to first token by format, on a machine that need not be here."""
    if check is not None:
        _check(check, csv, json)
        return
    names = options.formats_of(formats)
    shape = report.shape_of(model_)
    shape.check_ranks(world_size)
    if world_size % hosts or world_size % shared:
        raise SettingsError(f"--world {world_size}: it must be a multiple of --hosts {hosts} and of --shared {shared}")
    found = machines.gpu_of(gpu, tflops, memory_gbs)
    local = machines.link_of(link, found, world_size // hosts, link_gbs)
    between = machines.ethernet(host_link) if hosts > 1 else None
    machine = model.Machine(found, local, world_size, hosts, between, shared)
    if plot:
        report.draw(machine, shape, [name for name in names if name != "none"], batch, tokens, plot)
    rows = report.rows_of(machine, shape, names, batch, tokens)
    same = {"model": shape.name, "gpu": gpu, "link": local.name, "link_gbs": round(local.gbs, 2), "world": world_size}
    same |= {"hosts": hosts, "host_link": host_link if hosts > 1 else "", "batch": batch, "tokens": tokens}
    rows = [{**same, "predicted": True, **row} for row in rows]
    if not write_rows(rows, csv, json):
        _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    shown = [
        row
        | {
            "label": row["format"] if row["algorithm"] != "backend" else "backend",
            "ttft": round(1e3 * row["ttft_s"], 1),
            "overlap": round(1e3 * row["overlap_s"], 1),
            "share_pct": round(100 * row["share"]),
            "sent_gb": round(row["wire_bytes"] / 1e9, 2),
            "rise": row["rise_pct"] and round(row["rise_pct"], 2),
        }
        for row in rows
    ]
    columns = {"label": "format", "algorithm": "by", "all_reduce_us": "all-reduce us", "all_reduce_gain": "gain"}
    columns |= {"share_pct": "share %", "ttft": "TTFT ms", "gain": "gain", "overlap": "overlap ms"}
    columns |= {"overlap_gain": "gain", "sent_gb": "GB sent", "rise": "rise %"}
    hosts = f" on {first['hosts']} hosts, {first['host_link']} each," if first["hosts"] > 1 else ""
    what = f"predicted: {first['model']}, {first['batch']} x {first['tokens']} tokens"
    ranks = f"{first['world']} x {first['gpu']},{hosts} {first['link']} ({first['link_gbs']:g} GB/s)"
    print_table(f"{what}, {ranks}", columns, shown)
    memory = human_bytes(first["memory_bytes"])
    print_notes(
        [
            f"compute {1e3 * first['compute_s']:.1f} ms: without overlap no format gains more than {first['limit']}x; "
            f"weights and cache take {memory} a rank",
            "rise in perplexity: SmolLM2-135M on as many ranks; `flashcomm eval` measures your model",
        ]
    )


def is_off(error_pct: float) -> bool:
    """Return whether a prediction is so far off that docs/predict.md must say why."""
    return abs(error_pct) > 25


def _check(results: Path, csv: Path | None, json: bool) -> None:
    """Print the median error by file, and every row that is off by more than 25 %."""
    if not results.is_dir():
        raise SettingsError(f"--check {results}: give the folder of CSV files of bench and ttft")
    found = list(fit.check(results))
    rows = [{**m._asdict(), "error_pct": round(100 * m.error, 1)} for m in found]
    if not rows:
        raise SettingsError(f"--check {results}: it has no CSV file of bench or ttft")
    if write_rows(rows, csv, json):
        return
    files: dict[str, list[float]] = {}
    for row in rows:
        files.setdefault(row["file"], []).append(abs(row["error_pct"]))
    files["all"] = [abs(row["error_pct"]) for row in rows]
    shown: list[dict[str, Any]] = [
        {
            "file": f,
            "rows": len(e),
            "median": round(statistics.median(e), 1),
            "most": max(e),
            "off": sum(map(is_off, e)),
        }
        for f, e in files.items()
    ]
    heads = {"file": "file", "rows": "rows", "median": "median error %", "most": "largest %", "off": "over 25 %"}
    print_table("predicted and measured", heads, shown)
    for row in rows:
        if is_off(row["error_pct"]):
            times = f"measured {row['measured']:.0f} us, predicted {row['predicted']:.0f}"
            console.print(f"{row['error_pct']:+.0f} %  {row['file']}: {row['what']}: {times}", markup=False)
