"""How programs of different ranks wait for each other: the layout of a region, epochs, flags and the polling loop.

A region begins with the words of this module. Data comes behind them:

| offset in bytes | content                                                        | written by    | read by   |
|-----------------|----------------------------------------------------------------|---------------|-----------|
| 0               | int64: high half, the last call in which all programs started; | this rank     | this rank |
|                 | low half, how many programs of the next call have started      |               |           |
| ABORT           | int32: 0; 1 once a wait has timed out; 3 once that is reported | this rank     | this rank |
| FLAGS           | int64 [stage][source][tile]: the epoch of a tile               | rank `source` | this rank |
| DATA            | tiles, see `collective_kernel`                                 | all ranks     | this rank |

A program that waits for a tile of several ranks reads all their flags in one atomic instruction, and counts itself in
the same one. A program lives for some 3 us, and each further trip to memory would add a quarter of that (LOG.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashcomm.gpu.tile import scalar

MAX_TILES = 16384  # of a shard
MAX_RANKS = 16
ABORT = 8
FLAGS = 64
_STAGE_BYTES = 8 * MAX_TILES * MAX_RANKS
DATA = FLAGS + 2 * _STAGE_BYTES

_MAX_TILES, _STAGE = tl.constexpr(MAX_TILES), tl.constexpr(_STAGE_BYTES)
_FLAGS, _ABORT = tl.constexpr(FLAGS), tl.constexpr(ABORT)


class Region(NamedTuple):
    """Run-time values of a kernel: where the memory of the ranks is, and how long this rank waits.

    `own` and `local` are the same address, unless peers write to host memory. Then `local` is GPU memory, which also
    holds the epoch.
    """

    own: Any  # the address at which peers write for this rank
    local: Any  # the address at which this rank writes for itself
    rank: Any
    limit: Any  # of a wait, in ns; in Triton's interpreter, in polls
    peers: Any  # int64 (WORLD_SIZE,): the address at which this rank writes for each rank
    status: Any  # int32 (5,) in host memory: the report of `give_up`


class Ranks(NamedTuple):
    """Constants of a kernel: who takes part, and how they wait."""

    WORLD_SIZE: int
    CLOCK: bool  # whether there is a clock: False in Triton's interpreter
    DELAY: int  # polls between a wait and the read, for tests of a slow reader


@triton.jit
def bytes_at(address):
    """A pointer to bytes, 16-byte aligned."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def ints_at(address):
    """A pointer to int32s."""
    return address.to(tl.pointer_type(tl.int32))


@triton.jit
def longs_at(address):
    """A pointer to int64s, 16-byte aligned."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def arrives_at(source, region):
    """The address at which data of rank `source` arrives."""
    return tl.where(source == region.rank, region.local, region.own)


@triton.jit
def rank_of(peer, region):
    """Return the rank of a peer. Peers are numbered from 0 on in the order of ranks, without this rank."""
    peer = scalar(0, like=region.rank) + peer
    return peer + (peer >= region.rank).to(tl.int32)


@triton.jit
def clock(polls, ranks: tl.constexpr):
    """Return the time in ns, or in Triton's interpreter the number of polls, in the unit of `Region.limit`."""
    if ranks.CLOCK:
        return tl.extra.cuda.globaltimer()
    else:
        return polls


@triton.jit
def _look_at_flags(place, epoch, ranks: tl.constexpr, STEP: tl.constexpr):
    """Read flags, as a `LOOK` of `poll`. A peer may already be in the next call, so its flag counts, too.

    place: pointers to the flags, a mask, and zeros: what to add to them.
    """
    seen = tl.atomic_add(place[0], place[2], mask=place[1], sem="acquire", scope="sys")
    return seen, tl.max((place[1] & (((seen.to(tl.int32) - epoch) & -2) != 0)).to(tl.int32))


@triton.jit
def set_flag(flag, value, ranks: tl.constexpr):
    """Store a flag in host memory, with release semantics: all earlier stores of this program are visible before it.

    It is a plain store, because a read-modify-write over PCIe may not be atomic.
    """
    if ranks.CLOCK:
        tl.inline_asm_elementwise("""{
            .reg .pred p; .reg .b32 t;
            mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p st.release.sys.global.b32 [$1], $2;
            mov.b32 $0, 0; }""", "=r,l,r", [flag.to(tl.int64), value], tl.int32, is_pure=False, pack=1)  # fmt: skip
    else:
        tl.atomic_xchg(flag, value, sem="release", scope="sys")


@triton.jit
def poll(LOOK: tl.constexpr, place, epoch, seen, late, region, ranks: tl.constexpr, step: tl.constexpr):
    """Read a place until its content is of this epoch, the limit is over, or another program has given up.

    Args:
        LOOK: a kernel function (place, epoch, ranks, step) -> (content, late). late is 0 if the content is of this
            epoch and 1 otherwise, the same for all threads.
        place: passed to LOOK.
        epoch: the epoch of this call.
        seen: the content that LOOK has returned before.
        late: the `late` that LOOK has returned with it.
        region: a `Region`.
        ranks: a `Ranks`.
        step: passed to LOOK.

    Returns:
        The last content, and its `late`.
    """
    polls, state = scalar(0, like=late).to(tl.int64), scalar(0, like=late)
    begin = polls
    if late != 0:
        begin = clock(polls, ranks)
    while (late != 0) & (state == 0):
        seen, late = LOOK(place, epoch, ranks, step)
        polls += 1
        if (late != 0) & (polls % 32 == 0):
            over = (clock(polls, ranks) - begin >= region.limit).to(tl.int32)
            state = tl.atomic_or(ints_at(region.local + _ABORT), over, sem="relaxed", scope="gpu")
    return seen, late


