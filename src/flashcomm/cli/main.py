"""The `flashcomm` command. Each subcommand takes `--json`; the exit code is 0 only if all went well.

Here are options, progress and tables; what runs on the ranks is in the module of each command's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashcomm.cli import accuracy, ttft
from flashcomm.cli.options import (
    Algorithm,
    Csv,
    Device,
    Dtype,
    Json,
    Link,
    LocalWorld,
    MinBytes,
    Model,
    Timeout,
    World,
    device_for,
    dtype_for,
    formats_of,
    modes_of,
    prepare,
    progress_bar,
)
from flashcomm.errors import FlashcommError, SettingsError
from flashcomm.settings import DEFAULT_FORMAT

app = typer.Typer(
    name="flashcomm",
    help=__doc__.splitlines()[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure collectives, each verified before it is timed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
for _name, _command in (("eval", accuracy.evaluate), ("tune", accuracy.tune), ("probe", accuracy.probe)):
    app.command(_name)(_command)
app.command("ttft")(ttft.ttft)


@app.command()
def doctor(
    world_size: World = 2,
    format: Annotated[str | None, typer.Option("--format", "-f", help="Wire format.")] = None,
    row: Annotated[int, typer.Option(min=1, help="Length of a row (hidden size).")] = 4096,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    json: Json = False,
) -> None:
    """Show machine, links and versions, and which path would run for which size, and why not the others."""
    from flashcomm.cli import doctor as command
    from flashcomm.cli import report
    from flashcomm.settings import Settings

    where = device_for(device, world_size)
    settings = Settings.resolve(where, format=format)
    found = command.examine(world_size, row, dtype_for(dtype).itemsize, settings, where)
    if json:
        return report.print_json(found)
    for section in ("machine", "versions", "paths", "settings"):
        report.console.print(f"[bold]{section}[/bold]")
        for key, value in found[section].items():
            report.console.print(f"  {key:16} {value}", markup=False)
    rows = [c | {"not": "\n".join(f"{k}: {v}" for k, v in c["not"].items())} for c in found["choices"]]
    title = f"all-reduce of {dtype} rows of {row} as {settings.fmt}, {world_size} ranks on {where}"
    report.print_table(
        title, {"size": "bytes", "path": "path", "wire_bytes": "wire bytes", "why": "why", "not": "why not"}, rows
    )
    return None


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    world_size: World = 2,
    format: Annotated[
        str,
        typer.Option("--format", "-f", envvar="FLASHCOMM_FORMAT", help="Wire format of the all-reduces, or a plan."),
    ] = DEFAULT_FORMAT,
    tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens.")] = 64,
    min_bytes: MinBytes = None,
    algorithm: Algorithm = None,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    link: Link = None,
    timeout: Timeout = 600,
    json: Json = False,
) -> None:
    """Generate greedily with a tensor-parallel model; starts its ranks itself, or joins under torchrun."""
    from flashcomm.accuracy import generate as command
    from flashcomm.accuracy.models import check_model
    from flashcomm.cli import report

    where, settings = prepare(format, device, world_size, min_bytes, algorithm)
    check_model(model, world_size)
    streamed = [] if json else [""]

    def on_text(text: Any) -> None:
        if streamed:
            streamed[0] += text
            sys.stdout.write(text)
            sys.stdout.flush()

    args = (model, format, prompt, tokens, dtype_for(dtype), settings)
    result = _run(command.generate, world_size, args, device=where, link=link, timeout=timeout, on_event=on_text)
    if result is None:  # under torchrun, not rank 0
        return
    if json:
        report.print_json(result)
    else:
        sent = report.human(result["wire_bytes"])
        told = (
            f"{len(result['tokens'])} tokens in {result['seconds']} s, {format}; each of {world_size} ranks sent {sent}"
        )
        report.err_console.print(f"\n[dim]{told}[/dim]")


@app.command()
def calibrate(
    world_size: World = 2,
    formats: Annotated[
        str | None, typer.Option(help="Coded formats to measure; others go by the nearest. Default: a few.")
    ] = None,
    begin: Annotated[str, typer.Option("--begin", "-b", help="Smallest message.")] = "2K",
    end: Annotated[str, typer.Option("--end", "-e", help="Largest message.")] = "64M",
    factor: Annotated[int, typer.Option("--factor", "-f", min=2, help="From one size to the next.")] = 2,
    row: Annotated[int, typer.Option(min=1, help="Length of a row (hidden size).")] = 4096,
    turns: Annotated[int, typer.Option(min=1, help="Alternating samples; the median counts.")] = 7,
    device: Device = "auto",
    link: Link = None,
    output: Annotated[Path | None, typer.Option(help="Write the table here, not where Communicators look.")] = None,
    timeout: Timeout = 1800,
    json: Json = False,
) -> None:
    """Measure this machine once: `auto` then decides by its own times which way messages go."""
    from flashcomm.bench import calibrate as command
    from flashcomm.bench.all_reduce import sizes_between
    from flashcomm.cli import report
    from flashcomm.routing import timings
    from flashcomm.settings import parse_size

    if world_size < 2:
        raise SettingsError("calibrating a collective needs --world 2 or more")
    names = formats_of(formats) if formats else list(command.FORMATS)
    where, _ = prepare(names[0], device, world_size, None, None)
    sizes = sizes_between(parse_size("--begin", begin, least=16), parse_size("--end", end), factor)
    if not sizes:
        raise SettingsError(f"no sizes from {begin} to {end}: give --begin not above --end")
    about = report.environment()
    source = f"{about['machine']}{f' over {link}' if link else ''}, torch {about['torch']}, {about['date']}"
    args = (names, sizes, row, turns, source)
    with progress_bar(json) as bar:
        task = bar.add_task("measuring", total=len(sizes))
        found: Any = _run(
            command.measure,
            world_size,
            args,
            device=where,
            link=link,
            timeout=timeout,
            on_event=lambda _: bar.advance(task),
        )
    if found is None:
        return
    path = output or timings.own_directory() / timings.file_name(found["machine"], world_size, found["transport"])
    timings.save(path, timings.from_dict(found["table"]))
    if json:
        report.print_json({"file": str(path), **found})
        return
    rows = command.fastest(found["table"])
    report.print_table(f"all-reduce over {found['transport']}: the faster way, us", {c: c for c in rows[0]}, rows)
    report.console.print(f"written to {path}", markup=False)


@bench_app.command("all_reduce")
def bench_all_reduce(
    world_size: World = 2,
    formats: Annotated[
        str, typer.Option(help="Wire formats, separated by commas; lossless paths are always measured.")
    ] = "int8,int6-had,int4-had,int4",
    begin: Annotated[str, typer.Option("--begin", "-b", help="Smallest message.")] = "64K",
    end: Annotated[str, typer.Option("--end", "-e", help="Largest message.")] = "64M",
    factor: Annotated[int, typer.Option("--factor", "-f", min=2, help="From one size to the next.")] = 2,
    row: Annotated[
        int, typer.Option(min=1, help="Length of a row (hidden size), where it divides the message.")
    ] = 4096,
    turns: Annotated[int, typer.Option(min=1, help="Alternating samples; the median counts.")] = 7,
    mode: Annotated[
        str | None, typer.Option(help="eager, graph (replays of a CUDA graph) or both. [default: both on CUDA]")
    ] = None,
    min_bytes: MinBytes = "0",
    chunk_bytes: Annotated[str | None, typer.Option(help="Message bytes coded and sent at a time.")] = None,
    algorithm: Algorithm = None,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    link: Link = None,
    local_world_size: LocalWorld = None,
    timeout: Timeout = 1800,
    csv: Csv = None,
    json: Json = False,
) -> None:
    """All-reduce by size and format: nccl-tests columns, wire bytes, error, speed-up over the best lossless path."""
    from flashcomm.bench import all_reduce as command
    from flashcomm.cli import report
    from flashcomm.settings import parse_size

    if world_size < 2:
        raise SettingsError("a bench of a collective needs --world 2 or more")
    names = formats_of(formats)
    where, settings = prepare(names[0], device, world_size, min_bytes, algorithm)
    settings |= {"chunk_bytes": chunk_bytes} if chunk_bytes else {}
    settings |= {"local_world_size": local_world_size} if local_world_size else {}
    sizes = command.sizes_between(parse_size("--begin", begin, least=16), parse_size("--end", end), factor)
    if not sizes:
        raise SettingsError(f"no sizes from {begin} to {end}: give --begin not above --end")
    args = (names, sizes, row, dtype_for(dtype), turns, modes_of(mode, where), settings)
    with progress_bar(json) as bar:
        task = bar.add_task("starting", total=len(sizes))

        def on_event(event: Any) -> None:
            done = sizes.index(event["size"])
            bar.update(task, description=f"{event['size']} {event['format']} {event['path']}", completed=done)

        options = {"device": where, "link": link, "local_world_size": local_world_size or 1, "timeout": timeout}
        found: Any = _run(command.all_reduce, world_size, args, on_event=on_event, **options)
    if found is None:
        return
    rows = [r | {"link": link or "none", "local_world": local_world_size} for r in found["rows"]]
    if csv:
        report.write_csv(csv, rows)
    if json:
        report.print_json({"rows": rows, "unavailable": found["unavailable"], **report.environment()})
        return
    of_gpus = {"mode", "transport", "host_us"}  # they take the place of the wire bytes, which the CSV has
    columns = ["size", "format", "path", "mode", "transport", "time_us", "host_us", "busbw", "wire_bytes", "error"]
    columns = [c for c in columns if c not in (of_gpus if where == "cpu" else {"wire_bytes"})]
    over = f" over {link}" if link else ""
    over += f", nodes of {local_world_size}" if local_world_size else ""
    title = f"all_reduce of {dtype}, {world_size} ranks on {where}{over} (GB/s of uncompressed bytes)"
    ratios = {"speedup": "x best lossless" if where == "cpu" else "x best", "over_native": "x native"}
    report.print_table(title, {c: c for c in columns} | ratios, rows)
    told = {f"{r['path']}: {r['note']}" for r in rows}
    for line in [*sorted(told), *(f"not measured: {path}: {why}" for path, why in found["unavailable"].items())]:
        report.console.print(line, markup=False, style="dim")


@bench_app.command("codec")
def bench_codec(
    formats: Annotated[
        str, typer.Option(help="Wire formats, separated by commas.")
    ] = "int8,int8-had,int6,int6-had,int5,int4,int4-had,int4-g32,int3,int2",
    begin: Annotated[str, typer.Option("--begin", "-b", help="Smallest message.")] = "16M",
    end: Annotated[str, typer.Option("--end", "-e", help="Largest message.")] = "64M",
    factor: Annotated[int, typer.Option("--factor", "-f", min=2, help="From one size to the next.")] = 4,
    row: Annotated[int, typer.Option(min=1, help="Length of a row (hidden size).")] = 4096,
    threads: Annotated[int, typer.Option(min=1, help="Threads, on CPUs.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Buffers that decode_sum adds.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Alternating samples; the median counts.")] = 15,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is a GPU.")] = "cpu",
    dtype: Dtype = "bf16",
    csv: Csv = None,
    json: Json = False,
) -> None:
    """Speed of the codec beside a plain copy of the same bytes (GB/s)."""
    from flashcomm.bench import codec as codec_bench
    from flashcomm.bench.all_reduce import sizes_between
    from flashcomm.cli import report
    from flashcomm.settings import parse_size

    where = device_for(device, 1)
    sizes = sizes_between(parse_size("--begin", begin, least=16), parse_size("--end", end), factor)
    if not sizes:
        raise SettingsError(f"no sizes from {begin} to {end}: give --begin not above --end")
    names, rows = formats_of(formats), []
    with progress_bar(json) as bar:
        task = bar.add_task("verifying and timing", total=len(sizes) * len(names))
        for measured in codec_bench.codec(names, sizes, row, dtype_for(dtype), threads, turns, where, ranks):
            rows.append(measured)
            bar.advance(task)
    if csv:
        report.write_csv(csv, rows)
    if json:
        report.print_json({"rows": rows, **report.environment()})
        return
    columns = ("size", "format", "copy", "encode", "decode_sum", "encode_share", "decode_share")
    traffic = {"encode_traffic_share": "encode traffic", "decode_traffic_share": "decode traffic"}
    on = f"{threads} threads" if where == "cpu" else where
    report.print_table(
        f"codec of {dtype} on {on}, GB/s: copy and encode of message bytes, decode_sum of {ranks} ranks' wire bytes; "
        "shares of the copy, traffic: of all bytes read and written",
        {c: c for c in columns} | traffic,
        rows,
    )


@app.command()
def plot(
    sources: Annotated[list[Path], typer.Argument(help="A CSV written by bench, ttft or eval; of ttft also several.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to put the picture: .svg or .png.")],
    json: Json = False,
) -> None:
    """Draw a CSV of bench, ttft or eval."""
    from flashcomm.bench.plot import plot as draw
    from flashcomm.cli import report

    draw(sources, output)
    if json:
        report.print_json({"picture": str(output)})


def _run(target: Callable[..., object], world_size: int, args: tuple[Any, ...], **options: Any) -> Any:
    from flashcomm.ranks import launch

    options["timeout_s"] = options.pop("timeout")
    return launch.run(target, world_size, args, **options)


def main() -> None:
    """The console script: errors we know in one line on stderr and exit code 1, Ctrl-C 130."""
    try:
        app()
    except FlashcommError as why:
        typer.echo(f"flashcomm: {why}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
