"""The command line as a user runs it: whole processes, exit codes, one JSON object, clear errors."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from flashcomm.cli import main
from flashcomm.ranks import link

MODEL = Path(__file__).parent.parent.parent / ".assets" / "smollm2-135m-instruct"
needs_model = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no model: run scripts/fetch_assets.py")
BENCH = ("bench", "all_reduce")
NO_LINK = link.probe()
needs_link = pytest.mark.skipif(NO_LINK is not None, reason=f"no network namespaces: {NO_LINK}")


def flashcomm(*args: object, timeout: float = 200, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashcomm.cli.main", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **env})


def here(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, in a tenth of the time: for what is refused before anything starts."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["flashcomm", *map(str, args)]),
        mock.patch.dict(os.environ, env),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(list(args), code, out.getvalue(), err.getvalue())


def as_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Not 0, nothing on stdout, one message without a traceback that holds all parts."""
    assert done.returncode not in (0, -6, -11), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


class TestDoctor:
    def test_json(self) -> None:
        got = as_json(flashcomm("doctor", "--world", 3, "--format", "int4", "--row", 576, "--json"))
        assert set(got) == {"machine", "versions", "paths", "settings", "choices"}
        assert got["settings"]["fmt"] == "int4"
        paths = {c["size"]: c["path"] for c in got["choices"]}
        assert paths[4096] == "native"
        assert paths[1 << 24] == "two_shot"
        assert all(set(c["not"]) | {c["path"]} == {"native", "one_shot", "two_shot"} for c in got["choices"])

    def test_table_and_environment(self) -> None:
        done = flashcomm("doctor", FLASHCOMM_FORMAT="int5-g32", FLASHCOMM_MIN_BYTE="7")
        assert done.returncode == 0
        assert "as int5-g32, 2 ranks" in done.stdout
        assert "FLASHCOMM_MIN_BYTE is not a flashcomm setting" in done.stderr

    def test_help_names_every_command(self) -> None:
        out = flashcomm("--help").stdout
        assert all(name in out for name in ("doctor", "generate", "ttft", "bench", "plot"))


