"""`flashcomm bench all_reduce`, `bench codec` and `calibrate`."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from command_line import as_json, flashcomm, needs_link, refused

BENCH = ("bench", "all_reduce")


def test_json_csv_and_plot(tmp_path: Path) -> None:
    sizes = ("-b", 20000, "-e", 40000, "--row", 576, "--turns", 2)
    done = flashcomm(*BENCH, "-n", 3, "--formats", "int8,int4/int8", *sizes, "--csv", tmp_path / "b.csv", "--json")
    got = as_json(done)
    assert [(r["size"], r["path"] in ("one_shot", "two_shot")) for r in got["rows"] if r["format"] == "int8"] == [
        (20000, False), (20000, True), (40000, False), (40000, True),
    ]  # fmt: skip
    assert got["unavailable"]["symm two-shot"] == "for CUDA tensors only"
    assert {(r["world"], r["link"], r["local_world"]) for r in got["rows"]} == {(3, "none", None)}
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert [float(r["time_us"]) for r in rows] == [r["time_us"] for r in got["rows"]]
    assert all(rows[0][key] for key in ("machine", "torch", "python", "date", "command", "flashcomm"))
    assert "bench all_reduce" in rows[0]["command"]
    picture = tmp_path / "b.svg"
    assert as_json(flashcomm("plot", tmp_path / "b.csv", "-o", picture, "--json")) == {"picture": str(picture)}
    assert "<!-- speed-up over gloo -->" in picture.read_text()


def test_table() -> None:
    """Every path has a row, or a reason why it has none."""
    done = flashcomm(*BENCH, "--formats", "int8", "-b", 8192, "-e", 8192, "--turns", 1)
    assert done.returncode == 0, done.stderr
    for row in ("backend", "one_shot", "two_shot", "int8 +auto", "int8 +one_shot"):
        assert re.search(rf"8192 .*{row}", done.stdout), done.stdout
    assert "auto: takes backend; new output" in done.stdout
    for path in ("symm one-shot", "symm two-shot", "vllm custom", "flashinfer fp8"):
        assert f"not measured: {path}: for CUDA tensors only" in done.stdout


@needs_link
@pytest.mark.alone
def test_nodes_have_a_link_together() -> None:
    given = ("-n", 4, "--local-world", 2, "--algorithm", "hierarchical", "--link", "200mbit", "--formats", "int8")
    got = as_json(flashcomm(*BENCH, *given, "-b", 400_000, "-e", 400_000, "--row", 500, "--turns", 1, "--json"))
    rows = {(r["format"], r["path"]): r for r in got["rows"]}
    assert {r["local_world"] for r in got["rows"]} == {2}
    assert rows["int8", "hierarchical"]["error"] > rows["int8", "auto"]["error"]
    node_sends = 2 * 200_000 * (1 + 3 / 64)  # auto: two ranks send half a message to the other node, twice
    assert rows["int8", "auto"]["time_us"] > node_sends * 8 / 200  # with a link for each rank it takes half as long
    assert rows["int8", "hierarchical"]["time_us"] > node_sends / 2 * 8 / 200


@needs_link
@pytest.mark.alone
def test_a_link_limits_the_rate() -> None:
    """No row is faster than its bytes. How much slower it is depends on the machine, and is no matter for a test."""
    sizes = ("-b", "1M", "-e", "1M", "--turns", 1)
    rows = as_json(flashcomm(*BENCH, "--formats", "int4", *sizes, "--link", "50mbit", "--json"))["rows"]
    assert {r["path"] for r in rows} >= {"backend", "one_shot"}
    for row in rows:
        assert row["time_us"] > row["wire_bytes"] * 8 / 50, row


@pytest.mark.parametrize(
    ("op", "sent", "skewed_sent"), [("all_to_all", 40, 53), ("reduce_scatter", 40, 53), ("all_gather", 40, 92)]
)
def test_pieces(op: str, sent: int, skewed_sent: int) -> None:
    """60 rows of 256 values; skewed pieces are 46, 7 and 7 of them. sent: rows that the busiest rank sends."""
    sizes = ("-b", 60 * 512, "-e", 60 * 512, "--row", 256, "--turns", 1)
    got = as_json(flashcomm("bench", op, "-n", 3, "--formats", "int8,int4", *sizes, "--json"))["rows"]
    cases = [("none", "backend"), ("none", op), ("int8", op), ("int4", op)]
    assert [(r["split"], r["format"], r["path"]) for r in got] == [
        (split, *case) for split in ("equal", "skewed") for case in cases
    ]
    assert {(r["op"], r["size"]) for r in got} == {(op, 60 * 512)}
    plain = [r["wire_bytes"] for r in got if r["format"] == "none"]
    assert plain == [sent * 512] * 2 + [skewed_sent * 512] * 2
    for rows in (got[:4], got[4:]):
        backend, *rest = (r["time_us"] for r in rows)
        assert [r["over_backend"] for r in rows[1:]] == pytest.approx([backend / t for t in rest], rel=0.01, abs=1e-3)
        assert [r["speedup"] for r in rows[1:]] == pytest.approx(
            [min(backend, rest[0]) / t for t in rest], rel=0.01, abs=1e-3
        )
        assert rows[0]["error"] <= 0.004, "of sums in bf16"
        assert (rows[1]["error"] == 0) == (op != "reduce_scatter")
        assert rows[1]["error"] < rows[2]["error"] < rows[3]["error"]


def test_codec() -> None:
    sizes = ("-b", "100K", "-e", "400K", "--row", 576, "--turns", 2)
    rows = as_json(flashcomm("bench", "codec", "--formats", "int4,int5", *sizes, "--json"))["rows"]
    assert [r["format"] for r in rows] == ["int4", "int5"] * 2
    for row in rows:
        assert row["encode_share"] == pytest.approx(row["encode"] / row["copy"], rel=0.02)
        assert row["decode_share"] == pytest.approx(row["decode_sum"] / row["copy"], rel=0.02)


def test_calibrate_writes_a_table_that_communicators_find() -> None:
    from flashcomm import __version__
    from flashcomm.routing import timings

    sizes = ("-b", "4K", "-e", "8K", "--row", 64, "--turns", 1)
    got = as_json(flashcomm("calibrate", "--formats", "int8", *sizes, "--json"))
    table = timings.find(got["machine"], 2, got["transport"], __version__)
    assert table is not None
    assert table.sizes == (4096, 8192)
    assert got["table"]["us"].keys() == table.us.keys()
    assert set(table.us) == {"backend", "none one_shot", "int8 one_shot"}
    assert not table.at_setup
    Path(got["file"]).unlink()


def test_refusals() -> None:
    refused(flashcomm(*BENCH, "--formats", "int4,int9"), "9 bits asked for", "a format is int2")
    refused(flashcomm(*BENCH, "-n", 1), "needs --world 2")
    refused(flashcomm(*BENCH, "-b", "big"), "--begin='big': give a number of bytes")
    refused(flashcomm(*BENCH, "-b", "2M", "-e", "1M"), "no sizes from 2M to 1M")
    refused(flashcomm(*BENCH, "--dtype", "int8"), "allowed are bf16, fp16, fp32")
    refused(flashcomm(*BENCH, "--device", "tpu"), "allowed are auto, cpu and cuda")
    refused(flashcomm(*BENCH, "--device", "cuda"), "no CUDA device")
    refused(flashcomm(*BENCH, "--link", "fast"), "link rate 'fast' is not allowed")
    refused(flashcomm(*BENCH, "--mode", "slow"), "allowed are eager, graph, both")
    refused(flashcomm(*BENCH, "--mode", "graph", "--device", "cpu"), "CUDA graphs need --device cuda")
    refused(flashcomm(*BENCH, "--chunk-bytes", "0"), "chunk_bytes='0'")
    refused(flashcomm("bench", "all_to_all", "-n", 1), "needs --world 2")
    refused(flashcomm("bench", "codec", "--device", "cuda"), "no CUDA device")
    refused(flashcomm("calibrate", "-n", 1), "needs --world 2")
