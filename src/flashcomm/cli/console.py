"""The output of the commands: tables, one JSON object, progress on stderr."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashcomm.bench import records
from flashcomm.bench.records import Row
from flashcomm.ranks import launch

Report = Callable[[str, int, "int | None"], None]  # what is running, steps done, all steps

console = Console(
    highlight=False, width=max(120, shutil.get_terminal_size().columns)
)  # so that tables are not squeezed
err_console = Console(stderr=True, highlight=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Show a progress bar on stderr, if that is a terminal. Yield the function that advances it."""
    parts = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*parts, console=err_console, transient=True, disable=quiet or not err_console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def run_ranks(
    target: Callable[..., object], world_size: int, args: tuple[Any, ...], *, quiet: bool, **options: Any
) -> Any:
    """Call `launch.run` with a progress bar for events (what, done, total). Returns None on torchrun's other ranks."""
    with progress(quiet) as report:
        return launch.run(target, world_size, args, on_event=lambda event: report(*event), **options)  # type: ignore[misc]


def print_json(value: Mapping[str, Any]) -> None:
    """Write the JSON object of a `--json` command to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def write_rows(rows: Sequence[Row], csv: Path | None, json: bool, **more: Any) -> bool:
    """Write rows to a CSV file and as one JSON object to stdout, if requested.

    Args:
        rows: The measured rows.
        csv: The file to write. None: no file.
        json: Whether to write one JSON object, with `rows`, `more` and the machine.
        **more: Further keys of that object.

    Returns:
        Whether JSON was written, so that nothing else may go to stdout.
    """
    if csv:
        records.write_csv(csv, rows)
    if json:
        print_json({**more, "rows": rows, **records.environment()})
    return json


def print_table(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Print a table. `columns` maps keys of the rows to headings. Numbers are right-aligned."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for key, heading in columns.items():
        is_number = all(isinstance(row.get(key), (int, float, type(None))) for row in rows)
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number)
    for row in rows:
        table.add_row(*("-" if row.get(key) is None else str(row[key]) for key in columns))
    console.print(table)


def print_notes(notes: Sequence[str]) -> None:
    """Print lines below a table, dimmed."""
    for note in notes:
        console.print(note, markup=False, style="dim")
