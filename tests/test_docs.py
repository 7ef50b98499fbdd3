"""The how-tos: their examples run and print what they say, their links lead somewhere, the SGLang check is as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
HOW_TOS = ["compile", "dtensor", "transformers"]


@pytest.mark.parametrize("name", HOW_TOS)
def test_the_example_prints_what_the_page_says(name: str, tmp_path: Path) -> None:
    page = (DOCS / f"{name}.md").read_text()
    (code,), (output,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "text"))
    assert f"`python {name}_example.py` prints" in page
    file = tmp_path / f"{name}_example.py"
    file.write_text(code)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == output.strip()


@pytest.mark.parametrize("page", [*HOW_TOS, "sglang", "troubleshooting"])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", (DOCS / f"{page}.md").read_text()):
        assert (DOCS / link).exists(), link
