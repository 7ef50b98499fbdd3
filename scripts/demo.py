"""One prompt through SmolLM2-135M on 3 ranks with bf16 and low-bit all-reduces, then time to first token.

It only calls the `flashcomm` command and shows the results next to each other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

from flashcomm.bench.records import human_bytes
from flashcomm.testing import probe_link

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".assets" / "smollm2-135m-instruct"
PLAN = ROOT / "results" / "plans" / "smollm2-4.6.json"
PROMPT = "Explain in two sentences why the sky is blue."
FORMATS = ("none", "int6-had/int7-had", "int4-had")
LABELS = {"none": "bf16, gloo", "int6-had/int7-had": "int6-had/int7-had, the default", str(PLAN): "a plan of 4.6 bits"}
RATE = "100mbit"
NEXT = "Next: `.venv/bin/flashcomm doctor`, docs/quickstart.md, and `flashcomm eval --quick` with a model of yours."
BAR = 50  # characters of the longest bar
console = Console(width=max(120, Console().width), highlight=False)


def main() -> None:
    console.rule("[bold]SmolLM2-135M-Instruct on 3 processes, 60 all-reduces a pass")
    console.print(f"Prompt: [bold]{PROMPT}")
    results = []
    for fmt in FORMATS:
        with console.status(f"generating with all-reduces in {LABELS.get(fmt, fmt)}"):
            results.append(
                flashcomm("generate", "--format", fmt, "--prompt", PROMPT, "--tokens", "32", "--min-bytes", "0")
            )
    panels = []
    for result in results:
        each = [r["wire_bytes"] / len(r["tokens"]) for r in (results[0], result)]  # texts differ in length
        sent = f"{human_bytes(each[1])} a token" + (f", {each[0] / each[1]:.1f}x less" if each[0] > each[1] else "")
        title = LABELS.get(result["format"], result["format"])
        panels.append(Panel(result["text"].strip(), title=title, subtitle=sent, width=38))
    console.print(Columns(panels))
    for result in results[1:]:
        console.print(f"{result['format']}: {same(results[0]['tokens'], result['tokens'])} tokens as in bf16")

    console.rule(f"[bold]Time to first token of 512 tokens, each process on a link of {RATE[:-4]} Mbit/s")
    why_not = probe_link()
    if why_not:
        console.print(f"Skipped: this machine cannot emulate links: {why_not}")
    else:
        formats = ",".join((*FORMATS[1:2], str(PLAN), *FORMATS[2:]))
        with console.status("timing bf16, two formats and a plan in turn"):
            timed = flashcomm("ttft", "--formats", formats, "--tokens", "512", "--repeats", "2", "--link", RATE)
        for line in bars(timed["rows"]):
            console.print(line)
        console.print("█ computing  ▒ all-reduces; bytes that each process sends")
    console.print(NEXT)


def flashcomm(command: str, *arguments: str) -> dict[str, Any]:
    """Return the JSON object of a command on 3 ranks. If it fails, end with what it wrote."""
    full = [sys.executable, "-m", "flashcomm.cli.main", command, "--model", str(MODEL), "--world", "3", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run([*full, "--json"], stdout=subprocess.PIPE, stderr=log, text=True)
        if done.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(full)}\n{log.read()}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def same(a: list[int], b: list[int]) -> str:
    """Say how many of the first tokens are equal."""
    pairs = list(zip(a, b, strict=False))
    return f"the first {next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))} of {len(a)}"


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each row: name, a bar of computing and all-reduces, time, speed-up, bytes."""
    longest = max(row["ttft_s"] for row in rows)
    lines = []
    for row in rows:
        computing, all_of_it = (round(BAR * min(1.0, t / longest)) for t in (row["compute_s"], row["ttft_s"]))
        bar = "█" * computing + "▒" * (all_of_it - computing)
        name = LABELS.get(row["format"], row["format"])
        numbers = f"{row['ttft_s']:.2f} s  {row['speedup']:.2f}x  {human_bytes(row['wire_bytes'])}"
        lines.append(f"{name:31} {bar:{BAR}}  {numbers}")
    return lines


if __name__ == "__main__":
    main()
