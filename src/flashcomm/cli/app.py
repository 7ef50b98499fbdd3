"""The Typer app of `flashcomm`, with all commands. Each accepts `--json`. The exit code is 0 only on success."""

from __future__ import annotations

from typing import Annotated

import typer

from flashcomm import __version__
from flashcomm.bench.pieces import OPS
from flashcomm.cli import bench, calibrate, doctor, eval, generate, plot, predict, probe, ttft, tune

app = typer.Typer(
    name="flashcomm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure collectives, each verified before it is timed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
bench_app.command("all_reduce")(bench.all_reduce)
for _op in OPS:
    bench_app.command(_op, help=f"{_op} by size and format, for equal and for skewed pieces, beside the backend's.")(
        bench.pieces_command(_op)
    )
bench_app.command("codec")(bench.codec)
app.command("eval")(eval.evaluate)
app.command("tune")(tune.tune)
app.command("probe")(probe.probe)
app.command("ttft")(ttft.ttft)
app.command("doctor")(doctor.doctor)
app.command("generate")(generate.generate)
app.command("calibrate")(calibrate.calibrate)
app.command("plot")(plot.plot)
app.command("predict")(predict.predict)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"flashcomm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The `flashcomm` command. Each subcommand accepts `--json`. The exit code is 0 only on success."""
