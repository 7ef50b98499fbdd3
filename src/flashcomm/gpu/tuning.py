"""How messages are cut up for `collective_kernel`: sizes of tiles and blocks, as fast as any found on two H200 (LOG.md)."""

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

    tile_numel: int = 4096
    tiles_per_program: int = 1
    stage_lag: int = 0  # waves between roles
    ll: bool = False  # the LL protocol instead of flags


LL = Tuning(2048, ll=True)
SMALL = Tuning()
LARGE = Tuning(4096, tiles_per_program=2, stage_lag=1056)
LARGE_IN_8_PIECES = Tuning(8192, tiles_per_program=2, stage_lag=528)

LL_SENT_BYTES = 5 << 18  # that a rank sends by the LL protocol in one launch, at most
LL_EPOCH_BYTES = 8 << 20  # of the LL inbox, for either epoch; less in small workspaces
LARGE_NUMEL = 3 << 20  # values from which messages are cut up for bandwidth rather than latency


@dataclass(frozen=True)
class Tiles:
    """Tiles of one format and tuning: what they hold and how each of the two steps codes them."""

    unit: int
    units: int  # of a tile
    reduce: Step
    gather: Step
    num_warps: int


def tunings(fmt: WireFormat) -> tuple[Tuning, Tuning, Tuning]:
    """For the smallest messages, for small and for large ones."""
    return LL, SMALL, LARGE_IN_8_PIECES if _pieces(fmt.reduce) == 8 else LARGE


@lru_cache(maxsize=256)
def tiles_of(fmt: WireFormat, itemsize: int, tuning: Tuning) -> Tiles:
    """The tiles of a format for messages of `itemsize` bytes a value."""
    unit = fmt.unit
    units = max(1, tuning.tile_numel // unit)
    n_pieces = _pieces(fmt.reduce), _pieces(fmt.gather)
    if fmt.reduce.group == fmt.gather.group:  # one layout, so that between the steps no value moves
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
    """Cut a message into launches of at most `capacity` units: (first unit, units), as equal as can be."""
    n_launches = -(-n_units // capacity)
    yield from ((a, b - a) for a, b in pairwise(n_units * i // n_launches for i in range(n_launches + 1)))


def _pieces(step: StepFormat) -> int:
    """PIECES of a tile: the more, the fewer values cross threads, and the less of a line a thread reads at once."""
    if step.uncompressed:
        return 1
    return max(pieces(step), 8 if step.hadamard and step.bits >= 6 else 4)


def _step(step: StepFormat, n_pieces: int, numel: int, itemsize: int, ll: bool) -> Step:
    n_groups = numel // step.group
    size = low_latency.tile_bytes(step, n_groups, itemsize, n_pieces) if ll else tile_bytes(step, n_groups, itemsize)
    lanes = step.group // n_pieces
    return step_of(step, n_pieces, n_groups, lanes, n_bytes=-(-size // 16) * 16)
