"""The README shows lines of examples that run, and what they print. Figures are those of a CSV in results/."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashcomm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def statements(code: str) -> list[str]:
    """The lines of code without comments."""
    return [line for raw in code.splitlines() if (line := raw.partition("#")[0].strip())]


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_snippets_are_lines_of_examples_that_run() -> None:
    """Except for `from_pretrained`, which is as on the page of transformers. tests/test_docs.py runs the examples."""
    transformers, all_reduce = (statements(block) for block in blocks("python"))
    example = statements((ROOT / "examples" / "all_reduce.py").read_text())
    assert all_reduce
    assert all(line in example for line in all_reduce)
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert all(line in page for line in transformers)
    printed = re.findall(r"^# (calls .*)$", README, re.MULTILINE)
    assert printed == re.findall(r"^(calls .*)$", page, re.MULTILINE)
    (printed,) = blocks("text")
    assert printed in (ROOT / "docs" / "quickstart.md").read_text()
    logged = re.search(r"^# (Communicator\(.*)$", blocks("bash")[1], re.MULTILINE)
    assert logged is not None
    assert logged[1] in (ROOT / "docs" / "vllm.md").read_text()


def test_commands_exist() -> None:
    """Every `scripts/...` and every `flashcomm ...` command line the README shows."""
    for script in set(re.findall(r"\bscripts/(\w+)", README)):
        assert (ROOT / "scripts" / script).exists() or (ROOT / "scripts" / f"{script}.py").exists(), script
    for line in re.findall(r"^flashcomm (.*)$", "\n".join(blocks("bash")), re.MULTILINE):
        words = line.split()
        command = words[:2] if words[0] == "bench" else words[:1]
        shown = [sys.executable, "-m", "flashcomm.cli.main", *command, "--help"]
        done = subprocess.run(shown, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == 0
        for option in re.findall(r"(?<=\s)(--?[a-z][\w-]*)", line):
            assert option in done.stdout, f"{option} of: flashcomm {line}"


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """What scripts/tables.py would write is what stands there; every table it knows stands on one page."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tables

    texts = [(ROOT / page).read_text() for page in tables.PAGES]
    for page, text in zip(tables.PAGES, texts, strict=True):
        assert tables.rendered(text) == text, f"{page}: run scripts/tables.py"
    shown = [name for text in texts for name in re.findall(r"<!-- table (\w+) -->", text)]
    assert sorted(shown) == sorted(tables.TABLES)


def test_results_say_where_they_come_from() -> None:
    files = sorted((ROOT / "results").glob("*.csv"))
    assert files
    for file in files:
        rows = list(csv.DictReader(file.open()))
        assert rows, file
        for row in rows:
            assert all(row[key] for key in ("machine", "torch", "python", "flashcomm", "date", "command")), file


def test_ci_runs_the_scripts_of_the_workflows() -> None:
    called = r"\b(scripts/[\w-]+(?: build)?)$"
    ours, theirs = (
        set(re.findall(called, (ROOT / name).read_text(), re.MULTILINE))
        for name in (".ci/run", ".github/workflows/ci.yml")
    )
    assert len(ours) == 5
    assert ours == theirs


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {flashcomm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_address_of_the_repository_is_the_same_everywhere() -> None:
    """docs/releases.md says in which files it stands."""
    names = re.findall(r"`(pyproject\.toml|mkdocs\.yml|CITATION\.cff)`", (ROOT / "docs" / "releases.md").read_text())
    assert sorted(set(names)) == ["CITATION.cff", "mkdocs.yml", "pyproject.toml"]
    texts = [(ROOT / name).read_text() for name in set(names)]
    found = [re.findall(r"https://github\.com/[^/]+/[^/\"\s]+", text) for text in texts]
    assert all(found)
    assert {address for addresses in found for address in addresses} == {"https://github.com/flashcomm/flashcomm"}
