"""`flashcomm eval`, `tune` and `probe` on a real model, cut short."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_line import MODEL, as_json, flashcomm, needs_model, refused

from flashcomm.accuracy import evaluate

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


@pytest.mark.thorough
def test_eval_of_expert_parallelism(pages: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=49152, initializer_range=0.2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    common = ("--text", pages, "--context", 64, "--windows", 2, "--continuation", 0, "--experts", "--json")
    rows = as_json(flashcomm("eval", "--model", tmp_path, *common, "--formats", "int8,int8/int4"))["rows"]
    assert [(r["world"], r["format"], r["ranks"]) for r in rows] == [
        (n, fmt, "simulated experts") for n in (2, 4) for fmt in ("none", "int8", "int8/int4")
    ]
    assert all(0 < rows[i]["kl"] < rows[i + 1]["kl"] for i in (1, 4))
    refused(flashcomm("eval", "--model", MODEL, *common), "LlamaForCausalLM has no mixture of experts")
    refused(flashcomm("eval", "--model", tmp_path, *common, "--worlds", 3), "3 ranks cannot share the 4 experts")
    refused(flashcomm("eval", "--model", tmp_path, *common, "--real"), "give it without --real")


def test_tune_then_eval_the_plan(pages: Path, tmp_path: Path) -> None:
    common = ("--model", MODEL, "--text", pages, "--context", 64, "--windows", 2, "--json")
    plan = tmp_path / "plan-{}.json"
    bits = ("--bits", "4.6,7,2.1", "--check-windows", 8, "--csv", tmp_path / "tune.csv")
    done = flashcomm("tune", *common, *bits, "--check", pages, "--decode", "int8", "-o", plan)
    small, large, missed = json.loads(done.stdout)["plans"]
    assert done.returncode == 1
    assert "no plan meets the budget; the best plan found was written: 2.1 " in done.stderr
    assert "the fewest possible bits are 2.14" in done.stderr
    assert [p["met"] for p in (small, large, missed)] == [True, True, False]
    assert json.loads((tmp_path / "plan-2.1.json").read_text())["made"]["met"] is False
    assert [r["plan"] for r in csv.DictReader((tmp_path / "tune.csv").open())] == [
        p["plan"] for p in (small, large, missed)
    ]
    assert small["check_windows"] == 8
    assert 4.3 < small["bits"] <= 4.6
    assert 6 < large["bits"] <= 7
    assert 0 < large["predicted_kl"] < small["predicted_kl"]
    assert small["kl_low"] < small["kl"] < small["kl_high"]
    assert large["kl"] < small["kl"]
    saved = json.loads((tmp_path / "plan-4.6.json").read_text())
    assert saved["decode"] == "int8"
    assert {"bits": small["bits"], "met": True, "budget": "4.6", "world": 3}.items() <= saved["made"].items()

    csvs = tmp_path / "eval.csv", tmp_path / "layers.csv"
    files = ("--plan", tmp_path / "plan-4.6.json", "--csv", csvs[0], "--layers", csvs[1])
    args = ("--formats", "int8,int4", "--continuation", 4, *files)
    got = as_json(flashcomm("eval", *common, *args))
    rows = {r["format"]: r for r in got["rows"]}
    assert list(rows) == ["none", "int8", "int4", "plan-4.6.json"]
    assert {(r["world"], r["bos"], r["algorithm"]) for r in got["rows"]} == {(3, "no", "two_shot")}
    assert rows["plan-4.6.json"]["kl"] < rows["int4"]["kl"] / 2
    assert rows["int8"]["kl"] < rows["int4"]["kl"] / 20
    assert rows["int8"]["bits"] == pytest.approx(8.375, rel=0.02)  # three shards, each padded to 16 bytes
    assert rows["plan-4.6.json"]["bits"] == pytest.approx(small["bits"], rel=0.02)
    assert got["recommendation"].startswith("Recommendation for smollm2-135m-instruct: ")
    assert len(got["layers"]) == 2 * 60
    assert sum(float(r["kl"]) for r in got["layers"] if r["format"] == "int8") < 0.05
    for source, title in zip(csvs, ("3 ranks, two_shot", "smollm2-135m-instruct, 3 ranks"), strict=True):
        picture = source.with_suffix(".svg")
        assert as_json(flashcomm("plot", source, "-o", picture, "--json")) == {"picture": str(picture)}
        assert f"<!-- {title} -->" in picture.read_text()


def test_an_interrupted_eval_goes_on_where_it_was(pages: Path, tmp_path: Path) -> None:
    """The CSV has each row as soon as it is measured. `--resume` measures the others, to the same figures."""
    common = ("--model", MODEL, "--text", pages, "--context", 48, "--continuation", 0, "--csv", tmp_path / "e.csv")
    run = ("eval", *common, "--windows", 2, "--formats", "int4,int3")
    measure_row = evaluate._row

    def interrupt(name: str, *args: Any) -> Any:
        if name == "int3":
            raise KeyboardInterrupt
        return measure_row(name, *args)

    with mock.patch.object(evaluate, "_row", interrupt):
        done = flashcomm(*run)
    assert done.returncode == 130
    kept = list(csv.DictReader((tmp_path / "e.csv").open()))
    assert [r["format"] for r in kept] == ["none", "int4"]
    got = as_json(flashcomm(*run, "--resume", "--json"))["rows"]
    assert [r["format"] for r in got] == ["none", "int4", "int3"]
    again = list(csv.DictReader((tmp_path / "e.csv").open()))
    assert [{k: v for k, v in r.items() if k != "command"} for r in again[:2]] == [
        {k: v for k, v in r.items() if k != "command"} for r in kept
    ]
    assert "--resume" not in again[1]["command"]
    assert "--resume" in again[2]["command"]
    assert got[1]["kl"] == float(kept[1]["kl"])
    other = ("eval", *common, "--windows", 3, "--formats", "int4,int3", "--resume")
    refused(flashcomm(*other), "e.csv was measured with tokens=94, this run has 141")


def test_eval_quick_ends_in_a_recommendation(pages: Path) -> None:
    done = flashcomm("eval", "--model", MODEL, "--text", pages, "--context", 96, "--quick", "--formats", "int8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Recommendation for smollm2-135m-instruct: int8, 8.")
    assert re.search(r"^\d+ windows, about \d+ min$", done.stderr, re.MULTILINE)
    assert "takes about" in done.stderr


def test_real_ranks_give_the_rows_of_simulated_ones(pages: Path) -> None:
    text = ("--model", MODEL, "--text", pages, "--context", 64, "--windows", 2)
    args = (*text, "--worlds", 3, "--formats", "int4-had", "--continuation", 3, "--algorithm", "two_shot", "--json")
    simulated, real = (as_json(flashcomm("eval", *args, *more))["rows"] for more in ((), ("--real",)))
    for a, b in zip(simulated, real, strict=True):
        assert (a.pop("ranks"), b.pop("ranks")) == ("simulated", "real")
        assert a.pop("bits") == pytest.approx(b.pop("bits"), rel=0.02)  # three shards, padded each to 16 bytes
        assert a == b


def test_a_budget_below_what_8_bits_can_do(pages: Path, tmp_path: Path) -> None:
    where = ("--text", pages, "--check", pages, "--context", 64, "--windows", 2, "-o", tmp_path / "plan.json")
    done = flashcomm("tune", "--model", MODEL, *where, "--budget", "0.001%")
    refused(done, "no plan meets a budget of 0.001 %: int8-g32-had in every layer costs")
    assert not (tmp_path / "plan.json").exists()


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
    refused(flashcomm("eval", *both, "--worlds", 8, "--local-world", 8), "--local-world 8: each of --worlds 8 must be")
    refused(flashcomm("eval", *both, "--bos", "yes", "--resume"), "--resume continues a file of rows")
    refused(flashcomm("eval", *both, "--quick", "--formats", "none"), "--quick compares formats: give at least one")
    refused(flashcomm("eval", *both, "--bos", "maybe"), "--bos maybe: allowed are auto, yes and no")
    refused(flashcomm("tune", *both, "--context", 96, "--windows", 1, "-o", "p.json", "--bits", 4), "8 windows of 96")
    refused(flashcomm("eval", *both, "--algorithm", "hierarchical"), "go together: give both or neither")
    refused(flashcomm("probe", *both, "--algorithm", "hierarchical"), "go together: give both or neither")
    refused(flashcomm("eval", *both, "--worlds", "4"), "4 ranks cannot share smollm2", "it allows --world 1, 3")
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
