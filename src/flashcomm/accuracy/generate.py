"""`flashcomm generate`: greedy text from a tensor-parallel model whose all-reduces are low-bit."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from flashcomm.accuracy.models import load_model
from flashcomm.ranks.launch import RankContext


def generate(
    ctx: RankContext,
    model_dir: Path,
    fmt: str,
    prompt: str,
    n_tokens: int,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Load a model and generate greedily. Collective. Rank 0 emits text as it is generated.

    Args:
        ctx: This rank.
        model_dir: The model's directory.
        fmt: The wire format or plan of the all-reduces.
        prompt: The prompt. The model's chat template is applied, if it has one.
        n_tokens: The most tokens to generate.
        dtype: The dtype of the model.
        settings: Arguments of the Communicators.

    Returns:
        Text, tokens, seconds, bytes sent and calls by route.
    """
    from flashcomm.integrations import transformers as integration

    integration.enable(fmt, **settings)
    model, tokenizer = load_model(model_dir, ctx.world_size, ctx.device, dtype)
    integration.check_plan(model)
    text = prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids.to(ctx.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            streamer=_Emitter(ctx, tokenizer) if ctx.rank == 0 else None,
        )
    seconds = time.perf_counter() - begin
    new = output[0, ids.shape[1] :]
    communicators = integration.communicators()
    return {
        "format": fmt,
        "world": ctx.world_size,
        "prompt_tokens": ids.shape[1],
        "tokens": new.tolist(),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "seconds": round(seconds, 3),
        "wire_bytes": sum(c.transport.n_bytes_sent for c in communicators),
        "calls": dict(sum((Counter(c.calls) for c in communicators), Counter())),
    }


class _Emitter:
    """A transformers streamer that emits each new piece of text."""

    def __init__(self, ctx: RankContext, tokenizer: Any) -> None:
        self._ctx, self._tokenizer = ctx, tokenizer
        self._ids: list[int] = []
        self._shown = ""
        self._is_prompt = True

    def put(self, ids: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += ids.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # an unfinished multi-byte character
            self._ctx.emit(text[len(self._shown) :])
            self._shown = text

    def end(self) -> None:
        pass
