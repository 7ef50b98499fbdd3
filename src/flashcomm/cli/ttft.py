"""`flashcomm ttft`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashcomm.bench import records, shapes
from flashcomm.bench import ttft as bench
from flashcomm.cli import options
from flashcomm.cli.console import err_console, print_notes, print_table, run_ranks, write_rows
from flashcomm.errors import SettingsError
from flashcomm.ranks.link import parse_rate
from flashcomm.settings import DEFAULT_FORMAT
from flashcomm.wire.format import UNCOMPRESSED


def ttft(
    model: Annotated[
        str,
        typer.Option(
            help="Model directory, or a shape with random weights: llama-3.2-1b, llama-3-8b, llama-3-70b, qwen3-32b."
        ),
    ],
    world_size: options.World = 2,
    formats: Annotated[
        str,
        typer.Option(help=f"Formats and plans, separated by commas; on GPUs {UNCOMPRESSED} is flashcomm uncompressed."),
    ] = f"{UNCOMPRESSED},int8,{DEFAULT_FORMAT},int4-had",
    batch: Annotated[str, typer.Option(help="Prompts at a time; several, separated by commas.")] = "1",
    tokens: Annotated[str, typer.Option(help="Prompt length; several, separated by commas.")] = "512",
    layers: Annotated[int | None, typer.Option(help="Number of layers to keep. [default: all that fit]")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Turns; the median counts. [default: 3, 5 on CUDA]")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the stack of decoder layers.")] = False,
    overlap: Annotated[
        bool,
        typer.Option("--overlap", help="Measure two-batch overlap, too: of sequences, or of blocks of one."),
    ] = False,
    min_bytes: options.MinBytes = None,
    algorithm: options.Algorithm = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    link: options.Link = None,
    timeout: options.Timeout = 600,
    csv: options.Csv = None,
    json: options.Json = False,
) -> None:
    """Time to first token by wire format, the share of communication, and speed-up over uncompressed all-reduces."""
    names = options.formats_of(formats, plans=True)
    batches, lengths = options.numbers_of("--batch", batch), options.numbers_of("--tokens", tokens)
    where, kind = options.device_of(device, world_size), options.dtype_of(dtype)
    settings = options.settings_of(names[0], where, min_bytes=min_bytes, algorithm=algorithm)
    if overlap and compile:
        raise SettingsError(
            "--overlap and --compile: micro-batches of a compiled stack cannot take turns; give one of them"
        )
    if overlap and any(b == 1 and n < 4 for b in batches for n in lengths):
        raise SettingsError(f"--overlap --tokens {tokens}: one prompt is split into blocks of tokens; give at least 4")
    found = shapes.find_model(model, world_size, layers, where, kind)
    if layers is None and found.layers:
        err_console.print(
            f"{found.layers} of the {found.all_layers} layers of {model} fit and are measured; set --layers for others"
        )
    request = bench.Request(
        found,
        names,
        batches,
        lengths,
        repeats or (5 if where == "cuda" else 3),
        kind,
        parse_rate(link) if link else None,
        compile,
        overlap,
        settings,
    )
    measured = run_ranks(bench.ttft, world_size, (request,), quiet=json, device=where, link=link, timeout_s=timeout)
    if measured is None:
        return
    same = {"model": found.label, "link": bench.link_of(where, link), "device": where, "dtype": dtype}
    rows = [same | row | {"all_layers": found.all_layers} for row in measured]
    if not write_rows(rows, csv, json, model=found.label, link=same["link"]):
        _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    cut = "" if first["layers"] == first["all_layers"] else f", {first['layers']} of {first['all_layers']} layers"
    over = "" if first["link"] == "none" else f" over {first['link']}"
    columns = {"batch": "batch", "tokens": "tokens"} if len({(r["batch"], r["tokens"]) for r in rows}) > 1 else {}
    sizes = "" if columns else f", {first['batch']} x {first['tokens']} tokens"
    columns |= {"label": "format", "ttft": "TTFT ms", "compute": "compute ms", "sent": "sent a rank"}
    columns |= {"predicted_s": "predicted s"} if first["predicted_s"] is not None else {}
    columns |= {"share_pct": "share %", "limit": "limit x", "speedup": "x baseline"}
    shown = [
        row
        | {
            "label": bench.label_of(row["format"], row["path"], row["overlap"]),
            "ttft": round(1e3 * row["ttft_s"], 2),
            "compute": round(1e3 * row["compute_s"], 2),
            "sent": records.human_bytes(row["wire_bytes"]),
            "share_pct": round(100 * row["share"], 1),
        }
        for row in rows
    ]
    title = f"{first['model']}{cut}{sizes}, {first['world']} ranks on {first['device']}{over}"
    print_table(title + (", compiled" if first["compiled"] else ", eager"), columns, shown)
    notes = ["compute: without all-reduces; share: of the baseline's time; limit: the baseline over compute"]
    if first["compiled"]:
        notes.append("compiled: the stack, embeddings to last norm, as one graph; not the last projection")
    for row in rows:
        if row["overlap"]:
            bits = "the same bits as" if row["same_bits"] else "other bits than"
            size = f"{row['batch']} x {row['tokens']}"
            notes.append(f"{row['format']} with overlap, {size}: split by {row['halves']}, {bits} without")
    print_notes(notes)
