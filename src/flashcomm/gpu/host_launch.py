"""Collectives through host memory, one launch each: plans of launches of `host_kernel.host_collective`.

Results are those of `flashcomm.reference`, however a message is cut into tiles, waves and launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from flashcomm.gpu import host_kernel as kernel
from flashcomm.gpu import sync
from flashcomm.gpu.collective_kernel import ALL_GATHER, ONE_SHOT, REDUCE_SCATTER, TWO_SHOT, Collective
from flashcomm.gpu.compat import INTERPRETED, Int64, launcher
from flashcomm.gpu.launch import ALGORITHMS, POLLS_PER_SECOND, KernelCollectives, Launch, PeerMemory, at_offset
from flashcomm.gpu.tile import pieces, step_of, tile_bytes
from flashcomm.gpu.tuning import LL, Tiles, Tuning, cut
from flashcomm.wire.format import StepFormat, WireFormat


class HostMemory(PeerMemory, Protocol):
    """Zeroed host memory per rank that every rank maps, as the transports host_memory and cpu_shared make it."""

    mappings: list[int]  # addresses of everybody's memory in this process


@dataclass(frozen=True)
class HostTuning(Tuning):
    """How a launch of `host_collective` is cut up, with a tile per program and wave and a stage_lag of at least 1."""

    n_workers: int = 32  # programs that quantize and sum; the grid has one more for each rank
    n_pieces: int = 4  # of a tile of a plain format of up to 5 bits


SMALL_NUMEL, LARGE_NUMEL = 1 << 20, 4 << 20  # values of a rank's message: less than the former, the latter or more


def host_tuning(fmt: WireFormat, numel: int) -> HostTuning:
    """How messages of `numel` values a rank are cut up: as fast as any found on two H200 without peer access (LOG.md).

    A worker should move some 4 KB a step. Little memory traffic per SM is why few workers are enough.
    """
    bits = max(fmt.reduce.bits, fmt.gather.bits)
    tile_numel = 2048 if bits == 16 else 4096 if bits == 8 or numel < SMALL_NUMEL else 8192
    if numel < LARGE_NUMEL or bits in (6, 7):
        return HostTuning(tile_numel, stage_lag=4)
    return HostTuning(tile_numel, stage_lag=6, n_workers=48, n_pieces=8)


def shared_bytes(workspace: int) -> int:
    """Bytes of a rank's shared memory for `workspace` bytes of messages: half for even, half for odd calls."""
    return kernel.OUTBOX + workspace


def most_workers(asked: int, n_multiprocessors: int, world_size: int) -> int:
    """Workers of a launch, at most: so many that the whole grid, with a program per rank, is on the GPU at once.

    A multiprocessor holds one program or more. All ranks need the same number, as wave i is the same tiles everywhere.

    Args:
        asked: The setting; 0 leaves it to `host_tuning`.
        n_multiprocessors: Of the smallest GPU.
        world_size: Ranks of the group.
    """
    return max(1, min(asked or kernel.MAX_WORKERS, kernel.MAX_WORKERS, n_multiprocessors - world_size))


