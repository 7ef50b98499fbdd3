"""The console script: help, one line for each error, no orphans."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import flashcomm, process, refused

from flashcomm import __version__ as version
from flashcomm import cli


def test_help_names_every_command() -> None:
    out = flashcomm("--help").stdout
    commands = ("doctor", "generate", "ttft", "bench", "plot", "eval", "tune", "probe", "calibrate")
    assert [name for name in commands if name not in out] == []


def test_the_version() -> None:
    done = flashcomm("--version")
    assert (done.returncode, done.stdout) == (0, f"flashcomm {version}\n")


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_extra_it_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in [n for n in sys.modules if n.startswith("flashcomm.cli.") and n != "flashcomm.cli.main"]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(cli, name.rpartition(".")[2])
    done = flashcomm("doctor")
    assert done.returncode == 1
    assert done.stderr == f"flashcomm: the command line needs {package}: pip install 'flashcomm[cli]'\n"


def test_an_error_is_one_line() -> None:
    done = process("plot", "none.csv", "-o", "x.svg")
    refused(done, "flashcomm: none.csv cannot be read")
    assert done.stderr.count("\n") == 1


def test_no_orphans_after_a_kill() -> None:
    """If the parent is killed by SIGKILL, its ranks end within seconds."""
    marker = f"FC_TEST_{os.getpid()}"
    sizes = ("-b", "16M", "-e", "64M", "--turns", "99")
    command = [sys.executable, "-m", "flashcomm.cli.main", "bench", "all_reduce", *sizes]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    parent = subprocess.Popen(command, env={**os.environ, "MARKER": marker}, **quiet)  # type: ignore[call-overload]
    deadline = time.monotonic() + 60
    while _processes_with(marker) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _processes_with(marker) >= 3
    parent.kill()
    parent.wait()
    while _processes_with(marker) and time.monotonic() < deadline + 10:
        time.sleep(0.2)
    assert _processes_with(marker) == 0


def _processes_with(marker: str) -> int:
    count = 0
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            count += f"MARKER={marker}".encode() in environ.read_bytes()
        except OSError:
            continue
    return count
