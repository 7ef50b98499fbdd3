"""`flashcomm plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashcomm.bench import plot as bench
from flashcomm.cli import options
from flashcomm.cli.console import print_json


def plot(
    sources: Annotated[list[Path], typer.Argument(help="A CSV file of bench, ttft or eval; several only of ttft.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: .svg or .png.")],
    json: options.Json = False,
) -> None:
    """Draw a CSV file of bench, ttft or eval."""
    bench.plot(sources, output)
    if json:
        print_json({"picture": str(output)})
