"""The command `flashcomm bench epilogue`: options, progress and table of `epilogue_bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashcomm.cli.options import (
    Algorithm,
    Csv,
    Device,
    Dtype,
    Json,
    MinBytes,
    Timeout,
    World,
    dtype_for,
    formats_of,
    modes_of,
    prepare,
    progress_bar,
)
from flashcomm.errors import SettingsError


def bench(
    world: World = 2,
    formats: Annotated[str, typer.Option(help="Wire formats, separated by commas.")] = "int8,int4",
    begin: Annotated[str, typer.Option("--begin", "-b", help="Smallest message.")] = "1M",
    end: Annotated[str, typer.Option("--end", "-e", help="Largest message.")] = "64M",
    factor: Annotated[int, typer.Option("--factor", "-f", min=2, help="From one size to the next.")] = 4,
    row: Annotated[int, typer.Option(min=1, help="Length of a row (hidden size).")] = 4096,
    turns: Annotated[int, typer.Option(min=1, help="Alternating samples; the median counts.")] = 7,
    mode: Annotated[
        str | None, typer.Option(help="eager, graph (replays of a CUDA graph) or both. [default: graph on CUDA]")
    ] = None,
    engines: Annotated[
        str, typer.Option(help="Whose add+norm to measure behind the all-reduce, beside ours; on GPUs.")
    ] = "vllm,flashinfer,compiled",
    min_bytes: MinBytes = "0",
    algorithm: Algorithm = None,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    timeout: Timeout = 1800,
    csv: Csv = None,
    json: Json = False,
) -> None:
    """All-reduce, residual and RMS norm: in one launch, and as all-reduce and add+norm apart."""
    from flashcomm.cli import epilogue_bench as command
    from flashcomm.cli import launch, report
    from flashcomm.cli.bench import sizes_between
    from flashcomm.settings import parse_size

    if world < 2:
        raise SettingsError("a bench of a collective needs --world 2 or more")
    names = formats_of(formats)
    where, settings = prepare(names[0], device, world, min_bytes, algorithm)
    modes = modes_of(mode or ("graph" if where == "cuda" else "eager"), where)
    sizes = sizes_between(parse_size("--begin", begin, least=16), parse_size("--end", end), factor)
    if not sizes:
        raise SettingsError(f"no sizes from {begin} to {end}: give --begin not above --end")
    others = [name.strip() for name in engines.split(",") if name.strip()]
    if unknown := set(others) - set(command.ENGINES):
        raise SettingsError(f"--engines {', '.join(sorted(unknown))}: allowed are {', '.join(command.ENGINES)}")
    args = (names, sizes, row, dtype_for(dtype), turns, modes, others, settings)
    with progress_bar(json) as bar:
        task = bar.add_task("starting", total=len(sizes))

        def on_event(event: Any) -> None:
            done = sizes.index(event["size"])
            bar.update(task, description=f"{event['size']} {event['format']} {event['path']}", completed=done)

        found: Any = launch.run(command.layers, world, args, device=where, timeout_s=timeout, on_event=on_event)
    if found is None:
        return
    if csv:
        report.write_csv(csv, found["rows"])
    if json:
        report.print_json({**found, **report.environment()})
        return
    columns = {c: c for c in ("size", "format", "path", "mode", "algorithm", "transport", "time_us", "note")}
    ratios = {"speedup": "x apart", "over_native": "x native"}
    title = f"all_reduce, add, RMS norm of {dtype}, rows of {row}, {world} ranks on {where}"
    report.print_table(title, columns | ratios, found["rows"])
    for path, why in found["unavailable"].items():
        report.console.print(f"not measured: {path}: {why}", markup=False, style="dim")
