"""Plans and launches of the persistent kernel through host memory (`host_kernel`).

Results are those of `flashcomm.reference`: how a message is cut into tiles, waves and launches changes no bit, because
groups are quantized on their own and sums run in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from flashcomm.errors import InputError
from flashcomm.gpu import host_kernel as kernel
from flashcomm.gpu.codec import INTERPRETED
from flashcomm.gpu.host_kernel import ALL_GATHER, ONE_SHOT, REDUCE_SCATTER, TWO_SHOT
from flashcomm.gpu.launch import _at, messages
from flashcomm.gpu.tile import pieces, tile_bytes
from flashcomm.wire.format import StepFormat, WireFormat

POLLS_PER_SECOND = 2000  # of a program that waits in the interpreter, roughly
Launch = Callable[[int, int], None]  # from the address of a message to that of its result


class SharedRegion(Protocol):
    """Zeroed host memory per rank that every rank maps: of `transports.host_memory` or `transports.cpu_shared`."""

    rank: int
    world_size: int
    device: torch.device
    peers: Tensor  # int64 (world_size,) on the device; `sync.give_up` overwrites it
    status: Tensor  # int32 (5,) in host memory
    mappings: list[int]  # addresses of everybody's memory in this process


@dataclass(frozen=True)
class Tuning:
    """How a call is cut up.

    Attributes:
        tile: Values of a tile.
        n_workers: Programs that quantize and sum; the whole grid has as many more as there are ranks.
        lag: Waves between storing a tile and reading those of the peers, at least 1.
    """

    tile: int = 8192
    n_workers: int = 24
    lag: int = 3


SMALL, LARGE = Tuning(4096, 32, 2), Tuning(8192, 32, 4)
LARGE_NUMEL = 1 << 20  # values of a rank's message from which it is cut up for bandwidth


def shared_bytes(workspace: int) -> int:
    """Bytes of a rank's shared memory for `workspace` bytes of messages, half of them for every other call."""
    return kernel.OUTBOX + workspace


