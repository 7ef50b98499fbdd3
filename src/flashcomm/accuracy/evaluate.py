"""`flashcomm eval`: the accuracy of a model under each wire format, compared with uncompressed all-reduces.

All formats are evaluated on the same windows of a text. For each window and format it measures the log-likelihood of
the text, the KL divergence of every next-token distribution from the uncompressed one, and whether the likeliest token
is the same. The rise in perplexity has a 95 % interval from the paired differences of windows. It is far narrower than
the interval of either perplexity.

The ranks are simulated (`accuracy.simulate`) or real. Real ranks each run `on_rank`, and all get the same rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcomm.accuracy.models import load_model
from flashcomm.accuracy.simulate import Progress, TensorParallel, no_progress
from flashcomm.plan import Plan
from flashcomm.ranks.launch import RankContext
from flashcomm.wire.format import UNCOMPRESSED

BATCH_TOKENS = {"cpu": 4096, "cuda": 8192}  # logits of a batch are kept: 0.8 GB per 4096 tokens of 50k float32


@dataclass
class Tally:
    """Sums over tokens and windows of one format."""

    nll: list[float] = field(default_factory=list)  # nats, one per window
    kl: float = 0.0
    same: int = 0
    bits: float = 0.0
    greedy: float | None = None


class RealRanks:
    """The interface of `TensorParallel`, for real ranks: those of the process group that the model was loaded on."""

    def __init__(self, model: Any, world_size: int, settings: dict[str, Any]) -> None:
        from flashcomm.integrations import transformers as integration

        self.model, self.world_size = model, world_size
        self._integration, self._settings, self._plan = integration, settings, Plan.of(UNCOMPRESSED)
        self._width = sum(m.weight.shape[0] for m in model.modules() if getattr(m, "_flashcomm_layer", ""))
        self._tokens = self._before = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens += (args[0] if args else kwargs["input_ids"]).numel()

    @property
    def plan(self) -> Plan:
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = plan
        self._integration.enable(plan, min_bytes=0, **self._settings)
        self._tokens, self._before = 0, self._sent()

    def _sent(self) -> int:
        return sum(c.transport.n_bytes_sent for c in self._integration.communicators())

    @property
    def bits_per_value(self) -> float:
        values = self._tokens * self._width * 2 * (self.world_size - 1) / self.world_size
        return 8 * (self._sent() - self._before) / values if values else 0.0

    def __enter__(self) -> RealRanks:
        self.plan = self._plan
        return self

    def __exit__(self, *_: object) -> None:
        self._integration.disable()


def on_rank(
    ctx: RankContext,
    model_dir: Path,
    dtype: torch.dtype,
    windows: Tensor,
    n_bytes: int,
    plans: dict[str, Plan],
    settings: dict[str, Any],
    continuation: int,
) -> list[dict[str, Any]]:
    """Run `evaluate` on real ranks and return its rows. Collective. Rank 0 emits progress as (what, done, total)."""
    from flashcomm.integrations import transformers as integration

    integration.enable(UNCOMPRESSED, min_bytes=0, **settings)
    model, _ = load_model(model_dir, ctx.world_size, ctx.device, dtype)
    ranks = RealRanks(model, ctx.world_size, settings)
    for plan in plans.values():
        integration.enable(plan)
        integration.check_plan(model)

    def progress(what: str, done: int, total: int) -> None:
        if ctx.rank == 0:
            ctx.emit((what, done, total))

    return evaluate(ranks, windows.to(ctx.device), n_bytes, plans, continuation, progress)


def evaluate(
    ranks: TensorParallel | RealRanks,
    windows: Tensor,
    n_bytes: int,
    plans: dict[str, Plan],
    continuation: int = 0,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Measure perplexity, KL divergence and the share of equal tokens for each plan.

    Args:
        ranks: The model and its ranks, simulated or real.
        windows: Token ids (n, length) on the model's device.
        n_bytes: UTF-8 bytes of their text.
        plans: Plans by the name to show in rows.
        continuation: Number of greedy tokens to compare, after the first quarter of each window; 0: none.
        progress: Called after each step.

    Returns:
        A row for the uncompressed baseline, then one for each plan.
    """
    model, world_size = ranks.model, ranks.world_size
    tallies = {name: Tally() for name in (UNCOMPRESSED, *plans)}
    batches = torch.split(windows, max(1, BATCH_TOKENS[windows.device.type] // windows.shape[1]))
    with ranks, torch.inference_mode():
        uncompressed = ranks.plan
        for i, batch in enumerate(batches):
            progress(f"{world_size} ranks", i, len(batches))
            ranks.plan = uncompressed
            base = _log_probabilities(model, batch)
            _add(tallies[UNCOMPRESSED], batch, base, base, 16.0)
            for name, plan in plans.items():
                ranks.plan = plan
                _add(tallies[name], batch, _log_probabilities(model, batch), base, ranks.bits_per_value)
        if continuation:
            greedy = _greedy(ranks, uncompressed, windows, continuation)
            for i, (name, plan) in enumerate(plans.items()):
                progress(f"{world_size} ranks, greedy", i, len(plans))
                tallies[name].greedy = _agreed_share(greedy, _greedy(ranks, plan, windows, continuation))
    n_tokens = windows.shape[0] * (windows.shape[1] - 1)
    return [_row(name, tally, tallies[UNCOMPRESSED], world_size, n_tokens, n_bytes) for name, tally in tallies.items()]


def _log_probabilities(model: Any, batch: Tensor) -> Tensor:
    return model(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)  # type: ignore[no-any-return]


def _add(tally: Tally, batch: Tensor, mine: Tensor, base: Tensor, bits: float) -> None:
    tally.nll += (-mine.gather(-1, batch[:, 1:, None])[..., 0].double().sum(1)).tolist()
    if mine is not base:
        tally.kl += sum((b.exp() * (b - m)).sum().item() for b, m in zip(base, mine, strict=True))
        tally.same += int((mine.argmax(-1) == base.argmax(-1)).sum())
    tally.bits = bits


def _greedy(ranks: TensorParallel | RealRanks, plan: Plan, windows: Tensor, n: int) -> Tensor:
    """Generate n tokens greedily after the first quarter of each of up to 16 windows."""
    ranks.plan = plan
    return continue_greedily(ranks.model, windows[:16, : max(1, windows.shape[1] // 4)], n)


def continue_greedily(model: Any, prompts: Tensor, n: int) -> Tensor:
    """Generate n tokens greedily after prompts (k, length). Return token ids (k, n)."""
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, prompts.shape[1] :]  # type: ignore[no-any-return]


def _agreed_share(base: Tensor, mine: Tensor) -> float:
    """Return the mean share of a continuation before the first token that differs."""
    return (base == mine).cumprod(1).float().mean().item()


def rise(mine: Sequence[float], base: Sequence[float], n_tokens: int) -> tuple[float, float, float]:
    """Return the rise in perplexity and its 95 % interval, from paired differences of windows and Student's t.

    Args:
        mine: Negative log-likelihood of each window, in nats.
        base: The same for the baseline.
        n_tokens: Number of tokens in all windows.

    Returns:
        Rise, low end, high end, as fractions: 0.01 is 1 %.
    """
    differences = [(m - b) * len(base) / n_tokens for m, b in zip(mine, base, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return math.expm1(mean), float("nan"), float("nan")
    t = _student(len(differences) - 1)
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half)


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, expanded around the normal's (within 1 % for freedom >= 3)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    n = freedom
    return (
        z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )  # fmt: skip


def _row(name: str, tally: Tally, base: Tally, world_size: int, n_tokens: int, n_bytes: int) -> dict[str, Any]:
    nats = sum(tally.nll)
    risen, low, high = rise(tally.nll, base.nll, n_tokens)
    compared = tally is not base
    return {
        "world": world_size,
        "format": name,
        "bits": round(tally.bits, 3),
        "perplexity": round(math.exp(nats / n_tokens), 4),
        "bits_per_byte": round(nats / math.log(2) / n_bytes, 5),
        "rise_pct": round(100 * risen, 4) if compared else 0.0,
        "low_pct": round(100 * low, 4) if compared else 0.0,
        "high_pct": round(100 * high, 4) if compared else 0.0,
        "kl": round(tally.kl / n_tokens, 6),
        "same_top1_pct": round(100 * tally.same / n_tokens, 3) if compared else 100.0,
        "greedy_pct": None if tally.greedy is None else round(100 * tally.greedy, 2),
        "tokens": n_tokens,
    }
