"""`flashcomm calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashcomm.bench import calibrate as bench
from flashcomm.bench import records
from flashcomm.cli import options
from flashcomm.cli.console import console, print_json, print_table, run_ranks
from flashcomm.routing import timings


def calibrate(
    world_size: options.World = 2,
    formats: Annotated[
        str,
        typer.Option(
            help="Low-bit formats to measure, separated by commas; other formats use the times of the nearest."
        ),
    ] = ",".join(bench.FORMATS),
    begin: options.Begin = "2K",
    end: options.End = "64M",
    factor: options.Factor = 2,
    row: options.RowLength = 4096,
    turns: options.Turns = 7,
    device: options.Device = "auto",
    link: options.Link = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the timings to this file. [default: where Communicators find them]")
    ] = None,
    timeout: options.Timeout = 1800,
    json: options.Json = False,
) -> None:
    """Measure this machine once. `auto` then chooses the routes of messages by these times."""
    options.check_several_ranks(world_size)
    names, sizes = options.formats_of(formats), options.sizes_of(begin, end, factor)
    where, about = options.device_of(device, world_size), records.environment()
    source = f"{about['machine']}{f' over {link}' if link else ''}, torch {about['torch']}, {about['date']}"
    args = (names, sizes, row, turns, source)
    found = run_ranks(bench.calibrate, world_size, args, quiet=json, device=where, link=link, timeout_s=timeout)
    if found is None:
        return
    path = output or timings.own_directory() / timings.file_name(found["machine"], world_size, found["transport"])
    timings.save(path, timings.from_dict(found["table"]))
    if json:
        print_json({"file": str(path), **found})
        return
    rows = bench.fastest(found["table"])
    print_table(f"all-reduce over {found['transport']}: the faster algorithm, us", {c: c for c in rows[0]}, rows)
    console.print(f"written to {path}", markup=False)
