"""How messages are cut up for `collective_kernel`: the sizes that were fastest on two H200 (LOG.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from flashcomm.gpu import low_latency
from flashcomm.gpu.tile import Step, pieces, step_of, tile_bytes, warps
from flashcomm.wire.format import StepFormat, WireFormat


@dataclass(frozen=True)
class Tuning:
    """How a launch is cut up."""

    tile_numel: int = 4096  # values of a tile
    stage_lag: int = 0  # waves from one role to the next
    ll: bool = False  # whether to use the LL protocol instead of flags


LL = Tuning(2048, ll=True)
FLAGS = Tuning(stage_lag=1056)  # a lag of the programs that a GPU holds at once, so that few of them wait
FLAGS_IN_8_PIECES = Tuning(8192, stage_lag=528)

LL_SENT_BYTES = 5 << 18  # the most that a rank sends by the LL protocol in one launch
LL_EPOCH_BYTES = 8 << 20  # size of each half of the LL inbox; less in small workspaces
LARGE_NUMEL = 3 << 20  # messages of so many values have larger tiles, if their format is in 8 pieces


@dataclass(frozen=True)
class Tiles:
    """The tiles of one format and tuning: their size, and the constants of either step."""

    unit: int  # values of a unit
    units: int  # units of a tile
    reduce: Step
    gather: Step
    num_warps: int


def tunings(fmt: WireFormat) -> tuple[Tuning, Tuning, Tuning]:
    """Return the tunings for the smallest messages, for small and for large ones."""
    return LL, FLAGS, FLAGS_IN_8_PIECES if _pieces(fmt.reduce) == 8 else FLAGS


@lru_cache(maxsize=256)
def tiles_of(fmt: WireFormat, itemsize: int, tuning: Tuning) -> Tiles:
    """Return the tiles of a format, for messages with `itemsize` bytes per value."""
    unit = fmt.unit
    units = max(1, tuning.tile_numel // unit)
    n_pieces = _pieces(fmt.reduce), _pieces(fmt.gather)
    if fmt.reduce.group == fmt.gather.group:  # one layout, so that no value changes threads between the steps
        n_pieces = (max(n_pieces), max(n_pieces))
    steps = [
        _step(s, p, units * unit, itemsize, tuning.ll) for s, p in zip((fmt.reduce, fmt.gather), n_pieces, strict=True)
    ]
    sizes = [step.GROUPS * step.LANES for step in steps]
    num_warps = warps(sizes[0] // 16, 16)
    if tuning.ll:  # see low_latency.fetch
        assert min(sizes) >= 256, f"tiles of {tuning.tile_numel} values are too small for {fmt} by the LL protocol"
        num_warps = min(warps(size // 16, 16) for size in sizes)
    return Tiles(unit, units, steps[0], steps[1], num_warps)


def cut(n_units: int, capacity: int) -> Iterator[tuple[int, int]]:
    """Cut a message into nearly equal launches of at most `capacity` units. Yield (first unit, units) of each."""
    n_launches = -(-n_units // capacity)
    yield from ((a, b - a) for a, b in pairwise(n_units * i // n_launches for i in range(n_launches + 1)))


def _pieces(step: StepFormat) -> int:
    """PIECES of a tile. With more of them fewer values cross threads, but a thread reads less of a line at once."""
    if step.uncompressed:
        return 1
    return max(pieces(step), 8 if step.hadamard and step.bits >= 6 else 4)


def _step(step: StepFormat, n_pieces: int, numel: int, itemsize: int, ll: bool) -> Step:
    n_groups = numel // step.group
    size = low_latency.tile_bytes(step, n_groups, itemsize, n_pieces) if ll else tile_bytes(step, n_groups, itemsize)
    lanes = step.group // n_pieces
    return step_of(step, n_pieces, n_groups, lanes, n_bytes=-(-size // 16) * 16)
