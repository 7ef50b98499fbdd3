"""`flashcomm ttft` for a real model and for a shape with random weights, with all columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import MODEL, as_json, flashcomm, needs_link, needs_model, refused

TINY = ("ttft", "--model", "tiny", "--formats", "none,int4", "--repeats", 1, "--min-bytes", 0)
SMOL = ("ttft", "--model", MODEL, "--world", 3, "--formats", "int4", "--tokens", 128, "--repeats", 1)


@needs_model
def test_a_real_model(tmp_path: Path) -> None:
    got = as_json(flashcomm(*SMOL, "--csv", tmp_path / "t.csv", "--json"))
    backend, int4 = got["rows"]
    assert (backend["path"], int4["format"]) == ("backend", "int4")
    assert backend["speedup"] == 1.0
    assert backend["wire_bytes"] == 60 * 4 * 128 * 576 * 2 // 3
    assert 3.4 < backend["wire_bytes"] / int4["wire_bytes"] < 3.8
    assert backend["limit"] == pytest.approx(backend["ttft_s"] / backend["compute_s"], abs=2e-3)  # no time is compared
    assert backend["predicted_s"] is None
    as_json(flashcomm("plot", tmp_path / "t.csv", "-o", tmp_path / "t.png", "--json"))
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@needs_model
@needs_link
@pytest.mark.alone
def test_over_a_link() -> None:
    rows = as_json(flashcomm(*SMOL, "--link", "50mbit", "--json"))["rows"]
    assert [row["path"] for row in rows] == ["backend", "auto"]
    for row in rows:
        link_s = row["wire_bytes"] * 8 / 50e6 * 1514 / 1448
        assert row["predicted_s"] == pytest.approx(row["compute_s"] + link_s, rel=1e-3)
        assert row["ttft_s"] > link_s  # how much slower it is depends on the machine, and is no matter for a test


def test_sweep_with_overlap(tmp_path: Path) -> None:
    sizes = ("--batch", "2,3", "--tokens", "16,32", "--layers", 2)
    rows = as_json(flashcomm(*TINY, *sizes, "--overlap", "--csv", tmp_path / "t.csv", "--json"))["rows"]
    variants = [("backend", False), ("auto", False), ("backend", True), ("auto", True)]
    want = [(b, n, *variant) for n in (16, 32) for b in (2, 3) for variant in variants]
    assert [(r["batch"], r["tokens"], r["path"], r["overlap"]) for r in rows] == want
    for row in rows:
        n_values = row["batch"] * row["tokens"] * 128
        assert (row["layers"], row["all_layers"], row["compiled"], row["link"]) == (2, 3, False, "none")
        assert row["wire_bytes"] == 2 * 2 * (n_values * 2 if row["path"] == "backend" else n_values * 17 // 32)
        assert (row["format"] == "int4") == (row["path"] == "auto")
        assert row["same_bits"] is (True if row["overlap"] else None)
        assert row["halves"] == ("sequences" if row["overlap"] else None)
        base = next(r for r in rows if (r["batch"], r["tokens"]) == (row["batch"], row["tokens"]))
        assert row["share"] == pytest.approx(1 - base["compute_s"] / base["ttft_s"], rel=2e-3, abs=2e-3)
        assert row["speedup"] == pytest.approx(base["ttft_s"] / row["ttft_s"], rel=0.02)
        assert row["limit"] == pytest.approx(base["ttft_s"] / base["compute_s"], rel=0.02)
    as_json(flashcomm("plot", tmp_path / "t.csv", tmp_path / "t.csv", "-o", tmp_path / "t.svg", "--json"))
    assert (tmp_path / "t.svg").read_text().count("<!-- tiny, 2 of 3 layers, ") == 4
    refused(
        flashcomm("plot", tmp_path / "t.csv", Path(__file__), "-o", tmp_path / "t.svg"), "several files can be drawn"
    )


def test_compiled() -> None:
    done = flashcomm(*TINY, "--batch", 2, "--tokens", 16, "--compile")
    assert done.returncode == 0, done.stderr
    assert "tiny, 2 x 16 tokens, 2 ranks on cpu, compiled" in done.stdout
    assert "compiled: the stack, embeddings to last norm" in done.stdout


def test_refusals() -> None:
    refused(flashcomm("ttft", "--model", "llama-9b"), "--model llama-9b: no such directory and no such shape")
    refused(flashcomm(*TINY, "--layers", 4), "--layers 4: tiny has 3; give a number from 1 to that")
    refused(flashcomm(*TINY, "--world", 4), "4 ranks cannot share tiny", "--world 1, 2")
    refused(flashcomm(*TINY, "--batch", "1,x"), "--batch 1,x: give positive numbers")
    refused(flashcomm(*TINY, "--overlap", "--tokens", 3), "split into blocks of tokens; give at least 4")
    refused(flashcomm(*TINY, "--batch", 2, "--overlap", "--compile"), "cannot take turns")
