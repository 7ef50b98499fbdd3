"""`flashcomm probe`: two tests for failures that perplexity does not show.

needle      a number is hidden in a long text, and the model must repeat it at the end (needle in a haystack)
generation  text is generated greedily from many prompts, up to the first token that differs from the uncompressed one
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashcomm.accuracy.evaluate import continue_greedily
from flashcomm.accuracy.simulate import Progress, TensorParallel, no_progress
from flashcomm.plan import Plan
from flashcomm.wire.format import UNCOMPRESSED

NEEDLE = "The secret number of the harbour is {}."
QUESTION = "\n\nThe secret number of the harbour is"
DEPTHS = (0.1, 0.5, 0.9)


def needle(
    model: Any,
    tokenizer: Any,
    hay: Tensor,
    lengths: Sequence[int],
    plans: dict[str, Plan],
    world_size: int,
    algorithm: str,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Hide a number in a text and ask for it, at three depths and with two numbers for each context length.

    Each case is one forward pass over text, question and answer. The number counts as found if each of its tokens was
    the likeliest.

    Args:
        model: A transformers model with a tensor-parallel plan.
        tokenizer: Its tokenizer.
        hay: Token ids (n,) of the text, at least as many as the longest context.
        lengths: Context lengths in tokens.
        plans: Plans by the name to show in rows.
        world_size: Ranks to simulate.
        algorithm: As in `flashcomm.settings`.
        progress: Called after each step.

    Returns:
        Rows by context length and format: the share of numbers found, and the mean nats of the right number.
    """
    cases = [(length, depth, number) for length in lengths for depth in DEPTHS for number in (48213, 70956)]
    scores: dict[tuple[int, str], list[tuple[bool, float]]] = {}
    with TensorParallel(model, world_size, algorithm=algorithm) as ranks, torch.inference_mode():
        everything = {UNCOMPRESSED: ranks.plan} | plans
        for i, (length, depth, number) in enumerate(cases):
            progress(f"needle in {length} tokens", i, len(cases))
            ids, n_answer = _haystack(tokenizer, hay, length, depth, number)
            for name, plan in everything.items():
                ranks.plan = plan
                logits = model(ids[None].to(model.device), use_cache=False, logits_to_keep=n_answer + 1).logits
                scores.setdefault((length, name), []).append(_score(logits[0, :-1].float().cpu(), ids[-n_answer:]))
    return [
        {
            "probe": "needle",
            "world": world_size,
            "context": length,
            "format": name,
            "found_pct": round(100 * statistics.fmean(found for found, _ in many), 1),
            "nats": round(statistics.fmean(nats for _, nats in many), 4),
            "cases": len(many),
        }
        for (length, name), many in scores.items()
    ]


def _haystack(tokenizer: Any, hay: Tensor, length: int, depth: float, number: int) -> tuple[Tensor, int]:
    """Return `length` token ids, with the needle at `depth` and the answer at the end, and the answer's length."""

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    sentence, question, answer = ids("\n\n" + NEEDLE.format(number) + "\n\n"), ids(QUESTION), ids(f" {number}")
    room = length - sentence.numel() - question.numel() - answer.numel()
    cut = int(room * depth)
    return torch.cat([hay[:cut], sentence, hay[cut:room], question, answer]), answer.numel()


def _score(logits: Tensor, answer: Tensor) -> tuple[bool, float]:
    """Return whether every token of the answer was the likeliest, and the nats of the answer."""
    nats = -logits.log_softmax(-1).gather(1, answer[:, None]).sum().item()
    return bool((logits.argmax(-1) == answer).all()), nats


def generation(
    model: Any,
    prompts: Tensor,
    n_tokens: int,
    plans: dict[str, Plan],
    world_size: int,
    algorithm: str,
    batch: int,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Generate greedily from many prompts and compare with uncompressed all-reduces.

    Args:
        model: A transformers model with a tensor-parallel plan.
        prompts: Token ids (n, length).
        n_tokens: Tokens to generate from each prompt.
        plans: Plans by the name to show in rows.
        world_size: Ranks to simulate.
        algorithm: As in `flashcomm.settings`.
        batch: Number of prompts at a time.
        progress: Called after each step.

    Returns:
        Rows by format: the first token that differs (median and mean), and the share of texts in which none does.
        "one rank" is the model on one rank, which shows the effect of another order of additions alone.
    """
    names = [UNCOMPRESSED, "one rank", *plans]
    texts: dict[str, list[Tensor]] = {name: [] for name in names}
    pieces = torch.split(prompts, batch)
    for i, piece in enumerate(pieces):
        progress("generation", i, len(pieces))
        with torch.inference_mode():
            texts["one rank"].append(continue_greedily(model, piece, n_tokens).cpu())
            with TensorParallel(model, world_size, algorithm=algorithm) as ranks:
                for name, plan in ({UNCOMPRESSED: ranks.plan} | plans).items():
                    ranks.plan = plan
                    texts[name].append(continue_greedily(model, piece, n_tokens).cpu())
    base, rows = torch.cat(texts[UNCOMPRESSED]), []
    for name in names[1:]:
        first = (base == torch.cat(texts[name])).cumprod(1).sum(1)
        rows.append(
            {
                "probe": "generation",
                "world": world_size,
                "format": name,
                "prompts": len(prompts),
                "tokens": n_tokens,
                "never_pct": round(100 * (first == n_tokens).float().mean().item(), 1),
                "median_first": statistics.median(first.tolist()),
                "mean_same": round(first.float().mean().item(), 2),
            }
        )
    return rows
