"""Texts on disk, read as windows of tokens.

A window may begin with a beginning-of-sequence (BOS) token, which models that were trained with one need.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcomm.errors import InputError


def bos_of(tokenizer: Any, asked: str) -> int | None:
    """Return the token that each window begins with, or None.

    Args:
        tokenizer: The model's tokenizer.
        asked: "yes", "no", or "auto": as the tokenizer does with a text.

    Raises:
        InputError: `asked` is something else, or "yes" and the tokenizer has no such token.
    """
    if asked not in ("auto", "yes", "no"):
        raise InputError(f"--bos {asked}: allowed are auto, yes and no")
    bos = getattr(tokenizer, "bos_token_id", None)
    if asked == "yes" and bos is None:
        raise InputError("--bos yes: this tokenizer has no beginning-of-sequence token; give --bos no")
    if asked == "auto" and bos is not None and list(tokenizer("a").input_ids)[:1] != [bos]:
        return None
    return None if asked == "no" else bos


def tokens_of(path: Path, tokenizer: Any) -> Tensor:
    """Return the token ids of a UTF-8 text, without special tokens: int64 (n,), on the CPU.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as why:
        raise InputError(f"{path} cannot be read as UTF-8 text: {why}") from why
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]  # type: ignore[no-any-return]


def read_windows(path: Path, tokenizer: Any, length: int, count: int, bos: int | None = None) -> Tensor:
    """Read windows of a text at equal distances, from its first to its last token.

    Args:
        path: A UTF-8 text.
        tokenizer: The model's tokenizer.
        length: Tokens per window.
        count: Number of windows.
        bos: The token that each window begins with; None: the text's own token.

    Returns:
        Token ids, int64 (count, length), on the CPU.

    Raises:
        InputError: The file cannot be read, or its windows would overlap.
    """
    return even_windows(tokens_of(path, tokenizer), length, count, bos, str(path))


def even_windows(ids: Tensor, length: int, count: int, bos: int | None, name: str) -> Tensor:
    """Cut windows of token ids (n,) as `read_windows` does. `name` is the text's name in errors."""
    body = length - (bos is not None)
    if ids.numel() < count * body:
        raise InputError(
            f"{name} has {ids.numel()} tokens, but {count} windows of {body} need {count * body}: "
            f"give a longer text, or fewer --windows or a shorter --context"
        )
    starts = [(ids.numel() - body) * i // max(count - 1, 1) for i in range(count)]
    return _windows(ids, starts, body, bos)


def all_windows(ids: Tensor, length: int, bos: int | None) -> Tensor:
    """Cut token ids (n,) into windows that do not overlap: int64 (as many as fit, length).

    They are in an order in which any first few are spread over the text. So more windows can be added to the first n.
    """
    body = length - (bos is not None)
    n = ids.numel() // body
    stride = next((k for k in range(round(0.618 * n), n) if math.gcd(k, n) == 1), 1)
    return _windows(ids, [body * (i * stride % n) for i in range(n)], body, bos)


def _windows(ids: Tensor, starts: list[int], body: int, bos: int | None) -> Tensor:
    windows = torch.stack([ids[start : start + body] for start in starts]) if starts else ids.new_zeros(0, body)
    return windows if bos is None else torch.cat([windows.new_full((len(starts), 1), bos), windows], 1)


def bytes_in(windows: Tensor, tokenizer: Any) -> int:
    """Return the number of UTF-8 bytes of the text that the model predicts: all tokens but the first of each window."""
    return sum(len(tokenizer.decode(window[1:]).encode()) for window in windows)
