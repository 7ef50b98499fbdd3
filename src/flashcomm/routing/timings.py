"""Measured times of all-reduces: their interpolation between sizes, their files and their JSON.

A machine without a file measures itself when a Communicator is created (`setup.measure`), `flashcomm calibrate` does so
in more detail, and the policy reads them. There is one file for each kind of machine, number of ranks and transport.
The user's own files win over those of the package, and count only for the version of flashcomm that wrote them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flashcomm.wire.format import WireFormat

log = logging.getLogger("flashcomm")
BUILT_IN = Path(__file__).parent / "machines"
BACKEND = "backend"  # the key of torch.distributed's own all-reduce
MOST_BYTES = 1 << 20  # of a file of timings
ALGORITHMS = ("one_shot", "two_shot")  # every other key is a format and one of these
_OLD_BACKEND = "native"  # the key of the backend in files of flashcomm 0.1


@dataclass(frozen=True, eq=False)
class Timings:
    """Times of bfloat16 all-reduces.

    Attributes:
        source: Machine and date, which `explain` shows.
        sizes: Message sizes in bytes, ascending.
        us: Microseconds per size, by "backend" or by format and algorithm, such as "int4 one_shot".
        version: The version of flashcomm that measured them; "" if not known.
        at_setup: Whether creating a Communicator measured them. Formats that are missing are then measured, too.
    """

    source: str
    sizes: tuple[int, ...]
    us: dict[str, tuple[float, ...]]
    version: str = ""
    at_setup: bool = False

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

        A format of the same family, with or without the Hadamard transform, is more like it than any of the other
        family, because a transform may take longer than bits that are saved. Within a family the bits count. Of two
        formats that are equally near, it is the one of more bits, which probably takes longer.
        """
        step = fmt.reduce if algorithm == "one_shot" else fmt

        def distance(key: str) -> tuple[bool, bool, float, float]:
            other = WireFormat.parse(key.split()[0])
            bits = other.reduce.bits if algorithm == "one_shot" else other.bits
            family = other.reduce.hadamard != fmt.reduce.hadamard
            return other.uncompressed != fmt.uncompressed, family, abs(bits - step.bits), -bits

        return min((key for key in self.us if key.endswith(f" {algorithm}")), key=distance, default=None)


def own_directory() -> Path:
    """Return the directory for the user's own timings and converted models: in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcomm"


def file_name(machine: str, world_size: int, transport: str) -> str:
    """Return a file name such as `nvidia-h200-x2-symmetric.json`."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine} x{world_size} {transport}".lower()).strip("-") + ".json"


def find(machine: str, world_size: int, transport: str, version: str) -> Timings | None:
    """Return the timings of this kind of machine, or None if there are none. Own files of no use cause one warning.

    Args:
        machine: The kind of machine.
        world_size: Number of ranks.
        transport: The transport.
        version: The version of flashcomm. Own files of other versions are ignored.
    """
    name = file_name(machine, world_size, transport)
    try:
        found = _own(own_directory() / name, version)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError, RecursionError) as why:
        log.warning("%s is not a valid file of timings and is ignored: %s", own_directory() / name, why)
        found = None
    if found is None and (BUILT_IN / name).exists():
        found = from_dict(json.loads((BUILT_IN / name).read_text()))
    return found


def _own(path: Path, version: str) -> Timings:
    """Read a file of the user's.

    Raises:
        OSError, ValueError: It cannot be read, is not one of timings, is of another version, or others may write to it.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
            raise ValueError(f"every user may write to it; run chmod o-w {path}")
        if path.parent.stat().st_mode & stat.S_IWOTH:
            raise ValueError(f"every user may write to its folder; run chmod o-w {path.parent}")
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    found = from_dict(json.loads(text))
    if found.version != version:
        raise ValueError(
            f"flashcomm {found.version or 'of an unknown version'} measured it and this is {version}; run "
            "`flashcomm calibrate` again, or delete it"
        )
    return found


def as_dict(timings: Timings) -> dict[str, Any]:
    return {
        "source": timings.source,
        "flashcomm": timings.version,
        "at_setup": timings.at_setup,
        "sizes": list(timings.sizes),
        "us": {k: list(t) for k, t in timings.us.items()},
    }


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
    return Timings(source, sizes, us, str(data.get("flashcomm", "")), data.get("at_setup") is True)


def save(path: Path, timings: Timings) -> None:
    """Write a file of timings. Other processes see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(as_dict(timings), indent=1) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
