"""Generate text greedily with SmolLM2-135M in an unmodified vLLM on two ranks, once for each format.

    .venv-vllm/bin/python scripts/vllm_run.py [--formats none,int8] [--compiled] [--together] [--tokens 32] [--json]
    .venv-vllm/bin/python scripts/vllm_run.py --windows 32 [--formats int8,int4-had] [--csv FILE] [--json]

With --windows it measures the rise in perplexity that each format causes in vLLM, on that many windows of text, beside
what `flashcomm eval` predicts for the same windows.

Each format runs in its own vLLM process. Only FLASHCOMM_FORMAT differs. SmolLM2 has 9 heads, which two ranks cannot
share, so the script adds 3 heads of zeros. They do not change the output. `scripts/test-vllm` creates .venv-vllm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / ".assets"
TEXT = ASSETS / "wikipedia-test.txt"
CONTEXT = 512
WORLD = 2
PROMPTS = (1800, 900)  # characters of the text for each prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", default="none,int8,int4-had", help="wire formats, or plans as .json files")
    parser.add_argument("--compiled", action="store_true", help="use torch.compile; the default is eager")
    parser.add_argument("--together", action="store_true", help="both prompts in one batch; the default is one by one")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--windows", type=int, default=0, help="measure perplexity on this many windows, not texts")
    parser.add_argument("--csv", type=Path, help="with --windows: write the rows to this file")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the model; set in the process of one format
    asked = parser.parse_args()
    if asked.one:
        print("RESULT", json.dumps(generate(asked.one, asked.tokens, asked.compiled, asked.together, asked.windows)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "smollm2-12-heads"
        widen(ASSETS / "smollm2-135m-instruct", model)
        options = ["--compiled"] * asked.compiled + ["--together"] * asked.together
        options += ["--windows", str(asked.windows)] * (asked.windows > 0)
        formats = [fmt for fmt in asked.formats.split(",") if fmt != "none" or not asked.windows]
        results = [run(model, fmt, asked.tokens, options) for fmt in ["", *formats]]
        if asked.windows:
            compare(model, results, asked.csv, asked.json)
            return
    if asked.json:
        print(json.dumps(results))
        return
    mode = "compiled" if asked.compiled else "eager"
    print(f"vLLM {results[0]['vllm']}, {WORLD} ranks on a CPU, {mode}, prompts of {results[0]['prompt_tokens']} tokens")
    print(f"{'FLASHCOMM_FORMAT':20} {'low-bit':>7} {'vLLM':>6} {'sent MB':>8}  same tokens as if not set")
    for result in results:
        low_bit = (result["report"] or {}).get("low_bit", {}).values()
        calls, sent_mb = sum(n["calls"] for n in low_bit), sum(n["sent_bytes"] for n in low_bit) / 1e6
        reasons = (result["report"] or {}).get("own", {}).items()
        own = sum(n for reason, n in reasons if ": " not in reason)  # of all-reduces
        same = [first_difference(a, b) for a, b in zip(result["tokens"], results[0]["tokens"], strict=True)]
        equal = ", ".join(f"first {n} of {len(t)}" for n, t in zip(same, results[0]["tokens"], strict=True))
        print(f"{result['format'] or '(not set)':20} {calls:7} {own or '?':>6} {sent_mb:8.1f}  {equal}")
    print(results[0]["text"])


def compare(model: Path, results: list[dict[str, Any]], csv: Path | None, as_json: bool) -> None:
    """Show the rise in perplexity by format: in vLLM, and as predicted for the same windows."""
    from flashcomm.accuracy.intervals import Interval
    from flashcomm.bench import records

    plain, formats = results[0], ",".join(result["format"] for result in results[1:])
    command = [sys.executable, "-m", "flashcomm.cli.main", "eval", "--model", str(model), "--text", str(TEXT)]
    command += ["--windows", str(len(plain["nats"])), "--context", str(CONTEXT), "--formats", formats, "--json"]
    command += ["--worlds", str(WORLD), "--algorithm", "one_shot", "--dtype", "bf16", "--continuation", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    predicted = [row for row in json.loads(done.stdout)["rows"] if row["format"] != "none"]
    rows = []
    for result, expected in zip(results[1:], predicted, strict=True):
        nats = [mine - base for mine, base in zip(result["nats"], plain["nats"], strict=True)]
        low_bit = result["report"]["low_bit"]["all_reduce/one_shot"]["calls"]
        row = {"format": result["format"], "windows": len(nats), "context": CONTEXT, "low_bit_calls": low_bit}
        row |= Interval.of(nats).expm1().columns("rise_pct", "low_pct", "high_pct", 2, 0.01)
        row |= {f"predicted_{key}": expected[key] for key in ("rise_pct", "low_pct", "high_pct")}
        rows.append(row | {"vllm": result["vllm"], "command": " ".join(["scripts/vllm_run.py", *sys.argv[1:]])})
    if csv:
        records.write_csv(csv, rows)
    if as_json:
        print(json.dumps(rows))
        return
    print(f"vLLM {plain['vllm']}, {WORLD} ranks on a CPU, {len(plain['nats'])} windows of {CONTEXT} tokens")
    print(f"{'format':20} {'low-bit':>7}  {'rise in vLLM, % [95 %]':24}  predicted by flashcomm eval")
    for row in rows:
        both = (
            f"{row[p + 'rise_pct']:+.2f} [{row[p + 'low_pct']:+.2f}, {row[p + 'high_pct']:+.2f}]"
            for p in ("", "predicted_")
        )
        print(f"{row['format']:20} {row['low_bit_calls']:7}  {next(both):24}  {next(both)}")


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def run(model: Path, fmt: str, tokens: int, options: list[str]) -> dict[str, Any]:
    """Run vLLM with one format in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "FLASHCOMM_FORMAT"}
    env |= {"FLASHCOMM_FORMAT": fmt} if fmt else {}
    env |= {"VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(i % (os.cpu_count() or 1)) for i in range(WORLD)))
    openmp = sorted(Path(sys.prefix).glob("lib/libiomp5.so"))
    if openmp and platform.machine() == "x86_64":
        env.setdefault("LD_PRELOAD", str(openmp[0]))
    command = [sys.executable, __file__, "--one", str(model), "--tokens", str(tokens), *options]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        sys.exit(f"vLLM failed with FLASHCOMM_FORMAT={fmt!r}:\n{done.stdout[-6000:]}")
    return {"format": fmt, **json.loads(found[0].removeprefix("RESULT "))}


def generate(model: Path, tokens: int, compiled: bool, together: bool, windows: int) -> dict[str, Any]:
    """Return vLLM's tokens and text for the prompts, or the nats per token of windows; and rank 0's all-reduces."""
    import vllm

    llm = vllm.LLM(
        model=str(model),
        tensor_parallel_size=WORLD,
        dtype="bfloat16",
        enforce_eager=not compiled,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        seed=0,
        worker_extension_cls="flashcomm.integrations.vllm.Report",
    )
    before = llm.collective_rpc("flashcomm_report")[0]  # vLLM's own warm-up
    text = TEXT.read_text()
    how = vllm.SamplingParams(temperature=0, max_tokens=tokens)
    prompts: list[Any] = [text[:n] for n in PROMPTS]
    if windows:
        from flashcomm.accuracy.texts import bos_of, read_windows

        tokenizer = llm.get_tokenizer()
        ids = read_windows(TEXT, tokenizer, CONTEXT, windows, bos_of(tokenizer, "auto"))
        prompts = [{"prompt_token_ids": window} for window in ids.tolist()]
        how = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
    batches = [prompts] if together else [[prompt] for prompt in prompts]  # the latter are the same in every run
    outputs = [output for batch in batches for output in llm.generate(batch, how)]
    after = llm.collective_rpc("flashcomm_report")[0]
    for route, counts in before.get("low_bit", {}).items():
        for key, n in counts.items():
            after["low_bit"][route][key] -= n
    for reason, n in before.get("own", {}).items():
        after["own"][reason] -= n
    return {
        "vllm": vllm.__version__,
        "nats": [-sum(logprobs(o)) / (CONTEXT - 1) for o in outputs] if windows else [],
        "prompt_tokens": [len(o.prompt_token_ids) for o in outputs],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "text": outputs[0].outputs[0].text,
        "report": after,
    }


def logprobs(output: Any) -> list[float]:
    """Return the log-probability of each token of the prompt but the first, given those before it."""
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [found[token].logprob for token, found in pairs]


def widen(source: Path, target: Path) -> None:
    """Write SmolLM2 with 12 heads and 4 KV heads instead of 9 and 3. The added ones are zeros."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    shares = {"q_proj": (0, 12), "k_proj": (0, 4), "v_proj": (0, 4), "o_proj": (1, 12)}  # dimension, heads
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        dim, heads = shares.get(name.split(".")[-2], (0, 0))
        weight = weight.bfloat16()
        if heads:
            shape = list(weight.shape)
            shape[dim] = heads * head - shape[dim]
            weight = torch.cat([weight, weight.new_zeros(shape)], dim)
        weights[name] = weight.contiguous()
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            (target / file.name).write_bytes(file.read_bytes())
    config |= {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": head, "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
