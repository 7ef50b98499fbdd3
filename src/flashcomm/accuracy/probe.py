"""`flashcomm probe`: failures that perplexity does not show, in long contexts and in what a model says.

needle      one sentence that holds a number, somewhere in pages of text; the model is to say the number at the end
generation  greedy text from many prompts, token by token, until it first differs from the uncompressed model's
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashcomm.accuracy.evaluate import continue_greedily
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.plan import Plan

NEEDLE = "The secret number of the harbour is {}."
QUESTION = "\n\nThe secret number of the harbour is"
DEPTHS = (0.1, 0.5, 0.9)
Progress = Callable[[str, int, int], None]


def needle(
    model: Any,
    tokenizer: Any,
    hay: Tensor,
    lengths: Sequence[int],
    plans: dict[str, Plan],
    world_size: int,
    algorithm: str,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Rows by context length and format: share of numbers found, and nats of the right number.

    hay: token ids (n,). Three depths and two numbers a length, each read in one pass with the answer's tokens in
    place, so that `found` means: every digit's token was the likeliest one.
    """
    cases = [(length, depth, number) for length in lengths for depth in DEPTHS for number in (48213, 70956)]
    scores: dict[tuple[int, str], list[tuple[bool, float]]] = {}
    with TensorParallel(model, world_size, algorithm=algorithm) as ranks, torch.inference_mode():
        everything = {"bf16": ranks.plan} | plans
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
    """(`length` token ids with the needle at `depth` of them, the question and its answer at the end; answer tokens)"""

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    sentence, question, answer = ids("\n\n" + NEEDLE.format(number) + "\n\n"), ids(QUESTION), ids(f" {number}")
    room = length - sentence.numel() - question.numel() - answer.numel()
    cut = int(room * depth)
    return torch.cat([hay[:cut], sentence, hay[cut:room], question, answer]), answer.numel()


def _score(logits: Tensor, answer: Tensor) -> tuple[bool, float]:
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
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Rows by format: the token at which greedy text first differs from the uncompressed ranks', and how often it never
    does within n_tokens. "one rank" is the model unsplit: what another order of sums alone changes.

    prompts: token ids (n, length).
    """
    names = ["bf16", "one rank", *plans]
    texts: dict[str, list[Tensor]] = {name: [] for name in names}
    pieces = torch.split(prompts, batch)
    for i, piece in enumerate(pieces):
        progress("generation", i, len(pieces))
        with torch.inference_mode():
            texts["one rank"].append(continue_greedily(model, piece, n_tokens).cpu())
            with TensorParallel(model, world_size, algorithm=algorithm) as ranks:
                for name, plan in ({"bf16": ranks.plan} | plans).items():
                    ranks.plan = plan
                    texts[name].append(continue_greedily(model, piece, n_tokens).cpu())
    base, rows = torch.cat(texts["bf16"]), []
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
