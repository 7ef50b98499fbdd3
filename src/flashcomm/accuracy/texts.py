"""Texts on disk, read as windows of tokens that are spread evenly over the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcomm.errors import InputError


def read_windows(path: Path, tokenizer: Any, length: int, count: int) -> Tensor:
    """Read windows of a text at equal distances.

    Args:
        path: A UTF-8 text.
        tokenizer: The model's tokenizer.
        length: Tokens per window.
        count: Number of windows.

    Returns:
        Token ids, int64 (count, length), on the CPU.

    Raises:
        InputError: The file cannot be read, or has fewer than count * length tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as why:
        raise InputError(f"{path} cannot be read as UTF-8 text: {why}") from why
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    have = ids.numel() // length
    if have < count:
        raise InputError(
            f"{path} has {ids.numel()} tokens, but {count} windows of {length} need {count * length}: "
            f"give a longer text, or fewer --windows or a shorter --context"
        )
    starts = [(ids.numel() - length) * i // max(count - 1, 1) for i in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def bytes_in(windows: Tensor, tokenizer: Any) -> int:
    """Return the number of UTF-8 bytes of the windows' text."""
    return sum(len(tokenizer.decode(window).encode()) for window in windows)
