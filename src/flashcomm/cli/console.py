"""The output of the commands: tables, one JSON object, progress on stderr."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from flashcomm.bench import records
from flashcomm.bench.records import Row
from flashcomm.ranks import launch

Report = Callable[[str, int, "int | None"], None]  # what is running, steps done, all steps

console = Console(
    highlight=False, width=max(120, shutil.get_terminal_size().columns)
)  # so that tables are not squeezed
err_console = Console(stderr=True, highlight=False)


EVERY_S = 30.0  # between two lines of progress off a terminal


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Show progress with an estimate of the time left on stderr. Yield the function that advances it.

    On a terminal it is a bar, unless `quiet`. Elsewhere it is a line every 30 seconds, also if `quiet`.
    """
    if not err_console.is_terminal:
        yield _Lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=err_console, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


class _Lines:
    """A Report that writes a line every `EVERY_S` seconds. Time left is estimated by steps done of this total."""

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._start: tuple[float, int, int | None] = (self._shown, 0, None)  # time, steps done, all steps

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if total != self._start[2] or done < self._start[1]:
            self._start = (now, done, total)
        if now - self._shown < EVERY_S:
            return
        self._shown, (begin, first, _) = now, self._start
        text = f"{what}: {done}" + (f" of {total}" if total else "")
        if total and done > first:
            minutes = (now - begin) / (done - first) * (total - done) / 60
            text += f", about {minutes:.0f} min left" if minutes >= 1.5 else f", about {60 * minutes:.0f} s left"
        err_console.print(text, markup=False, soft_wrap=True)


def run_ranks(
    target: Callable[..., object],
    world_size: int,
    args: tuple[Any, ...],
    *,
    quiet: bool,
    on_row: Callable[[Row], None] = lambda row: None,
    **options: Any,
) -> Any:
    """Call `launch.run` with progress for events (what, done, total). Returns None on torchrun's other ranks.

    Events that are rows go to `on_row`.
    """
    with progress(quiet) as report:

        def on_event(event: Any) -> None:
            if isinstance(event, Mapping):
                on_row(event)
            else:
                report(*event)

        return launch.run(target, world_size, args, on_event=on_event, **options)


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
