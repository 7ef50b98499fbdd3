"""`flashcomm eval`: the accuracy of a model under each wire format, compared with uncompressed all-reduces.

All formats are evaluated on the same windows of a text. For each window and format it measures the log-likelihood of
the text, the KL divergence of every next-token distribution from the uncompressed one, and whether the likeliest token
is the same. The rise in perplexity and the KL divergence have a 95 % interval over windows. That of the rise comes from
paired differences, and is far narrower than the interval of either perplexity. That of the divergence is narrower yet.

The uncompressed model runs once. Its hidden states are kept in host memory, and its logits computed again for each
format, a few tokens at a time.

The ranks are simulated (`accuracy.simulate`) or real. Real ranks each run `on_rank`, and all get the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcomm.accuracy.experts import ExpertParallel
from flashcomm.accuracy.head import Head
from flashcomm.accuracy.intervals import Interval
from flashcomm.accuracy.models import load_model
from flashcomm.accuracy.simulate import Progress, TensorParallel, no_progress
from flashcomm.plan import Plan
from flashcomm.ranks.launch import RankContext
from flashcomm.wire.format import UNCOMPRESSED

BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
PROMPTS = 16  # windows whose first quarter is continued greedily

OnRow = Callable[[dict[str, Any]], None]


@dataclass
class Tally:
    """The measures of one format: lists have a value per window, in nats or tokens.

    Attributes:
        nll: Negative log-likelihood of the window.
        kl: Sum of the tokens' KL divergence from the uncompressed model.
        same: Number of tokens whose likeliest token is that of the uncompressed model.
        bits: Bits per value on the wire.
        greedy: Share of the greedy continuations that is the same.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[int] = field(default_factory=list)
    bits: float = 16.0
    greedy: float | None = None


class RealRanks:
    """The interface of `TensorParallel`, for real ranks: those of the process group that the model was loaded on."""

    def __init__(self, model: Any, world_size: int, settings: dict[str, Any]) -> None:
        from flashcomm.integrations import transformers as integration

        self.model, self.world_size = model, world_size
        self._integration, self._settings, self._plan = integration, settings, Plan.of(UNCOMPRESSED)
        self._width = sum(m.weight.shape[0] for m in model.modules() if getattr(m, "_flashcomm_layer", ""))
        self._tokens = self._before = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self._tokens += args[0].numel()

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
) -> bool:
    """Run `evaluate` on real ranks. Collective. Rank 0 emits (what, done, total) as progress, and each row.

    Returns:
        True, so that the caller knows that this process ran the ranks.
    """
    from flashcomm.integrations import transformers as integration

    integration.enable(UNCOMPRESSED, min_bytes=0, **settings)
    model, _ = load_model(model_dir, ctx.world_size, ctx.device, dtype)
    ranks = RealRanks(model, ctx.world_size, settings)
    for plan in plans.values():
        integration.enable(plan)
        integration.check_plan(model)

    def emit(event: Any) -> None:
        if ctx.rank == 0:
            ctx.emit(event)

    windows = windows.to(ctx.device)
    evaluate(ranks, windows, n_bytes, plans, continuation, lambda *step: emit(step), emit)
    return True


