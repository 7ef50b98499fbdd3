"""Which tests belong to `scripts/test-thorough`, and which prove a point of the contract from outside tests/contract/.

Tests may carry the markers `thorough` and `contract` themselves. The lists here are for everything else. An entry is
the beginning of a test's name without "tests/": a file, a class, a function or one set of parameters; `*` stands for
any text. When the whole suite is collected, an entry that matches nothing is an error.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Seconds of CPU time are those of one run, without a GPU.
THOROUGH: tuple[str, ...] = ("test_mutations.py",)

CONTRACT: dict[int, tuple[str, ...]] = {}


def mark(items: list[pytest.Item]) -> list[str]:
    """Add the markers; returns a line for each entry that matches none of the items."""
    entries = [(pytest.mark.thorough, entry) for entry in THOROUGH]
    entries += [(pytest.mark.contract(point), entry) for point, listed in CONTRACT.items() for entry in listed]
    unmatched = []
    for marker, entry in entries:
        pattern = re.compile("tests/" + ".*".join(map(re.escape, entry.split("*"))) + r"($|/|::|\[)")
        matching = [item for item in items if pattern.match(item.nodeid)]
        for item in matching:
            item.add_marker(marker)
        if not matching and importlib.util.find_spec("triton"):  # without it whole files are skipped
            unmatched.append(f"tests/selection.py: no test begins with {entry!r}: correct the entry of {marker.name!r}")
    return unmatched


def points() -> dict[int, str]:
    """The points of the contract, from docs/design.md."""
    section = (ROOT / "docs" / "design.md").read_text().split("## The contract\n")[1].split("\n## ")[0]
    found = re.findall(r"^ ?(\d+)\. (.+(?:\n    .+)*)", section, re.MULTILINE)
    return {int(number): re.sub(r"\s+", " ", text) for number, text in found}


def proofs(items: list[pytest.Item]) -> dict[int, list[pytest.Item]]:
    """The tests of each point of the contract."""
    return {
        point: [item for item in items if any(point in marker.args for marker in item.iter_markers("contract"))]
        for point in points()
    }


def unproven(items: list[pytest.Item]) -> list[str]:
    """A line for each point without a file in tests/contract/ or without a test that `scripts/test` runs."""
    faults = []
    for point, tests in proofs(items).items():
        if not any(item.path.name.startswith(f"test_{point:02}_") for item in tests):
            faults.append(f"point {point} of the contract has no tests/contract/test_{point:02}_*.py")
        if not any(item.get_closest_marker("thorough") is None for item in tests):
            faults.append(f"point {point} of the contract has no test outside scripts/test-thorough")
    return faults


def table(items: list[pytest.Item]) -> str:
    """Each point of the contract and the tests that prove it, with the number of their sets of parameters."""
    lines = []
    for point, tests in proofs(items).items():
        lines.append(f"\n{point:2}. {points()[point]}")
        names = [item.nodeid.removeprefix("tests/").split("[")[0] for item in tests]
        for name in dict.fromkeys(names):
            n = names.count(name)
            lines.append(f"      {name}" + (f" ({n})" if n > 1 else ""))
    return "\n".join(lines)
