"""`all_reduce_add_rms_norm` over peers' memory, in one launch: plans of launches of `fused_norm_kernel.fused_norm`.

It is the all-reduce of `fused.FusedCollectives`, in whose region and epochs it works, for rows of whole units, and with
flags whatever the size: words that carry the epoch (`fused_ll`) have their own area, in which nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashcomm.collectives import fused, fused_sync
from flashcomm.collectives import fused_norm_kernel as kernel
from flashcomm.collectives.fused import FusedCollectives, Tuning
from flashcomm.collectives.fused_kernel import TWO_SHOT
from flashcomm.collectives.norm_kernel import chunks
from flashcomm.errors import InputError
from flashcomm.wire.format import WireFormat
from flashcomm.wire.triton_codec import INTERPRETED

MOST_BYTES = 256  # of a row in the registers of one thread
Launch = Callable[[int, int, int, int, int, float], None]  # of the addresses x, residual, weight, normed, new residual


def tunings(fmt: WireFormat) -> tuple[Tuning, ...]:
    """How small and large messages are cut up: as in `fused`, those with flags."""
    return fused.tunings(fmt, tails=False)[1:]


def tuning(numel: int, fmt: WireFormat) -> Tuning:
    """How a message of `numel` values is cut up."""
    return tunings(fmt)[numel >= fused.LARGE_NUMEL]


class FusedNorm:
    """The all-reduce with its epilogue over the region of `collectives`, whose order of calls it is part of."""

    def __init__(self, collectives: FusedCollectives) -> None:
        self.collectives = collectives
        self._plans: dict[Any, Launch] = {}
        self._compiled: dict[Any, Any] = {}

    def fits(self, kind: int, x: Tensor, fmt: WireFormat) -> bool:
        """Whether messages like x can go this way: of rows of whole units that the registers of a program hold."""
        if x.numel() == 0 or x.shape[-1] % fmt.unit or self.collectives.region.mapped:
            return False
        return self._holds(kind, x, fmt, tuning(x.numel(), fmt))

    def _holds(self, kind: int, x: Tensor, fmt: WireFormat, how: Tuning) -> bool:
        """Whether a launch cut up so has place for a row like x's, in the region and in registers."""
        row = x.shape[-1]
        capacity = self.collectives.capacity(kind, fmt.unit, fmt, x.element_size(), how)
        units = fused._tile(fmt.unit, fmt, x.element_size(), how)[0]
        chunk, n_chunks, _ = chunks(row, units * fmt.unit)
        constants = fused._constants(
            kind, self.collectives.region.world, fmt.unit, units, False, fmt, x.dtype, x.element_size(), how
        )
        held = chunk * n_chunks * x.element_size() // (32 * dict(constants)["num_warps"])
        return held <= MOST_BYTES and capacity >= row // fmt.unit

    def plan(self, kind: int, x: Tensor, fmt: WireFormat, how: Tuning | None = None) -> Launch:
        """What to call with the addresses of tensors like x (weight: one row), all contiguous and 16-byte aligned, and
        eps. Compiles what is new for x's dtype, the length of its rows and the format; kept by shape.

        Raises InputError while a graph is captured, if there is something to compile.
        """
        key = kind, x.shape, x.dtype, fmt, how
        if key in self._plans:
            return self._plans[key]
        if how is None:
            how = tuning(x.numel(), fmt)
            if not INTERPRETED:  # so that later no number of rows compiles anything
                for other in tunings(fmt):
                    if self._holds(kind, x, fmt, other):
                        next(self._launches(kind, x, fmt, other))
        launches = list(self._launches(kind, x, fmt, how))

        def run(x: int, residual: int, weight: int, normed: int, summed: int, eps: float) -> None:
            for launch in launches:
                launch(x, residual, weight, normed, summed, eps)

        if len(self._plans) >= 4096:
            self._plans.clear()
        self._plans[key] = launches[0] if len(launches) == 1 else run
        return self._plans[key]

    def _launches(self, kind: int, x: Tensor, fmt: WireFormat, how: Tuning) -> Iterator[Launch]:
        """Launches for as many rows at a time as fit; their data lies where that of flags does."""
        of, row, itemsize, unit = self.collectives, x.shape[-1], x.element_size(), fmt.unit
        world, units, bytes1, _ = of.region.world, *fused._tile(unit, fmt, itemsize, how)
        per_row, n_rows = row // unit, x.numel() // row
        chunk, n_chunks, rows = chunks(row, units * unit)
        most = of.capacity(kind, unit, fmt, itemsize, how) // per_row
        n_parts = -(-n_rows // most)
        ends = [n_rows * i // n_parts for i in range(n_parts + 1)]
        for first, end in pairwise(ends):
            n_units, over = (end - first) * per_row, world if kind == TWO_SHOT else 1
            n_tiles = -(-n_units // (units * over))
            slice_units = n_tiles * units
            second = world * n_tiles * bytes1 if kind == TWO_SHOT else 0
            limit = int(of.timeout_s * (fused.POLLS_PER_SECOND[0] if INTERPRETED else 1e9))
            place = (of.region.own, of.local, of.region.rank, end - first, n_units, slice_units, slice_units, n_tiles)
            constants = dict(fused._constants(kind, world, unit, units, False, fmt, x.dtype, itemsize, how))
            del constants["TAILS"], constants["LL"]
            constants |= {"ROW": row, "CHUNK": chunk, "CHUNKS": n_chunks, "ROWS": rows, "DELAY": of.delay}
            constants |= {"MAPPED": of.region.mapped and not INTERPRETED, "enable_fp_fusion": False}
            steps = -(-n_tiles // how.run) + (2 if kind == TWO_SHOT else 1) * how.lag
            grid = steps * (2 * world + 1 if kind == TWO_SHOT else 2)
            area = fused_sync.DATA + 2 * of.ll_half
            yield self._launch(x, first * row, (*place, area, of.half, second, limit, how.lag), constants, grid)

    def _launch(self, x: Tensor, start: int, numbers: tuple[int, ...], constants: dict[str, Any], grid: int) -> Launch:
        """A launch on `grid` programs for rows that begin `start` values into tensors like x."""
        region, where = self.collectives.region, start * x.element_size()
        if INTERPRETED:

            def interpret(x_at: int, residual: int, weight: int, normed: int, summed: int, eps: float) -> None:
                dtype = torch.int16 if constants["BF16"] else x.dtype
                read = [fused._at(at, x.dtype) for at in (x_at + where, residual + where, weight)]
                written = [fused._at(at + where, dtype) for at in (normed, summed)]
                kernel.fused_norm[(grid,)](*read, *written, region.peers, region.status, *numbers, eps, **constants)

            return interpret
        key = (tuple(constants.items()), x.dtype)
        if key not in self._compiled:
            if torch.cuda.is_current_stream_capturing():
                raise InputError(
                    "a graph is being captured and the kernel for this dtype, row and format is not there yet: make "
                    "one such call before capturing"
                )
            like = torch.empty(16, dtype=x.dtype, device=region.device)
            compiled = kernel.fused_norm.warmup(
                *[like] * 5, region.peers, region.status, *numbers, 1e-5, **constants, grid=(grid,)
            )
            compiled[(grid, 1, 1)]  # loads it
            self._compiled[key] = compiled
        start_kernel, device = self._compiled[key][(grid, 1, 1)], region.device.index
        stream = torch._C._cuda_getCurrentRawStream
        names = [name for name in kernel.fused_norm.arg_names if name in constants]
        before, behind = (region.peers.data_ptr(), region.status.data_ptr(), *numbers), [constants[n] for n in names]

        def launch(x_at: int, residual: int, weight: int, normed: int, summed: int, eps: float) -> None:
            tensors = (x_at + where, residual + where, weight, normed + where, summed + where)
            start_kernel(*tensors, *before, eps, *behind, stream=stream(device))

        return launch
