"""`flashcomm ttft`: time to first token by wire format, the share of all-reduces in it, and the largest speed-up.

The model is loaded once. Variants (a format, with or without two-batch overlap) take turns, so that a slowdown of the
machine affects all of them. The baseline `backend` is transformers' own dist.all_reduce, without flashcomm. A turn
without all-reduces gives the compute time:

    share   1 - compute / backend            the share of all-reduces in the time of the baseline
    limit   backend / compute                the speed-up if all-reduces took no time

On CPUs each all-reduce of that turn is replaced by one of a single element, because ranks share cores and must stay
synchronized. On GPUs it is left out: even a single element takes ten microseconds, which is not compute time.

With a link, the prediction is compute time + wire bytes per rank * 8 / (link rate * payload fraction of a frame). Time
above it is quantization, and idle time between messages.
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

from flashcomm.bench.records import BACKEND
from flashcomm.bench.shapes import TimedModel
from flashcomm.errors import FlashcommError
from flashcomm.ranks.launch import RankContext
from flashcomm.ranks.link import PAYLOAD_FRACTION
from flashcomm.wire.format import UNCOMPRESSED


@dataclass(frozen=True)
class Request:
    """The arguments of a measurement.

    Attributes:
        model: The model to time.
        formats: Wire formats and plans.
        batches: Numbers of prompts. Every pair of batch and tokens is measured.
        tokens: Prompt lengths.
        repeats: Turns, of which the median counts.
        dtype: The dtype of the model.
        rate: The rate of the link in bits per second; None: no link.
        compiled: Whether to compile the decoder layers.
        overlap: Whether to measure two-batch overlap, too.
        settings: Arguments of the Communicators.
    """

    model: TimedModel
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
class Variant:
    """A row. `path` is "backend" (without flashcomm), "auto" (by flashcomm) or "none" (no all-reduces)."""

    format: str
    path: str
    overlap: bool = False

    def __str__(self) -> str:
        return f"{self.format if self.path == 'auto' else self.path}{', overlap' if self.overlap else ''}"


def label_of(fmt: str, path: str, overlap: bool) -> str:
    """Return the name of a row in tables and plots."""
    return f"{fmt}{'' if path == 'auto' else ', not ours'}{', overlap' if overlap else ''}"


@dataclass
class Case:
    """A batch of prompts, and its results by variant."""

    ids: Tensor
    seconds: dict[Variant, list[float]] = field(default_factory=dict)
    logits: dict[Variant, Tensor] = field(default_factory=dict)
    wire_bytes: dict[Variant, int] = field(default_factory=dict)
    halves: dict[Variant, str | None] = field(default_factory=dict)


NO_SUMS, BASELINE = Variant(UNCOMPRESSED, "none"), Variant(UNCOMPRESSED, BACKEND)


def variants_of(formats: Sequence[str], device: str, overlap: bool) -> list[Variant]:
    """Return the variants to measure. On CPUs the baseline stands for uncompressed: the backend runs both."""
    auto = [Variant(f, "auto") for f in dict.fromkeys(formats) if f != UNCOMPRESSED or device == "cuda"]
    plain = [BASELINE, *auto]
    return [NO_SUMS, *plain, *(Variant(v.format, v.path, True) for v in plain if overlap)]


def ttft(ctx: RankContext, request: Request) -> list[dict[str, Any]]:
    """Measure time to first token. Collective.

    Args:
        ctx: This rank. It emits progress as (what, done, total).
        request: The measurement.

    Returns:
        A row for each batch, prompt length and variant but `none`; docs/cli.md explains the columns.

    Raises:
        FlashcommError: On every rank, if the ranks' logits differ or are not finite.
    """
    from flashcomm.integrations import transformers as integration

    ctx.emit(("loading", 0, None))
    integration.enable(UNCOMPRESSED, **request.settings)
    model = request.model.load(ctx.world_size, ctx.device, request.dtype)
    for name in request.formats:
        integration.enable(name, **request.settings)
        integration.check_plan(model)
    stack, eager = model.base_model, model.base_model.forward
    if request.overlap:
        integration.overlap(model, min_tokens=0, mode="always")
    forwards = {False: eager, True: stack.forward}
    compiled = torch.compile(eager, dynamic=False) if request.compiled else None
    variants = variants_of(request.formats, ctx.device.type, request.overlap)
    sizes = [(b, n) for n in request.tokens for b in request.batches]
    steps = len(sizes) * len(variants) * (request.repeats + 2)
    done, rows = 0, []

    @contextlib.contextmanager
    def running(variant: Variant, in_graph: bool) -> Iterator[None]:
        """Make the model run as this variant inside a with block."""
        # The baseline does not compare shapes before calls, just like transformers without flashcomm.
        check = {"check": False} if variant.path != "auto" else {}
        integration.enable(variant.format, **request.settings, **check)
        stack.forward = compiled if in_graph and compiled is not None else forwards[variant.overlap]
        none = variant.path == "none"
        off = integration.without_all_reduce(in_step=ctx.device.type == "cpu") if none else contextlib.nullcontext()
        with off, integration.backend_all_reduce() if variant.path == BACKEND else contextlib.nullcontext():
            yield

    for batch, n_tokens in sizes:
        if request.compiled:
            torch._dynamo.reset()  # otherwise graphs of earlier shapes count towards its limit
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (batch, n_tokens), generator=generator).to(ctx.device)
        case = Case(ids, {variant: [] for variant in variants})
        for turn in range(-2, request.repeats):  # one eager turn to verify, one that compiles and warms up
            for variant in variants:
                what = {-2: "verifying", -1: "compiling" if request.compiled else "warming up"}.get(turn, "timing")
                ctx.emit((f"{batch} x {n_tokens}, {what} {variant}", done, steps))
                done += 1
                with running(variant, in_graph=turn > -2):
                    if turn == -2:
                        _verify(ctx, model, variant, case, integration)
                    elif (seconds := _first_token(ctx, model, ids)) and turn >= 0:
                        case.seconds[variant].append(seconds)
        rows += _rows(ctx, request, case, model.config)
    return rows


def _forward(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of every prompt's next token: (batch, vocabulary). The cache is filled, as in real use."""
    logits: Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def _verify(ctx: RankContext, model: Any, variant: Variant, case: Case, integration: Any) -> None:
    """Run once, uncompiled, to record logits and wire bytes. Check that logits are finite and equal on all ranks."""
    with torch.inference_mode(), integration.messages() as seen:
        logits = _forward(model, case.ids)
    if variant.path == "none":
        return
    case.logits[variant] = logits.cpu()
    case.halves[variant] = model.base_model.forward.last if variant.overlap else None
    case.wire_bytes[variant] = sum(map(integration.wire_bytes, seen))
    mine = torch.stack([logits.double().sum(), logits.double().square().sum()])
    all_ranks = [torch.empty_like(mine) for _ in range(ctx.world_size)]
    dist.all_gather(all_ranks, mine)
    if not all(torch.equal(theirs, all_ranks[0]) and bool(theirs.isfinite().all()) for theirs in all_ranks):
        raise FlashcommError(f"{variant}: the ranks' logits differ or are not finite, so nothing was timed")


