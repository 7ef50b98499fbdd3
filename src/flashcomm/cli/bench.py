"""`flashcomm bench` of all-reduces, of collectives of pieces, and of the codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from flashcomm.bench import all_reduce as bench_all_reduce
from flashcomm.bench import codec as bench_codec
from flashcomm.bench import pieces as bench_pieces
from flashcomm.cli import options
from flashcomm.cli.console import print_notes, print_table, progress, run_ranks, write_rows
from flashcomm.errors import SettingsError

MODES = {"eager": ("eager",), "graph": ("graph",), "both": ("eager", "graph")}


def all_reduce(
    world_size: options.World = 2,
    formats: Annotated[
        str, typer.Option(help="Wire formats, separated by commas; uncompressed routes are always measured.")
    ] = "int8,int6-had,int4-had,int4",
    begin: options.Begin = "64K",
    end: options.End = "64M",
    factor: options.Factor = 2,
    row: options.RowLength = 4096,
    turns: options.Turns = 7,
    mode: Annotated[
        str | None, typer.Option(help="eager, graph (replays of a CUDA graph) or both. [default: both on CUDA]")
    ] = None,
    min_bytes: options.MinBytes = "0",
    chunk_bytes: Annotated[str | None, typer.Option(help="Message bytes per chunk.")] = None,
    algorithm: options.Algorithm = None,
    only_auto: Annotated[
        bool, typer.Option("--only-auto", help="Measure only the backend, and for each format what auto takes.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    link: options.Link = None,
    local_world_size: options.LocalWorld = None,
    timeout: options.Timeout = 1800,
    csv: options.Csv = None,
    json: options.Json = False,
) -> None:
    """All-reduce by size and format: nccl-tests columns, wire bytes, error, speed-up over the best uncompressed."""
    options.check_several_ranks(world_size)
    names, sizes, where = (
        options.formats_of(formats),
        options.sizes_of(begin, end, factor),
        options.device_of(device, world_size),
    )
    given = {"min_bytes": min_bytes, "algorithm": algorithm, "chunk_bytes": chunk_bytes}
    settings = options.settings_of(names[0], where, **given, local_world_size=local_world_size)
    args = (names, sizes, row, options.dtype_of(dtype), turns, _modes(mode, where), settings, only_auto)
    ranks: dict[str, Any] = {"device": where, "link": link, "timeout_s": timeout}
    ranks["local_world_size"] = local_world_size or 1
    found = run_ranks(bench_all_reduce.all_reduce, world_size, args, quiet=json, **ranks)
    if found is None:
        return
    rows = [r | {"link": link or "none", "local_world": local_world_size} for r in found["rows"]]
    if write_rows(rows, csv, json, unavailable=found["unavailable"]):
        return
    if where == "cpu":
        measured, best = ["time_us", "busbw", "wire_bytes", "error"], "x best uncompressed"
    else:  # the wire bytes would make the table too wide; the CSV has them
        measured, best = ["mode", "transport", "time_us", "host_us", "busbw", "error"], "x best"
    columns = {c: c for c in ("size", "format", "path", *measured)} | {"speedup": best, "over_backend": "x backend"}
    over = (f" over {link}" if link else "") + (f", nodes of {local_world_size}" if local_world_size else "")
    title = f"all_reduce of {dtype}, {world_size} ranks on {where}{over} (GB/s of uncompressed bytes)"
    print_table(title, columns, rows)
    print_notes(sorted({f"{r['path']}: {r['note']}" for r in rows}))
    print_notes([f"not measured: {path}: {why}" for path, why in found["unavailable"].items()])


def pieces_command(op: str) -> Callable[..., None]:
    """Return the command for one of `bench.pieces.OPS`."""

    def command(
        world_size: options.World = 2,
        formats: Annotated[
            str, typer.Option(help="Wire formats, separated by commas; uncompressed ones are always measured.")
        ] = "int8,int6-had,int4-had,int4",
        begin: options.Begin = "64K",
        end: options.End = "64M",
        factor: options.Factor = 4,
        row: options.RowLength = 4096,
        turns: options.Turns = 7,
        mode: Annotated[
            str | None, typer.Option(help="eager, graph (replays of a CUDA graph) or both. [default: both on CUDA]")
        ] = None,
        chunk_bytes: Annotated[str | None, typer.Option(help="Message bytes per chunk, on CPUs.")] = None,
        device: options.Device = "auto",
        dtype: options.Dtype = "bf16",
        link: options.Link = None,
        timeout: options.Timeout = 1800,
        csv: options.Csv = None,
        json: options.Json = False,
    ) -> None:
        """Time of pieces by size and format, equal and skewed, beside the backend's."""
        options.check_several_ranks(world_size)
        names, sizes = options.formats_of(formats), options.sizes_of(begin, end, factor)
        where = options.device_of(device, world_size)
        settings = options.settings_of(names[0], where, chunk_bytes=chunk_bytes)
        args = (op, names, sizes, row, options.dtype_of(dtype), turns, _modes(mode, where), settings)
        ranks: dict[str, Any] = {"device": where, "link": link, "timeout_s": timeout}
        found = run_ranks(bench_pieces.pieces, world_size, args, quiet=json, **ranks)
        if found is None:
            return
        rows = [r | {"link": link or "none"} for r in found]
        if write_rows(rows, csv, json):
            return
        columns = ("size", "split", "format", "path", "mode", "time_us", "busbw", "wire_bytes", "error")
        over = f" over {link}" if link else ""
        title = f"{op} of {dtype}, {world_size} ranks on {where}{over} (GB/s of uncompressed bytes)"
        print_table(title, {c: c for c in columns} | {"speedup": "x best", "over_backend": "x backend"}, rows)

    return command


