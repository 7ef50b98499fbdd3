"""scripts/bench_vllm.py with a stand-in for vLLM: what it asks, counts, compares and writes, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flashcomm.bench.records import read_csv

ROOT = Path(__file__).resolve().parents[2]
VLLM = """
import os, time
from types import SimpleNamespace as Some

__version__ = "0.26.0"
FORMAT = os.environ.get("FLASHCOMM_FORMAT")
SECONDS = {None: 0.08, "int8": 0.02}[FORMAT]  # each step
clock = [1.0]
time.perf_counter = lambda: clock[0]

class SamplingParams(Some):
    pass

class LLM:
    def __init__(self, **options):
        assert options["disable_custom_all_reduce"] == (os.environ["NCCL_P2P_DISABLE"] == "1")
        assert options["enforce_eager"] and options["max_num_batched_tokens"] >= 8192
        print("Using ['PYNCCL'] all-reduce backends (in dispatch order) for group 'tp:0' out of", flush=True)
        if os.environ.get("BROKEN", "") == FORMAT:
            raise RuntimeError("no such GPU")
        print("Starting to load model", flush=True)
        self.llm_engine, self.calls, self.left = self, 5, {}
        self.model_config = Some(hf_config=Some(vocab_size=100))

    def collective_rpc(self, name):
        if FORMAT is None:
            return [{}]
        low_bit = {"all_reduce/one_shot": {"calls": self.calls, "sent_bytes": 1000000 * self.calls}}
        return [{"low_bit": low_bit, "own": {"too small to pay": 2 * self.calls, "all_gather: not hidden states": 9}}]

    def add_request(self, name, prompt, how):
        assert how.ignore_eos and max(prompt["prompt_token_ids"]) < 100
        self.left[name] = how.max_tokens

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        clock[0] += SECONDS
        self.calls += 3
        names = list(self.left)
        self.left = {name: n - 1 for name, n in self.left.items() if n > 1}
        return [Some(request_id=name) for name in names]
"""


def bench(tmp_path: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "vllm.py").write_text(VLLM)
    command = [sys.executable, str(ROOT / "scripts" / "bench_vllm.py"), "--model", "tiny", "--mode", "eager"]
    command += ["--link", "no-peer", "--formats", "unset,int8", "--at-once", "2", "--repeats", "2", *options]
    path = f"{tmp_path}:{ROOT / 'src'}"
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path} | env, capture_output=True, text=True, timeout=60
    )


def test_rows_compare_each_format_with_vllm_alone_and_say_what_was_low_bit(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    done = bench(tmp_path, "--cells", "ttft 1x512,decode 16,mixed", "--csv", str(csv))
    assert done.returncode == 0, done.stderr
    rows = read_csv(csv)
    assert [(r["cell"], r["format"]) for r in rows] == [
        (cell, fmt) for cell in ("ttft 1x512", "decode 16", "mixed") for fmt in ("unset", "int8")
    ]
    for alone, ours in (rows[:2], rows[2:4]):
        assert [r["median"] for r in (alone, ours)] == ["80.0", "20.0"], "ms to the first or a later token"
        assert [r["over_vllm"] for r in (alone, ours)] == ["1.0", "4.0"]
        assert alone["low_bit_calls"] == alone["own_calls"] == "0"
        assert (ours["start_low_bit_calls"], ours["start_own_calls"]) == ("5", "10")
        assert (ours["vllm_all_reduce"], ours["vllm"]) == ("PYNCCL", "0.26.0")
        assert "scripts/bench-vllm --model tiny" in ours["command"]
    assert float(rows[4]["median"]) > 5000, "tokens/s, prompts included"
    assert rows[5]["over_vllm"] == "4.0", "more is better"
    one_step, many_steps = rows[1], rows[3]
    assert (one_step["low_bit_calls"], one_step["own_calls"], one_step["sent_mb"]) == ("3", "6", "3.0")
    assert many_steps["routes"] == "all_reduce/one_shot=195", "65 steps"


def test_an_engine_that_fails_ends_all_and_shows_its_log(tmp_path: Path) -> None:
    done = bench(tmp_path, "--cells", "ttft 1x512", BROKEN="int8")
    assert done.returncode == 1
    assert "vLLM with int8 ended" in done.stderr
    assert "no such GPU" in done.stderr
