"""Generate text greedily with SmolLM2-135M in an unmodified vLLM on two ranks, once for each format.

    .venv-vllm/bin/python scripts/vllm_run.py [--formats none,int8] [--compiled] [--together] [--tokens 32] [--json]

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
WORLD = 2
PROMPTS = (1800, 900)  # characters of the text for each prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", default="none,int8,int4-had", help="wire formats, or plans as .json files")
    parser.add_argument("--compiled", action="store_true", help="use torch.compile; the default is eager")
    parser.add_argument("--together", action="store_true", help="both prompts in one batch; the default is one by one")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the model; set in the process of one format
    asked = parser.parse_args()
    if asked.one:
        print("RESULT", json.dumps(generate(asked.one, asked.tokens, asked.compiled, asked.together)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "smollm2-12-heads"
        widen(ASSETS / "smollm2-135m-instruct", model)
        options = ["--compiled"] * asked.compiled + ["--together"] * asked.together
        results = [run(model, fmt, asked.tokens, options) for fmt in ["", *asked.formats.split(",")]]
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


def generate(model: Path, tokens: int, compiled: bool, together: bool) -> dict[str, Any]:
    """Return vLLM's tokens and text for the prompts, and the all-reduces of rank 0."""
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
    text = (ASSETS / "wikipedia-test.txt").read_text()
    how = vllm.SamplingParams(temperature=0, max_tokens=tokens)
    prompts = [text[:n] for n in PROMPTS]
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
        "prompt_tokens": [len(o.prompt_token_ids) for o in outputs],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "text": outputs[0].outputs[0].text,
        "report": after,
    }


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
