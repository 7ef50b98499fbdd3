"""Collectives over peers' memory: how messages are cut into launches, and whether these have succeeded.

Results are those of `flashcomm.reference`. How a message is cut into tiles, shards and launches changes no bit, because
groups are quantized on their own and sums run in rank order. The kernel is `collective_kernel.collective`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from flashcomm.errors import CommunicationError, InputError
from flashcomm.gpu import sync
from flashcomm.gpu.collective_kernel import (
    ALL_GATHER,
    ALL_TO_ALL,
    ONE_SHOT,
    REDUCE_SCATTER,
    TWO_SHOT,
    Collective,
    Message,
    collective,
)
from flashcomm.gpu.compat import INTERPRETED, Int64, launcher
from flashcomm.gpu.tuning import LARGE_NUMEL, LL_EPOCH_BYTES, LL_SENT_BYTES, Tiles, Tuning, cut, tiles_of, tunings
from flashcomm.wire.format import WireFormat

# The index is the number in `collective_kernel`.
ALGORITHMS = ("one_shot", "two_shot", "reduce_scatter", "all_gather", "all_to_all_single")
SHARDED = (REDUCE_SCATTER, ALL_TO_ALL)  # the message consists of one shard for each rank
PHASES = ("", "the quantized message", "the quantized sum")  # the index is the phase in `sync.give_up`
POLLS_PER_SECOND = (800, 400)  # in the interpreter, roughly: polls of flags, and of a tile of LL words
Launch = Callable[[int, int], None]  # takes the addresses of a message and of its result


class PeerMemory(Protocol):
    """Zeroed memory of each rank that its peers can write to, as made by the modules in `transports`."""

    rank: int
    world_size: int
    n_bytes: int
    device: torch.device
    peers: Tensor  # int64 (world_size,) on the device: the address at which this rank writes for each rank, itself too
    own: int  # the address at which peers write for this rank; what it writes for itself is at its entry of `peers`
    status: Tensor  # int32 (5,) in host memory: the report of `sync.give_up`

    def close(self) -> None: ...


def region_bytes(workspace: int) -> int:
    """Return the size of a region with `workspace` bytes for messages, half of them for calls of odd epochs."""
    return sync.DATA + workspace


class KernelCollectives:
    """The collectives over one region. Calls must come in the same order on all ranks, on one stream at a time.

    Args:
        region: memory that a transport has made and all ranks have mapped, at least `region_bytes(4 MiB)`.
        timeout_s: limit of every wait, in seconds.
        delay: polls between a wait and the read, for tests of a slow reader.
    """

    ll_sent_bytes = LL_SENT_BYTES  # the most that a rank sends by the LL protocol in one launch

    def __init__(self, region: PeerMemory, timeout_s: float, delay: int = 0) -> None:
        self.region, self.timeout_s, self.delay = region, timeout_s, delay
        data = region.n_bytes - sync.DATA
        self.ll_epoch_bytes = min(LL_EPOCH_BYTES, data // 8) // 16 * 16
        self.epoch_bytes = (data // 2 - self.ll_epoch_bytes) // 16 * 16
        self.local = int(region.peers[region.rank].item())
        self._status = (ctypes.c_int32 * 5).from_address(region.status.data_ptr())

    def plan(self, algorithm: str, x: Tensor, row: int, fmt: WireFormat, tuning: Tuning | None = None) -> Launch:
        """Return how to run a collective for messages like x. The first plan for a dtype and a format compiles kernels.

        Args:
            algorithm: one of ALGORITHMS.
            x: bf16, fp16 or fp32; only its size, dtype and device matter.
            row: the number of values in a row, a multiple of `fmt.unit`.
            fmt: the format; reduce_scatter uses only its reduce step, all_gather and all_to_all_single only its
                gather step.
            tuning: how to cut the message up; None chooses by size.

        Returns:
            A function that launches the collective. It takes the addresses of the message and of its result, both
            contiguous and 16-byte aligned. In an all-reduce they may be the same.

        Raises:
            InputError: rows are not whole units, or a kernel would have to be compiled during CUDA graph capture.
        """
        if row % fmt.unit:
            raise InputError(
                f"{algorithm} by the kernel takes rows of whole units of {fmt.unit} values, got {row}: "
                "send such a message by the pipelined executor"
            )
        kind = ALGORITHMS.index(algorithm)
        if tuning is None:
            tuning = self.tuning(algorithm, x.numel(), fmt, x.element_size())
            if not INTERPRETED:  # so that no other length compiles anything later
                for other in tunings(fmt):
                    if self.capacity(algorithm, fmt, x.element_size(), other):
                        next(self._launches(kind, x, fmt, other))
        launches = list(self._launches(kind, x, fmt, tuning))
        if len(launches) == 1:
            return launches[0]

        def run(source: int, target: int) -> None:
            for launch in launches:
                launch(source, target)

        return run

    def check(self) -> None:
        """Raise CommunicationError if a wait has timed out in a launch that has ended. Does not wait for launches."""
        if self._status[0]:
            _, phase, peer, expected, seen = self._status
            raise CommunicationError(
                f"rank {self.region.rank} of {self.region.world_size}: waited {self.timeout_s:g} s (FLASHCOMM_TIMEOUT_S) "
                f"for {PHASES[phase]} of rank {peer}: expected call {expected}, saw {seen}. That rank died, is stuck "
                "or did not make the call; results since then are NaN. Make a new Communicator on the ranks left"
            )

    def close(self) -> None:
        """Wait for this rank's launches, and release the region."""
        self.region.close()

    def tuning(self, algorithm: str, numel: int, fmt: WireFormat, itemsize: int) -> Tuning:
        """Return how to cut up a message of `numel` values."""
        world_size, (least, small, large) = self.region.world_size, tunings(fmt)
        n_units, tiles = numel // fmt.unit, tiles_of(fmt, itemsize, least)
        if ALGORITHMS.index(algorithm) in SHARDED:
            n_units = -(-n_units // world_size)
        n_tiles = -(-n_units // (tiles.units * world_size if algorithm == "two_shot" else tiles.units))
        sent = max(_stage_bytes(ALGORITHMS.index(algorithm), tiles)) * n_tiles * (world_size - 1)
        if sent <= self.ll_sent_bytes and n_units <= self.capacity(algorithm, fmt, itemsize, least):
            return least
        return large if numel >= LARGE_NUMEL else small

    def capacity(self, algorithm: str, fmt: WireFormat, itemsize: int, tuning: Tuning) -> int:
        """Return how many units fit one launch: of the message in an all-reduce, else of a shard."""
        world_size, tiles = self.region.world_size, tiles_of(fmt, itemsize, tuning)
        need = world_size * sum(_stage_bytes(ALGORITHMS.index(algorithm), tiles))
        epoch_bytes = self.ll_epoch_bytes if tuning.ll else self.epoch_bytes
        n_tiles = min(epoch_bytes // need, sync.MAX_TILES)
        return n_tiles * tiles.units * (world_size if algorithm == "two_shot" else 1)

    def _launches(self, kind: int, x: Tensor, fmt: WireFormat, tuning: Tuning) -> Iterator[Launch]:
        region, itemsize, unit = self.region, x.element_size(), fmt.unit
        world_size, tiles = region.world_size, tiles_of(fmt, itemsize, tuning)
        limit = int(self.timeout_s * (POLLS_PER_SECOND[tuning.ll] if INTERPRETED else 1e9))
        where = sync.Region(
            Int64(region.own), Int64(self.local), region.rank, Int64(limit), region.peers, region.status
        )
        ranks = sync.Ranks(world_size, not INTERPRETED, self.delay)
        by_hand = INTERPRETED and x.dtype == torch.bfloat16
        in_hadamard = kind == TWO_SHOT and fmt.between_steps[0].in_hadamard_domain
        call = Collective(kind, unit, tiles.units, in_hadamard, tuning.ll, by_hand)
        many = 2 * world_size
        per_tile = {ONE_SHOT: 2, TWO_SHOT: many + 1, ALL_TO_ALL: many - 1}.get(kind, world_size + 1)  # programs
        n_units = x.numel() // unit // (world_size if kind in SHARDED else 1)
        for first, count in cut(n_units, self.capacity(ALGORITHMS[kind], fmt, itemsize, tuning)):
            message = self._message(kind, n_units, count, tiles, tuning)
            start = launcher(
                collective,
                grid=message.n_tiles * per_tile,
                pointers=(x.dtype, torch.int16 if by_hand else x.dtype),
                numbers=(where, message),
                bundles=(call, ranks, tiles.reduce, tiles.gather),
                num_warps=tiles.num_warps,
                device=region.device.index,
                may_capture=False,
            )
            yield at_offset(start, first * unit * itemsize) if first else start

    def _message(self, kind: int, n_units: int, count: int, tiles: Tiles, tuning: Tuning) -> Message:
        """The `Message` of one launch over `count` units: in all of an all-reduce, else of each shard.

        n_units: the units of the message of an all-reduce, else of a shard.
        """
        world_size = self.region.world_size
        n_tiles = -(-count // (tiles.units * world_size if kind == TWO_SHOT else tiles.units))
        shard_units, stride, total = count, n_units, 1 << 60
        if kind == TWO_SHOT:
            shard_units, stride, total = n_tiles * tiles.units, n_tiles * tiles.units, count
        elif kind == ONE_SHOT:
            stride, total = 0, count
        return Message(
            Int64(total),
            Int64(shard_units),
            Int64(stride),
            n_tiles,
            Int64(sync.DATA + (0 if tuning.ll else 2 * self.ll_epoch_bytes)),
            Int64(self.ll_epoch_bytes if tuning.ll else self.epoch_bytes),
            Int64(world_size * n_tiles * tiles.reduce.BYTES if kind == TWO_SHOT else 0),
            min(tuning.stage_lag, n_tiles),
        )


def _stage_bytes(kind: int, tiles: Tiles) -> tuple[int, ...]:
    """The bytes of a tile in each stage of an algorithm."""
    if kind in (ALL_GATHER, ALL_TO_ALL):
        return (tiles.gather.BYTES,)
    return (tiles.reduce.BYTES, tiles.gather.BYTES) if kind == TWO_SHOT else (tiles.reduce.BYTES,)


def at_offset(start: Callable[..., None], offset: int) -> Launch:
    """Return a launch on the part of a message that begins `offset` bytes into it, and into its result."""

    def launch(source: int, target: int) -> None:
        start(source + offset, target + offset)

    return launch