def _modes(asked: str | None, device: str) -> tuple[str, ...]:
    """Return the modes of --mode. CUDA graphs need CUDA."""
    asked = asked or ("both" if device == "cuda" else "eager")
    if asked not in MODES:
        raise SettingsError(f"--mode {asked}: allowed are {', '.join(MODES)}")
    if device != "cuda" and asked != "eager":
        raise SettingsError(f"--mode {asked}: CUDA graphs need --device cuda; on CPUs use --mode eager")
    return MODES[asked]


def codec(
    formats: options.Formats = "int8,int8-had,int6,int6-had,int5,int4,int4-had,int4-g32",
    begin: options.Begin = "16M",
    end: options.End = "64M",
    factor: options.Factor = 4,
    row: options.RowLength = 4096,
    threads: Annotated[int, typer.Option(min=1, help="Threads, on CPUs.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Number of buffers that decode_sum adds.")] = 4,
    turns: options.Turns = 15,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there is a GPU.")] = "cpu",
    dtype: options.Dtype = "bf16",
    csv: options.Csv = None,
    json: options.Json = False,
) -> None:
    """Speed of the codec, compared with a plain copy of the same bytes (GB/s)."""
    where, kind = options.device_of(device, 1), options.dtype_of(dtype)
    names, sizes = options.formats_of(formats), options.sizes_of(begin, end, factor)
    rows: list[dict[str, Any]] = []
    with progress(json) as report:
        for measured in bench_codec.codec(names, sizes, row, kind, threads, turns, where, ranks):
            rows.append(measured)
            report("verifying and timing", len(rows), len(sizes) * len(names))
    if write_rows(rows, csv, json):
        return
    columns = ("size", "format", "copy", "encode", "decode_sum", "encode_share", "decode_share")
    traffic = {"encode_traffic_share": "encode traffic", "decode_traffic_share": "decode traffic"}
    on = f"{threads} threads" if where == "cpu" else where
    title = (
        f"codec of {dtype} on {on}, GB/s: copy and encode of message bytes, decode_sum of {ranks} ranks' wire bytes; "
        "shares of the copy, traffic: of all bytes read and written"
    )
    print_table(title, {c: c for c in columns} | traffic, rows)