class HostCollectives(KernelCollectives):
    """The collectives through host memory. Calls must come in the same order on all ranks, on one stream at a time.

    Args:
        region: what a transport has made and all ranks have mapped.
            Behind its `n_bytes`, of `region_bytes(4 MiB)` or more, it has `shared_bytes(workspace)`.
        workspace: bytes of messages; larger ones take several launches.
        timeout_s: limit of every wait, in seconds.
        n_workers: programs that quantize and sum, at most (`most_workers`); the same on all ranks.
        delay: polls between a wait and the read, for tests of a slow reader.
    """

    region: HostMemory
    ll_sent_bytes = 56 << 10  # over PCIe twice the bytes soon cost more than a flag

    def __init__(
        self,
        region: HostMemory,
        workspace: int,
        timeout_s: float,
        n_workers: int = kernel.MAX_WORKERS,
        delay: int = 0,
    ) -> None:
        super().__init__(region, timeout_s, delay)
        self.epoch_bytes, device = workspace // 2 // 16 * 16, region.device
        self._most = n_workers
        self._table = torch.tensor([base + region.n_bytes for base in region.mappings], dtype=torch.int64).to(device)
        self._own = torch.empty(self.epoch_bytes, dtype=torch.uint8, device=device)
        self._state = torch.zeros(kernel.STATE_BYTES, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the state is zero, whatever stream the first call is on

    def plan(self, algorithm: str, x: Tensor, row: int, fmt: WireFormat, tuning: Tuning | None = None) -> Launch:
        """As `KernelCollectives.plan`."""
        if tuning is None:
            tuning = self.tuning(algorithm, x.numel(), fmt, x.element_size())
            if not INTERPRETED and row % fmt.unit == 0:  # so that later no length compiles anything
                for other in (LL, *(host_tuning(fmt, numel) for numel in (0, SMALL_NUMEL, LARGE_NUMEL))):
                    next(self._launches(ALGORITHMS.index(algorithm), x, fmt, other))
        return super().plan(algorithm, x, row, fmt, tuning)

    def tuning(self, algorithm: str, numel: int, fmt: WireFormat, itemsize: int) -> Tuning:
        """How a message of `numel` values is cut up: by the LL protocol or as `host_tuning` says."""
        tuning = super().tuning(algorithm, numel, fmt, itemsize)
        return tuning if tuning.ll else host_tuning(fmt, numel)

    def capacity(self, algorithm: str, fmt: WireFormat, itemsize: int, tuning: Tuning) -> int:
        """Units of a shard that fit one launch (all-reduce: of the message)."""
        if not isinstance(tuning, HostTuning):
            return super().capacity(algorithm, fmt, itemsize, tuning)
        world_size, tiles = self.region.world_size, host_tiles(fmt, itemsize, tuning)
        need = {
            ONE_SHOT: tiles.reduce.BYTES,
            TWO_SHOT: world_size * tiles.reduce.BYTES + tiles.gather.BYTES,
            REDUCE_SCATTER: world_size * tiles.reduce.BYTES,
            ALL_GATHER: tiles.gather.BYTES,
        }[ALGORITHMS.index(algorithm)]
        n_tiles = min(self.epoch_bytes // need, (kernel.MAX_WAVES - 1) * self._most_workers(tuning))
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
        counters = kernel.Counter(Int64(state)), kernel.Counter(Int64(state + 64))
        by_hand = INTERPRETED and x.dtype == torch.bfloat16
        in_hadamard = kind == TWO_SHOT and fmt.between_steps[0].in_hadamard_domain
        n_units = x.numel() // unit // (world_size if kind == REDUCE_SCATTER else 1)
        for first, count in cut(n_units, self.capacity(ALGORITHMS[kind], fmt, itemsize, tuning)):
            message = self._message(kind, n_units, count, tiles, tuning)
            n_waves = -(-message.n_tiles // self._most_workers(tuning))
            n_workers = -(-message.n_tiles // n_waves)  # no more than fill the last wave, too
            outbox = kernel.Outbox(self._table, Int64(self._own.data_ptr()), Int64(state), *counters, n_workers)
            start = launcher(
                kernel.host_collective,
                grid=1 if INTERPRETED else world_size + n_workers,
                pointers=(x.dtype, torch.int16 if by_hand else x.dtype),
                numbers=(where, outbox, message._replace(inbox=Int64(kernel.OUTBOX))),
                bundles=(
                    Collective(kind, 1, unit, tiles.units, in_hadamard, False, by_hand),
                    sync.Ranks(world_size, not INTERPRETED, not INTERPRETED, self.delay),
                    kernel.Steps(tiles.reduce, tiles.gather),
                ),
                num_warps=tiles.num_warps,
                device=region.device.index,
                may_capture=False,
            )
            yield at_offset(start, first * unit * itemsize) if first else start


@lru_cache(maxsize=256)
def host_tiles(fmt: WireFormat, itemsize: int, tuning: HostTuning) -> Tiles:
    """The tiles of a format for messages of `itemsize` bytes a value."""
    units = max(1, tuning.tile_numel // fmt.unit)
    n_pieces = [_pieces(step, tuning) for step in (fmt.reduce, fmt.gather)]
    if fmt.reduce.group == fmt.gather.group:  # one layout, so that between the steps no value moves
        n_pieces = [max(n_pieces)] * 2
    steps = []
    for step, p in zip((fmt.reduce, fmt.gather), n_pieces, strict=True):
        n_groups = units * fmt.unit // step.group
        n_bytes = -(-tile_bytes(step, n_groups, itemsize) // 16) * 16
        steps.append(step_of(step, p, n_groups, step.group // p, n_bytes=n_bytes))
    num_warps = max(1, min(8, steps[0].GROUPS * steps[0].LANES // 256))
    return Tiles(fmt.unit, units, steps[0], steps[1], num_warps)


def _pieces(step: StepFormat, tuning: HostTuning) -> int:
    """PIECES of a tile: the more, the more groups a warp has, and the more of their scales' words are one PCIe transfer."""
    if step.uncompressed:
        return 1
    if step.hadamard:
        return max(pieces(step), 8 if step.bits >= 6 else 4)
    return max(pieces(step), tuning.n_pieces if step.packed else 4)
