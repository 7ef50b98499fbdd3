"""Measure an unmodified vLLM with and without flashcomm: first token, decoding, and throughput of a mixed load.

    scripts/bench-vllm --csv results/vllm-h100x2-nvlink.csv       # Llama-3-8B's shape, compiled, linked as they are
    scripts/bench-vllm --link no-peer --mode eager --formats unset,int8

Each format runs in its own vLLM, and FLASHCOMM_FORMAT is the only difference. `unset` is vLLM without flashcomm. The
weights are random (load_format="dummy"), so that no model is downloaded. All engines of `--at-once` start together and
are then measured in turn, one at a time, so that a change of the machine's speed affects all alike.

Columns beside the times: low_bit_calls and own_calls are rank 0's all-reduces in the last measurement that no CUDA
graph replayed; start_low_bit_calls and start_own_calls are those before the first, which include the graphs' captures.

`--link no-peer` takes peer access away: from NCCL and flashcomm by NCCL_P2P_DISABLE=1, and from vLLM's own all-reduces
over GPU memory by turning them off, because they do not read that variable.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashcomm.bench.records import read_csv, write_csv
from flashcomm.settings import DEFAULT_FORMAT

SET = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("FLASHCOMM_", "NCCL_", "VLLM_"))]
UNSET = "unset"
ENGINE = Path(__file__).with_name("bench_vllm_engine.py")
MAX_TOKENS = 8192  # of a batch, and of a prompt
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}


def shape(base: dict[str, Any], layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocab: int) -> Any:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp, "vocab_size": vocab}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128, "hidden_act": "silu"}
    return {**base, **sizes, **attention, "max_position_embeddings": 2 * MAX_TOKENS, "torch_dtype": "bfloat16"}


MODELS = {
    "llama-3-8b": shape(LLAMA, 32, 4096, 14336, 32, 8, 128256),
    "qwen3-32b": shape(QWEN, 64, 5120, 25600, 64, 8, 151936),
    "tiny": shape(LLAMA, 2, 512, 1024, 4, 2, 4096),
}
CELLS: dict[str, dict[str, Any]] = {  # tokens: of each prompt; new: tokens to generate
    "ttft 1x512": {"batch": 1, "tokens": 512, "new": 1},
    "ttft 1x8192": {"batch": 1, "tokens": 8192, "new": 1},
    "ttft 8x1024": {"batch": 8, "tokens": 1024, "new": 1},
    "decode 1": {"batch": 1, "tokens": 64, "new": 65},
    "decode 16": {"batch": 16, "tokens": 64, "new": 65},
    "decode 128": {"batch": 128, "tokens": 64, "new": 65},
    "mixed": {"batch": 64, "tokens": [128, 2048], "new": [16, 128]},
}


OPTIONS = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "tensor_parallel_size": 2,
    "dtype": "bfloat16",
    "max_model_len": MAX_TOKENS + 256,
    "max_num_batched_tokens": MAX_TOKENS,
    "max_num_seqs": 128,
    "enable_prefix_caching": False,
    "seed": 0,
    "kv_cache_memory_bytes": 6 << 30,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]},
    "worker_extension_cls": "flashcomm.integrations.vllm.Report",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument(
        "--formats", default=f"{UNSET},{DEFAULT_FORMAT},int4-had,int8", help="the first is the baseline"
    )
    parser.add_argument("--link", choices=("peer", "no-peer"), default="peer", help="whether GPUs access each other")
    parser.add_argument(
        "--mode", choices=("compiled", "eager"), default="compiled", help="compiled has CUDA graphs, too"
    )
    parser.add_argument("--cells", default=",".join(CELLS), help="which of them to measure")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each cell, after one to warm up")
    parser.add_argument(
        "--at-once", type=int, default=1, help="engines that share the GPUs' memory; one runs at a time"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for an engine to start, or for one answer")
    parser.add_argument("--options", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--csv", type=Path, help="add rows to this file after each cell")
    parser.add_argument("--logs", type=Path, help="the folder for the engines' output; the default is a temporary one")
    parser.add_argument("--json", action="store_true", help="print the rows at the end as JSON")
    asked = parser.parse_args()
    formats = asked.formats.split(",")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / asked.model
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODELS[asked.model]))
        asked.logs = asked.logs or Path(folder)
        asked.logs.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for i in range(0, len(formats), asked.at_once):
            for new in measure(formats[i : i + asked.at_once], model, asked, rows):
                rows += new
                if asked.csv:
                    old = read_csv(asked.csv) if asked.csv.exists() else []
                    write_csv(asked.csv, [*old, *new])
    if asked.json:
        print(json.dumps(rows))


def measure(
    formats: list[str], model: Path, asked: Any, before: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """Run one engine for each format and yield the rows of each cell."""
    say(f"starting vLLM with {', '.join(formats)}: {asked.model}, {asked.mode}, {asked.link}")
    engines: list[Engine] = []
    try:
        for fmt in formats:
            engines.append(Engine(fmt, model, asked))
            engines[-1].loading.wait(asked.timeout)  # flashcomm may measure the link before: not beside another engine
        starts = [engine.answer() for engine in engines]
        for engine, start in zip(engines, starts, strict=True):
            used = f"{start['low_bit_calls']} low-bit, {start['own_calls']} own"
            say(f"{engine.fmt}: ready after {start['start_s']:.0f} s; {used}")
        for cell in asked.cells.split(","):
            values: list[list[float]] = [[] for _ in engines]
            counts: list[dict[str, Any]] = [{} for _ in engines]
            for n in range(asked.repeats + 1):
                for i, engine in enumerate(engines):
                    counts[i] = engine.ask({**CELLS[cell], "seed": n})
                    values[i] += [counts[i]["value"]] if n else []
            rows = []
            for engine, start, times, count in zip(engines, starts, values, counts, strict=True):
                row = {"model": asked.model, "link": asked.link, "mode": asked.mode, "format": engine.fmt, "cell": cell}
                row |= {"unit": "tokens/s" if cell == "mixed" else "ms", "median": round(statistics.median(times), 3)}
                row |= {"min": round(min(times), 3), "max": round(max(times), 3), "repeats": len(times)}
                base = next((r for r in [*before, *rows] if r["cell"] == cell), row)  # the first format's
                better = base["median"] / row["median"]
                row["over_vllm"] = round(1 / better if cell == "mixed" else better, 3)
                row |= {"start_low_bit_calls": start["low_bit_calls"], "start_own_calls": start["own_calls"]}
                row |= {key: count[key] for key in ("low_bit_calls", "own_calls", "sent_mb", "routes", "vllm")}
                row |= {"vllm_all_reduce": engine.found("all_reduce"), "attention": engine.found("attention")}
                row["command"] = " ".join([*SET, "scripts/bench-vllm", *map(shlex.quote, sys.argv[1:])])
                rows.append(row)
                spread = f"{row['over_vllm']:.2f}x [{row['min']:.2f} to {row['max']:.2f}]"
                used = f"{row['low_bit_calls']} low-bit, {row['own_calls']} own"
                say(f"{cell:12} {engine.fmt:18} {row['median']:9.2f} {row['unit']:8} {spread} {used}")
            yield rows
    finally:
        for engine in engines:
            engine.stop()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Engine:
    """A vLLM in a process group of its own, which answers one question after the other."""

    LINES = (
        ("all_reduce", re.compile(r"Using \[(.*?)\] all-reduce backends .* for group 'tp")),
        ("attention", re.compile(r"Using (\w+) attention backend")),
    )

    def __init__(self, fmt: str, model: Path, asked: Any) -> None:
        self.fmt, self.timeout, self._found = fmt, asked.timeout, {"all_reduce": "", "attention": ""}
        self.loading = threading.Event()  # all groups have been created, or vLLM has ended
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        env = {k: v for k, v in os.environ.items() if k != "FLASHCOMM_FORMAT"}
        env |= {} if fmt == UNSET else {"FLASHCOMM_FORMAT": fmt}
        env |= {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # else a batch may begin before all its requests have come
        options = {"model": str(model), "enforce_eager": asked.mode == "eager", **OPTIONS, **asked.options}
        options["gpu_memory_utilization"] = round(0.88 / asked.at_once, 2)
        if asked.link == "no-peer":
            env |= {"NCCL_P2P_DISABLE": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
            options["disable_custom_all_reduce"] = True
        self.log = asked.logs / f"{asked.model}-{asked.link}-{asked.mode}-{fmt.replace('/', '-')}.log"
        command = [sys.executable, str(ENGINE), json.dumps(options)]
        self._process = subprocess.Popen(
            command, env=env, stdin=-1, stdout=-1, stderr=-2, text=True, bufsize=1, start_new_session=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self.log.open("w") as log:
            for line in self._process.stdout:
                if line.startswith("ANSWER "):
                    self._answers.put(json.loads(line.removeprefix("ANSWER ")))
                    continue
                log.write(line)
                log.flush()
                if re.search("Starting to load model|Loading model", line):
                    self.loading.set()
                for name, pattern in self.LINES:
                    if (match := pattern.search(line)) and not self._found[name]:
                        self._found[name] = match[1].replace("'", "")
        self._answers.put(None)
        self.loading.set()

    def answer(self) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=self.timeout)
        except queue.Empty:
            answer = None
        if answer is None:
            end = self.log.read_text()[-6000:]
            sys.exit(f"vLLM with {self.fmt} ended, or gave no answer for {self.timeout:.0f} s:\n{end}")
        return answer

    def ask(self, cell: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(cell) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def found(self, name: str) -> str:
        """Return what vLLM's log says about its own choice."""
        return self._found[name]

    def stop(self) -> None:
        """End the engine and its workers: by the end of its input, or after 20 s at once."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


if __name__ == "__main__":
    main()
