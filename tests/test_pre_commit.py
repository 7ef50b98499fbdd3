"""What runs before a commit is what CI runs: the same versions."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_hooks_have_the_pinned_versions() -> None:
    hooks, pins = ((ROOT / name).read_text() for name in (".pre-commit-config.yaml", "constraints.txt"))
    ((tool, version),) = re.findall(r"astral-sh/(ruff)-pre-commit\n +rev: v(.+)", hooks)
    assert f"{tool}=={version}\n" in pins
    assert "entry: .venv/bin/mypy\n" in hooks
