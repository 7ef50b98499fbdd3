"""The `ttft` command: options, progress and tables. What runs on the ranks is in `ttft`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashcomm.cli.options import (
    Algorithm,
    Csv,
    Device,
    Dtype,
    Json,
    Link,
    MinBytes,
    Timeout,
    World,
    dtype_for,
    formats_of,
    numbers_of,
    prepare,
    progress_bar,
)
from flashcomm.errors import InputError, SettingsError
from flashcomm.settings import DEFAULT_FORMAT

if TYPE_CHECKING:
    import torch


def ttft(
    model: Annotated[
        str,
        typer.Option(
            help="Model directory, or a shape with random weights: llama-3.2-1b, llama-3-8b, llama-3-70b, qwen3-32b."
        ),
    ],
    world_size: World = 2,
    formats: Annotated[
        str, typer.Option(help="Wire formats and plans, separated by commas; on GPUs bf16 is our uncompressed way.")
    ] = f"bf16,int8,{DEFAULT_FORMAT},int4-had",
    batch: Annotated[str, typer.Option(help="Prompts at a time; several, separated by commas.")] = "1",
    tokens: Annotated[str, typer.Option(help="Prompt length; several, separated by commas.")] = "512",
    layers: Annotated[int | None, typer.Option(help="Leave only this many. [default: all that fit]")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Turns; the median counts. [default: 3, 5 on CUDA]")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the stack of decoder layers.")] = False,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Measure with overlap, too: batches of 2 and more.")
    ] = False,
    min_bytes: MinBytes = None,
    algorithm: Algorithm = None,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    link: Link = None,
    timeout: Timeout = 600,
    csv: Csv = None,
    json: Json = False,
) -> None:
    """Time to first token by wire format, the share of communication, and speed-up over uncompressed all-reduces."""
    from flashcomm.bench import ttft as command
    from flashcomm.cli import report
    from flashcomm.ranks import launch
    from flashcomm.ranks.link import parse_rate

    names, batches, lengths = (
        formats_of(formats, plans=True),
        numbers_of("--batch", batch),
        numbers_of("--tokens", tokens),
    )
    where, settings = prepare(names[0], device, world_size, min_bytes, algorithm)
    rate = parse_rate(link) if link else None
    if overlap and compile:
        raise SettingsError("--overlap and --compile: a compiled stack has no place to hand over; give one of them")
    if overlap and min(batches) < 2:
        raise SettingsError(f"--overlap --batch {batch}: a batch is cut into two halves; give batches of 2 and more")
    kind = dtype_for(dtype)
    source, label, kept, all_layers = _model(model, world_size, layers, where, kind)
    repeats = repeats or (5 if where == "cuda" else 3)
    ask = command.Ask(source, kept, names, batches, lengths, repeats, kind, rate, compile, overlap, settings)
    with progress_bar(json) as bar:
        task = bar.add_task("starting", total=None)

        def on_event(event: Any) -> None:
            bar.update(task, description=event["what"], completed=event["done"], total=event["of"])

        rows: Any = launch.run(
            command.ttft, world_size, (ask,), device=where, link=link, on_event=on_event, timeout_s=timeout
        )
    if rows is None:  # under torchrun, not rank 0
        return
    over = command.link_of(where, link)
    same = {"model": label, "link": over, "device": where, "dtype": dtype}
    rows = [same | r | {"all_layers": all_layers} for r in rows]
    if csv:
        report.write_csv(csv, rows)
    if json:
        report.print_json({"model": label, "link": over, "rows": rows, **report.environment()})
        return
    _print(rows, compile)


def _model(
    name: str, world_size: int, layers: int | None, where: str, dtype: torch.dtype
) -> tuple[Path | str, str, int | None, int]:
    """(what the ranks load, the name to show, layers to leave or None, layers there are), all of it checked."""
    from flashcomm.accuracy.models import check_divisible, check_model, cut
    from flashcomm.bench import shapes
    from flashcomm.cli import report

    path = Path(name)
    if name not in shapes.SHAPES:
        if not path.exists() and os.sep not in name:
            shapes.config_of(name)  # raises: names directories and shapes
        config = check_model(path, world_size)
        all_layers = int(config.num_hidden_layers)
        if layers is not None:
            cut(config, layers, path.name)
        return path, path.name, layers, all_layers
    config = shapes.config_of(name)
    all_layers = int(config.num_hidden_layers)
    check_divisible(config, world_size, name)
    if layers is None:
        fit = shapes.layers_that_fit(config, world_size, dtype.itemsize, memory_bytes(where, world_size))
        if fit < 1:
            raise InputError(
                f"not one layer of {name} fits this machine's memory on {world_size} ranks: use more ranks"
            )
        if fit < all_layers:
            report.err_console.print(f"{fit} of the {all_layers} layers of {name} fit and are measured; --layers N")
            layers = fit
    shapes.config_of(name, layers)
    return name, name, layers, all_layers


def memory_bytes(where: str, world_size: int) -> int:
    """What a rank has to itself: its GPU's memory, or its share of this machine's."""
    import torch

    if where == "cuda":
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world_size


def _print(rows: list[dict[str, Any]], compiled: bool) -> None:
    from flashcomm.cli import report

    first = rows[0]
    cut = "" if first["layers"] == first["all_layers"] else f", {first['layers']} of {first['all_layers']} layers"
    over = "" if first["link"] == "none" else f" over {first['link']}"
    columns = {"batch": "batch", "tokens": "tokens"} if len({(r["batch"], r["tokens"]) for r in rows}) > 1 else {}
    columns |= {"way": "format", "ttft": "TTFT ms", "compute": "compute ms", "sent": "sent a rank"}
    columns |= {"predicted_s": "predicted s"} if first["predicted_s"] is not None else {}
    columns |= {"share_pct": "share %", "limit": "limit x", "speedup": "x baseline"}
    shown = []
    for row in rows:
        name = row["format"] if row["path"] == "auto" else f"{row['format']}, not ours"
        way = f"{name}, overlap" if row["overlap"] else name
        more = {"way": way, "ttft": round(1e3 * row["ttft_s"], 2), "compute": round(1e3 * row["compute_s"], 2)}
        shown.append(row | more | {"share_pct": round(100 * row["share"], 1), "sent": report.human(row["wire_bytes"])})
    sizes = "" if "batch" in columns else f", {first['batch']} x {first['tokens']} tokens"
    title = f"{first['model']}{cut}{sizes}, {first['world']} ranks on {first['device']}{over}"
    report.print_table(title + (", compiled" if compiled else ", eager"), columns, shown)
    notes = ["compute: without all-reduces; share: of the baseline's time; limit: the baseline over compute"]
    if compiled:
        notes.append(
            "compiled: the stack, embeddings to last norm, as one graph for all formats; not the last projection"
        )
    for row in rows:
        if row["same_bits"] is False:
            notes.append(f"{row['format']} with overlap, {row['batch']} x {row['tokens']}: other bits than without")
    for note in notes:
        report.console.print(note, markup=False, style="dim")
