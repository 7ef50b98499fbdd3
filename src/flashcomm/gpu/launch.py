"""Collectives of one launch each over peers' memory: plans of launches, kept per shape, and their launching.

Results are those of `flashcomm.reference`: how a message is cut into tiles, slices and launches changes no bit, because
groups are coded on their own and sums run in rank order. The kernel is `fused_kernel.fused`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from flashcomm.errors import CommunicationError, InputError
from flashcomm.gpu import all_reduce as kernel
from flashcomm.gpu import low_latency, sync
from flashcomm.gpu.all_reduce import ALL_GATHER, ONE_SHOT, REDUCE_SCATTER, TWO_SHOT
from flashcomm.gpu.codec import INTERPRETED
from flashcomm.gpu.tile import pieces, tile_bytes, warps
from flashcomm.wire.format import StepFormat, WireFormat

POLLS_PER_SECOND = (2000, 400)  # of a waiting program in the interpreter, roughly: of a flag, of a tile of `fused_ll`
PHASES = ("", "the quantized message", "the quantized sum", "the staged bytes", "the fetching of earlier bytes")
Launch = Callable[[int, int], None]  # from the address of a message to that of its result


class Region(Protocol):
    """Zeroed memory per rank that all ranks read and write: of `transports.symmetric` or `transports.shared`."""

    rank: int
    world_size: int
    n_bytes: int
    device: torch.device
    mapped: bool  # what peers write to is host memory
    peers: Tensor  # int64 (world,) on the device: where this rank writes for each rank, itself included
    own: int  # the address of what peers write for this rank; for itself it writes to its own entry of `peers`
    status: Tensor  # int32 (5,) in host memory: what `fused_sync.wait` reports

    def close(self) -> None: ...


def region_bytes(workspace: int) -> int:
    """Size of a region that holds `workspace` bytes of messages, half of them for every other call.

    The first part, of `LL_HALF` or less for either, is for what carries its epoch (`fused_ll`), and for nothing else.
    """
    return sync.DATA + workspace


@dataclass(frozen=True)
class Tuning:
    """How a launch is cut up: values of a tile, tiles of a block, steps between roles."""

    tile: int = 4096
    run: int = 1
    lag: int = 0
    ll: bool = False  # words that carry the epoch, see `fused_ll`; else a flag per block


LL = Tuning(2048, ll=True)
LL_SENT = 5 << 18  # bytes of such words which a rank sends at most in a launch that is cut up so by itself
LL_HALF = 8 << 20  # bytes of them, of an epoch, that there is room for; less, an eighth, in small workspaces
SMALL, LARGE, LARGE_IN_8 = Tuning(4096), Tuning(4096, 2, 1056), Tuning(8192, 2, 528)
LARGE_NUMEL = 3 << 20  # values from which messages are cut up for bandwidth rather than latency


def tunings(fmt: WireFormat, tails: bool) -> tuple[Tuning, Tuning, Tuning]:
    """For the smallest messages, for small and for large ones: the fastest found on two H200 (LOG.md).

    tails: rows end in short units.
    """
    if tails:
        return LL, SMALL, SMALL
    return LL, SMALL, LARGE_IN_8 if _pieces(fmt.reduce) == 8 else LARGE


@dataclass(frozen=True)
class Message:
    """A contiguous part of a tensor (or of each of its slices): where it begins, its values, its rows."""

    start: int
    numel: int
    row: int


def messages(numel: int, row: int, unit: int, capacity: int) -> Iterator[Message]:
    """Cut rows of `row` values into messages of at most `capacity` units. Only the last units of rows may be short."""
    per_row = -(-row // unit)
    if row % unit == 0 or capacity >= per_row:  # pieces of whole units, of whole rows if these have short ones
        most = capacity if row % unit == 0 else capacity // per_row
        row = unit if row % unit == 0 else row
        n_parts = -(-(numel // row) // most)
        ends = [numel // row * i // n_parts * row for i in range(n_parts + 1)]
        yield from (Message(a, b - a, row) for a, b in pairwise(ends))
    else:
        for first in range(0, numel, row):
            for start in range(first, first + row, capacity * unit):
                piece = min(capacity * unit, first + row - start)
                yield Message(start, piece, piece)


class KernelCollectives:
    """The collectives over one region. Calls must come in the same order on all ranks, on one stream at a time."""

    def __init__(self, region: Region, timeout_s: float, delay: int = 0) -> None:
        self.region, self.timeout_s, self.delay = region, timeout_s, delay
        data = region.n_bytes - sync.DATA
        self.ll_half = min(LL_HALF, data // 8) // 16 * 16
        self.half = (data // 2 - self.ll_half) // 16 * 16
        self.local = int(region.peers[region.rank].item())
        self._status = (ctypes.c_int32 * 5).from_address(region.status.data_ptr())
        self._compiled: dict[Any, Any] = {}

    def fits(self, kind: int, numel: int, row: int, fmt: WireFormat, itemsize: int) -> bool:
        """Whether the message can be cut to the workspace: all but slices with very long rows of odd length can."""
        unit, how = fmt.unit, self.tuning(kind, numel, row, fmt, itemsize)
        capacity = self.capacity(kind, unit, fmt, itemsize, how)
        return capacity > 0 and (kind in (ONE_SHOT, TWO_SHOT) or row % unit == 0 or capacity >= -(-row // unit))

    def tuning(self, kind: int, numel: int, row: int, fmt: WireFormat, itemsize: int) -> Tuning:
        """How a message of `numel` values in rows of `row` is cut up."""
        world_size, unit = self.region.world_size, fmt.unit
        least, small, large = tunings(fmt, row % unit != 0)
        n_units = numel // row * -(-row // unit)
        if kind == REDUCE_SCATTER:
            n_units = -(-n_units // world_size)
        units, bytes1, bytes2 = _tile(unit, fmt, itemsize, least)
        n_tiles = -(-n_units // (units * world_size if kind == TWO_SHOT else units))
        sent = {ONE_SHOT: bytes1, TWO_SHOT: max(bytes1, bytes2), REDUCE_SCATTER: bytes1, ALL_GATHER: bytes2}[kind]
        if n_tiles * sent * (world_size - 1) <= LL_SENT and n_units <= self.capacity(kind, unit, fmt, itemsize, least):
            return least
        return large if numel >= LARGE_NUMEL else small

    def plan(self, kind: Any, x: Tensor, row: int, fmt: WireFormat, how: Tuning | None = None) -> Launch:
        """What to call with the addresses of tensors like x: of the message and of the result, which may be the same
        in an all-reduce; both contiguous and 16-byte aligned. Compiles what is new for x's dtype and the format.

        row: values of a row. Raises InputError while a graph is captured, if there is something to compile.
        """
        kind = {
            "one_shot": ONE_SHOT,
            "two_shot": TWO_SHOT,
            "reduce_scatter": REDUCE_SCATTER,
            "all_gather": ALL_GATHER,
        }.get(kind, kind)
        if how is None:
            how = self.tuning(kind, x.numel(), row, fmt, x.element_size())
            if not INTERPRETED:  # so that later no length compiles anything
                for other in tunings(fmt, row % fmt.unit != 0):
                    if self.capacity(kind, fmt.unit, fmt, x.element_size(), other):
                        next(self._launches(kind, x, row, fmt, other))
        launches = list(self._launches(kind, x, row, fmt, how))
        if len(launches) == 1:
            return launches[0]

        def run(source: int, target: int) -> None:
            for launch in launches:
                launch(source, target)

        return run

    def check(self) -> None:
        """Raise CommunicationError if a wait of this rank timed out; of launches that are done, without waiting."""
        if self._status[0]:
            _, phase, peer, expected, seen = self._status
            raise CommunicationError(
                f"rank {self.region.rank} of {self.region.world_size}: waited {self.timeout_s:g} s (FLASHCOMM_TIMEOUT_S) "
                f"for {PHASES[phase]} of rank {peer}: expected call {expected}, saw {seen}. That rank died, is stuck "
                "or did not make the call; results since then are NaN. Make a new Communicator on the ranks left"
            )

    def capacity(self, kind: int, unit: int, fmt: WireFormat, itemsize: int, tuning: Tuning) -> int:
        """Units of a slice that fit one launch (all-reduce: of the message)."""
        world_size, (units, bytes1, bytes2) = self.region.world_size, _tile(unit, fmt, itemsize, tuning)
        if kind == ONE_SHOT:
            need = world_size * bytes1
        elif kind == TWO_SHOT:
            need = world_size * (bytes1 + bytes2)
        else:
            need = world_size * (bytes1 if kind == REDUCE_SCATTER else bytes2)
        tiles = min((self.ll_half if tuning.ll else self.half) // need, tuning.run * sync.MAX_BLOCKS)
        return tiles * units * (world_size if kind == TWO_SHOT else 1)

    def _launches(self, kind: int, x: Tensor, row: int, fmt: WireFormat, tuning: Tuning) -> Iterator[Launch]:
        world_size, itemsize, unit = self.region.world_size, x.element_size(), fmt.unit
        units, bytes1, _ = _tile(unit, fmt, itemsize, tuning)
        capacity = self.capacity(kind, unit, fmt, itemsize, tuning)
        numel = x.numel() // world_size if kind == REDUCE_SCATTER else x.numel()
        for part in messages(numel, row, unit, capacity):
            per_row = -(-part.row // unit)
            n_units = part.numel // part.row * per_row
            if kind == TWO_SHOT:
                n_tiles = -(-n_units // (units * world_size))
                slice_units, stride, total = n_tiles * units, n_tiles * units, n_units
            elif kind == ONE_SHOT:
                n_tiles, slice_units, stride, total = -(-n_units // units), n_units, 0, n_units
            else:
                n_tiles, slice_units, total = -(-n_units // units), n_units, 1 << 60
                stride = numel // part.row * per_row
            roles = {ONE_SHOT: 2, TWO_SHOT: 2 * world_size + 1}.get(kind, world_size + 1)
            steps = -(-n_tiles // tuning.run) + (2 if kind == TWO_SHOT else 1) * tuning.lag
            second = world_size * n_tiles * bytes1 if kind == TWO_SHOT else 0
            limit = int(self.timeout_s * (POLLS_PER_SECOND[tuning.ll] if INTERPRETED else 1e9))
            half = self.ll_half if tuning.ll else self.half
            numbers = (
                self.region.own,
                self.local,
                self.region.rank,
                part.row,
                per_row,
                total,
                slice_units,
                stride,
                n_tiles,
                sync.DATA + (0 if tuning.ll else 2 * self.ll_half),
                half,
                second,
            )
            tails = part.row % unit != 0 or part.start * itemsize % 16 != 0  # then nothing is loaded 16 bytes at a time
            constants = _constants(kind, world_size, unit, units, tails, fmt, x.dtype, itemsize, tuning)
            constants += (("MAPPED", self.region.mapped and not INTERPRETED),)
            yield self._launch(x, part.start * itemsize, (*numbers, limit, tuning.lag), constants, steps * roles)

    def _launch(
        self, x: Tensor, where: int, numbers: tuple[int, ...], constants: tuple[tuple[str, Any], ...], grid: int
    ) -> Launch:
        """A launch of the kernel on `grid` programs, for a message that begins `where` bytes into a tensor like x."""
        region, options = self.region, dict(constants) | {"DELAY": self.delay, "enable_fp_fusion": False}
        if INTERPRETED:

            def interpret(source: int, target: int) -> None:
                dtype = torch.int16 if options["BF16"] else x.dtype
                pointers = _at(source + where, x.dtype), _at(target + where, dtype)
                kernel.fused[(grid,)](*pointers, region.peers, region.status, *numbers, **options)

            return interpret
        key = (constants, x.dtype, self.delay)
        if key not in self._compiled:
            if torch.cuda.is_current_stream_capturing():
                raise InputError(
                    "a graph is being captured and the kernel for this dtype and format is not there yet: make one "
                    "such call, of about the same size, before capturing"
                )
            like = torch.empty(16, dtype=x.dtype, device=region.device)
            compiled = kernel.fused.warmup(like, like, region.peers, region.status, *numbers, **options, grid=(grid,))
            compiled[(grid, 1, 1)]  # loads it
            self._compiled[key] = compiled
        start, stream, device = (
            self._compiled[key][(grid, 1, 1)],
            torch._C._cuda_getCurrentRawStream,
            region.device.index,
        )
        names = [name for name in kernel.fused.arg_names if name in options]
        static = (region.peers.data_ptr(), region.status.data_ptr(), *numbers, *(options[name] for name in names))

        def launch(source: int, target: int) -> None:
            start(source + where, target + where, *static, stream=stream(device))

        return launch

    def close(self) -> None:
        """Wait for what this rank has launched."""
        self.region.close()


def _at(address: int, dtype: torch.dtype) -> Tensor:
    """A tensor at an address, for the interpreter, which takes no bare ones."""
    kind = {2: ctypes.c_int16, 4: ctypes.c_int32}[dtype.itemsize]
    return torch.frombuffer((kind * 1).from_address(address), dtype=dtype)


def _pieces(step: StepFormat) -> int:
    """P of `triton_tile`: the more, the fewer values cross threads, and the less of a line a thread reads at once."""
    if step.uncompressed:
        return 1
    return max(pieces(step), 8 if step.hadamard and step.bits >= 6 else 4)


def _both_pieces(fmt: WireFormat) -> tuple[int, int]:
    """P of the steps: one where they have one group, so that both have one layout."""
    a, b = _pieces(fmt.reduce), _pieces(fmt.gather)
    return (max(a, b), max(a, b)) if fmt.reduce.group == fmt.gather.group else (a, b)


def _tile(unit: int, fmt: WireFormat, itemsize: int, tuning: Tuning) -> tuple[int, int, int]:
    """Units of a tile, and its bytes as the reduce and as the gather step code it."""
    units, n = max(1, tuning.tile // unit), []
    for step, p in zip((fmt.reduce, fmt.gather), _both_pieces(fmt), strict=True):
        n_groups = units * unit // step.group
        n += [
            low_latency.tile_bytes(step, n_groups, itemsize, p) if tuning.ll else tile_bytes(step, n_groups, itemsize)
        ]
    return units, -(-n[0] // 16) * 16, -(-n[1] // 16) * 16


@lru_cache(maxsize=256)
def _constants(kind: int, world_size: int, unit: int, units: int, tails: bool, fmt: WireFormat, dtype: torch.dtype,
            itemsize: int, tuning: Tuning) -> tuple[tuple[str, Any], ...]:  # fmt: skip
    out: dict[str, Any] = {"KIND": kind, "WORLD": world_size, "RUN": tuning.run, "TAILS": tails}
    out |= {"UNIT": unit, "UNITS": units, "ROTATED": kind == TWO_SHOT and fmt.between_steps[0].in_hadamard_domain}
    both = zip((fmt.reduce, fmt.gather), _both_pieces(fmt), _tile(unit, fmt, itemsize, tuning)[1:], strict=True)
    for i, (step, p, n_bytes) in enumerate(both):
        clip_ratio = step.clip_ratio(step.group) or 0.0
        values = {"BITS": step.bits, "SHRUNK": clip_ratio, "TURNED": step.hadamard, "GROUP": step.group}
        values |= {"P": p, "BYTES": n_bytes}
        out |= {f"{name}{i + 1}": value for name, value in values.items()}
    out |= {"REAL": not INTERPRETED, "DELAY": 0, "LL": tuning.ll, "BF16": INTERPRETED and dtype == torch.bfloat16}
    sizes = [units * unit // p for p in _both_pieces(fmt)]
    out["num_warps"] = warps(sizes[0] // 16, 16)
    if tuning.ll:  # see low_latency.fetch
        assert min(sizes) >= 256, f"tiles of {tuning.tile} values are too small for {fmt} with epochs inside"
        out["num_warps"] = min(warps(size // 16, 16) for size in sizes)
    return tuple(out.items())
