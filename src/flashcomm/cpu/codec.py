"""encode and decode_sum for CPU tensors, with compiled kernels on several threads. The same bits as `torch_codec`.

Kernels release the GIL. A message is split over up to `torch.get_num_threads()` threads, each with at least
`VALUES_PER_THREAD` values. The threads are our own, so any number of Python threads may call at once.
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

VALUES_PER_THREAD = 1 << 17  # the fewest: for less work a thread costs more time than it saves


def encode(x: Tensor, layout: Layout, start: int, stop: int, out: Tensor) -> None:
    """Do what `torch_codec.encode` does, for CPU tensors."""
    step = layout.step
    if step.uncompressed or not _supported(x.dtype):
        torch_codec.encode(x, layout, start, stop, out)
        return
    _check_holds(x, stop - start, "values")
    _check_holds(out, layout.nbytes(start, stop), "wire bytes")
    kernel = encoder(x.dtype, step, layout.row % step.group)
    values, wire = x.data_ptr(), out.data_ptr()
    for a, b in layout.gaps(start, stop):
        ctypes.memset(wire + a, 0, b - a)

    def encode_range(a: int, b: int) -> None:
        kernel(
            values + (a - start) * x.element_size(),
            *_addresses(wire, layout, start, stop, a),
            *_group_counts(layout, a, b),
        )

    _on_threads(encode_range, layout, start, stop)


def decode_sum(wires: Tensor, layout: Layout, start: int, stop: int, out: Tensor, dtype: torch.dtype) -> None:
    """Do what `torch_codec.decode_sum` does, for CPU tensors."""
    if not (_supported(out.dtype) and _supported(dtype)):
        torch_codec.decode_sum(wires, layout, start, stop, out, dtype)
        return
    step, ranks, stride = layout.step, wires.shape[0], wires.stride(0)
    _check_holds(out, stop - start, "values")
    for wire_of_rank in (wires[0], wires[-1]):
        _check_holds(wire_of_rank, layout.nbytes(start, stop), "wire bytes")
    wire, result = wires.data_ptr(), out.data_ptr()
    kernel = adder(dtype, out.dtype) if step.uncompressed else decoder(out.dtype, step, layout.row % step.group)

    def decode_range(a: int, b: int) -> None:
        target = result + (a - start) * out.itemsize
        if step.uncompressed:
            kernel(wire + (a - start) * dtype.itemsize, target, stride, ranks, b - a)
        else:
            kernel(target, *_addresses(wire, layout, start, stop, a), stride, ranks, *_group_counts(layout, a, b))

    _on_threads(decode_range, layout, start, stop)


def _check_holds(x: Tensor, count: int, what: str) -> None:
    """Raise ValueError unless x holds the memory that a kernel will access: kernels get bare addresses."""
    if x.device.type != "cpu" or not x.is_contiguous() or x.numel() < count:
        raise ValueError(f"{count} contiguous {what} on the CPU are needed, got {tuple(x.shape)} on {x.device}")


def _supported(dtype: torch.dtype) -> bool:
    return dtype != torch.float16 or has_half()


def _on_threads(run: Callable[[int, int], None], layout: Layout, start: int, stop: int) -> None:
    """Call run(a, b) for ranges that make up [start, stop), on several threads if the message is large enough.

    Ranges are cut on group boundaries.
    """
    n_threads = min(torch.get_num_threads(), (stop - start) // VALUES_PER_THREAD)
    if n_threads < 2:
        if stop > start:
            run(start, stop)
        return
    ends = bounds(start, stop, layout.row, layout.step.group, n_threads)
    futures = [_pool(os.getpid()).submit(run, a, b) for a, b in pairwise(ends[1:]) if a < b]
    run(ends[0], ends[1])
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """The threads of process `pid`. A forked child needs its own: its parent's do not run in it."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="flashcomm-codec")


def _addresses(wire: int, layout: Layout, start: int, stop: int, a: int) -> list[int]:
    """The addresses of the group that starts at value `a`, in the wire buffer of [start, stop).

    They are those of its scale, its zero point and its bytes in three planes: 0 for planes that the format lacks.
    """
    at, group = layout.sections(start, stop), layout.groups_before(a) - layout.groups_before(start)
    planes = [
        wire + base + layout.plane_bytes_before(width, a) - layout.plane_bytes_before(width, start)
        for base, (width, _) in zip(at.planes, layout.step.planes, strict=True)
    ]
    return [wire + at.scale + 2 * group, wire + at.zero_point + group, *planes, *[0] * (3 - len(planes))]


def _group_counts(layout: Layout, a: int, b: int) -> tuple[int, int, int]:
    """The numbers of groups to the end of the first row, in every other row, and in all of [a, b).

    If all groups are full, they count as one row.
    """
    n_groups, per_row = layout.groups_before(b) - layout.groups_before(a), layout.groups_per_row
    if layout.row % layout.step.group == 0:
        return n_groups, n_groups, n_groups
    return per_row - layout.groups_before(a) % per_row, per_row, n_groups
