"""Residual addition and RMSNorm in one kernel: the bits of `reference.add_rms_norm`.

A program has whole rows and keeps them in registers: it reads and writes every value once. Sums of pairs come out of
reductions over two values, which are one addition in any layout and on any backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcomm.gpu.compat import INTERPRETED, launcher
from flashcomm.gpu.tile import narrow, widen

TILE_NUMEL = 4096  # values of a program: more of them are more chunks of a row
MOST_CHUNKS = 8
MOST_HIDDEN = TILE_NUMEL * MOST_CHUNKS


class Rows(NamedTuple):
    """Constants of a kernel: ROWS rows of ROW values a program, each as N_CHUNKS chunks of CHUNK."""

    ROW: int
    CHUNK: int
    N_CHUNKS: int
    ROWS: int
    BF16: bool  # see `tile.narrow`


@triton.jit
def _value_of(stored, BF16: tl.constexpr):
    """What `narrow` gave, as float32."""
    if BF16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return widen(stored)


@triton.jit
def _pair_sum(q, N: tl.constexpr, ROWS: tl.constexpr):
    """`reference.pair_sum` of ROWS runs of N values, N a power of two: float32 (ROWS,) of q, any shape, in order."""
    q = tl.reshape(q, (ROWS * N,))
    for i in tl.static_range(16):
        if (1 << i) < N:
            q = tl.sum(tl.reshape(q, (ROWS * N >> (i + 1), 2)), 1)
    return q


@triton.jit
def _push(sums, more, C: tl.constexpr):
    """Sums of neighboring chunks, newest first, none of two of equal size, and that of chunk C."""
    sums = (more,) + sums
    for level in tl.static_range(4):
        if (C + 1) % (2 << level) == 0:
            sums = (sums[1] + sums[0],) + sums[2:]
    return sums


@triton.jit
def _scale_of(sums, eps, ROW: tl.constexpr, ROWS: tl.constexpr):
    """What to multiply rows with, float32 (ROWS,), of what `_push` made of their chunks' squares."""
    total = sums[0]
    for i in tl.static_range(1, 4):
        if i < len(sums):
            total = sums[i] + total
    mean = tl.div_rn(total, tl.full((ROWS,), ROW, tl.float32))
    return tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def _chunk(rows, c, n_rows, how: tl.constexpr):
    """Columns of a chunk, its values' offsets in the message, and which of them exist."""
    column = c * how.CHUNK + tl.arange(0, how.CHUNK)
    keep = (rows < n_rows)[:, None] & (column < how.ROW)[None, :]
    return column, rows.to(tl.int64)[:, None] * how.ROW + column[None, :], keep


@triton.jit
def add_rms_norm_kernel(total, residual, weight, out, summed, n_rows, eps, how: tl.constexpr):
    """summed = total + residual, and out = its RMSNorm, of rows that lie one after the other."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    rows = tl.program_id(0) * how.ROWS + tl.arange(0, how.ROWS)
    kept, sums = (), ()
    for c in tl.static_range(how.N_CHUNKS):
        column, at, keep = _chunk(rows, c, n_rows, how)
        y = widen(tl.load(total + at, mask=keep, other=0.0)) + widen(tl.load(residual + at, mask=keep, other=0.0))
        stored = narrow(y, DTYPE, how.BF16)
        tl.store(summed + at, stored, mask=keep)
        y = _value_of(stored, how.BF16)
        kept, sums = kept + (stored,), _push(sums, _pair_sum(y * y, how.CHUNK, how.ROWS), c)
    scale = _scale_of(sums, eps, how.ROW, how.ROWS)
    for c in tl.static_range(how.N_CHUNKS):
        column, at, keep = _chunk(rows, c, n_rows, how)
        w = widen(tl.load(weight + column, mask=column < how.ROW, other=0.0)[None, :])
        y = narrow(_value_of(kept[c], how.BF16) * scale[:, None], DTYPE, how.BF16)
        tl.store(out + at, narrow(_value_of(y, how.BF16) * w, DTYPE, how.BF16), mask=keep)


def add_rms_norm(total: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm` in one launch. No number of rows compiles anything new.

    Args:
        total, residual: (..., hidden), bf16, fp16 or fp32, contiguous, hidden at most MOST_HIDDEN.
        weight: (hidden,), of the same dtype.
        eps: added to the mean of squares.

    Returns:
        The normalized rows, and the new residual.
    """
    hidden = total.shape[-1]
    if hidden > MOST_HIDDEN or not all(t.is_contiguous() for t in (total, residual, weight)):
        raise ValueError(f"contiguous rows of at most {MOST_HIDDEN} values are needed, got {tuple(total.shape)}")
    out, summed = torch.empty_like(total), torch.empty_like(total)
    chunk = min(TILE_NUMEL, triton.next_power_of_2(hidden))
    n_chunks, rows = -(-hidden // chunk), max(1, TILE_NUMEL // chunk // 2)
    n_rows, by_hand = total.numel() // hidden, INTERPRETED and total.dtype == torch.bfloat16
    tensors = (total, residual, weight, out, summed)
    addresses = [t.data_ptr() for t in tensors]
    start = launcher(
        add_rms_norm_kernel,
        grid=triton.cdiv(n_rows, rows),
        pointers=[t.dtype for t in tensors[:3]] + [torch.int16 if by_hand else t.dtype for t in tensors[3:]],
        numbers=(n_rows, float(eps)),
        bundles=(Rows(hidden, chunk, n_chunks, rows, by_hand),),
        num_warps=max(1, min(8, chunk * rows * min(2, n_chunks) // 512)),
        device=total.get_device(),
        aligned=not any(address & 15 for address in addresses),
    )
    start(*addresses)
    return out, summed