def evaluate(
    ranks: TensorParallel | ExpertParallel | RealRanks,
    windows: Tensor,
    n_bytes: int,
    plans: dict[str, Plan],
    continuation: int = 0,
    progress: Progress = no_progress,
    on_row: OnRow = lambda row: None,
) -> list[dict[str, Any]]:
    """Measure perplexity, KL divergence and the share of equal tokens for each plan.

    Args:
        ranks: The model and its ranks, simulated or real.
        windows: Token ids (n, length) on the model's device.
        n_bytes: UTF-8 bytes of the text that is predicted: all tokens but the first of each window.
        plans: Plans by the name to show in rows.
        continuation: Number of greedy tokens to compare, after the first quarter of each window; 0: none.
        progress: Called after each step. It counts windows; each greedy continuation counts as one.
        on_row: Called with each row as soon as it is measured.

    Returns:
        A row for the uncompressed baseline, then one for each plan.
    """
    baseline, rows = Baseline(ranks, windows), []
    prompts = windows[:PROMPTS, : max(1, windows.shape[1] // 4)]
    steps = len(windows) + (len(prompts) if continuation else 0)
    greedy: Tensor | None = None
    with ranks, torch.inference_mode():
        for i, (name, plan) in enumerate([(UNCOMPRESSED, Plan.of(UNCOMPRESSED)), *plans.items()]):

            def report(done: int, name: str = name, before: int = i * steps) -> None:
                progress(f"{ranks.world_size} ranks, {name}", before + done, steps * (1 + len(plans)))

            report(0)
            tally = baseline.tally(plan if i else None, len(windows), report)
            if continuation:
                ranks.plan = plan
                tokens = continue_greedily(ranks.model, prompts, continuation)
                tally.greedy = None if greedy is None else _agreed_share(greedy, tokens)
                greedy = tokens if greedy is None else greedy
                report(steps)
            rows.append(_row(name, plan, tally, baseline, n_bytes))
            on_row(rows[-1])
    return rows


class Baseline:
    """The uncompressed model on windows of a text, with which plans are compared. Windows are run as they are needed.

    Args:
        ranks: The model and its ranks, simulated or real.
        windows: Token ids (n, length) on the model's device.
    """

    def __init__(self, ranks: TensorParallel | ExpertParallel | RealRanks, windows: Tensor) -> None:
        self.ranks, self.windows, self.head = ranks, windows, Head(ranks.model)
        self.size = max(1, BATCH_TOKENS[windows.device.type] // windows.shape[1])
        self._hidden: list[Tensor] = []  # of each batch, in host memory
        self.nll: list[float] = []

    def tally(self, plan: Plan | None, n: int, report: Callable[[int], None] = lambda done: None) -> Tally:
        """Measure a plan on the first n windows, inside `with ranks, torch.inference_mode()`.

        Args:
            plan: The plan; None: the baseline itself.
            n: Number of windows, rounded up to whole batches.
            report: Called with the number of windows done, after each batch.
        """
        tally, uncompressed = Tally(), Plan.of(UNCOMPRESSED)
        self.ranks.plan = plan or uncompressed
        for i, batch in enumerate(torch.split(self.windows, self.size)[: -(-n // self.size)]):
            if plan is None:
                self._add(tally, batch)
            else:
                if i == len(self._hidden):
                    self.ranks.plan = uncompressed
                    self._add(Tally(), batch)
                    self.ranks.plan = plan
                self._add(tally, batch, self._hidden[i])
                tally.bits = self.ranks.bits_per_value
            report(min((i + 1) * self.size, len(self.windows)))
        return tally

    def _add(self, tally: Tally, batch: Tensor, base: Tensor | None = None) -> None:
        """Run a batch of windows. base: the baseline's hidden states (tokens, channels), or None if this is it."""
        hidden = self.head.hidden(input_ids=batch)[:, :-1].flatten(0, 1)
        targets = batch[:, 1:].flatten()
        nll, kl, same = (torch.zeros(len(targets), dtype=torch.float64) for _ in range(3))
        for piece in self.head.pieces(len(targets)):
            mine = self.head.logits(hidden[piece]).log_softmax(-1)
            nll[piece] = -mine.gather(-1, targets[piece, None])[:, 0].double().cpu()
            if base is not None:
                b = self.head.logits(base[piece].to(hidden.device)).log_softmax(-1)
                same[piece] = (mine.argmax(-1) == b.argmax(-1)).double().cpu()
                kl[piece] = b.exp().mul(b.sub_(mine)).sum(-1).double().cpu()
        tally.nll += nll.view(len(batch), -1).sum(1).tolist()
        if base is None:
            self._hidden.append(hidden.cpu())
            self.nll += tally.nll[-len(batch) :]
            return
        tally.kl += kl.view(len(batch), -1).sum(1).tolist()
        tally.same += map(int, same.view(len(batch), -1).sum(1).tolist())

    def divergence(self, tally: Tally) -> Interval:
        """Return the KL divergence from the baseline, in nats per token."""
        return Interval.of([kl / (self.windows.shape[1] - 1) for kl in tally.kl])

    def rise(self, tally: Tally) -> Interval:
        """Return the rise in perplexity over the baseline, from paired differences of windows; 0.01 is 1 %."""
        pairs = zip(tally.nll, self.nll, strict=False)  # the baseline may have run on more windows
        return Interval.of([(mine - base) / (self.windows.shape[1] - 1) for mine, base in pairs]).expm1()


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


def _row(name: str, plan: Plan, tally: Tally, baseline: Baseline, n_bytes: int) -> dict[str, Any]:
    n_tokens = len(tally.nll) * (baseline.windows.shape[1] - 1)
    nats = sum(tally.nll)
    row: dict[str, Any] = {
        "world": baseline.ranks.world_size,
        "format": name,
        "bits": round(tally.bits, 3),
        "perplexity": round(math.exp(min(nats / n_tokens, 700.0)), 4),
        "bits_per_byte": round(nats / math.log(2) / n_bytes, 5),
    }
    if tally.kl:
        row |= baseline.rise(tally).columns("rise_pct", "low_pct", "high_pct", 4, 0.01)
        row |= baseline.divergence(tally).columns("kl", "kl_low", "kl_high", 6)
    else:  # the baseline: no interval
        row |= {"rise_pct": 0.0, "low_pct": None, "high_pct": None, "kl": 0.0, "kl_low": None, "kl_high": None}
    return row | {
        "same_top1_pct": round(100 * sum(tally.same) / n_tokens, 3) if tally.same else 100.0,
        "greedy_pct": None if tally.greedy is None else round(100 * tally.greedy, 2),
        "tokens": n_tokens,
        "plan": plan.digest,
    }