class TestBench:
    def test_json_csv_and_plot(self, tmp_path: Path) -> None:
        sizes = ("-b", 20000, "-e", 40000, "--row", 576, "--turns", 2)
        done = flashcomm(*BENCH, "-n", 3, "--formats", "int8,int4/int8", *sizes, "--csv", tmp_path / "b.csv", "--json")
        got = as_json(done)
        assert [(r["size"], r["format"]) for r in got["rows"] if r["path"] != "auto"] == [
            (size, fmt) for size in (20000, 40000) for fmt in ("bf16", "bf16", "bf16", "int8", "int4/int8")
        ]
        assert got["unavailable"]["symm two-shot"] == "for CUDA tensors only"
        for row in got["rows"]:
            assert row["world"] == 3
            assert row["time_us"] > 0
            assert row["wire_bytes"] > 0
            assert row["algbw"] == pytest.approx(row["size"] / row["time_us"] / 1e3, rel=1e-2)
            assert row["busbw"] == pytest.approx(row["algbw"] * 4 / 3, rel=1e-2)
            assert row["speedup"] > 0
        by = {(r["size"], r["format"]): r for r in got["rows"]}
        assert by[20000, "bf16"]["speedup"] == 1.0  # the last of the lossless ones is the best
        assert by[20000, "bf16"]["error"] < 0.01 < by[20000, "int4/int8"]["error"]
        assert by[40000, "int8"]["wire_bytes"] < 0.6 * 2 * 40000
        rows = list(csv.DictReader((tmp_path / "b.csv").open()))
        assert len(rows) == 14
        assert all(rows[0][key] for key in ("machine", "torch", "python", "date", "command", "flashcomm"))
        assert "bench all_reduce" in rows[0]["command"]
        as_json(flashcomm("plot", tmp_path / "b.csv", "-o", tmp_path / "b.svg", "--json"))
        assert (
            "over the best lossless path" in (tmp_path / "b.svg").read_text()
            or (tmp_path / "b.svg").stat().st_size > 5000
        )

    def test_codec(self) -> None:
        args = (
            "bench",
            "codec",
            "--formats",
            "int4,int3",
            "-b",
            "100K",
            "-e",
            "400K",
            "--row",
            576,
            "--turns",
            2,
            "--json",
        )
        rows = as_json(flashcomm(*args))["rows"]
        assert [r["format"] for r in rows] == ["int4", "int3"] * 2
        for row in rows:
            assert row["encode_share"] == pytest.approx(row["encode"] / row["copy"], rel=0.02)
            assert row["decode_share"] == pytest.approx(row["decode_sum"] / row["copy"], rel=0.02)

    def test_table(self) -> None:
        """Every path has a row, and what has none a reason."""
        done = flashcomm(*BENCH, "--formats", "int8", "-b", 8192, "-e", 8192, "--turns", 1)
        assert done.returncode == 0, done.stderr
        for row in ("bf16 +native", "bf16 +one_shot", "bf16 +two_shot", "int8 +auto", "int8 +one_shot"):
            assert re.search(rf"8192 +{row}", done.stdout), done.stdout
        assert "auto: takes native; new output" in done.stdout
        for path in ("symm one-shot", "symm two-shot", "vllm custom", "flashinfer fp8"):
            assert f"not measured: {path}: for CUDA tensors only" in done.stdout

    @needs_link
    @pytest.mark.alone
    def test_nodes_have_a_link_together(self) -> None:
        given = ("-n", 4, "--local-world", 2, "--algorithm", "hierarchical", "--link", "200mbit", "--formats", "int8")
        got = as_json(flashcomm(*BENCH, *given, "-b", 400_000, "-e", 400_000, "--row", 500, "--turns", 1, "--json"))
        rows = {(r["format"], r["path"]): r for r in got["rows"]}
        assert {r["local_world"] for r in got["rows"]} == {2}
        assert rows["int8", "hierarchical"]["error"] > rows["int8", "auto"]["error"]
        assert rows["int8", "hierarchical"]["time_us"] < rows["int8", "auto"]["time_us"]  # half crosses, see policy

    @needs_link
    @pytest.mark.alone
    def test_a_link_limits_the_rate(self) -> None:
        """1 MB over 50 Mbit/s takes 168 ms and the frame headers uncompressed, a quarter as int4."""
        rows = as_json(flashcomm(*BENCH, "--formats", "int4", "-b", "1M", "-e", "1M", "--turns", 3,
                                 "--link", "50mbit", "--json"))["rows"]  # fmt: skip
        by = {r["format"]: r for r in rows}
        least_us = 2**20 * 8 / 50
        assert least_us < by["bf16"]["time_us"] < 1.6 * least_us
        assert by["int4"]["speedup"] > 2.2

    def test_refusals(self) -> None:
        refused(flashcomm(*BENCH, "--formats", "int4,int9"), "9 bits asked for", "a format is int2")
        refused(here(*BENCH, "-n", 1), "needs --world 2")
        refused(here(*BENCH, "-b", "big"), "--begin='big': give a number of bytes")
        refused(here(*BENCH, "-b", "2M", "-e", "1M"), "no sizes from 2M to 1M")
        refused(here(*BENCH, "--dtype", "int8"), "allowed are bf16, fp16, fp32")
        refused(here(*BENCH, "--device", "tpu"), "allowed are auto, cpu and cuda")
        refused(here(*BENCH, "--device", "cuda"), "no CUDA device")
        refused(here("doctor", "--device", "cuda"), "no CUDA device")
        refused(here(*BENCH, "--link", "fast"), "fast")
        refused(here(*BENCH, "--mode", "slow"), "allowed are eager, graph, both")
        refused(here(*BENCH, "--mode", "graph", "--device", "cpu"), "CUDA graphs need --device cuda")
        refused(here("bench", "codec", "--device", "cuda"), "no CUDA device")
        refused(here("plot", "none.csv", "-o", "x.svg"), "none.csv cannot be read")

    def test_no_orphans_after_a_kill(self) -> None:
        """The parent dies by SIGKILL: so do its ranks, within seconds."""
        marker = f"FC_TEST_{os.getpid()}"
        command = [
            sys.executable,
            "-m",
            "flashcomm.cli.main",
            "bench",
            "all_reduce",
            "-b",
            "16M",
            "-e",
            "64M",
            "--turns",
            "99",
        ]
        parent = subprocess.Popen(
            command, env={**os.environ, "MARKER": marker}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
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


@needs_model
class TestModel:
    PROMPT = "Explain in two sentences why the sky is blue."

    def generate(self, fmt: str, world_size: int = 3, **env: str) -> dict[str, Any]:
        args = (
            "--model",
            MODEL,
            "--world",
            world_size,
            "--format",
            fmt,
            "--prompt",
            self.PROMPT,
            "--tokens",
            8,
            "--min-bytes",
            "0",
        )
        return as_json(flashcomm("generate", *args, "--dtype", "fp32", "--json", **env))

    def test_three_ranks_say_what_one_says(self) -> None:
        """A real model: lossless and 8-bit all-reduces over 3 ranks give the tokens of a single process."""
        single, uncompressed, coded = self.generate("bf16", world_size=1), self.generate("bf16"), self.generate("int8")
        assert single["text"].startswith("The sky is blue")
        assert uncompressed["tokens"] == single["tokens"]
        assert coded["tokens"] == single["tokens"]
        assert single["wire_bytes"] == 0
        assert coded["wire_bytes"] < 0.4 * uncompressed["wire_bytes"]  # one-shot at 8.3 bits, a ring at 32
        assert sum(coded["calls"].values()) == 60 * len(coded["tokens"])
        assert set(coded["calls"]) <= {"all_reduce/one_shot", "all_reduce/two_shot"}

    def test_torchrun(self) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "flashcomm.cli.main"]
        args = ["generate", "--model", MODEL, "--world", 3, "--format", "int8", "--prompt", self.PROMPT, "--tokens", 4]
        command = [*torchrun, *map(str, args), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert as_json(done)["world"] == 3

    def test_ttft(self, tmp_path: Path) -> None:
        args = ("ttft", "--model", MODEL, "--world", 3, "--formats", "int4", "--tokens", 128, "--repeats", 1)
        got = as_json(flashcomm(*args, "--csv", tmp_path / "t.csv", "--json"))
        uncompressed, coded = got["rows"]
        assert (uncompressed["format"], coded["format"]) == ("bf16", "int4")
        assert uncompressed["speedup"] == 1.0
        assert uncompressed["wire_bytes"] == 60 * 4 * 128 * 576 * 2 // 3
        assert 3.4 < uncompressed["wire_bytes"] / coded["wire_bytes"] < 3.8
        assert 0 < uncompressed["compute_s"] < uncompressed["ttft_s"]
        assert uncompressed["predicted_s"] is None
        as_json(flashcomm("plot", tmp_path / "t.csv", "-o", tmp_path / "t.png", "--json"))

    @needs_link
    @pytest.mark.alone
    def test_ttft_over_a_link(self) -> None:
        args = (
            "ttft",
            "--model",
            MODEL,
            "--world",
            3,
            "--formats",
            "int4",
            "--tokens",
            128,
            "--repeats",
            1,
            "--link",
            "50mbit",
        )
        rows = as_json(flashcomm(*args, "--json"))["rows"]
        by = {r["format"]: r for r in rows}
        assert by["bf16"]["predicted_s"] == pytest.approx(
            by["bf16"]["compute_s"] + by["bf16"]["wire_bytes"] * 8 / 50e6 * 1514 / 1448, rel=1e-3
        )
        assert by["int4"]["speedup"] > 1.3

    def test_refusals(self, tmp_path: Path) -> None:
        say = ("--prompt", "x", "--json")
        refused(here("generate", "--model", tmp_path / "none", *say), "no model directory at")
        refused(here("generate", "--model", tmp_path, *say), "0 GGUF files and no config.json")
        refused(here("generate", "--model", MODEL, "--world", 2, *say), "2 ranks cannot share", "--world 1, 3")
        refused(here("generate", "--model", MODEL, "--world", 3, "-f", "int4-g99", *say), "a group of 99 asked for")
        broken = tmp_path / "broken"
        shutil.copytree(MODEL, broken)
        weights = broken / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        refused(here("generate", "--model", broken, "--world", 3, *say), "is corrupt or cut short", "download it again")
        (broken / "config.json").write_text("{not json")
        refused(here("generate", "--model", broken, "--world", 3, *say), "no readable model config")


class TestTtftOfAShape:
    """Random weights in a well-known shape: every column, overlap, compiled, and what is refused."""

    TINY = ("ttft", "--model", "tiny", "--formats", "bf16,int4", "--repeats", 1, "--min-bytes", 0)

    def test_sweep_with_overlap(self, tmp_path: Path) -> None:
        sizes = ("--batch", "2,3", "--tokens", "16,32", "--layers", 2)
        got = as_json(flashcomm(*self.TINY, *sizes, "--overlap", "--csv", tmp_path / "t.csv", "--json"))
        ways = [("bf16", "native", False), ("int4", "auto", False), ("bf16", "native", True), ("int4", "auto", True)]
        want = [(b, n, *way) for n in (16, 32) for b in (2, 3) for way in ways]
        rows = got["rows"]
        assert [(r["batch"], r["tokens"], r["format"], r["path"], r["overlap"]) for r in rows] == want
        for row in rows:
            n_values = row["batch"] * row["tokens"] * 128
            assert (row["layers"], row["all_layers"], row["compiled"], row["link"]) == (2, 3, False, "none")
            assert row["wire_bytes"] == 2 * 2 * (n_values * 2 if row["format"] == "bf16" else n_values * 17 // 32)
            assert row["same_bits"] is (True if row["overlap"] else None)
            assert row["share"] == pytest.approx(1 - 1 / row["limit"], abs=2e-3)
            base = next(r for r in rows if (r["batch"], r["tokens"]) == (row["batch"], row["tokens"]))
            assert row["speedup"] == pytest.approx(base["ttft_s"] / row["ttft_s"], rel=0.02)
            assert row["limit"] == pytest.approx(base["ttft_s"] / base["compute_s"], rel=0.02)
        as_json(flashcomm("plot", tmp_path / "t.csv", tmp_path / "t.csv", "-o", tmp_path / "t.svg", "--json"))
        assert (tmp_path / "t.svg").read_text().count("<!-- tiny, 2 of 3 layers, ") == 4
        refused(here("plot", tmp_path / "t.csv", Path(__file__), "-o", tmp_path / "t.svg"), "several make one")

    def test_compiled(self) -> None:
        done = flashcomm(*self.TINY, "--batch", 2, "--tokens", 16, "--compile")
        assert done.returncode == 0, done.stderr
        assert "tiny, 2 x 16 tokens, 2 ranks on cpu, compiled" in done.stdout
        assert "compiled: the stack, embeddings to last norm" in done.stdout

    def test_refusals(self) -> None:
        refused(here("ttft", "--model", "llama-9b"), "--model llama-9b: no such directory, and no such shape")
        refused(here(*self.TINY, "--layers", 4), "--layers 4: tiny has 3; give 1 to that many")
        refused(here(*self.TINY, "--world", 4), "4 ranks cannot share tiny", "--world 1, 2")
        refused(here(*self.TINY, "--batch", "1,x"), "--batch 1,x: give positive numbers")
        refused(here(*self.TINY, "--overlap"), "give batches of 2 and more")
        refused(here(*self.TINY, "--batch", 2, "--overlap", "--compile"), "no place to hand over")


@pytest.fixture(scope="class")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 900 tokens of English."""
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    lines = [
        f"On day {i} the ship sailed {i * 7 % 40} miles to the north and met {i * 3 % 11} birds." for i in range(40)
    ]
    path.write_text("\n".join(lines))
    return path


@needs_model
class TestAccuracy:
    """eval, tune and probe on the real model, cut short."""

    def test_tune_then_eval_the_plan(self, pages: Path, tmp_path: Path) -> None:
        common = ("--model", MODEL, "--text", pages, "--context", 64, "--windows", 2, "--json")
        plan = tmp_path / "plan-{}.json"
        made = as_json(flashcomm("tune", *common, "--bits", "4.6,7", "--check", pages, "--decode", "int8", "-o", plan))
        small, large = made["plans"]
        assert small["met"]
        assert 4.3 < small["bits"] <= 4.6
        assert 6 < large["bits"] <= 7
        assert 0 < large["predicted_kl"] < small["predicted_kl"]
        assert small["check_rise_pct"] == small["rise_pct"]  # the same text

        csvs = tmp_path / "eval.csv", tmp_path / "layers.csv"
        files = ("--plan", tmp_path / "plan-4.6.json", "--csv", csvs[0], "--layers", csvs[1])
        args = ("--worlds", "2,4", "--formats", "int8,int4", "--algorithm", "two_shot", "--continuation", 4, *files)
        got = as_json(flashcomm("eval", *common, *args))
        rows = {(r["world"], r["format"]): r for r in got["rows"]}
        assert set(rows) == {(w, f) for w in (2, 4) for f in ("bf16", "int8", "int4", "plan-4.6.json")}
        assert rows[2, "plan-4.6.json"]["kl"] < rows[2, "int4"]["kl"] / 2
        assert rows[2, "int8"]["kl"] < rows[2, "int4"]["kl"] / 20
        assert rows[2, "int8"]["bits"] == pytest.approx(8.375, rel=0.002)
        assert rows[2, "plan-4.6.json"]["bits"] == pytest.approx(small["bits"], rel=0.002)
        assert rows[2, "plan-4.6.json"]["rise_pct"] == pytest.approx(small["rise_pct"], abs=0.01)
        assert len(got["layers"]) == 2 * 60
        assert sum(float(r["kl"]) for r in got["layers"] if r["format"] == "int8") < 0.05
        for source in csvs:
            picture = source.with_suffix(".svg")
            assert as_json(flashcomm("plot", source, "-o", picture, "--json")) == {"picture": str(picture)}
            assert "<svg" in picture.read_text()

    def test_real_ranks_give_the_rows_of_simulated_ones(self, pages: Path) -> None:
        args = (
            "--model",
            MODEL,
            "--text",
            pages,
            "--context",
            64,
            "--windows",
            2,
            "--worlds",
            3,
            "--formats",
            "int4-had",
        )
        args = (*args, "--continuation", 3, "--algorithm", "two_shot", "--json")
        simulated, real = (as_json(flashcomm("eval", *args, *more))["rows"] for more in ((), ("--real",)))
        for a, b in zip(simulated, real, strict=True):
            assert (a.pop("ranks"), b.pop("ranks")) == ("simulated", "real")
            assert a.pop("bits") == pytest.approx(b.pop("bits"), rel=0.02)  # three shards, padded each to 16 bytes
            assert a == b

    def test_a_budget_no_format_meets(self, pages: Path, tmp_path: Path) -> None:
        where = ("--text", pages, "--context", 96, "--windows", 2, "-o", tmp_path / "plan.json")
        done = flashcomm("tune", "--model", MODEL, *where, "--bits", "2.05")
        assert done.returncode == 1
        assert "no plan meets the budget; written is the best found for 2.05" in done.stderr
        assert json.loads((tmp_path / "plan.json").read_text())["made"]["met"] is False

    def test_probe(self, pages: Path, tmp_path: Path) -> None:
        args = ("--text", pages, "--contexts", "96,128", "--prompts", 2, "--tokens", 4, "--formats", "int8,int2")
        got = as_json(flashcomm("probe", "--model", MODEL, *args, "--csv", tmp_path / "probe.csv", "--json"))
        needles = {(r["context"], r["format"]): r for r in got["rows"] if r["probe"] == "needle"}
        assert set(needles) == {(c, f) for c in (96, 128) for f in ("bf16", "int8", "int2")}
        for context in (96, 128):
            base, int8, int2 = (needles[context, fmt]["nats"] for fmt in ("bf16", "int8", "int2"))
            assert abs(int8 - base) < 1
            assert int2 > base + 5
            assert needles[context, "int2"]["found_pct"] == 0
        said = {r["format"]: r for r in got["rows"] if r["probe"] == "generation"}
        assert said["int8"]["mean_same"] > said["int2"]["mean_same"]
        assert {r["probe"] for r in csv.DictReader((tmp_path / "probe.csv").open())} == {"needle", "generation"}

    def test_refusals(self, pages: Path, tmp_path: Path) -> None:
        both = ("--model", MODEL, "--text", pages)
        refused(here("eval", *both, "--context", 512, "--windows", 9), "pages.txt has", "windows of 512 need 4608")
        refused(here("eval", *both, "--worlds", "2,x"), "--worlds 2,x: give numbers of at least 1")
        refused(here("eval", *both, "--local-world", 4), "--local-world 4: not all of --worlds 2,4,8 are several nodes")
        refused(here("eval", *both, "--algorithm", "hierarchical"), "go together: give both or neither")
        refused(here("probe", *both, "--algorithm", "hierarchical"), "go together: give both or neither")
        refused(here("eval", *both, "--worlds", "5", "--windows", 1), "5 ranks cannot share the inputs of")
        refused(here("eval", *both, "--plan", tmp_path / "no.json"), "no plan at")
        (tmp_path / "other.json").write_text('{"flashcomm_plan": 1, "format": "int8", "layers": {"h.*": "int4"}}')
        few = ("--context", 96, "--windows", 1)
        refused(
            here("eval", *both, *few, "--plan", tmp_path / "other.json"),
            "names layers that the model does not have (h.*)",
        )
        refused(here("eval", *both, "--formats", "bf16", "--layers", "l.csv"), "--layers prices formats")
        refused(here("tune", *both, "-o", "p.json"), "give one of --budget")
        refused(here("tune", *both, "-o", "p.json", "--bits", "4", "--world", 1), "--world 1: one rank sends nothing")
        refused(here("tune", *both, "-o", "p.json", "--budget", "-1%"), "--budget -1%: give a rise")
        refused(here("tune", *both, "-o", "p.json", "--bits", "1,2"), "--bits 1: give bits per value")
        refused(here("tune", *both, "-o", "p.json", "--bits", "4,5"), "for several budgets, has a {}")
        refused(here("tune", *both, "-o", "p.txt", "--bits", "4"), "a plan's name ends in .json")
        refused(here("probe", *both, "--contexts", "9000"), "takes at most 8192 tokens")
        refused(here("generate", "--model", MODEL, "--prompt", "x", "--format", tmp_path / "no.json"), "no plan at")

    def test_generate_with_a_plan(self, tmp_path: Path) -> None:
        plan = {"flashcomm_plan": 1, "format": "int8", "decode": "bf16", "layers": {"*.o_proj": "int6-had"}}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        args = ("--world", 3, "--prompt", "Say hello.", "--tokens", 4, "--min-bytes", 0, "--json")
        got = as_json(flashcomm("generate", "--model", MODEL, "--format", tmp_path / "plan.json", *args))
        assert len(got["tokens"]) == 4
        assert got["calls"]["all_reduce/native"] == 3 * 60  # the three tokens decoded
        assert sum(got["calls"].values()) == 4 * 60
