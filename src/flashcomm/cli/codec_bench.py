"""`flashcomm bench codec`: how fast this machine encodes and decodes, beside a plain copy of the same bytes.

Per format: `encode` of a message, in GB/s of message bytes, and `decode_sum` of the buffers of 4 ranks, in GB/s of wire
bytes; each also as a share of `Tensor.copy_` of the message, measured in the same turn. Every case is compared with
the plain torch codec first. The operations take turns; the median of the turns counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from flashcomm.errors import FlashcommError
from flashcomm.wire import codec_for, torch_codec
from flashcomm.wire.format import Layout, WireFormat

RANKS = 4


def codec(
    formats: Sequence[str], sizes: Sequence[int], row: int, dtype: torch.dtype, threads: int, turns: int
) -> Iterator[dict[str, Any]]:
    """Rows of size (bytes), format, threads, copy, encode and decode_sum (GB/s), and their shares of the copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in sizes:
            for fmt in formats:
                yield _measure(fmt, max(1, size // dtype.itemsize // row), row, dtype, threads, turns)
    finally:
        torch.set_num_threads(before)


def _measure(fmt: str, n_rows: int, row: int, dtype: torch.dtype, threads: int, turns: int) -> dict[str, Any]:
    step, fast = WireFormat.parse(fmt).reduce, codec_for("cpu")
    layout, n = Layout(step, row, dtype.itemsize), n_rows * row
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    wires = torch.empty(RANKS, layout.nbytes(0, n), dtype=torch.uint8)
    for wire in wires:
        fast.encode(x, layout, 0, n, wire)
    copied, out = torch.empty_like(x), torch.empty_like(x)
    _verify(x, wires, layout, dtype)
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: copied.copy_(x), n * dtype.itemsize),
        "encode": (lambda: fast.encode(x, layout, 0, n, wires[0]), n * dtype.itemsize),
        "decode_sum": (lambda: fast.decode_sum(wires, layout, 0, n, out, dtype), wires.numel()),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):  # the first warms up
        for name, (run, n_bytes) in cases.items():
            run()  # brings its own data into the caches, whatever ran before
            begin = time.perf_counter()
            run()
            if turn:
                rates[name].append(n_bytes / (time.perf_counter() - begin) / 1e9)
    gb_s = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "size": n * dtype.itemsize,
        "type": str(dtype).removeprefix("torch."),
        "format": fmt,
        "threads": threads,
        **{name: float(f"{value:.4g}") for name, value in gb_s.items()},
        "encode_share": round(gb_s["encode"] / gb_s["copy"], 3),
        "decode_share": round(gb_s["decode_sum"] / gb_s["copy"], 3),
    }


def _verify(x: torch.Tensor, wires: torch.Tensor, layout: Layout, dtype: torch.dtype) -> None:
    """Raise FlashcommError unless the first rows' wire bytes and sum are those of the plain torch codec."""
    n = min(x.numel(), 64 * layout.row)
    want = torch.empty(layout.nbytes(0, n), dtype=torch.uint8)
    torch_codec.encode(x[:n], layout, 0, n, want)
    got = torch.empty_like(want)
    fast = codec_for("cpu")
    fast.encode(x[:n], layout, 0, n, got)
    sums = [torch.empty(n, dtype=dtype) for _ in range(2)]
    for module, out in zip((torch_codec, fast), sums, strict=True):
        module.decode_sum(torch.stack([want] * RANKS), layout, 0, n, out, dtype)
    whole = torch.empty_like(x)
    fast.decode_sum(wires, layout, 0, x.numel(), whole, dtype)
    if not (torch.equal(want, got) and torch.equal(*sums) and torch.equal(whole[:n], sums[0])):
        raise FlashcommError(f"{layout.step}: the compiled codec differs from the plain one: nothing was timed")