@triton.jit
def give_up(phase, source, epoch, seen, region, ranks: tl.constexpr):
    """Report a wait that timed out. All programs that give up call this, and the first one reports.

    From the next launch on, this rank stores only to its own memory. It is no longer in step with its peers, which must
    not take its data for data of their calls.

    Args:
        phase: what was waited for, an index of `launch.PHASES`.
        source: the rank that was waited for.
        epoch: the epoch that was expected.
        seen: the epoch that was found.
        region: a `Region`.
        ranks: a `Ranks`.
    """
    if tl.atomic_cas(ints_at(region.local + _ABORT), 1, 3) == 1:
        tl.store(region.status + 1, phase)
        tl.store(region.status + 2, source)
        tl.store(region.status + 3, epoch)
        tl.store(region.status + 4, seen)
        for i in tl.static_range(ranks.WORLD_SIZE):
            tl.store(region.peers + i, region.local)
        set_flag(region.status, scalar(1, like=epoch), ranks)  # the status is always in host memory


@triton.jit
def _epoch_of(before, region):
    """Return the epoch of the call, and advance it if this is the last program to start. before: the count till then."""
    epoch = (before >> 32) + 1
    if (before & 0xFFFFFFFF) == tl.num_programs(0) - 1:
        tl.atomic_xchg(longs_at(region.local), epoch << 32, sem="relaxed", scope="gpu")
    return epoch.to(tl.int32)


@triton.jit
def arrive(region):
    """Count this program, and return the epoch of the call."""
    return _epoch_of(tl.atomic_add(longs_at(region.local), 1, sem="relaxed", scope="gpu"), region)


@triton.jit
def arrive_and_wait(first, tile, region, ranks: tl.constexpr, N_SOURCES: tl.constexpr, STAGE: tl.constexpr):
    """Count this program, and wait for the flags of a tile of the ranks first, ..., first + N_SOURCES - 1.

    Args:
        first: a rank.
        tile: the index of the tile.
        region: a `Region`.
        ranks: a `Ranks`.
        N_SOURCES: the number of ranks.
        STAGE: 0 for the quantized message, 1 for the quantized sum.

    Returns:
        The epoch of the call, and 1 once all flags are of this epoch, or 0 after the limit.
    """
    N: tl.constexpr = (
        2 if N_SOURCES < 2 else 4 if N_SOURCES < 4 else 8 if N_SOURCES < 8 else 16 if N_SOURCES < 16 else 32
    )
    lane = tl.arange(0, N)
    source, counts = first + lane, lane == N_SOURCES  # this lane counts the program, the ones before it read flags
    here = lane < N_SOURCES
    flags = arrives_at(source, region) + _FLAGS + STAGE * _STAGE + 8 * (source * _MAX_TILES + tile).to(tl.int64)
    words = tl.where(counts, region.local, flags).to(tl.pointer_type(tl.int64))
    seen = tl.atomic_add(words, counts.to(tl.int64), mask=here | counts, sem="acquire", scope="sys")
    epoch = _epoch_of(tl.sum(tl.where(counts, seen, 0)), region)

    place = (words, here, (lane * 0).to(tl.int64))
    late = tl.max((here & (((seen.to(tl.int32) - epoch) & -2) != 0)).to(tl.int32))
    seen, late = poll(_look_at_flags, place, epoch, seen, late, region, ranks, None)
    if late != 0:
        behind = here & (((seen.to(tl.int32) - epoch) & -2) != 0)
        which = tl.min(tl.where(behind, source, 0x7FFFFFFF))
        give_up(STAGE + 1, which, epoch, tl.sum(tl.where(source == which, seen, 0)).to(tl.int32), region, ranks)
    for _ in range(ranks.DELAY):
        seen, again = _look_at_flags(place, epoch, ranks, None)
        late |= again & late
    tl.debug_barrier()
    return epoch, 1 - late


@triton.jit
def publish(to, tile, epoch, region, ranks: tl.constexpr, STAGE: tl.constexpr, TO_ALL: tl.constexpr):
    """Set the flag of a tile in the memory of rank `to` or of all ranks, behind all stores of this program."""
    N: tl.constexpr = 1 if not TO_ALL else 2 if ranks.WORLD_SIZE <= 2 else 4 if ranks.WORLD_SIZE <= 4 else 8 if ranks.WORLD_SIZE <= 8 else 16  # fmt: skip
    tl.debug_barrier()
    target = tl.arange(0, N)
    here = target < ranks.WORLD_SIZE
    if not TO_ALL:
        target += to
    flag = _FLAGS + STAGE * _STAGE + 8 * (region.rank * _MAX_TILES + tile).to(tl.int64)
    flags = (tl.load(region.peers + target, mask=here, other=0) + flag).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flags, tl.zeros((N,), tl.int64) + epoch, mask=here, sem="release", scope="sys")
