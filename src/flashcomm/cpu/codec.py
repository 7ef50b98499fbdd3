"""The bits of `torch_codec`, compiled for the CPU at hand: same arguments, same bytes, on as many cores as pay.

`cpu_encode` and `cpu_decode` say what a kernel does to a group, in vectors (`cpu_vector`) that LLVM turns into machine
code (`cpu_jit`): one kernel per dtype, format and remainder of the row, made at first use in some 0.05 s.

Kernels release the GIL; more than `GRAIN` values are split over `torch.get_num_threads()` threads of our own, so that
any number of Python threads may call at once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from flashcomm.cpu.decode import adder, decoder
from flashcomm.cpu.encode import encoder
from flashcomm.cpu.jit import has_half
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, bounds

GRAIN = 1 << 17  # values a thread gets at least; below it a thread costs more than it brings


def encode(x: Tensor, layout: Layout, start: int, stop: int, out: Tensor) -> None:
    """As `torch_codec.encode`, for CPU tensors."""
    step = layout.step
    if step.uncompressed or not _supported(x.dtype):
        torch_codec.encode(x, layout, start, stop, out)
        return
    _hold(x, stop - start, "values")
    _hold(out, layout.nbytes(start, stop), "wire bytes")
    kernel = encoder(x.dtype, step, layout.row % step.group)
    values, wire = x.data_ptr(), out.data_ptr()
    for a, b in layout.gaps(start, stop):
        ctypes.memset(wire + a, 0, b - a)

    def part(a: int, b: int) -> None:
        kernel(
            values + (a - start) * x.element_size(), *_sections(wire, layout, start, stop, a), *_groups(layout, a, b)
        )

    _split(part, layout, start, stop)


def decode_sum(wires: Tensor, layout: Layout, start: int, stop: int, out: Tensor, dtype: torch.dtype) -> None:
    """As `torch_codec.decode_sum`, for CPU tensors."""
    if not (_supported(out.dtype) and _supported(dtype)):
        torch_codec.decode_sum(wires, layout, start, stop, out, dtype)
        return
    step, ranks, stride = layout.step, wires.shape[0], wires.stride(0)
    _hold(out, stop - start, "values")
    for wire_of_rank in (wires[0], wires[-1]):
        _hold(wire_of_rank, layout.nbytes(start, stop), "wire bytes")
    wire, result = wires.data_ptr(), out.data_ptr()
    kernel = adder(dtype, out.dtype) if step.uncompressed else decoder(out.dtype, step, layout.row % step.group)

    def part(a: int, b: int) -> None:
        target = result + (a - start) * out.itemsize
        if step.uncompressed:
            kernel(wire + (a - start) * dtype.itemsize, target, stride, ranks, b - a)
        else:
            kernel(target, *_sections(wire, layout, start, stop, a), stride, ranks, *_groups(layout, a, b))

    _split(part, layout, start, stop)


def _hold(x: Tensor, count: int, what: str) -> None:
    """Kernels get bare addresses: refuse a tensor that does not hold what they will touch."""
    if x.device.type != "cpu" or not x.is_contiguous() or x.numel() < count:
        raise ValueError(f"{count} contiguous {what} on the CPU are needed, got {tuple(x.shape)} on {x.device}")


def _supported(dtype: torch.dtype) -> bool:
    return dtype != torch.float16 or has_half()


def _split(part: Callable[[int, int], None], layout: Layout, start: int, stop: int) -> None:
    """Run part over [start, stop), cut on group boundaries, on as many threads as are worth it."""
    n_threads = min(torch.get_num_threads(), (stop - start) // GRAIN)
    if n_threads < 2:
        if stop > start:
            part(start, stop)
        return
    ends = bounds(start, stop, layout.row, layout.step.group, n_threads)
    futures = [_pool(os.getpid()).submit(part, a, b) for a, b in pairwise(ends[1:]) if a < b]
    part(ends[0], ends[1])
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """The threads of process `pid`: a forked child must not wait for its parent's."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="flashcomm-codec")


def _sections(wire: int, layout: Layout, start: int, stop: int, a: int) -> list[int]:
    """Addresses of the scale, the zero and the bytes in three planes of group `a`, in the buffer of [start, stop)."""
    at, group = layout.sections(start, stop), layout.groups_before(a) - layout.groups_before(start)
    planes = [
        wire + base + layout.plane_bytes_before(width, a) - layout.plane_bytes_before(width, start)
        for base, (width, _) in zip(at.planes, layout.step.planes, strict=True)
    ]
    return [wire + at.scale + 2 * group, wire + at.zero_point + group, *planes, *[0] * (3 - len(planes))]


def _groups(layout: Layout, a: int, b: int) -> tuple[int, int, int]:
    """Groups to the end of the first row, in other rows, and in [a, b) altogether; without tails it is all one row."""
    n_groups, per_row = layout.groups_before(b) - layout.groups_before(a), layout.groups_per_row
    if layout.row % layout.step.group == 0:
        return n_groups, n_groups, n_groups
    return per_row - layout.groups_before(a) % per_row, per_row, n_groups
