"""Collectives through host memory: how messages are cut into launches of `host_kernel.host_collective`.

Results are those of `flashcomm.reference`. How a message is cut into tiles, waves and launches changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from flashcomm.gpu import host_kernel as kernel
from flashcomm.gpu import host_sync, sync
from flashcomm.gpu.collective_kernel import ALL_GATHER, ALL_TO_ALL, ONE_SHOT, REDUCE_SCATTER, TWO_SHOT, Collective
from flashcomm.gpu.compat import INTERPRETED, Int64, launcher
from flashcomm.gpu.launch import (
    ALGORITHMS,
    POLLS_PER_SECOND,
    SHARDED,
    KernelCollectives,
    Launch,
    PeerMemory,
    at_offset,
)
from flashcomm.gpu.tile import pieces, step_of, tile_bytes
from flashcomm.gpu.tuning import LL, Tiles, Tuning, cut
from flashcomm.wire.format import StepFormat, WireFormat


class HostMemory(PeerMemory, Protocol):
    """Zeroed host memory of each rank, mapped by all ranks. The transports host_memory and cpu_shared make it."""

    mappings: list[int]  # the address in this process of each rank's memory


@dataclass(frozen=True)
class HostTuning(Tuning):
    """How a launch of `host_collective` is cut up. A worker has one tile of each wave, and stage_lag is at least 1."""

    n_workers: int = 32  # programs that quantize and sum; the grid also has a publisher and a relay for each peer
    n_pieces: int = 4  # PIECES of a tile, for plain formats of up to 5 bits


# Values of a rank's message: it is small below the former, large from the latter on.
SMALL_NUMEL, LARGE_NUMEL = 1 << 20, 4 << 20


def host_tuning(fmt: WireFormat, numel: int) -> HostTuning:
    """Return how to cut up messages of `numel` values per rank: the fastest way measured on two H200 (LOG.md).

    Those two H200 had peer access turned off. A worker should move some 4 KB a step. PCIe asks little memory traffic of
    an SM, so few workers are enough.
    """
    bits = max(fmt.reduce.bits, fmt.gather.bits)
    tile_numel = 2048 if bits == 16 else 4096 if bits == 8 or numel < SMALL_NUMEL else 8192
    if numel < LARGE_NUMEL or bits in (6, 7):
        return HostTuning(tile_numel, stage_lag=4)
    return HostTuning(tile_numel, stage_lag=6, n_workers=48, n_pieces=8)


def shared_bytes(workspace: int) -> int:
    """Return the bytes of a rank's shared memory for `workspace` bytes of messages, half of them for odd epochs."""
    return host_sync.OUTBOX + workspace


def most_workers(asked: int, n_multiprocessors: int, world_size: int) -> int:
    """Return the largest number of workers of a launch with which the whole grid is on the GPU at once.

    A multiprocessor holds at least one program. Besides its workers the grid has one program per rank. All ranks need
    the same number, because a wave must be the same tiles on all of them.

    Args:
        asked: the setting; 0 leaves the number to `host_tuning`.
        n_multiprocessors: those of the smallest GPU.
        world_size: the number of ranks.
    """
    return max(1, min(asked or host_sync.MAX_WORKERS, host_sync.MAX_WORKERS, n_multiprocessors - world_size))


