"""`flashcomm eval`, `tune` and `probe` on a real model, cut short."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from command_line import MODEL, as_json, flashcomm, needs_model, refused

pytestmark = needs_model


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return some 900 tokens of English."""
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    lines = [
        f"On day {i} the ship sailed {i * 7 % 40} miles to the north and met {i * 3 % 11} birds." for i in range(40)
    ]
    path.write_text("\n".join(lines))
    return path


def test_tune_then_eval_the_plan(pages: Path, tmp_path: Path) -> None:
    common = ("--model", MODEL, "--text", pages, "--context", 64, "--windows", 2, "--json")
    plan = tmp_path / "plan-{}.json"
    made = as_json(flashcomm("tune", *common, "--bits", "4.6,7", "--check", pages, "--decode", "int8", "-o", plan))
    small, large = made["plans"]
    assert small["met"]
    assert 4.3 < small["bits"] <= 4.6
    assert 6 < large["bits"] <= 7
    assert 0 < large["predicted_kl"] < small["predicted_kl"]
    assert small["check_rise_pct"] == small["rise_pct"]  # the same text
    saved = json.loads((tmp_path / "plan-4.6.json").read_text())
    assert saved["decode"] == "int8"
    assert {"bits": small["bits"], "met": True, "budget": "4.6", "world": 2}.items() <= saved["made"].items()

    csvs = tmp_path / "eval.csv", tmp_path / "layers.csv"
    files = ("--plan", tmp_path / "plan-4.6.json", "--csv", csvs[0], "--layers", csvs[1])
    args = ("--worlds", "2,4", "--formats", "int8,int4", "--algorithm", "two_shot", "--continuation", 4, *files)
    got = as_json(flashcomm("eval", *common, *args))
    rows = {(r["world"], r["format"]): r for r in got["rows"]}
    assert len(rows) == 2 * 4
    assert {f for _, f in rows} > {"int8", "int4", "plan-4.6.json"}
    assert rows[2, "plan-4.6.json"]["kl"] < rows[2, "int4"]["kl"] / 2
    assert rows[2, "int8"]["kl"] < rows[2, "int4"]["kl"] / 20
    assert rows[2, "int8"]["bits"] == pytest.approx(8.375, rel=0.002)
    assert rows[2, "plan-4.6.json"]["bits"] == pytest.approx(small["bits"], rel=0.002)
    assert rows[2, "plan-4.6.json"]["rise_pct"] == pytest.approx(small["rise_pct"], abs=0.01)
    assert len(got["layers"]) == 2 * 60
    assert sum(float(r["kl"]) for r in got["layers"] if r["format"] == "int8") < 0.05
    for source, title in zip(csvs, ("2 ranks, two_shot", "smollm2-135m-instruct, 2 ranks"), strict=True):
        picture = source.with_suffix(".svg")
        assert as_json(flashcomm("plot", source, "-o", picture, "--json")) == {"picture": str(picture)}
        assert f"<!-- {title} -->" in picture.read_text()


def test_real_ranks_give_the_rows_of_simulated_ones(pages: Path) -> None:
    text = ("--model", MODEL, "--text", pages, "--context", 64, "--windows", 2)
    args = (*text, "--worlds", 3, "--formats", "int4-had", "--continuation", 3, "--algorithm", "two_shot", "--json")
    simulated, real = (as_json(flashcomm("eval", *args, *more))["rows"] for more in ((), ("--real",)))
    for a, b in zip(simulated, real, strict=True):
        assert (a.pop("ranks"), b.pop("ranks")) == ("simulated", "real")
        assert a.pop("bits") == pytest.approx(b.pop("bits"), rel=0.02)  # three shards, padded each to 16 bytes
        assert a == b


def test_a_budget_no_format_meets(pages: Path, tmp_path: Path) -> None:
    where = ("--text", pages, "--context", 96, "--windows", 2, "-o", tmp_path / "plan.json")
    done = flashcomm("tune", "--model", MODEL, *where, "--bits", "2.05")
    assert done.returncode == 1
    assert "no plan meets the budget; the best plans found were written: 2.05" in done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["made"]["met"] is False


def test_probe(pages: Path, tmp_path: Path) -> None:
    args = ("--text", pages, "--contexts", "96,128", "--prompts", 2, "--tokens", 4, "--formats", "int8,int2")
    got = as_json(flashcomm("probe", "--model", MODEL, *args, "--csv", tmp_path / "probe.csv", "--json"))
    needles = {(r["context"], r["format"]): r for r in got["rows"] if r["probe"] == "needle"}
    assert len(needles) == 2 * 3
    for context in (96, 128):
        (base,) = (r["nats"] for (c, f), r in needles.items() if c == context and f not in ("int8", "int2"))
        assert abs(needles[context, "int8"]["nats"] - base) < 1
        assert needles[context, "int2"]["nats"] > base + 5
        assert needles[context, "int2"]["found_pct"] == 0
    by_format = {r["format"]: r for r in got["rows"] if r["probe"] == "generation"}
    assert by_format["int8"]["mean_same"] > by_format["int2"]["mean_same"]
    assert {r["probe"] for r in csv.DictReader((tmp_path / "probe.csv").open())} == {"needle", "generation"}


def test_refusals(pages: Path, tmp_path: Path) -> None:
    both = ("--model", MODEL, "--text", pages)
    refused(flashcomm("eval", *both, "--context", 512, "--windows", 9), "pages.txt has", "windows of 512 need 4608")
    refused(flashcomm("eval", *both, "--worlds", "2,x"), "--worlds 2,x: give positive numbers")
    refused(flashcomm("eval", *both, "--local-world", 4), "--local-world 4: each of --worlds 2,4,8 must be")
    refused(flashcomm("eval", *both, "--algorithm", "hierarchical"), "go together: give both or neither")
    refused(flashcomm("probe", *both, "--algorithm", "hierarchical"), "go together: give both or neither")
    refused(flashcomm("eval", *both, "--worlds", "5", "--windows", 1), "5 ranks cannot share the inputs of")
    refused(flashcomm("eval", *both, "--plan", tmp_path / "no.json"), "no plan at")
    (tmp_path / "other.json").write_text('{"flashcomm_plan": 1, "format": "int8", "layers": {"h.*": "int4"}}')
    few = ("--context", 96, "--windows", 1, "--plan", tmp_path / "other.json")
    refused(flashcomm("eval", *both, *few), "names layers that the model does not have (h.*)")
    refused(flashcomm("eval", *both, "--formats", "none", "--layers", "l.csv"), "--layers measures single formats")
    refused(flashcomm("tune", *both, "-o", "p.json"), "give one of --budget")
    refused(flashcomm("tune", *both, "-o", "p.json", "--bits", "4", "--world", 1), "--world 1: one rank sends nothing")
    refused(flashcomm("tune", *both, "-o", "p.json", "--budget", "-1%"), "--budget -1%: give a rise")
    refused(flashcomm("tune", *both, "-o", "p.json", "--bits", "1,2"), "--bits 1: give bits per value")
    refused(flashcomm("tune", *both, "-o", "p.json", "--bits", "4,5"), "for several budgets, has a {}")
    refused(flashcomm("tune", *both, "-o", "p.txt", "--bits", "4"), "give a name that ends in .json")
    refused(flashcomm("probe", *both, "--contexts", "9000"), "supports at most 8192 tokens")
