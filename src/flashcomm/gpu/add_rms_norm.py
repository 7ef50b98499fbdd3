"""Residual addition and RMSNorm in one kernel: the bits of `reference.add_rms_norm`.

A program holds whole rows in registers, so that every value is read and written once. Each addition of two neighbors is
a reduction over two values: it rounds once, in any layout and on any backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcomm.gpu.compat import INTERPRETED, launcher
from flashcomm.gpu.tile import narrow, widen

TILE_NUMEL = 4096  # values of a chunk; a longer row is several chunks
MOST_CHUNKS = 8
MOST_HIDDEN = TILE_NUMEL * MOST_CHUNKS


class Rows(NamedTuple):
    """Constants of a kernel: a program has ROWS rows of ROW values. Each is N_CHUNKS chunks of CHUNK columns."""

    ROW: int
    CHUNK: int
    N_CHUNKS: int
    ROWS: int
    BF16: bool  # see `tile.narrow`


@triton.jit
def _value_of(stored, BF16: tl.constexpr):
    """Return the float32 values that `narrow` has rounded."""
    if BF16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return widen(stored)


@triton.jit
def _pair_sum(q, N: tl.constexpr, ROWS: tl.constexpr):
    """Return `reference.pair_sum` of each row, float32 (ROWS,). q: float32, ROWS rows of N values, N a power of two."""
    q = tl.reshape(q, (ROWS * N,))
    for i in tl.static_range(16):
        if (1 << i) < N:
            q = tl.sum(tl.reshape(q, (ROWS * N >> (i + 1), 2)), 1)
    return q


@triton.jit
def _push(sums, more, C: tl.constexpr):
    """Return the tuple `sums` with the sum of chunk C added.

    It holds sums of neighboring chunks, the newest first. Sums of equally many chunks are added at once, as in
    `reference.pair_sum`.
    """
    sums = (more,) + sums
    for level in tl.static_range(4):
        if (C + 1) % (2 << level) == 0:
            sums = (sums[1] + sums[0],) + sums[2:]
    return sums


@triton.jit
def _scale_of(sums, eps, ROW: tl.constexpr, ROWS: tl.constexpr):
    """Return the factors of the rows, 1 / sqrt(mean + eps), float32 (ROWS,). sums: of squares, from `_push`."""
    total = sums[0]
    for i in tl.static_range(1, 4):
        if i < len(sums):
            total = sums[i] + total
    mean = tl.div_rn(total, tl.full((ROWS,), ROW, tl.float32))
    return tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def _chunk(rows, c, n_rows, how: tl.constexpr):
    """Return the columns of chunk c, the offsets of its values in the message, and a mask of those that exist."""
    column = c * how.CHUNK + tl.arange(0, how.CHUNK)
    keep = (rows < n_rows)[:, None] & (column < how.ROW)[None, :]
    return column, rows.to(tl.int64)[:, None] * how.ROW + column[None, :], keep


@triton.jit
def add_rms_norm_kernel(total, residual, weight, out, summed, n_rows, eps, how: tl.constexpr):
    """Store total + residual to `summed`, and its RMSNorm to `out`. Rows are contiguous."""
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
    """Return `reference.add_rms_norm`, computed in one launch. A new number of rows compiles nothing.

    Args:
        total: (..., hidden), bf16, fp16 or fp32, contiguous, hidden at most MOST_HIDDEN.
        residual: (..., hidden), of total's dtype, contiguous.
        weight: (hidden,), of total's dtype, contiguous.
        eps: added to the mean of squares.

    Returns:
        The normalized rows and the new residual, both of total's shape and dtype.

    Raises:
        ValueError: a tensor is not contiguous, or hidden is too large.
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