class HostCollectives:
    """The collectives over host memory. Calls must come in the same order on all ranks, on one stream at a time.

    Args:
        region: Memory that all ranks have joined.
        at: Byte of everybody's memory at which the part for these calls begins, a multiple of 4096.
        workspace: Bytes of messages that this part holds, the same on all ranks (`shared_bytes`).
        timeout_s: Seconds to wait for a peer.
        local: Address of GPU memory in which ranks note that they gave up, `sync.ABORT` bytes on.
        n_workers: Programs of a call, instead of those of its `Tuning`.
        delay: For tests: polls of a slow reader between its wait and its read.
    """

    def __init__(
        self,
        region: SharedRegion,
        at: int,
        workspace: int,
        timeout_s: float,
        local: int,
        n_workers: int | None = None,
        delay: int = 0,
    ) -> None:
        self.region, self.timeout_s, self.local, self.delay, self.n_workers = region, timeout_s, local, delay, n_workers
        self.half = workspace // 2 // 16 * 16
        device = region.device
        self._table = torch.tensor([mapping + at for mapping in region.mappings], dtype=torch.int64).to(device)
        self._own = torch.empty(self.half, dtype=torch.uint8, device=device)
        self._state = torch.zeros(kernel.STATE_BYTES, dtype=torch.uint8, device=device)
        self._compiled: dict[Any, Any] = {}

    def fits(self, kind: int, numel: int, row: int, fmt: WireFormat) -> bool:
        """Whether the kernel takes the message: rows of whole units only."""
        return row % fmt.unit == 0

    def tuning(self, kind: int, numel: int) -> Tuning:
        """How a message of `numel` values of a rank is cut up."""
        return LARGE if numel >= LARGE_NUMEL else SMALL

    def plan(self, kind: int, x: Tensor, row: int, fmt: WireFormat, how: Tuning | None = None) -> Launch:
        """What to call with the addresses of tensors like x: of the message and of the result.

        They may be the same in an all-reduce; both are contiguous and 16-byte aligned. Compiles what is new for x's
        dtype and the format.

        Args:
            kind: ONE_SHOT, TWO_SHOT, REDUCE_SCATTER or ALL_GATHER.
            x: A tensor like the message.
            row: Values of a row, a multiple of `fmt.unit`.
            fmt: The wire format.
            how: How to cut the message up; None chooses.

        Raises:
            InputError: While a graph is captured and there is something to compile.
        """
        if how is None:
            how = self.tuning(kind, x.numel())
            if not INTERPRETED:  # so that later no length compiles anything
                for other in (SMALL, LARGE):
                    next(self._launches(kind, x, row, fmt, other))
        launches = list(self._launches(kind, x, row, fmt, how))
        if len(launches) == 1:
            return launches[0]

        def run(source: int, target: int) -> None:
            for launch in launches:
                launch(source, target)

        return run

    def capacity(self, kind: int, fmt: WireFormat, itemsize: int, how: Tuning) -> int:
        """Units of a slice that fit one launch (all-reduce: of the message)."""
        world_size, (units, bytes1, bytes2) = self.region.world_size, _tile(fmt, itemsize, how.tile)
        need = {
            ONE_SHOT: bytes1,
            TWO_SHOT: world_size * bytes1 + bytes2,
            REDUCE_SCATTER: world_size * bytes1,
            ALL_GATHER: bytes2,
        }[kind]
        n_workers = 1 if INTERPRETED else how.n_workers
        tiles = min(self.half // need, (kernel.MAX_WAVES - 1) * n_workers)
        return tiles * units * (world_size if kind == TWO_SHOT else 1)

    def _launches(self, kind: int, x: Tensor, row: int, fmt: WireFormat, how: Tuning) -> Iterator[Launch]:
        world_size, itemsize, unit = self.region.world_size, x.element_size(), fmt.unit
        units, bytes1, _ = _tile(fmt, itemsize, how.tile)
        numel = x.numel() // world_size if kind == REDUCE_SCATTER else x.numel()
        for part in messages(numel, row, unit, self.capacity(kind, fmt, itemsize, how)):
            n_units = part.numel // unit
            slice_units, stride, total = n_units, numel // unit, 1 << 60
            if kind == TWO_SHOT:
                slice_units = stride = -(-n_units // (units * world_size)) * units
                total = n_units
            elif kind == ONE_SHOT:
                stride, total = 0, n_units
            n_tiles = -(-slice_units // units)
            second = world_size * n_tiles * bytes1 if kind == TWO_SHOT else 0
            most = 1 if INTERPRETED else self.n_workers or how.n_workers
            n_workers = min(most, n_tiles)
            limit = int(self.timeout_s * (POLLS_PER_SECOND if INTERPRETED else 1e9))
            numbers = (
                self._state.data_ptr(),
                self.local,
                self.region.rank,
                total,
                slice_units,
                stride,
                n_tiles,
                self.half,
                second,
                limit,
                how.lag,
                n_workers,
            )
            constants = _constants(kind, world_size, fmt, x.dtype, itemsize, how.tile)
            grid = 1 if INTERPRETED else world_size + n_workers
            yield self._launch(x, part.start * itemsize, numbers, constants, grid)

    def _launch(
        self, x: Tensor, where: int, numbers: tuple[int, ...], constants: tuple[tuple[str, Any], ...], grid: int
    ) -> Launch:
        """A launch for a message that begins `where` bytes into a tensor like x."""
        region, options = self.region, dict(constants) | {"DELAY": self.delay, "enable_fp_fusion": False}
        tensors = (self._table, region.peers, region.status, self._own)
        if INTERPRETED:

            def interpret(source: int, target: int) -> None:
                dtype = torch.int16 if options["BF16"] else x.dtype
                pointers = _at(source + where, x.dtype), _at(target + where, dtype)
                kernel.persistent[(grid,)](*pointers, *tensors, *numbers, **options)

            return interpret
        key = (constants, x.dtype, self.delay)
        if key not in self._compiled:
            if torch.cuda.is_current_stream_capturing():
                raise InputError(
                    "cannot compile a kernel during CUDA graph capture: make one call with this dtype and format "
                    "before capturing"
                )
            like = torch.empty(16, dtype=x.dtype, device=region.device)
            self._compiled[key] = kernel.persistent.warmup(like, like, *tensors, *numbers, **options, grid=(grid,))
        start, stream, device = (
            self._compiled[key][(grid, 1, 1)],
            torch._C._cuda_getCurrentRawStream,
            region.device.index,
        )
        names = [name for name in kernel.persistent.arg_names if name in options]
        static = (*(t.data_ptr() for t in tensors), *numbers, *(options[name] for name in names))

        def launch(source: int, target: int) -> None:
            start(source + where, target + where, *static, stream=stream(device))

        return launch


def _pieces(step: StepFormat) -> int:
    """P of a tile: the more, the fewer values cross threads, and the less of a line a thread reads at once."""
    if step.uncompressed:
        return 1
    return max(pieces(step), 8 if step.hadamard and step.bits >= 6 else 4)


def _both_pieces(fmt: WireFormat) -> tuple[int, int]:
    """P of both steps, the same where they have the same groups, so that both have one layout."""
    a, b = _pieces(fmt.reduce), _pieces(fmt.gather)
    return (max(a, b), max(a, b)) if fmt.reduce.group == fmt.gather.group else (a, b)


def _tile(fmt: WireFormat, itemsize: int, tile: int) -> tuple[int, int, int]:
    """Units of a tile, and its bytes in the reduce and in the gather step."""
    units = max(1, tile // fmt.unit)
    sizes = [tile_bytes(step, units * fmt.unit // step.group, itemsize) for step in (fmt.reduce, fmt.gather)]
    return units, -(-sizes[0] // 16) * 16, -(-sizes[1] // 16) * 16


@lru_cache(maxsize=256)
def _constants(
    kind: int, world_size: int, fmt: WireFormat, dtype: torch.dtype, itemsize: int, tile: int
) -> tuple[tuple[str, Any], ...]:
    units, *n_bytes = _tile(fmt, itemsize, tile)
    out: dict[str, Any] = {"KIND": kind, "WORLD": world_size, "NPEERS": triton.next_power_of_2(world_size - 1)}
    out |= {"UNIT": fmt.unit, "UNITS": units}
    out |= {"ROTATED": kind == TWO_SHOT and fmt.between_steps[0].in_hadamard_domain}
    both = zip((fmt.reduce, fmt.gather), _both_pieces(fmt), n_bytes, strict=True)
    for i, (step, p, size) in enumerate(both, 1):
        values = {"BITS": step.bits, "CLIP": step.clip_ratio(step.group) or 0.0, "HAD": step.hadamard}
        values |= {"GROUP": step.group, "P": p, "BYTES": size}
        out |= {f"{name}{i}": value for name, value in values.items()}
    out |= {"REAL": not INTERPRETED, "DELAY": 0, "BF16": INTERPRETED and dtype == torch.bfloat16}
    out["num_warps"] = max(1, min(8, units * fmt.unit // max(_both_pieces(fmt)) // 256))
    return tuple(out.items())
