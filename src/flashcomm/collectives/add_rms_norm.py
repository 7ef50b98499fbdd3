"""Add + RMSNorm after a layer's all-reduce: add the residual and normalize, in one pass over the message."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from flashcomm import reference

BLOCK_NUMEL = 1 << 16  # values that a CPU processes at a time, so that they stay in its cache


def add_rms_norm(total: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (normed, new residual), two new tensors, with the bits of `reference.add_rms_norm`.

    Args:
        total: (..., hidden), the result of the all-reduce.
        residual: Like total.
        weight: (hidden,).
        eps: Added to the mean square.
    """
    total, residual, weight = (t.resolve_neg().contiguous() for t in (total, residual, weight))
    hidden = total.shape[-1]
    if total.numel() == 0:
        return torch.empty_like(total), torch.empty_like(total)
    kernel = _kernel() if total.is_cuda else None
    if kernel is not None and hidden <= kernel.MOST_HIDDEN:
        kernel_out: tuple[Tensor, Tensor] = kernel.add_rms_norm(total, residual, weight, eps)
        return kernel_out
    normed, summed = torch.empty_like(total), torch.empty_like(total)
    rows = [t.view(-1, hidden) for t in (total, residual, normed, summed)]
    step = max(1, BLOCK_NUMEL // hidden) if total.is_cpu else rows[0].shape[0]
    for at in range(0, rows[0].shape[0], step):
        t, r, n, s = (part[at : at + step] for part in rows)
        y, new = reference.add_rms_norm(t, r, weight, eps)
        n.copy_(y)
        s.copy_(new)
    return normed, summed


def _kernel() -> ModuleType | None:
    try:
        return importlib.import_module("flashcomm.gpu.add_rms_norm")
    except ImportError:  # no Triton
        return None
