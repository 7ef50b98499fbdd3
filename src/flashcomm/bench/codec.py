"""`flashcomm bench codec`: the speed of the codec, compared with a plain copy of the same bytes.

For each format it measures `encode` of a message, in GB/s of message bytes, and `decode_sum` of several ranks' buffers,
in GB/s of wire bytes. Both are also given as shares of the speed of `Tensor.copy_` of the message, measured in the same
turn. `encode_traffic_share` and `decode_traffic_share` count all bytes read and written, also for the copy. 1 means as
fast as a copy.

Every case is first compared with the plain torch codec on the CPU. The operations take turns, and the median of the
turns counts. On CPUs their data is in the caches. On GPUs N calls between two CUDA events rotate over up to 16 sets of
buffers, which together exceed three times the L2 cache if possible.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flashcomm.codecs import codec_for
from flashcomm.errors import FlashcommError, UnavailableError
from flashcomm.setup import measure
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, WireFormat

Operation = Callable[[int], object]  # argument: the number of the set of buffers


def codec(
    formats: Sequence[str],
    sizes: Sequence[int],
    row: int,
    dtype: torch.dtype,
    threads: int,
    turns: int,
    device: str = "cpu",
    ranks: int = 4,
) -> Iterator[dict[str, Any]]:
    """Measure the codec.

    Args:
        formats: Wire formats. Their reduce step is measured.
        sizes: Message sizes in bytes.
        row: Values per row.
        dtype: The dtype of the message.
        threads: Number of torch's threads, on CPUs.
        turns: Samples of each operation.
        device: "cpu" or "cuda".
        ranks: Number of buffers that `decode_sum` adds.

    Yields:
        A row for each size and format: copy, encode and decode_sum in GB/s, shares of the copy, times in us.

    Raises:
        UnavailableError: There is no such device.
        FlashcommError: The codec's results differ from those of the plain torch codec.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device='cuda' was requested, but torch finds no CUDA device: use device='cpu'")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in sizes:
            n_rows = max(1, size // dtype.itemsize // row)
            x = torch.randn(n_rows * row, generator=torch.Generator().manual_seed(0)).to(dtype)
            for fmt in formats:
                measured = _measure(fmt, x, row, turns, torch.device(device), ranks)
                yield measured | {"threads": threads if device == "cpu" else None}
    finally:
        torch.set_num_threads(before)


def _measure(fmt: str, x: Tensor, row: int, turns: int, device: torch.device, ranks: int) -> dict[str, Any]:
    """Measure one row for the message x, flat, on the CPU."""
    dtype, n = x.dtype, x.numel()
    step, fast = WireFormat.parse(fmt).reduce, codec_for(device.type)
    layout = Layout(step, row, dtype.itemsize)
    wire_bytes = layout.nbytes(0, n)
    n_sets = 1 if device.type == "cpu" else measure.sets_for(x.nbytes, device)
    inputs = [x.to(device, copy=True) for _ in range(n_sets)]
    wires = [torch.empty(ranks, wire_bytes, dtype=torch.uint8, device=device) for _ in range(n_sets)]
    for of_ranks in wires:
        for wire in of_ranks:
            fast.encode(inputs[0], layout, 0, n, wire)
    copied, out = ([torch.empty_like(inputs[0]) for _ in range(n_sets)] for _ in range(2))
    _verify(x, wires[0], layout)
    gathered = ranks * wire_bytes
    cases: dict[str, tuple[Operation, int, int]] = {  # operation, bytes it is rated by, bytes read and written
        "copy": (lambda i: copied[i].copy_(inputs[i]), x.nbytes, 2 * x.nbytes),
        "encode": (lambda i: fast.encode(inputs[i], layout, 0, n, wires[i][0]), x.nbytes, x.nbytes + wire_bytes),
        "decode_sum": (lambda i: fast.decode_sum(wires[i], layout, 0, n, out[i], dtype), gathered, gathered + x.nbytes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):  # the first warms up
        for name, (run, _, _) in cases.items():
            taken = _by_host_clock(run) if device.type == "cpu" else _by_events(run, x.nbytes, n_sets)
            if turn:
                seconds[name].append(taken)
    median_s = {name: statistics.median(taken) for name, taken in seconds.items()}
    gb_s = {name: rated / median_s[name] / 1e9 for name, (_, rated, _) in cases.items()}
    traffic = {name: gb_s[name] * moved / rated for name, (_, rated, moved) in cases.items()}
    return {
        "size": x.nbytes,
        "type": str(dtype).removeprefix("torch."),
        "format": fmt,
        "threads": None,
        **{name: float(f"{value:.4g}") for name, value in gb_s.items()},
        "encode_share": round(gb_s["encode"] / gb_s["copy"], 3),
        "decode_share": round(gb_s["decode_sum"] / gb_s["copy"], 3),
        "device": device.type,
        "ranks": ranks,
        "encode_us": round(median_s["encode"] * 1e6, 1),
        "decode_us": round(median_s["decode_sum"] * 1e6, 1),
        "encode_traffic_share": round(traffic["encode"] / traffic["copy"], 3),
        "decode_traffic_share": round(traffic["decode_sum"] / traffic["copy"], 3),
    }


def _by_host_clock(run: Operation) -> float:
    """Return the seconds of one call, by the host's clock."""
    run(0)  # brings its data into the caches
    begin = time.perf_counter()
    run(0)
    return time.perf_counter() - begin


def _by_events(run: Operation, n_bytes: int, n_sets: int) -> float:
    """Return the seconds per call of N calls queued on the GPU, which rotate over the sets."""
    n_calls = measure.calls_for(n_bytes, n_sets)

    def calls() -> None:
        for k in range(n_calls):
            run(k % n_sets)

    begin = time.perf_counter()
    calls()
    lead_s = 2 * (time.perf_counter() - begin)
    return measure.device_seconds(calls, lead_s) / n_calls


def _verify(x: Tensor, wires: Tensor, layout: Layout) -> None:
    """Compare the first rows' wire bytes, and sums of the first and last rows, with the plain torch codec on the CPU.

    Args:
        x: The message, flat, on the CPU.
        wires: Its wire bytes (ranks, nbytes), on the device.
        layout: The layout of the wire bytes.

    Raises:
        FlashcommError: They differ.
    """
    n, fast, plain = min(x.numel(), 64 * layout.row), codec_for(wires.device.type), torch_codec
    want = torch.empty(layout.nbytes(0, n), dtype=torch.uint8)
    plain.encode(x[:n], layout, 0, n, want)
    got = torch.empty_like(want, device=wires.device)
    fast.encode(x[:n].to(wires.device), layout, 0, n, got)
    whole = torch.empty_like(x, device=wires.device)
    fast.decode_sum(wires, layout, 0, x.numel(), whole, x.dtype)
    right = torch.equal(got.cpu(), want)
    for part, of_whole in ((x[:n], whole[:n]), (x[-n:], whole[-n:])):
        plain.encode(part, layout, 0, n, want)
        total = torch.empty_like(part)
        plain.decode_sum(torch.stack([want] * len(wires)), layout, 0, n, total, x.dtype)
        right = right and torch.equal(total, of_whole.cpu())
    if not right:
        where = wires.device.type
        raise FlashcommError(
            f"{layout.step}: the codec for {where} differs from the plain torch codec: nothing was timed"
        )
