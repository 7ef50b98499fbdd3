"""`reference.add_rms_norm` as a Triton kernel, and the parts of it that the fused kernel shares.

A program has whole rows and keeps them in registers: it reads and writes every value once. Sums of pairs come out of
reductions over two values, which are one addition in any layout and on any backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcomm.gpu.codec import INTERPRETED
from flashcomm.gpu.tile import SCALE_NAN, widen

TILE = 4096  # values of a program: more of them is more chunks of a row
MOST_CHUNKS = 8
MOST_HIDDEN = TILE * MOST_CHUNKS


@triton.jit
def rounded(y, out, BF16: tl.constexpr):
    """y (float32) rounded once to the dtype of pointer out, half to even; with BF16 to int16s that are bfloat16s."""
    if BF16:  # by hand: not every backend of Triton rounds
        bits = y.to(tl.int32, bitcast=True)
        bits = tl.where(y == y, bits + 0x7FFF + ((bits >> 16) & 1), SCALE_NAN << 16) >> 16
        return bits.to(tl.int16)
    else:
        return y.to(out.dtype.element_ty)


@triton.jit
def value_of(stored, BF16: tl.constexpr):
    """What `rounded` gave, as float32."""
    if BF16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return widen(stored)


@triton.jit
def pair_sum(q, N: tl.constexpr, ROWS: tl.constexpr):
    """`reference.pair_sum` of ROWS runs of N values, N a power of two: float32 (ROWS,) of q, any shape, in order."""
    q = tl.reshape(q, (ROWS * N,))
    for i in tl.static_range(16):
        if (1 << i) < N:
            q = tl.sum(tl.reshape(q, (ROWS * N >> (i + 1), 2)), 1)
    return q


@triton.jit
def push(sums, more, C: tl.constexpr):
    """Sums of neighboring chunks, newest first, none of two of equal size, and that of chunk C."""
    sums = (more,) + sums
    for level in tl.static_range(4):
        if (C + 1) % (2 << level) == 0:
            sums = (sums[1] + sums[0],) + sums[2:]
    return sums


@triton.jit
def scale_of(sums, eps, ROW: tl.constexpr, ROWS: tl.constexpr):
    """What to multiply rows with, float32 (ROWS,), of what `push` made of their chunks' squares."""
    total = sums[0]
    for i in tl.static_range(1, 4):
        if i < len(sums):
            total = sums[i] + total
    mean = tl.div_rn(total, tl.full((ROWS,), ROW, tl.float32))
    return tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def normed(stored, scale, weight, out, BF16: tl.constexpr):
    """Values times scale, rounded, times weight: float32, to be rounded again. scale and weight broadcast."""
    return value_of(rounded(value_of(stored, BF16) * scale, out, BF16), BF16) * widen(weight)


@triton.jit(do_not_specialize=["n_rows"])
def _add_rms_norm(total, residual, weight, out, summed, n_rows, eps, ROW: tl.constexpr, CHUNK: tl.constexpr,
                  N_CHUNKS: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr):  # fmt: skip
    """Rows of ROW values as N_CHUNKS chunks of CHUNK, ROWS of them a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept, sums = (), ()
    for c in tl.static_range(N_CHUNKS):
        inside = c * CHUNK + tl.arange(0, CHUNK)
        keep = (row < n_rows)[:, None] & (inside < ROW)[None, :]
        at = row.to(tl.int64)[:, None] * ROW + inside[None, :]
        y = widen(tl.load(total + at, mask=keep, other=0.0)) + widen(tl.load(residual + at, mask=keep, other=0.0))
        stored = rounded(y, out, BF16)
        tl.store(summed + at, stored, mask=keep)
        y = value_of(stored, BF16)
        kept, sums = kept + (stored,), push(sums, pair_sum(y * y, CHUNK, ROWS), c)
    scale = scale_of(sums, eps, ROW, ROWS)
    for c in tl.static_range(N_CHUNKS):
        inside = c * CHUNK + tl.arange(0, CHUNK)
        keep = (row < n_rows)[:, None] & (inside < ROW)[None, :]
        at = row.to(tl.int64)[:, None] * ROW + inside[None, :]
        w = tl.load(weight + inside, mask=inside < ROW, other=0.0)[None, :]
        tl.store(out + at, rounded(normed(kept[c], scale[:, None], w, out, BF16), out, BF16), mask=keep)


def chunks(hidden: int, tile: int) -> tuple[int, int, int]:
    """Values of a chunk (a power of two), chunks of a row, and rows of a tile of `tile` values."""
    chunk = min(tile, triton.next_power_of_2(hidden))
    return chunk, -(-hidden // chunk), max(1, tile // chunk)


def add_rms_norm(total: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm` in one launch; all contiguous, hidden at most MOST_HIDDEN. No length compiles."""
    hidden = total.shape[-1]
    if hidden > MOST_HIDDEN or not all(t.is_contiguous() for t in (total, residual, weight)):
        raise ValueError(f"contiguous rows of at most {MOST_HIDDEN} values are needed, got {tuple(total.shape)}")
    out, summed = torch.empty_like(total), torch.empty_like(total)
    chunk, n_chunks, rows = chunks(hidden, TILE)
    rows = max(1, rows // 2)
    n_rows, by_hand = total.numel() // hidden, INTERPRETED and total.dtype == torch.bfloat16
    to = [t.view(torch.int16) if by_hand else t for t in (out, summed)]
    _add_rms_norm[(triton.cdiv(n_rows, rows),)](
        total, residual, weight, *to, n_rows, eps, ROW=hidden, CHUNK=chunk, N_CHUNKS=n_chunks, ROWS=rows, BF16=by_hand,
        num_warps=max(1, min(8, chunk * rows * min(2, n_chunks) // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return out, summed
