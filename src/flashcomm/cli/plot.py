"""`flashcomm plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashcomm.bench import plot as bench
from flashcomm.cli import options
from flashcomm.cli.console import print_json
from flashcomm.errors import InputError


def plot(
    sources: Annotated[list[Path], typer.Argument(help="A CSV file of bench, ttft or eval; several only of ttft.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: .svg or .png.")],
    where: Annotated[
        list[str] | None, typer.Option(help="Draw only rows with this value in this column: model=llama-3-8b.")
    ] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Draw for dark pages.")] = False,
    json: options.Json = False,
) -> None:
    """Draw a CSV file of bench, ttft or eval."""
    wrong = [text for text in where or () if "=" not in text]
    if wrong:
        raise InputError(f"--where {wrong[0]}: give a column and a value, such as model=llama-3-8b")
    bench.plot(sources, output, dict(text.split("=", 1) for text in where or ()), dark)
    if json:
        print_json({"picture": str(output)})
