"""What every command's output has in common: where the figures were taken, one JSON object, one CSV."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import flashcomm

Row = Mapping[str, Any]

console = Console(highlight=False, width=max(120, shutil.get_terminal_size().columns))  # tables keep their columns
err_console = Console(stderr=True, highlight=False)


def cpu_name() -> str:
    """The processor's name as the kernel tells it, without its host's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment() -> dict[str, str]:
    """Machine, versions, date and command: the columns that make a figure in a CSV worth something."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    machine = f"{len(gpus)} x {gpus[0]}" if gpus else f"{os.cpu_count()} cores of {cpu_name()}"
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("FLASHCOMM_", "NCCL_"))]
    command = " ".join([*settings, "flashcomm", *map(shlex.quote, sys.argv[1:])])
    return {
        "machine": machine,
        "flashcomm": flashcomm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def print_json(value: Mapping[str, Any]) -> None:
    """The one object a `--json` command writes to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_table(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """A table of rows; columns: key -> heading. Numbers are right-aligned and given as they are."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for key, heading in columns.items():
        is_number = all(isinstance(row.get(key), (int, float, type(None))) for row in rows)
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number)
    for row in rows:
        table.add_row(*("-" if row.get(key) is None else str(row[key]) for key in columns))
    console.print(table)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows with the columns of `environment()` behind their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = environment()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)


def human(n_bytes: float) -> str:
    """Bytes with a unit: 12.5 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"
