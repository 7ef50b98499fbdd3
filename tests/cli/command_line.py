"""Run the command line in tests, in this process or in a new one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from flashcomm.cli import main
from flashcomm.testing import probe_link

MODEL = Path(__file__).parent.parent.parent / ".assets" / "smollm2-135m-instruct"
NO_LINK = probe_link()
needs_model = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no model: run scripts/fetch_assets.py")
needs_link = pytest.mark.skipif(NO_LINK is not None, reason=f"no network namespaces: {NO_LINK}")


def flashcomm(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process. The ranks that it starts are still processes."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["flashcomm", *map(str, args)]),
        mock.patch.dict(os.environ, env),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(list(args), code, out.getvalue(), err.getvalue())


def process(*args: object, launcher: tuple[object, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process, like a user."""
    command = [sys.executable, *launcher, "-m", "flashcomm.cli.main", *args]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=200, env={**os.environ, **env}
    )


def as_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the JSON object on stdout of a successful command."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Assert exit code 1 or 2, an empty stdout, and a message with all parts and without a traceback."""
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
