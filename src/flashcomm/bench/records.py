"""Rows of measurements in CSV files, with the machine and versions that they were measured on."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import flashcomm
from flashcomm.errors import InputError
from flashcomm.wire.format import UNCOMPRESSED

BACKEND = "backend"  # the path of torch.distributed's own all-reduce

Row = Mapping[str, Any]


def cpu_name() -> str:
    """Return the processor's name as Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment() -> dict[str, str]:
    """Return the columns that say how a row was measured: machine, versions, date and command."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    machine = f"{count} x {torch.cuda.get_device_name(0)}" if count else f"{os.cpu_count()} cores of {cpu_name()}"
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("FLASHCOMM_", "NCCL_"))]
    return {
        "machine": machine,
        "flashcomm": flashcomm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join([*settings, "flashcomm", *map(shlex.quote, sys.argv[1:])]),
    }


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows`, and the columns of `environment()` after their own. Rows may have different columns.

    A row that has columns of `environment()` already, because it was read from a file, keeps them. An existing file is
    replaced in one step, so that an interruption leaves the old rows or the new ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    where = environment()
    columns = dict.fromkeys(key for row in rows for key in row if key not in where)
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, *where])
        writer.writeheader()
        writer.writerows({**where, **row} for row in rows)
    unfinished.replace(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file. Old names of columns, paths and formats are replaced by the current ones.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as why:
        raise InputError(f"{path} cannot be read: {why.strerror}") from why
    return [{**row, "format": UNCOMPRESSED} if row.get("format") == "bf16" else row for row in rows]  # its old name


def human_bytes(n_bytes: float) -> str:
    """Return bytes with a unit, in powers of 1000, such as "12.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"