class HostCollectives(KernelCollectives):
    """The collectives through host memory. Calls must come in the same order on all ranks, on one stream at a time.

    Args:
        region: memory that a transport has made and all ranks have mapped. Its first `n_bytes` are for the LL protocol,
            at least `region_bytes(4 MiB)`. Behind them it has `shared_bytes(workspace)` bytes more.
        workspace: bytes for messages; a message that needs more takes several launches.
        timeout_s: limit of every wait, in seconds.
        n_workers: the largest number of workers (see `most_workers`), the same on all ranks.
        delay: polls between a wait and the read, for tests of a slow reader.
    """

    region: HostMemory
    ll_sent_bytes = 56 << 10  # small, because over PCIe twice the bytes soon take longer than a flag

    def __init__(
        self,
        region: HostMemory,
        workspace: int,
        timeout_s: float,
        n_workers: int = host_sync.MAX_WORKERS,
        delay: int = 0,
    ) -> None:
        super().__init__(region, timeout_s, delay)
        self.epoch_bytes, device = workspace // 2 // 16 * 16, region.device
        self._most = n_workers
        self._table = torch.tensor([base + region.n_bytes for base in region.mappings], dtype=torch.int64).to(device)
        self._own = torch.empty(self.epoch_bytes, dtype=torch.uint8, device=device)
        self._state = torch.zeros(host_sync.STATE_BYTES, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that the state is zero on whatever stream the first call is

    def plan(self, algorithm: str, x: Tensor, row: int, fmt: WireFormat, tuning: Tuning | None = None) -> Launch:
        """Return how to run a collective for messages like x: see `KernelCollectives.plan`."""
        if tuning is None:
            tuning = self.tuning(algorithm, x.numel(), fmt, x.element_size())
            if not INTERPRETED and row % fmt.unit == 0:  # so that no other length compiles anything later
                for other in (LL, *(host_tuning(fmt, numel) for numel in (0, SMALL_NUMEL, LARGE_NUMEL))):
                    next(self._launches(ALGORITHMS.index(algorithm), x, fmt, other))
        return super().plan(algorithm, x, row, fmt, tuning)

    def tuning(self, algorithm: str, numel: int, fmt: WireFormat, itemsize: int) -> Tuning:
        """Return how to cut up a message of `numel` values: for the LL protocol or as `host_tuning` does."""
        tuning = super().tuning(algorithm, numel, fmt, itemsize)
        return tuning if tuning.ll else host_tuning(fmt, numel)

    def capacity(self, algorithm: str, fmt: WireFormat, itemsize: int, tuning: Tuning) -> int:
        """Return how many units fit one launch: of the message in an all-reduce, else of a shard."""
        if not isinstance(tuning, HostTuning):
            return super().capacity(algorithm, fmt, itemsize, tuning)
        world_size, tiles = self.region.world_size, host_tiles(fmt, itemsize, tuning)
        need = {
            ONE_SHOT: tiles.reduce.BYTES,
            TWO_SHOT: world_size * tiles.reduce.BYTES + tiles.gather.BYTES,
            REDUCE_SCATTER: world_size * tiles.reduce.BYTES,
            ALL_GATHER: tiles.gather.BYTES,
            ALL_TO_ALL: world_size * tiles.gather.BYTES,
        }[ALGORITHMS.index(algorithm)]
        n_tiles = min(self.epoch_bytes // need, (host_sync.MAX_WAVES - 1) * self._most_workers(tuning))
        return n_tiles * tiles.units * (world_size if algorithm == "two_shot" else 1)

    def _most_workers(self, tuning: HostTuning) -> int:
        return 1 if INTERPRETED else min(tuning.n_workers, self._most)

    def _launches(self, kind: int, x: Tensor, fmt: WireFormat, tuning: Tuning) -> Iterator[Launch]:
        if not isinstance(tuning, HostTuning):
            yield from super()._launches(kind, x, fmt, tuning)
            return
        region, itemsize, unit = self.region, x.element_size(), fmt.unit
        world_size, tiles = region.world_size, host_tiles(fmt, itemsize, tuning)
        limit = int(self.timeout_s * (POLLS_PER_SECOND[0] if INTERPRETED else 1e9))
        where = sync.Region(Int64(0), Int64(self.local), region.rank, Int64(limit), region.peers, region.status)
        state = self._state.data_ptr()
        counters = host_sync.Counter(Int64(state)), host_sync.Counter(Int64(state + 64))
        by_hand = INTERPRETED and x.dtype == torch.bfloat16
        in_hadamard = kind == TWO_SHOT and fmt.between_steps[0].in_hadamard_domain
        n_units = x.numel() // unit // (world_size if kind in SHARDED else 1)
        for first, count in cut(n_units, self.capacity(ALGORITHMS[kind], fmt, itemsize, tuning)):
            message = self._message(kind, n_units, count, tiles, tuning)
            n_waves = -(-message.n_tiles // self._most_workers(tuning))
            n_workers = -(-message.n_tiles // n_waves)  # the fewest that need no more waves
            outbox = host_sync.Outbox(self._table, Int64(self._own.data_ptr()), Int64(state), *counters, n_workers)
            start = launcher(
                kernel.host_collective,
                grid=1 if INTERPRETED else world_size + n_workers,
                pointers=(x.dtype, torch.int16 if by_hand else x.dtype),
                numbers=(where, outbox, message._replace(inbox=Int64(host_sync.OUTBOX))),
                bundles=(
                    Collective(kind, unit, tiles.units, in_hadamard, False, by_hand),
                    sync.Ranks(world_size, not INTERPRETED, self.delay),
                    kernel.Steps(tiles.reduce, tiles.gather),
                ),
                num_warps=tiles.num_warps,
                device=region.device.index,
                may_capture=False,
            )
            yield at_offset(start, first * unit * itemsize) if first else start


@lru_cache(maxsize=256)
def host_tiles(fmt: WireFormat, itemsize: int, tuning: HostTuning) -> Tiles:
    """Return the tiles of a format, for messages with `itemsize` bytes per value."""
    units = max(1, tuning.tile_numel // fmt.unit)
    n_pieces = [_pieces(step, tuning) for step in (fmt.reduce, fmt.gather)]
    if fmt.reduce.group == fmt.gather.group:  # one layout, so that no value changes threads between the steps
        n_pieces = [max(n_pieces)] * 2
    steps = []
    for step, p in zip((fmt.reduce, fmt.gather), n_pieces, strict=True):
        n_groups = units * fmt.unit // step.group
        n_bytes = -(-tile_bytes(step, n_groups, itemsize) // 16) * 16
        steps.append(step_of(step, p, n_groups, step.group // p, n_bytes=n_bytes))
    num_warps = max(1, min(8, steps[0].GROUPS * steps[0].LANES // 256))
    return Tiles(fmt.unit, units, steps[0], steps[1], num_warps)


def _pieces(step: StepFormat, tuning: HostTuning) -> int:
    """Return PIECES of a tile. With more of them a warp has more groups, whose scales then share a PCIe transfer."""
    if step.uncompressed:
        return 1
    if step.hadamard:
        return max(pieces(step), 8 if step.bits >= 6 else 4)
    return max(pieces(step), tuning.n_pieces if step.packed else 4)
