"""The README's examples run, and print what it says they print; its figures are those of a CSV in results/."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_prints_what_it_says(tmp_path: Path) -> None:
    code, output = blocks("python")[0], blocks("text")[0]
    file = tmp_path / "example.py"
    file.write_text(code)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == output.strip()


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


def rows_of(name: str) -> dict[tuple[str, str], dict[str, str]]:
    """A CSV of results/ by (size or link, format)."""
    with (ROOT / "results" / name).open(newline="") as file:
        return {(row.get("size") or row["link"], row["format"]): row for row in csv.DictReader(file)}


def test_figures_are_those_of_the_results() -> None:
    ttft = rows_of("ttft-smollm2-3ranks-100mbit.csv")
    named = {"bf16": "bf16, gloo", "int8": "int8", "int6-had/int7-had": "int6-had/int7-had, the default"}
    named |= {"results/plans/smollm2-4.6.json": "a plan of 4.6 bits", "int4-had": "int4-had"}
    for fmt, label in named.items():
        row = ttft["100mbit", fmt]
        seconds, speedup, sent = float(row["ttft_s"]), float(row["speedup"]), int(row["wire_bytes"]) / 1e6
        assert f"| {label} | {seconds:.2f} s | {speedup:.2f}x | {sent:.1f} MB |" in README
    for rate, label in (("200mbit", "200 Mbit/s"), ("1gbit", "1 Gbit/s")):
        rows = rows_of(f"allreduce-2ranks-{rate}.csv")
        cells = []
        for fmt in ("bf16", "int8", "int6-had", "int4-had"):
            row = rows[str(16 << 20), fmt]
            times = "" if fmt == "bf16" else f", {float(row['speedup']):.2f}x"
            cells.append(f"{float(row['time_us']) / 1e3:.0f} ms{times}")
        assert f"| {label} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("page", ["README.md", "docs/accuracy.md"])
def test_tables_are_those_of_the_results(page: str) -> None:
    """What scripts/tables.py would write is what stands there; every table it knows stands on one of both pages."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import tables

    text = (ROOT / page).read_text()
    assert tables.rendered(text) == text, "run scripts/tables.py"
    assert set(re.findall(r"<!-- table (\w+) -->", text)) <= set(tables.TABLES)
    assert sum((ROOT / p).read_text().count("<!-- table ") for p in tables.PAGES) == len(tables.TABLES)


def test_results_say_where_they_come_from() -> None:
    files = sorted((ROOT / "results").glob("*.csv"))
    assert files
    for file in files:
        rows = list(csv.DictReader(file.open()))
        assert rows, file
        for row in rows:
            assert all(row[key] for key in ("machine", "torch", "python", "flashcomm", "date", "command")), file
