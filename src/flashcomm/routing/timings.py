"""Tables of measured times: where they lie, and their JSON. `flashcomm calibrate` writes them, the policy reads them.

One for a kind of machine, a world size and a transport: first the user's own, then those that come with the package.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from flashcomm.routing.policy import Table

BUILT_IN = Path(__file__).parent / "machines"


def own_directory() -> Path:
    """Where `calibrate` puts what it measured on this machine: $XDG_CACHE_HOME/flashcomm, ~/.cache/flashcomm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcomm"


def file_name(machine: str, world_size: int, transport: str) -> str:
    """`nvidia-h200-x2-symmetric.json` and the like."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine} x{world_size} {transport}".lower()).strip("-") + ".json"


def find(machine: str, world_size: int, transport: str) -> Table | None:
    """The table for this kind of machine, if there is one that can be read."""
    for directory in (own_directory(), BUILT_IN):
        path = directory / file_name(machine, world_size, transport)
        try:
            return from_dict(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def as_dict(table: Table) -> dict[str, Any]:
    return {"source": table.source, "sizes": list(table.sizes), "us": {way: list(t) for way, t in table.us.items()}}


def from_dict(data: dict[str, Any]) -> Table:
    """Raises ValueError, KeyError or TypeError for what is no table."""
    sizes = tuple(int(size) for size in data["sizes"])
    us = {str(way): tuple(float(t) for t in times) for way, times in data["us"].items()}
    if not sizes or sorted(set(sizes)) != list(sizes) or "native" not in us:
        raise ValueError("a table needs rising sizes and the way 'native'")
    if any(len(times) != len(sizes) or min(times) <= 0 for times in us.values()):
        raise ValueError("a table needs a positive time of every way for every size")
    return Table(str(data["source"]), sizes, us)


def save(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_dict(table), indent=1) + "\n")
