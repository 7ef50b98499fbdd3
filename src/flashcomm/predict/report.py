"""The rows of `flashcomm predict`: what each format would bring on a machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashcomm.bench.records import BACKEND
from flashcomm.bench.shapes import SHAPES
from flashcomm.errors import InputError
from flashcomm.predict import machines, model
from flashcomm.wire.format import UNCOMPRESSED, WireFormat

SUMS_A_LAYER = 2  # all-reduces: after attention and after the MLP


def shape_of(name: str) -> model.Shape:
    """Return the shape of a known name, of a config.json, or of a directory that has one.

    Raises:
        InputError: There is neither, or the file is no config of a dense decoder.
    """
    if name in SHAPES:
        return model.Shape.of(name, SHAPES[name])
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.exists():
        raise InputError(
            f"--model {name}: no such shape and no such config.json; shapes are {', '.join(SHAPES)}. For another model "
            "give the path of its config.json"
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as why:
        raise InputError(f"--model {path} cannot be read as JSON: {why}") from why
    if not isinstance(config, dict):
        raise InputError(f"--model {path} is no config: an object with hidden_size and so on is needed")
    return model.Shape.of(path.parent.name or str(path), config.get("text_config") or config)


def rows_of(
    machine: model.Machine, shape: model.Shape, formats: Sequence[str], batch: int, tokens: int
) -> list[dict[str, Any]]:
    """Predict the backend and every format.

    Args:
        machine: The ranks.
        shape: The model.
        formats: Wire formats.
        batch: Number of prompts.
        tokens: Tokens a prompt.

    Returns:
        A row for the backend, then one for each format: times in us and s, bytes a rank and a first token, the gain
        over the backend, the gain if all-reduces took no time, and the rise in perplexity that was measured with
        SmolLM2-135M on as many ranks (None: not measured).

    Raises:
        InputError: The ranks cannot share the model.
    """
    shape.check_ranks(machine.world_size)
    w, n_bytes, sums = machine.world_size, batch * tokens * shape.hidden * 2, SUMS_A_LAYER * shape.layers
    compute = model.compute_s(shape, machine.gpu, w, batch, tokens)
    plain = WireFormat.parse(UNCOMPRESSED)
    cases = [(UNCOMPRESSED, BACKEND), *((name, None) for name in dict.fromkeys(formats))]
    rows: list[dict[str, Any]] = []
    for name, algorithm in cases:
        fmt = WireFormat.parse(name)
        if algorithm is None:
            algorithm, us = model.best(machine, fmt, n_bytes, shape.hidden)
            half = model.best(machine, fmt, n_bytes // 2, shape.hidden)[1]
        else:
            us, half = (
                model.all_reduce_us(machine, algorithm, plain, n, shape.hidden) for n in (n_bytes, n_bytes // 2)
            )
        first = model.first_token_s(compute, us * sums / 1e6, shape.layers, overlap=False)
        overlap = model.first_token_s(compute, 2 * half * sums / 1e6, shape.layers, overlap=True)
        backend = rows[0]["ttft_s"] if rows else first
        flat = "two_shot" if algorithm == "hierarchical" else algorithm
        row = {"format": name, "algorithm": algorithm, "all_reduce_us": round(us, 1)}
        row |= {"all_reduce_gain": round(rows[0]["all_reduce_us"] / us, 3) if rows else 1.0}
        row |= {"ttft_s": round(first, 6), "gain": round(backend / first, 3), "share": round(1 - compute / first, 4)}
        row |= {"overlap_s": round(overlap, 6), "overlap_gain": round(backend / overlap, 3)}
        row |= {"compute_s": round(compute, 6), "limit": round(backend / compute, 3)}
        row |= {"wire_bytes": model.sent_bytes(flat, n_bytes, shape.hidden, fmt, w) * sums}
        row |= {"memory_bytes": shape.memory_bytes(w, batch, tokens)}
        sent = str(fmt.reduce) if algorithm == "one_shot" else name  # one-shot has no second step
        row |= {"rise_pct": model.constants()["rise_pct"].get(str(w), {}).get(sent)}
        rows.append(row)
    return rows


def sentence(gpu: str, transport: str, world_size: int, fmt: str) -> str:
    """Return what a format would bring an 8B model on this machine's GPUs, or why that cannot be said."""
    links = {"symmetric": "nvlink", "host_memory": "host-memory"}
    if not gpu or transport not in links:
        return "GPUs only; try `flashcomm predict --gpu NAME --world N`"
    try:
        found = machines.gpu_of(gpu)
        machine = model.Machine(found, machines.link_of(links[transport], found, world_size), world_size)
        row = rows_of(machine, shape_of("llama-3-8b"), [fmt], 8, 1024)[1]
    except InputError as why:
        return f"nothing: {why}"
    return (
        f"llama-3-8b, 8 x 1024 tokens, {world_size} ranks: time to first token {row['gain']:.2f}x by {fmt}, "
        f"{row['overlap_gain']:.2f}x with overlap (flashcomm predict)"
    )


def draw(
    machine: model.Machine, shape: model.Shape, formats: Sequence[str], batch: int, tokens: int, target: Path
) -> None:
    """Draw the gain in time to first token against the rate of the link, and against the number of ranks.

    Args:
        machine: The ranks.
        shape: The model.
        formats: Wire formats.
        batch: Number of prompts.
        tokens: Tokens a prompt.
        target: The file to write, .svg or .png.

    Raises:
        InputError: The file's name ends in something else.
        UnavailableError: matplotlib is not installed.
    """
    from flashcomm.bench.plot import import_pyplot, save

    pyplot = import_pyplot(target)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    rates = [2 ** (i / 2) for i in range(17)]  # 1 to 256 GB/s
    ranks = [w for w in (2, 3, 4, 6, 8) if shape.heads % w == shape.kv_heads % w == shape.mlp % w == 0]
    for fmt in formats:
        at_rate = [machine._replace(link=machine.link._replace(gbs=rate)) for rate in rates]
        left.plot(rates, [rows_of(m, shape, [fmt], batch, tokens)[1]["gain"] for m in at_rate], label=fmt)
        at_ranks = [machine._replace(world_size=w) for w in ranks]
        right.plot(ranks, [rows_of(m, shape, [fmt], batch, tokens)[1]["gain"] for m in at_ranks], marker="o")
    left.axvline(machine.link.gbs, color="0.6", linewidth=1, linestyle=":")
    left.set_xscale("log", base=2)
    left.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    left.set_xlabel("link, GB/s each way (dotted: this one)")
    left.set_ylabel("time to first token, gain over the backend")
    right.set_xticks(ranks)
    right.set_xlabel(f"ranks, over {machine.link.name}")
    for axis in (left, right):
        axis.axhline(1, color="0.6", linewidth=1)
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"predicted: {shape.name}, {batch} x {tokens} tokens, {machine.world_size} ranks", fontsize=10)
    save(figure, target)
