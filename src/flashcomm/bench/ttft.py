"""`flashcomm ttft`: time to first token by wire format, the share of it that all-reduces take, what is left to gain.

One model is loaded once; ways (a format, with or without overlap) take turns, so that a machine that slows down slows
all of them. The baseline `native` is what a user has without flashcomm: transformers' own dist.all_reduce. A turn
without all-reduces gives the compute time:

    share   1 - compute / native            of the baseline's time that all-reduces take
    limit   native / compute                the speed-up that sums in no time at all would bring

On CPUs ranks sum one element in each all-reduce's place in that turn: they share cores and must keep step. On GPUs
nothing at all takes its place: a sum of one element is ten microseconds of latency, which is not compute.

With a link, the prediction is compute time + wire bytes per rank * 8 / (link rate * payload fraction of a frame); what
is above it is coding, and bubbles between messages.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.accuracy.models import load_model
from flashcomm.errors import FlashcommError
from flashcomm.ranks.launch import RankContext


@dataclass(frozen=True)
class Ask:
    """What to measure. model: a directory, or the name of a shape; layers: of the model's first ones, None for all."""

    model: Any
    layers: int | None
    formats: Sequence[str]
    batches: Sequence[int]
    tokens: Sequence[int]
    repeats: int
    dtype: torch.dtype
    rate: int | None
    compiled: bool
    overlap: bool
    settings: dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A row: path is "native" (without flashcomm), "auto" (what flashcomm takes) or "none" (no all-reduces)."""

    format: str
    path: str
    overlap: bool = False

    def __str__(self) -> str:
        return f"{self.format if self.path == 'auto' else self.path}{', overlap' if self.overlap else ''}"


@dataclass
class Case:
    """One batch of prompts on the model, and what was found for it."""

    ids: Tensor
    seconds: dict[Way, list[float]] = field(default_factory=dict)
    logits: dict[Way, Tensor] = field(default_factory=dict)
    wire_bytes: dict[Way, int] = field(default_factory=dict)


NONE, NATIVE = Way("bf16", "none"), Way("bf16", "native")


def ways_of(formats: Sequence[str], device: str, overlap: bool) -> list[Way]:
    """What takes turns. On CPUs uncompressed messages go the native way; on GPUs we have ways of our own for them."""
    auto = [Way(f, "auto") for f in dict.fromkeys(formats) if f != "bf16" or device == "cuda"]
    plain = [NATIVE, *auto]
    return [NONE, *plain, *(Way(w.format, w.path, True) for w in plain if overlap)]


def ttft(ctx: RankContext, ask: Ask) -> list[dict[str, Any]]:
    """On every rank: a row for each batch, prompt length and way but `none`; see docs/cli.md for its columns.

    Raises FlashcommError, on every rank, where the ranks' logits differ or are not finite.
    """
    from flashcomm.integrations import transformers as integration

    ctx.emit({"what": "loading", "done": 0, "of": None})
    integration.enable("bf16", **ask.settings)
    model = _load(ctx, ask)
    for name in ask.formats:
        integration.enable(name, **ask.settings)
        integration.check_plan(model)
    stack, eager = model.base_model, model.base_model.forward
    if ask.overlap:
        integration.overlap(model, min_tokens=0)
    forwards = {False: eager, True: stack.forward}
    compiled = torch.compile(eager, dynamic=False) if ask.compiled else None
    ways = ways_of(ask.formats, ctx.device.type, ask.overlap)
    sizes = [(b, n) for n in ask.tokens for b in ask.batches]
    steps = len(sizes) * len(ways) * (ask.repeats + 2)
    done, rows = 0, []

    @contextlib.contextmanager
    def going(way: Way, in_graph: bool) -> Iterator[None]:
        """The model goes this way inside a with block."""
        # The baseline compares no shapes before a call: it is what one has without flashcomm.
        check = {"check": False} if way.path != "auto" else {}
        integration.enable(way.format, **ask.settings, **check)
        stack.forward = compiled if in_graph and compiled is not None else forwards[way.overlap]
        none = way.path == "none"
        off = integration.without_all_reduce(in_step=ctx.device.type == "cpu") if none else contextlib.nullcontext()
        with off, integration.native_all_reduce() if way.path == "native" else contextlib.nullcontext():
            yield

    for batch, n_tokens in sizes:
        if ask.compiled:
            torch._dynamo.reset()  # else the graphs of earlier shapes count towards its limit
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (batch, n_tokens), generator=generator).to(ctx.device)
        case = Case(ids, {way: [] for way in ways})
        for turn in range(-2, ask.repeats):  # one eager turn to verify, one that compiles and warms up
            for way in ways:
                what = {-2: "verifying", -1: "compiling" if ask.compiled else "warming up"}.get(turn, "timing")
                ctx.emit({"what": f"{batch} x {n_tokens}, {what} {way}", "done": done, "of": steps})
                done += 1
                with going(way, in_graph=turn > -2):
                    if turn == -2:
                        _verify(ctx, model, way, case, integration)
                    elif (seconds := _first_token(ctx, model, ids)) and turn >= 0:
                        case.seconds[way].append(seconds)
        rows += _rows(ctx, ask, case, model.config)
    return rows


def _load(ctx: RankContext, ask: Ask) -> Any:
    if isinstance(ask.model, str):
        from flashcomm.bench.shapes import build

        return build(ask.model, ask.layers, ctx.world_size, ctx.device, ask.dtype)
    return load_model(ask.model, ctx.world_size, ctx.device, ask.dtype, ask.layers)[0]


def _forward(model: Any, ids: Tensor) -> Tensor:
    """(batch, vocabulary): the logits of every prompt's next token; the cache is filled, as it is in use."""
    logits: Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def _verify(ctx: RankContext, model: Any, way: Way, case: Case, integration: Any) -> None:
    """Run once, uncompiled: note logits and wire bytes, and make sure that all ranks have the same, finite logits."""
    with torch.inference_mode(), integration.messages() as seen:
        logits = _forward(model, case.ids)
    if way.path == "none":
        return
    case.logits[way] = logits.cpu()
    case.wire_bytes[way] = sum(map(integration.wire_bytes, seen))
    mine = torch.stack([logits.double().sum(), logits.double().square().sum()])
    everybody = [torch.empty_like(mine) for _ in range(ctx.world_size)]
    dist.all_gather(everybody, mine)
    if not all(torch.equal(theirs, everybody[0]) and bool(theirs.isfinite().all()) for theirs in everybody):
        raise FlashcommError(f"{way}: the ranks' logits differ or are not finite, so that no time is worth taking")


