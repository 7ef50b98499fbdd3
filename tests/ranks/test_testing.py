"""The example in `flashcomm.testing` runs and prints what it says."""

from __future__ import annotations

import inspect
import re
import runpy
import textwrap
from pathlib import Path

import pytest

from flashcomm import testing


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, example = inspect.cleandoc(testing.__doc__ or "").split("::\n", 1)
    code = textwrap.dedent(example[: example.index("\nWith `link")])
    (output,) = re.findall(r"print\(.*\)  # (.*)", code)
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == output
