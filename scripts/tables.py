"""Write tables into README.md and pages of docs/, between `<!-- table NAME -->` and `<!-- end -->`.

The data come from the CSV files in results/. A test checks that the pages are up to date.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flashcomm.bench.records import BACKEND, read_csv
from flashcomm.predict import fit, machines, report
from flashcomm.predict import model as predict
from flashcomm.wire.format import UNCOMPRESSED, WireFormat

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/accuracy.md", "docs/formats.md", "docs/performance.md", "docs/predict.md", "docs/vllm.md")
Row = dict[str, str]


def rows_of(name: str) -> list[Row]:
    return read_csv(ROOT / "results" / name)


def low_bit(name: str) -> list[Row]:
    """The rows of a CSV file without those of the uncompressed baseline."""
    return [row for row in rows_of(name) if row["format"] != UNCOMPRESSED]


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def name_of(row: Row) -> str:
    return f"`{row['format'].removesuffix('.json')}`"


def signed(row: Row, interval: bool = False) -> str:
    text = f"{float(row['rise_pct']):+.2f}"
    return text + (f" [{float(row['low_pct']):+.2f}, {float(row['high_pct']):+.2f}]" if interval else "")


def accuracy() -> str:
    """Return bits, the rise at each number of ranks, and KL at the first, by format."""
    rows = low_bit("accuracy-smollm2.csv")
    worlds = list(dict.fromkeys(r["world"] for r in rows))
    found = {(r["format"], r["world"]): r for r in rows}
    formats = sorted(dict.fromkeys(r["format"] for r in rows), key=lambda f: -float(found[f, worlds[0]]["bits"]))
    body = []
    for fmt in formats:
        many = [found[fmt, w] for w in worlds]
        kl = f"{float(many[0]['kl']):.4f}"
        body.append(
            [name_of(many[0]), f"{float(many[0]['bits']):.2f}", *map(signed, many), kl, many[0]["same_top1_pct"]]
        )
    ranks = [f"{w} ranks" for w in worlds]
    return table(["format", "bits/value", *ranks, f"KL, {ranks[0]}", "same likeliest token, %"], body)


def auto() -> str:
    rows = low_bit("accuracy-smollm2-2ranks-auto.csv")
    body = [[name_of(r), r["bits"], signed(r, True), f"{float(r['kl']):.4f}", r["greedy_pct"]] for r in rows]
    return table(["format, 2 ranks, one-shot", "bits/value", "rise, %", "KL", "greedy, %"], body)


def nodes() -> str:
    """Return the rise in two-shot and in two nodes, at each number of ranks, by format."""
    worlds = ("4", "8")
    flat = {(r["format"], r["world"]): r for r in rows_of("accuracy-smollm2.csv")}
    rows = [r for w in worlds for r in low_bit(f"accuracy-smollm2-hierarchical-{w}.csv")]
    found = {(r["format"], r["world"]): r for r in rows}
    head = [part for w in worlds for part in (f"{w} ranks, two-shot", f"in 2 nodes of {int(w) // 2}")]
    body = []
    for fmt in dict.fromkeys(r["format"] for r in rows):
        pairs = [(flat[fmt, w], found[fmt, w]) for w in worlds]
        body.append([name_of(found[fmt, worlds[0]]), *(signed(r) for pair in pairs for r in pair)])
    return table(["format", *head], body)


def slow_first_token() -> str:
    """Return the time to first token and the bytes sent over 100 Mbit/s, by format."""
    names = {"results/plans/smollm2-4.6.json": "a plan of 4.6 bits", UNCOMPRESSED: "bf16, gloo"}
    body = []
    for r in rows_of("ttft-smollm2-3ranks-100mbit.csv"):
        name = names.get(r["format"], f"`{r['format']}`")
        speedup, sent = float(r["speedup"]), int(r["wire_bytes"]) / 1e6
        body.append([name, f"{float(r['ttft_s']):.2f} s", f"{speedup:.2f}x", f"{sent:.1f} MB"])
    return table(["all-reduces in", "time to first token", "speed-up", "each rank sends"], body)


def slow_times() -> str:
    """Return the times of all-reduces between two ranks over slow links: gloo's, and auto's with each format."""
    body = []
    for rate, label in (("200mbit", "200 Mbit/s"), ("1gbit", "1 Gbit/s")):
        rows = rows_of(f"allreduce-2ranks-{rate}.csv")
        formats = list(dict.fromkeys(r["format"] for r in rows if r["path"] == "auto"))
        for size, message in ((64 << 10, "64 KB"), (256 << 10, "256 KB"), (1 << 20, "1 MB"), (16 << 20, "16 MB")):
            found = {(r["path"], r["format"]): r for r in rows if r["size"] == str(size)}
            line = [label, message, f"{float(found[BACKEND, UNCOMPRESSED]['time_us']) / 1e3:.3g} ms"]
            for fmt in formats:
                row = found["auto", fmt]
                line.append(f"{float(row['time_us']) / 1e3:.3g} ms, {float(row['over_backend']):.2f}x")
            body.append(line)
    return table(["link", "message", "bf16, gloo", *(f"`{fmt}`" for fmt in formats)], body)


def nodes_times() -> str:
    """Return the times of 16 MB over 2 hosts of 2 ranks: gloo, two-shot and hierarchical."""
    body = []
    for rate, label in (("200mbit", "200 Mbit/s"), ("1gbit", "1 Gbit/s")):
        rows = [r for r in rows_of(f"allreduce-2x2ranks-{rate}.csv") if r["size"] == str(16 << 20)]
        backend = next(r for r in rows if r["path"] == BACKEND)
        for path, name in (("auto", "two_shot"), ("hierarchical", "hierarchical")):
            ours = [r for r in rows if r["path"] == path]
            times = [f"{float(r['time_us']) / 1e3:.0f} ms, {float(r['over_backend']):.2f}x" for r in ours]
            body.append([label, f"`{name}`", f"{float(backend['time_us']) / 1e3:.0f} ms", *times])
    formats = [name_of(r) for r in rows if r["path"] == "hierarchical"]
    return table(["a host's link", "", "bf16, gloo", *formats], body)


def real() -> str:
    rows = low_bit("accuracy-smollm2-3ranks-real.csv")
    body = [[r["ranks"], name_of(r), r["bits"], r["perplexity"], signed(r, True), r["kl"]] for r in rows]
    return table(["3 ranks", "format", "bits/value", "perplexity", "rise, %", "KL"], body)


def predicted() -> str:
    """Return predicted and measured KL. Predictions are sums of sensitivities, or come from tune on its own text."""
    made = json.loads((ROOT / "results" / "plans" / "smollm2-4.6.json").read_text())["made"]
    measured = {(r["world"], r["format"]): r for r in rows_of("accuracy-smollm2.csv")}
    layers = rows_of("accuracy-layers-smollm2.csv")
    body = []
    for fmt in dict.fromkeys(r["format"] for r in layers):
        total = sum(float(r["kl"]) for r in layers if r["format"] == fmt)
        body.append([f"`{fmt}`, 2 ranks", f"{total:.4f}", f"{float(measured['2', fmt]['kl']):.4f}"])
    body.append(
        ["`plan-4.6`, 4 ranks", f"{made['predicted_kl']:.4f}", f"{float(measured['4', 'plan-4.6.json']['kl']):.4f}"]
    )
    return table(["", "KL predicted", "KL measured"], body)


def needle() -> str:
    rows = [r for r in rows_of("needle-smollm2.csv") if r["probe"] == "needle"]
    lengths = list(dict.fromkeys(r["context"] for r in rows))
    found = {(r["format"], r["context"]): r for r in rows}
    body = []
    for fmt in dict.fromkeys(r["format"] for r in rows):
        many = [found[fmt, length] for length in lengths]
        body.append([name_of(many[0]), *(f"{float(r['found_pct']):.0f} %, {float(r['nats']):.2f}" for r in many)])
    return table(["format", *(f"{length} tokens" for length in lengths)], body)


def needle_served() -> str:
    """Return what plans tuned at 512 and at 8,192 tokens find in 8,192, by three ranks."""
    names = {"smollm2-4.6.json": "a plan of 4.6 bits, tuned at 512 tokens"}
    names |= {"smollm2-4.6-8192.json": "a plan of 4.6 bits, tuned at 8,192 tokens"}
    rows = rows_of("needle-smollm2-8192.csv")
    body = [[names.get(r["format"], name_of(r)), f"{float(r['found_pct']):.0f} %", r["nats"]] for r in rows]
    return table(["format, 3 ranks", "found in 8,192 tokens", "nats"], body)


def generation() -> str:
    rows = rows_of("generation-smollm2.csv")
    body = [[name_of(r), r["median_first"], r["mean_same"], f"{r['never_pct']} %"] for r in rows]
    return table(["format", "first difference, median token", "mean", "never within 64"], body)


def formats() -> str:
    """Return the plans and a few formats, from wide to narrow: bits, reduction relative to bf16, rises."""
    rows = rows_of("accuracy-smollm2.csv")
    worlds = list(dict.fromkeys(r["world"] for r in rows))
    found = {(r["format"], r["world"]): r for r in rows}
    body = []
    for fmt in ("int8", "int8-had", "int6-had/int7-had", "int6", "plan-5.3.json", "plan-4.6.json", "int4-had", "int4"):
        many = [found[fmt, w] for w in worlds]
        bits = float(many[0]["bits"])
        body.append([name_of(many[0]), f"{bits:.2f}", f"{16 / bits:.1f}x", *map(signed, many)])
    return table(["format", "bits/value", "less than bf16", *(f"{w} ranks" for w in worlds)], body)


def families() -> str:
    """Return the KL divergence of each format on both models, at the first number of ranks measured."""
    files = {"SmolLM2-135M": "accuracy-smollm2.csv", "Qwen2.5-Coder-0.5B": "accuracy-qwen2.5-coder.csv"}
    found = {name: {r["format"]: r for r in reversed(low_bit(file))} for name, file in files.items()}
    first, second = found.values()
    shared = sorted((f for f in first if f in second), key=lambda f: -float(first[f]["bits"]))
    body = [
        [name_of(first[f]), first[f]["bits"], *(f"{float(m[f]['kl']):.4f}" for m in (first, second))] for f in shared
    ]
    return table(["format", "bits/value", *(f"{name}, KL" for name in files)], body)


def halved() -> str:
    """Return the KL divergence of int4-had, of smaller groups and of a plan of as many bits, by model."""
    body, labels = [], {"smollm2-135m-instruct": "SmolLM2-135M", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B"}
    rows = low_bit("accuracy-half-of-int4-had.csv")
    whole = {r["model"]: float(r["kl"]) for r in rows if r["format"] == "int4-had"}
    for r in rows:
        name = "a plan" if r["format"].endswith(".json") else name_of(r)
        interval = f"{float(r['kl']):.4f} [{float(r['kl_low']):.4f}, {float(r['kl_high']):.4f}]"
        body.append([labels[r["model"]], name, r["bits"], interval, f"{float(r['kl']) / whole[r['model']]:.2f}"])
    return table(["model", "format", "bits/value", "KL [95 %]", "of `int4-had`'s"], body)


def tuned() -> str:
    """Return what `tune` promised and measured, by model and budget."""
    body = []
    for r in rows_of("tune-two-models.csv"):
        kl, risen = (f"{float(r[a]):{spec}} [{float(r[b]):{spec}}, {float(r[c]):{spec}}]" for a, b, c, spec in (
            ("kl", "kl_low", "kl_high", ".4f"), ("rise_pct", "low_pct", "high_pct", "+.2f"),
        ))  # fmt: skip
        met = "met" if r["met"] == "True" else "not met"
        body.append(
            [r["model"], f"{float(r['budget'].removesuffix('%')):g} %", met, r["bits"], r["predicted_kl"], kl, risen]
        )
    return table(["model", "budget", "", "bits/value", "KL predicted", "KL measured [95 %]", "rise, % [95 %]"], body)


def third() -> str:
    """Return the plans of SmolLM2 on a text of another kind."""
    rows = low_bit("accuracy-smollm2-python-docs.csv")
    body = []
    for r in rows:
        kl = f"{float(r['kl']):.4f} [{float(r['kl_low']):.4f}, {float(r['kl_high']):.4f}]"
        body.append([name_of(r), r["bits"], kl, signed(r, True)])
    return table(["format, 3 ranks", "bits/value", "KL [95 %]", "rise, % [95 %]"], body)


GPU_FORMATS = ("none", "int8", "int6-had/int7-had", "int4-had", "int4")


def gpu_times(name: str, baselines: dict[str, tuple[str, ...]], formats: tuple[str, ...] = GPU_FORMATS) -> str:
    """Return times in graphs and, for flashcomm, how many times as fast as the backend, from 64 KB on.

    Args:
        name: A CSV file of `flashcomm bench`, of which equal pieces count.
        baselines: The heads of columns, and the paths of which the fastest counts.
        formats: Those to show.
    """
    graph = [r for r in rows_of(name) if r["mode"] == "graph" and r.get("split", "equal") == "equal"]
    body = []
    for power in range(16, 29, 2):
        rows = [r for r in graph if int(r["size"]) == 1 << power]
        if not rows:
            continue
        line = [f"{1 << power - 20} MB" if power >= 20 else f"{1 << power - 10} KB"]
        line += [f"{min(float(r['time_us']) for r in rows if r['path'] in paths):.1f}" for paths in baselines.values()]
        for fmt in formats:
            ours = "all_to_all", "all_gather", "reduce_scatter", "one_shot" if fmt == "none" else "auto"
            (row,) = (r for r in rows if r["format"] == fmt and r["path"] in ours)
            line.append(f"{float(row['time_us']):.1f}, {float(row['over_backend']):.2f}x")
        body.append(line)
    labels = {"int4": "int4 (the paper's)", "none": "uncompressed"}
    return table(["message", *baselines, *(labels.get(fmt, fmt) for fmt in formats)], body)


def nvlink() -> str:
    symm = ("symm one-shot", "symm two-shot")
    baselines = {"NCCL": (BACKEND,), "torch symm": symm, "FlashInfer FP8": ("flashinfer fp8",)}
    return gpu_times("h200x2-nvlink.csv", baselines)


def host_memory() -> str:
    return gpu_times("h200x2-host-memory.csv", {"NCCL": (BACKEND,)})


def four_nvlink() -> str:
    return gpu_times("h200x4-nvlink.csv", {"NCCL": (BACKEND,)}, GPU_FORMATS[1:])


def four_host_memory() -> str:
    return gpu_times("h200x4-host-memory.csv", {"NCCL": (BACKEND,)}, GPU_FORMATS[1:])


def first_token() -> str:
    """Return times to first token of the backend, and how many times as fast flashcomm is, by model and format."""
    rows = rows_of("ttft-h200x2-no-peer-access.csv")
    formats = ("int6-had/int7-had", "int4-had")
    body = []
    for case in dict.fromkeys((r["model"], r["layers"], r["all_layers"], r["batch"], r["tokens"]) for r in rows):
        model, layers, all_layers, batch, tokens = case
        mine = [r for r in rows if (r["model"], r["layers"], r["all_layers"], r["batch"], r["tokens"]) == case]
        found = {(r["format"], r["path"], r["overlap"]): r for r in mine}
        some = "" if layers == all_layers else f", {layers} of {all_layers} layers"
        backend = found["none", BACKEND, "False"]
        line = [f"{model}{some}, {batch} x {tokens}", f"{float(backend['ttft_s']) * 1e3:.0f} ms"]
        for overlap in ("False", "True"):
            for fmt in formats:
                row = found.get((fmt, "auto", overlap))
                line.append(f"{float(row['speedup']):.2f}x" if row else "")
        body.append([*line, f"{float(backend['limit']):.2f}x"])
    head = ["model, prompts x tokens", "NCCL", *formats, *(f"{fmt}, overlap" for fmt in formats), "no communication"]
    return table(head, body)


def rise(name: str, fmt: str, ranks: str = "simulated") -> str:
    """Return the rise in perplexity of a format, in percent, as a cell of a table."""
    row = next(r for r in rows_of(name) if r["format"] == fmt and r["ranks"] == ranks)
    return f"{float(row['rise_pct']):+.2f} %"


def links() -> str:
    """Return, by link, what formats gain in an all-reduce of 16 MB and in time to first token, and what they cost.

    With two ranks the default format is sent in one step, as int6-had.
    """
    body = []
    auto = "accuracy-smollm2-2ranks-auto.csv"
    gpus = {
        "NVLink (two H200)": ("h200x2-nvlink.csv", rows_of("ttft-h200x2-nvlink.csv"), "int8"),
        "no peer access (two H200)": ("h200x2-host-memory.csv", rows_of("ttft-h200x2-no-peer-access.csv"), "int4-had"),
    }
    for link, (name, first, second) in gpus.items():
        times = [
            r for r in rows_of(name) if r["mode"] == "graph" and r["size"] == str(16 << 20) and r["path"] == "auto"
        ]
        first = [r for r in first if r["model"] == "llama-3-8b" and (r["batch"], r["tokens"]) == ("8", "1024")]
        first = [r for r in first if r["overlap"] == "False"]
        before = next(float(r["ttft_s"]) for r in first if r["path"] == BACKEND)
        for fmt, once in (("int6-had/int7-had", "int6-had"), (second, second)):
            (time,) = (float(r["over_backend"]) for r in times if r["format"] == fmt)
            (after,) = (float(r["ttft_s"]) for r in first if r["format"] == fmt)
            faster = f"{before * 1e3:.0f} → {after * 1e3:.0f} ms, {before / after:.2f}x"
            body.append([link, f"`{fmt}`", f"{time:.2f}x", faster, rise(auto, once)])
    for fmt in ("int6-had", "int4-had"):
        rows = [r for r in rows_of("allreduce-2ranks-1gbit.csv") if r["size"] == str(16 << 20) and r["path"] == "auto"]
        (time,) = (float(r["over_backend"]) for r in rows if r["format"] == fmt)
        body.append(["1 Gbit/s, emulated, 2 ranks", f"`{fmt}`", f"{time:.2f}x", "not measured", rise(auto, fmt)])
    real_ranks = "accuracy-smollm2-3ranks-real.csv"
    slow = rows_of("ttft-smollm2-3ranks-100mbit.csv")
    named = {"int6-had/int7-had": "int6-had/int7-had", "results/plans/smollm2-4.6.json": "smollm2-4.6.json"}
    for fmt, short in named.items():
        row = next(r for r in slow if r["format"] == fmt)
        faster = f"{float(slow[0]['ttft_s']):.2f} → {float(row['ttft_s']):.2f} s, {float(row['speedup']):.2f}x"
        name = "a plan of 4.6 bits" if fmt.endswith(".json") else f"`{fmt}`"
        body.append(["100 Mbit/s, emulated, 3 ranks", name, "not measured", faster, rise(real_ranks, short, "real")])
    for line in body:
        line[1] = line[1].replace("`int6-had/int7-had`", "`int6-had/int7-had`, the default")
    return table(["your links", "format", "all-reduce of 16 MB", "time to first token", "perplexity"], body)


def first_token_nvlink() -> str:
    rows = sorted(rows_of("ttft-h200x2-nvlink.csv"), key=lambda r: (int(r["tokens"]), int(r["batch"])))
    body, formats = [], GPU_FORMATS[1:]
    for batch, tokens in dict.fromkeys((r["batch"], r["tokens"]) for r in rows):
        mine = {r["format"]: r for r in rows if (r["batch"], r["tokens"]) == (batch, tokens)}
        nccl = mine[UNCOMPRESSED]
        times = [f"{float(mine[fmt]['speedup']):.2f}x" for fmt in formats]
        body.append(
            [f"{batch} x {tokens}", f"{float(nccl['ttft_s']) * 1e3:.1f} ms", *times, f"{float(nccl['limit']):.2f}x"]
        )
    return table(["prompts x tokens", "NCCL", *formats, "no communication"], body)


def predict_check() -> str:
    """Return the errors of the predictions of every measurement, by file."""
    found = list(fit.check(ROOT / "results"))
    body = []
    for file in [*dict.fromkeys(m.file for m in found), "all"]:
        errors = [abs(m.error) for m in found if file in (m.file, "all")]
        off = sum(error > 0.25 for error in errors)
        name = file if file == "all" else f"`{file}`"
        body.append([name, str(len(errors)), f"{statistics.median(errors):.1%}", f"{max(errors):.0%}", str(off)])
    return table(["measured in", "rows", "median error", "largest error", "off by more than 25 %"], body)


PREDICTED_FORMATS = ("int8", "int6-had/int7-had", "int4-had")


def gains(machine: predict.Machine, shape: str, formats: tuple[str, ...] = PREDICTED_FORMATS) -> list[str]:
    """Return predicted gains in time to first token, 8 x 1024 tokens, without and with overlap, by format."""
    rows = report.rows_of(machine, report.shape_of(shape), list(formats), 8, 1024)
    return [f"{row['gain']:.2f}x, {row['overlap_gain']:.2f}x" for row in rows[1:]]


def gpu(name: str, link: str, ranks: int, shared: int = 1) -> predict.Machine:
    found = machines.gpu_of(name)
    return predict.Machine(found, machines.link_of(link, found, ranks), ranks, shared=shared)


def predict_ranks() -> str:
    cases = [
        ("H100, NVLink", "h100", "nvlink", False),
        ("H100, PCIe 5, no peer access", "h100", "host-memory", False),
        ("L40S, PCIe 4, no peer access", "l40s", "host-memory", False),
        ("RTX 4090, PCIe 4, no peer access", "rtx-4090", "host-memory", False),
        ("RTX 4090, two behind one PCIe 4 switch", "rtx-4090", "host-memory", True),
    ]
    body = []
    for what, name, link, shared in cases:
        for ranks in (2, 4, 8):
            machine = gpu(name, link, ranks, 2 if shared else 1)
            body.append([what, str(ranks), *gains(machine, "llama-3-8b")])
    return table(["llama-3-8b", "ranks", *(f"`{f}`" for f in PREDICTED_FORMATS)], body)


def predict_hosts() -> str:
    body = []
    for rate in ("25gbit", "100gbit"):
        for hosts in (2, 4, 8):
            between, ranks = machines.ethernet(rate), 4 * hosts
            machine = gpu("h100", "nvlink", ranks)._replace(hosts=hosts, host_link=between)
            times = [predict.all_reduce_us(machine, "backend", WireFormat.parse("none"), 64 << 20, 4096)]
            fmt = WireFormat.parse("int6-had/int7-had")
            times += [predict.all_reduce_us(machine, a, fmt, 64 << 20, 4096) for a in ("two_shot", "hierarchical")]
            body.append([rate, f"{hosts} x 4", *(f"{us / 1e3:.1f} ms" for us in times), f"{times[0] / times[2]:.2f}x"])
    head = ["a host's link", "GPUs", "backend", "two-shot", "hierarchical", "hierarchical over backend"]
    return table(head, body)


def predict_claims() -> str:
    claims = [
        ("Flash Communication, 4 x L40, time to first token", "2.06x", "l40", "host-memory", 4, "ttft"),
        ("Flash Communication, 4 x A100, time to first token", "1.19x", "a100", "nvlink", 4, "ttft"),
        ("Flash Communication, 4 x L40, all-reduce of 64 MB", "3.18x", "l40", "host-memory", 4, "sum"),
        ("QuickReduce, 2 x MI300X, time to first token, 70B", "3.7 to 4.1x", "mi300x", "nvlink", 2, "ttft"),
        ("QuickReduce, 4 x MI300X, time to first token, 70B", "1.4x", "mi300x", "nvlink", 4, "ttft"),
        ("QuickReduce, 8 x MI300X, time to first token, 70B", "1.2 to 1.3x", "mi300x", "nvlink", 8, "ttft"),
        ("QuickReduce, 2 x MI300X, all-reduce of 64 MB", "3.1x", "mi300x", "nvlink", 2, "sum"),
    ]
    body = []
    for what, claim, name, link, ranks, kind in claims:
        machine = gpu(name, link, ranks)
        if kind == "ttft":
            row = report.rows_of(machine, report.shape_of("llama-3-70b"), ["int4"], 8, 1024)[1]
            got = f"{row['gain']:.2f}x (limit {row['limit']:.2f}x)"
        else:
            plain = predict.all_reduce_us(machine, BACKEND, WireFormat.parse("none"), 64 << 20, 8192)
            got = f"{plain / predict.best(machine, WireFormat.parse('int4'), 64 << 20, 8192)[1]:.2f}x"
        body.append([what, claim, got])
    return table(["published", "claim", "predicted for `int4`"], body)


def vllm() -> str:
    """Return times and throughput of vLLM with and without flashcomm, by format."""
    rows = rows_of("vllm-h200x2-no-peer-access.csv")
    names = {"ttft": "first token, {} tokens", "decode": "a token, batch of {}", "mixed": "64 requests"}
    formats, body = list(dict.fromkeys(r["format"] for r in rows)), []
    for cell in dict.fromkeys(r["cell"] for r in rows):
        kind, _, size = cell.partition(" ")
        mine = {r["format"]: r for r in rows if r["cell"] == cell}
        digits = 2 if kind == "decode" else 0
        line = [names[kind].format(size.replace("x", " x "))]
        for fmt in formats:
            value = f"{float(mine[fmt]['median']):,.{digits}f} {mine[fmt]['unit']}"
            line.append(value if fmt == formats[0] else f"{value}, {float(mine[fmt]['over_vllm']):.2f}x")
        body.append(line)
    return table(["", "vLLM alone", *(f"`{fmt}`" for fmt in formats[1:])], body)


def vllm_perplexity() -> str:
    """Return the rise in perplexity in vLLM, and what eval predicted, by format."""
    body = []
    for r in rows_of("vllm-cpu-perplexity.csv"):
        expected = {key: r[f"predicted_{key}"] for key in ("rise_pct", "low_pct", "high_pct")}
        body.append([name_of(r), signed(r, True), signed(expected, True)])
    return table(["format", "rise in vLLM, % [95 %]", "predicted by `flashcomm eval`"], body)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        *(links, formats, nvlink, host_memory, four_nvlink, four_host_memory, first_token, first_token_nvlink),
        accuracy,
        *(auto, nodes, slow_first_token, slow_times, nodes_times, real, predicted),
        *(needle, needle_served, generation, families, halved, tuned, third),
        *(predict_check, predict_ranks, predict_hosts, predict_claims),
        *(vllm, vllm_perplexity),
    )
}
for file in sorted((ROOT / "results").glob("h200x2-*-*.csv")):
    if file.stem.startswith(("h200x2-all-to-all", "h200x2-all-gather", "h200x2-reduce-scatter")):
        name = file.stem.removeprefix("h200x2-").replace("-", "_")
        TABLES[name] = partial(gpu_times, file.name, {"NCCL": (BACKEND,)})


def rendered(page: str) -> str:
    """Return the page with every table updated from the CSV files."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(rendered((ROOT / name).read_text()))
