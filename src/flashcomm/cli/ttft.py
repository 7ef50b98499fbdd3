"""`flashcomm ttft`: time to first token by wire format, bytes on the wire, and what bytes and compute time predict.

One model is loaded once; the formats take turns, so that a machine that slows down slows all of them. A turn in which
each all-reduce sums one element only (`none`: ranks keep step, bytes do not travel) gives the compute time. The
prediction for a format is then

    compute time + wire bytes per rank * 8 / (link rate * payload fraction of a frame)

and shows how much of the time is neither: coding, and bubbles between messages.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.cli.launch import RankContext
from flashcomm.cli.models import load_model

NONE = "none"


def ttft(
    ctx: RankContext,
    model_dir: Path,
    formats: Sequence[str],
    n_tokens: int,
    repeats: int,
    dtype: torch.dtype,
    rate: int | None,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """On every rank: rows of format, world, tokens, ttft_s, compute_s, wire_bytes, predicted_s, speedup over bf16."""
    from flashcomm.integrations import transformers as seam

    seam.enable("bf16", **settings)
    model, _ = load_model(model_dir, ctx.world, ctx.device, dtype)
    for name in formats:
        seam.enable(name, **settings)
        seam.check_plan(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, n_tokens), generator=generator).to(ctx.device)
    names = list(dict.fromkeys([NONE, "bf16", *formats]))
    times: dict[str, list[float]] = {name: [] for name in names}
    wire_bytes = dict.fromkeys(names, 0)
    for turn in range(repeats + 1):  # the first compiles and warms up, and is not counted
        for name in names:
            ctx.emit({"format": name, "turn": turn, "turns": repeats + 1})
            # The baseline compares no shapes before a call: it is what one has without flashcomm.
            seam.enable("bf16" if name == NONE else name, **settings, **({"check": False} if name == "bf16" else {}))
            with seam.without_all_reduce(name == NONE):
                seconds, wire_bytes[name] = _first_token(ctx, model, ids, seam)
            if turn:
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "format": name,
            "world": ctx.world,
            "tokens": n_tokens,
            "ttft_s": round(median[name], 4),
            "compute_s": round(median[NONE], 4),
            "wire_bytes": wire_bytes[name],
            "predicted_s": None if rate is None else round(predict(median[NONE], wire_bytes[name], rate), 4),
            "speedup": round(median["bf16"] / median[name], 3),
        }
        for name in dict.fromkeys(["bf16", *formats])
    ]


def predict(compute_s: float, wire_bytes: int, rate: int) -> float:
    """Seconds: compute time plus the time wire_bytes take on a link of `rate` bits per second."""
    from flashcomm.cli.link import PAYLOAD_FRACTION

    return compute_s + wire_bytes * 8 / (rate * PAYLOAD_FRACTION)


def _first_token(ctx: RankContext, model: Any, ids: torch.Tensor, seam: Any) -> tuple[float, int]:
    """(seconds until the slowest rank has the first token, payload bytes this rank sent)."""
    sent = sum(c.transport.n_bytes_sent for c in seam.communicators())
    synchronise: Callable[[], None] = torch.cuda.synchronize if ctx.device.type == "cuda" else (lambda: None)
    dist.barrier()
    synchronise()
    begin = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
    synchronise()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=ctx.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item(), sum(c.transport.n_bytes_sent for c in seam.communicators()) - sent
