"""One prompt through SmolLM2-135M on 3 ranks with bf16 and low-bit all-reduces, then time to first token.

It only calls the `flashcomm` command and shows the results next to each other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

from flashcomm.bench.records import human_bytes
from flashcomm.testing import probe_link

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".assets" / "smollm2-135m-instruct"
PROMPT = "Explain in two sentences why the sky is blue."
FORMATS = ("none", "int6-had/int7-had", "int4-had")
RATE = "100mbit"
console = Console(width=max(120, Console().width))


def main() -> None:
    console.rule("[bold]A tensor-parallel model on 3 ranks, all-reduces in 16, 6 to 7 and 4 bits")
    console.print(
        f"SmolLM2-135M-Instruct, 3 processes over gloo, 60 all-reduces per forward pass. Prompt: [bold]{PROMPT}"
    )
    results = []
    for fmt in FORMATS:
        with console.status(f"generating with {fmt} all-reduces"):
            results.append(generate(fmt))
    panels = []
    for result in results:
        each = [r["wire_bytes"] / len(r["tokens"]) for r in (results[0], result)]  # texts differ in length
        sent = f"{human_bytes(each[1])} a token" + (f", {each[0] / each[1]:.1f}x less" if each[0] > each[1] else "")
        panels.append(Panel(result["text"].strip(), title=result["format"], subtitle=sent, width=38))
    console.print(Columns(panels))
    console.print(agreement(results))

    console.rule(f"[bold]Time to first token, 512 tokens, every rank on a link of {RATE[:-4]} Mbit/s")
    why_not = probe_link()
    if why_not:
        console.print(f"Skipped: no network namespaces here: {why_not}")
        return
    command = ["ttft", "--model", str(MODEL), "--world", "3", "--formats", ",".join(FORMATS[1:]), "--tokens", "512"]
    sys.exit(subprocess.call([sys.executable, "-m", "flashcomm.cli.main", *command, "--repeats", "3", "--link", RATE]))


def generate(fmt: str) -> dict[str, Any]:
    """Run `flashcomm generate --json` with every all-reduce low-bit, also the small ones of decoding."""
    command = ["generate", "--model", str(MODEL), "--world", "3", "--format", fmt, "--prompt", PROMPT]
    command += ["--tokens", "64", "--min-bytes", "0", "--json"]
    done = subprocess.run([sys.executable, "-m", "flashcomm.cli.main", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def agreement(results: list[dict[str, Any]]) -> str:
    """Say how many of the first greedy tokens of each format are those of bf16."""
    lines = []
    for result in results[1:]:
        pairs = list(zip(results[0]["tokens"], result["tokens"], strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        lines.append(
            f"{result['format']}: the first {same} of {len(results[0]['tokens'])} tokens equal the uncompressed"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