def _first_token(ctx: RankContext, model: Any, ids: Tensor) -> float:
    """Return the seconds until the slowest rank has the first token of every prompt."""
    begin = _start(ctx)
    with torch.inference_mode():
        _forward(model, ids).argmax(-1)
    seconds = torch.tensor(begin(), dtype=torch.float64, device=ctx.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _start(ctx: RankContext) -> Callable[[], float]:
    """Make the ranks start together. Return a function that returns the seconds until all work since then is done.

    On GPUs it measures between CUDA events. The first is on an idle GPU, so that launch times are included.
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


def _rows(ctx: RankContext, request: Request, case: Case, config: Any) -> list[dict[str, Any]]:
    median = {variant: statistics.median(values) for variant, values in case.seconds.items()}
    compute, backend = median[NO_SUMS], median[BASELINE]
    rows = []
    for variant, seconds in median.items():
        if variant == NO_SUMS:
            continue
        wire_bytes = case.wire_bytes[variant]
        same = (
            torch.equal(case.logits[variant], case.logits[Variant(variant.format, variant.path)])
            if variant.overlap
            else None
        )
        row = {"format": variant.format, "path": variant.path, "overlap": variant.overlap, "compiled": request.compiled}
        row |= {"halves": case.halves[variant]}
        row |= {"world": ctx.world_size, "layers": config.num_hidden_layers}
        row |= {"batch": case.ids.shape[0], "tokens": case.ids.shape[1]}
        row |= {"ttft_s": round(seconds, 6), "compute_s": round(compute, 6)}
        row |= {"share": round(1 - compute / backend, 4), "limit": round(backend / compute, 3)}
        row |= {"wire_bytes": wire_bytes, "speedup": round(backend / seconds, 3), "same_bits": same}
        row |= {"predicted_s": None if request.rate is None else round(predict(compute, wire_bytes, request.rate), 4)}
        rows.append(row)
    return rows


def predict(compute_s: float, wire_bytes: int, rate: int) -> float:
    """Return compute time plus the time of wire_bytes on a link of `rate` bits per second, in seconds."""
    return compute_s + wire_bytes * 8 / (rate * PAYLOAD_FRACTION)


def link_of(device: str, rate: str | None) -> str:
    """Return the value of the column `link`: the rate of --link, or whether GPUs have peer access."""
    if device != "cuda":
        return rate or "none"
    count = torch.cuda.device_count()
    access = all(torch.cuda.can_device_access_peer(i, j) for i in range(count) for j in range(count) if i != j)
    return "peer access" if access and os.environ.get("NCCL_P2P_DISABLE") != "1" else "no peer access"