def _first_token(ctx: RankContext, model: Any, ids: Tensor) -> float:
    """Seconds until the slowest rank has the first token of every prompt."""
    begin = _start(ctx)
    with torch.inference_mode():
        _forward(model, ids).argmax(-1)
    seconds = torch.tensor(begin(), dtype=torch.float64, device=ctx.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _start(ctx: RankContext) -> Callable[[], float]:
    """Lets the ranks start together; the function returned gives the seconds since, all that was asked for included.

    On GPUs between CUDA events, the first of them on an idle GPU: what the host needs to launch is part of it.
    """
    dist.barrier()
    if ctx.device.type != "cuda":
        begin = time.perf_counter()
        return lambda: time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    first.record()

    def seconds() -> float:
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    return seconds


def _rows(ctx: RankContext, ask: Ask, case: Case, config: Any) -> list[dict[str, Any]]:
    median = {way: statistics.median(values) for way, values in case.seconds.items()}
    compute, native = median[NONE], median[NATIVE]
    rows = []
    for way, seconds in median.items():
        if way == NONE:
            continue
        wire_bytes = case.wire_bytes[way]
        same = torch.equal(case.logits[way], case.logits[Way(way.format, way.path)]) if way.overlap else None
        row = {"format": way.format, "path": way.path, "overlap": way.overlap, "compiled": ask.compiled}
        row |= {"world": ctx.world_size, "layers": config.num_hidden_layers}
        row |= {"batch": case.ids.shape[0], "tokens": case.ids.shape[1]}
        row |= {"ttft_s": round(seconds, 6), "compute_s": round(compute, 6)}
        row |= {"share": round(1 - compute / native, 4), "limit": round(native / compute, 3)}
        row |= {"wire_bytes": wire_bytes, "speedup": round(native / seconds, 3), "same_bits": same}
        row |= {"predicted_s": None if ask.rate is None else round(predict(compute, wire_bytes, ask.rate), 4)}
        rows.append(row)
    return rows


def predict(compute_s: float, wire_bytes: int, rate: int) -> float:
    """Seconds: compute time plus the time wire_bytes take on a link of `rate` bits per second."""
    from flashcomm.ranks.link import PAYLOAD_FRACTION

    return compute_s + wire_bytes * 8 / (rate * PAYLOAD_FRACTION)


def link_of(device: str, asked: str | None) -> str:
    """What the ranks' messages travel over, as the rows name it."""
    if device != "cuda":
        return asked or "none"
    count = torch.cuda.device_count()
    blind = any(not torch.cuda.can_device_access_peer(i, j) for i in range(count) for j in range(count) if i != j)
    return "no peer access" if blind or os.environ.get("NCCL_P2P_DISABLE") == "1" else "peer access"
