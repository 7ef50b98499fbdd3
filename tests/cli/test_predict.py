"""`flashcomm predict`."""

from __future__ import annotations

import csv
from pathlib import Path

from command_line import as_json, flashcomm, refused


def test_table_json_csv_and_plot(tmp_path: Path) -> None:
    asked = ("predict", "--gpu", "rtx-4090", "--world", 4, "--formats", "int8,int4-had")
    shown = flashcomm(*asked)
    assert "predicted: llama-3-8b, 8 x 1024 tokens, 4 x rtx-4090, host-memory (31.5 GB/s)" in shown.stdout
    assert "rise in perplexity: SmolLM2-135M on as many ranks; `flashcomm eval` measures your model" in shown.stdout
    files = ("--csv", tmp_path / "p.csv", "--plot", tmp_path / "p.svg")
    rows = as_json(flashcomm(*asked, *files, "--json"))["rows"]
    assert [(r["format"], r["algorithm"]) for r in rows] == [
        ("none", "backend"), ("int8", "two_shot"), ("int4-had", "two_shot"),
    ]  # fmt: skip
    assert 1 == rows[0]["gain"] < rows[1]["gain"] < rows[2]["gain"] < rows[0]["limit"]
    assert [r["gain"] for r in csv.DictReader((tmp_path / "p.csv").open())] == [str(r["gain"]) for r in rows]
    assert (tmp_path / "p.svg").stat().st_size > 10_000


def test_hosts() -> None:
    rows = as_json(flashcomm("predict", "--world", 8, "--hosts", 2, "--formats", "int8", "--json"))["rows"]
    assert [r["algorithm"] for r in rows] == ["backend", "hierarchical"]


def test_check() -> None:
    results = Path(__file__).parents[2] / "results"
    shown = flashcomm("predict", "--check", results).stdout
    assert "h200x2-host-memory.csv" in shown
    assert " %  h200x2-auto.csv: 2048 bytes, none, backend: measured " in shown


def test_refusals(tmp_path: Path) -> None:
    refused(flashcomm("predict", "--world", 3), "3 ranks cannot share llama-3-8b", "allowed are 2, 4, 8")
    refused(flashcomm("predict", "--gpu", "foo"), "--gpu foo is not known", "--tflops")
    refused(flashcomm("predict", "--model", "llama-9"), "shapes are llama-3.2-1b", "config.json")
    refused(flashcomm("predict", "--link", "25gbit"), "--hosts and --host-link")
    refused(flashcomm("predict", "--world", 4, "--hosts", 3), "multiple of --hosts 3")
    refused(flashcomm("predict", "--formats", "int12"), "12 bits")
    refused(flashcomm("predict", "--check", tmp_path), "no CSV file of bench or ttft")
    refused(flashcomm("predict", "--plot", tmp_path / "x.pdf"), ".svg or .png")
