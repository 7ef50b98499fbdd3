"""The process of one engine of bench_vllm.py: start vLLM and measure each cell that comes as a line of JSON."""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any


def serve(options: dict[str, Any]) -> None:
    """Start vLLM with these arguments. Then measure each cell of the standard input, and print the answer."""
    began = time.perf_counter()
    import vllm

    llm = vllm.LLM(**options)
    vocab = llm.llm_engine.model_config.hf_config.vocab_size
    report = llm.collective_rpc("flashcomm_report")[0]
    print("ANSWER", json.dumps({"start_s": time.perf_counter() - began, **counts({}, report)}), flush=True)
    for line in sys.stdin:
        cell = json.loads(line)
        value, before = generate(llm, vocab, **cell), report
        report = llm.collective_rpc("flashcomm_report")[0]
        print("ANSWER", json.dumps({"value": value, "vllm": vllm.__version__, **counts(before, report)}), flush=True)


def generate(llm: Any, vocab: int, batch: int, tokens: int | list[int], new: int | list[int], seed: int) -> float:
    """Return ms to the first token (new=1) or ms for each later token; for a mixed load tokens/s, prompts included."""
    import vllm

    draw = random.Random(seed)
    mixed = isinstance(new, list)
    if mixed:
        draw = random.Random(0)  # the same load each time
    lengths = [(draw.randint(*tokens), draw.randint(*new)) if mixed else (tokens, new) for _ in range(batch)]  # type: ignore[misc]
    prompts = [[draw.randrange(vocab) for _ in range(n)] for n, _ in lengths]
    engine, waiting, first = llm.llm_engine, set(), 0.0
    began = time.perf_counter()
    for i, (prompt, (_, n)) in enumerate(zip(prompts, lengths, strict=True)):
        waiting.add(name := f"{began}-{i}")
        how = vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": prompt}, how)
    while engine.has_unfinished_requests():
        for output in engine.step():
            waiting.discard(output.request_id)
        if not waiting and not first:
            first = time.perf_counter()
    end = time.perf_counter()
    if mixed:
        return sum(n + m for n, m in lengths) / (end - began)
    return 1e3 * (first - began if new == 1 else (end - first) / (new - 1))  # type: ignore[operator]


def counts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return rank 0's all-reduces between two reports, without those that CUDA graphs replayed."""
    old = before.get("low_bit", {})
    calls = {k: n["calls"] - old.get(k, {"calls": 0})["calls"] for k, n in after.get("low_bit", {}).items()}
    sent = sum(
        n["sent_bytes"] - old.get(k, {"sent_bytes": 0})["sent_bytes"] for k, n in after.get("low_bit", {}).items()
    )
    own = sum(n - before.get("own", {}).get(k, 0) for k, n in after.get("own", {}).items() if ": " not in k)
    routes = " ".join(f"{k}={n}" for k, n in calls.items() if n)
    return {"low_bit_calls": sum(calls.values()), "own_calls": own, "sent_mb": round(sent / 1e6, 1), "routes": routes}


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
