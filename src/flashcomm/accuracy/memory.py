"""The memory that a measurement takes, told before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flashcomm.accuracy.head import PIECE_BYTES
from flashcomm.accuracy.simulate import row_parallel_layers
from flashcomm.errors import InputError


def needed_bytes(
    skeleton: Any, itemsize: int, world_size: int, batch_tokens: int, kept_tokens: int, *, backward: bool
) -> int:
    """Return about how many bytes a measurement takes at most.

    Args:
        skeleton: The model without weights; see `models.skeleton`.
        itemsize: Bytes of a weight.
        world_size: Ranks to simulate.
        batch_tokens: Tokens in a batch.
        kept_tokens: Tokens whose hidden states are kept.
        backward: Whether sensitivities are measured, which keeps messages and gradients of all layers.
    """
    config, layers = skeleton.config.get_text_config(), list(row_parallel_layers(skeleton).values())
    weights: int = sum(p.numel() for p in skeleton.parameters()) + sum(
        m.weight.numel() for m in layers
    )  # ranks' shards
    logits = 8 * max(PIECE_BYTES, 4 * 16 * config.vocab_size)
    width = 8 * config.hidden_size + 6 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    working = batch_tokens * width * 4
    if backward:
        messages = 4 * batch_tokens * sum(m.out_features for m in layers) * (world_size + 4)
        working = working * config.num_hidden_layers + messages
    return int(itemsize * (weights + kept_tokens * config.hidden_size) + logits + working)


def available_bytes(device: str) -> int | None:
    """Return the free memory of the first GPU or of this machine, or None if that is not known."""
    if device == "cuda":
        return torch.cuda.mem_get_info(0)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else None


def check_memory(name: str, needed: int, device: str) -> str:
    """Return a sentence with the memory that is needed. Raises InputError if there is not as much."""
    there, gib = available_bytes(device), needed / 2**30
    if there is not None and needed > there:
        raise InputError(
            f"measuring {name} takes about {gib:.1f} GiB, and {there / 2**30:.1f} GiB are free: "
            "use --dtype bf16, a shorter --context, fewer --windows or a larger machine"
        )
    return f"takes about {gib:.1f} GiB of memory"
