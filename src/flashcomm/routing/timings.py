"""Measured times of all-reduces: their interpolation between sizes, their files and their JSON.

`flashcomm calibrate` writes them, and the policy reads them. There is one file for each kind of machine, number of
ranks and transport. The user's own files win over those of the package.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flashcomm.wire.format import WireFormat

log = logging.getLogger("flashcomm")
BUILT_IN = Path(__file__).parent / "machines"
BACKEND = "backend"  # the key of torch.distributed's own all-reduce
ALGORITHMS = ("one_shot", "two_shot")  # every other key is a format and one of these
_OLD_BACKEND = "native"  # the key of the backend in files of flashcomm 0.1


@dataclass(frozen=True, eq=False)
class Timings:
    """Times of bfloat16 all-reduces.

    Attributes:
        source: Machine and date, which `explain` shows.
        sizes: Message sizes in bytes, ascending.
        us: Microseconds per size, by "backend" or by format and algorithm, such as "int4 one_shot".
    """

    source: str
    sizes: tuple[int, ...]
    us: dict[str, tuple[float, ...]]

    def time(self, key: str, n_bytes: int) -> float:
        """Return the microseconds of a message, interpolated log-log; beyond the largest size, proportional to size."""
        times = self.us[key]
        if n_bytes <= self.sizes[0]:
            return times[0]
        if n_bytes >= self.sizes[-1]:
            return times[-1] * n_bytes / self.sizes[-1]
        for i, (low, high) in enumerate(pairwise(self.sizes)):
            if n_bytes <= high:
                part = math.log(n_bytes / low) / math.log(high / low)
                return math.exp((1 - part) * math.log(times[i]) + part * math.log(times[i + 1]))
        raise AssertionError

    def nearest(self, fmt: WireFormat, algorithm: str) -> str | None:
        """Return the measured key that is most like a format, or None.

        Besides the difference in bits, uncompressed or not counts as 8 bits, and the Hadamard transform as 1 bit.
        """
        step = fmt.reduce if algorithm == "one_shot" else fmt

        def distance(key: str) -> float:
            other = WireFormat.parse(key.split()[0])
            bits = abs((other.reduce.bits if algorithm == "one_shot" else other.bits) - step.bits)
            return bits + 8 * (other.uncompressed != fmt.uncompressed) + (other.reduce.hadamard != fmt.reduce.hadamard)

        return min((key for key in self.us if key.endswith(f" {algorithm}")), key=distance, default=None)


def own_directory() -> Path:
    """Return the directory for the user's own timings and converted models: in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcomm"


def file_name(machine: str, world_size: int, transport: str) -> str:
    """Return a file name such as `nvidia-h200-x2-symmetric.json`."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine} x{world_size} {transport}".lower()).strip("-") + ".json"


def find(machine: str, world_size: int, transport: str) -> Timings | None:
    """Return the timings of this kind of machine, or None if there is no readable file."""
    for directory in (own_directory(), BUILT_IN):
        path = directory / file_name(machine, world_size, transport)
        try:
            return from_dict(json.loads(path.read_text()))
        except OSError:
            continue
        except (ValueError, RecursionError) as why:
            log.warning("%s is not a valid file of timings and is ignored: %s", path, why)
    return None


def as_dict(timings: Timings) -> dict[str, Any]:
    return {"source": timings.source, "sizes": list(timings.sizes), "us": {k: list(t) for k, t in timings.us.items()}}


def from_dict(data: dict[str, Any]) -> Timings:
    """Read timings from their JSON object.

    Raises:
        ValueError: The object is not one of timings.
    """
    try:
        source, sizes = str(data["source"]), tuple(int(size) for size in data["sizes"])
        us = {BACKEND if k == _OLD_BACKEND else str(k): tuple(map(float, times)) for k, times in data["us"].items()}
    except (KeyError, TypeError, AttributeError, OverflowError) as why:
        raise ValueError(f"timings need source, sizes and us: {type(why).__name__}: {why}") from why
    if not sizes or sizes[0] < 1 or sorted(set(sizes)) != list(sizes) or BACKEND not in us:
        raise ValueError(f"timings need ascending sizes of at least 1 byte, and times of {BACKEND!r}")
    if any(len(times) != len(sizes) or not all(0 < t < math.inf for t in times) for times in us.values()):
        raise ValueError("timings need a positive, finite time for every route and size")
    for key in us.keys() - {BACKEND}:
        fmt, _, algorithm = key.partition(" ")
        WireFormat.parse(fmt)  # raises FormatError, a ValueError
        if algorithm not in ALGORITHMS:
            raise ValueError(f"timings of {key!r}: a key must be a format and one of {', '.join(ALGORITHMS)}")
    return Timings(source, sizes, us)


def save(path: Path, timings: Timings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_dict(timings), indent=1) + "\n")
