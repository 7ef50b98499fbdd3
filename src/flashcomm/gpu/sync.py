"""How programs of different ranks wait for each other: the layout of a region, epochs, flags and the polling loop.

A region begins with the words of this module. Data comes behind them:

| offset in bytes | content                                                        | written by    | read by   |
|-----------------|----------------------------------------------------------------|---------------|-----------|
| 0               | int64: high half, the last call in which all programs started; | this rank     | this rank |
|                 | low half, how many programs of the next call have started      |               |           |
| ABORT           | int32: 0; 1 once a wait has timed out; 3 once that is reported | this rank     | this rank |
| FLAGS           | int32 [stage][source][block]: the epoch of a block             | rank `source` | this rank |
| DATA            | tiles, see `collective_kernel`                                 | all ranks     | this rank |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashcomm.gpu.tile import scalar

MAX_BLOCKS = 16384  # of a shard
MAX_RANKS = 16
ABORT = 8
FLAGS = 64
_STAGE_BYTES = 4 * MAX_BLOCKS * MAX_RANKS
DATA = FLAGS + 2 * _STAGE_BYTES

_MAX_BLOCKS, _STAGE = tl.constexpr(MAX_BLOCKS), tl.constexpr(_STAGE_BYTES)
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
    HOST_MEMORY: bool  # whether peers write to host memory, where flags take only plain loads and stores
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
def clock(polls, ranks: tl.constexpr):
    """Return the time in ns, or in Triton's interpreter the number of polls, in the unit of `Region.limit`."""
    if ranks.CLOCK:
        return tl.extra.cuda.globaltimer()
    else:
        return polls


@triton.jit
def _look_at_flag(flag, epoch, ranks: tl.constexpr, STEP: tl.constexpr):
    """Read a flag, as a `LOOK` of `poll`. A peer may already be in the next call, so its flag counts, too.

    One thread reads the flag. From host memory it is a plain load, because a read-modify-write over PCIe may not be
    atomic. A pause between two loads leaves the link to the data.

    Returns:
        0 if the flag is of this call or the next one, else 1; twice, since a flag is its own data.
    """
    if ranks.HOST_MEMORY:
        late = tl.inline_asm_elementwise("""{
            .reg .pred p, q; .reg .b32 t;
            mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; setp.ne.u32 q, t, t;
            @!p bra known;
            ld.acquire.sys.global.b32 t, [$1]; sub.s32 t, t, $2; and.b32 t, t, -2; setp.ne.s32 q, t, 0;
            @q nanosleep.u32 100;
            known: barrier.sync.aligned 0; barrier.red.or.pred q, 0, q;
            selp.b32 $0, 1, 0, q; }""", "=r,l,r", [flag.to(tl.int64), epoch], tl.int32, False, 1)  # fmt: skip
    else:
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        late = (((seen - epoch) & -2) != 0).to(tl.int32)
    return late, late


@triton.jit
def set_flag(flag, value, HOST_MEMORY: tl.constexpr):
    """Store a flag, with release semantics: all earlier stores of this program are visible before it."""
    if HOST_MEMORY:
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
        set_flag(region.status, scalar(1, like=epoch), ranks.CLOCK)  # the status is always in host memory


@triton.jit
def wait(source, block, epoch, region, ranks: tl.constexpr, STAGE: tl.constexpr):
    """Wait for the flag of a block of rank `source`. Return 1 once it is of this epoch, or 0 after the limit."""
    flag = ints_at(arrives_at(source, region) + _FLAGS + STAGE * _STAGE + 4 * (source * _MAX_BLOCKS + block))
    seen, late = _look_at_flag(flag, epoch, ranks, None)
    seen, late = poll(_look_at_flag, flag, epoch, seen, late, region, ranks, None)
    if late != 0:
        give_up(STAGE + 1, source, epoch, tl.load(flag, volatile=True), region, ranks)
    for _ in range(ranks.DELAY):
        seen, again = _look_at_flag(flag, epoch, ranks, None)
        late |= again & late
    tl.debug_barrier()
    return 1 - late


@triton.jit
def arrive(region):
    """Count this program, and return the epoch of the call. The last program to start advances the epoch."""
    counter = region.local.to(tl.pointer_type(tl.int64))
    before = tl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
    epoch = (before >> 32) + 1
    if (before & 0xFFFFFFFF) == tl.num_programs(0) - 1:
        tl.atomic_xchg(counter, epoch << 32, sem="relaxed", scope="gpu")
    return epoch.to(tl.int32)


@triton.jit
def publish(to, block, epoch, region, ranks: tl.constexpr, STAGE: tl.constexpr, TO_ALL: tl.constexpr):
    """Set the flag of a block in the memory of rank `to` or of all ranks, behind all stores of this program."""
    tl.debug_barrier()
    at = _FLAGS + STAGE * _STAGE + 4 * (region.rank * _MAX_BLOCKS + block)
    for i in tl.static_range(ranks.WORLD_SIZE if TO_ALL else 1):
        set_flag(ints_at(tl.load(region.peers + (i if TO_ALL else to)) + at), epoch, ranks.HOST_MEMORY)
