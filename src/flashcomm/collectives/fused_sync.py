"""How programs of ranks wait for each other: the layout of a region, epochs and flags, as kernels see them."""

from __future__ import annotations

import triton
import triton.language as tl

MAX_BLOCKS = 16384  # of a slice
MAX_RANKS = 16
ABORT = 8  # bytes: whether a wait of this rank timed out; before it epoch and started programs, behind it flags
FLAGS = 64  # [stage][source][block]
_STAGE_BYTES = 4 * MAX_BLOCKS * MAX_RANKS
DATA = FLAGS + 2 * _STAGE_BYTES

BLOCKS, STAGE_AT = tl.constexpr(MAX_BLOCKS), tl.constexpr(_STAGE_BYTES)
FLAGS_AT, _ABORT, DATA_AT = (tl.constexpr(at) for at in (FLAGS, ABORT, DATA))


@triton.jit
def bytes_at(address):
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def words(address):
    return address.to(tl.pointer_type(tl.int32))


@triton.jit
def _clock(polls, REAL: tl.constexpr):
    if REAL:
        return tl.extra.cuda.globaltimer()
    else:
        return polls


@triton.jit
def _late(seen, epoch):
    """Whether a flag is neither of this call nor of the next one, in which a peer may be already."""
    return ((seen - epoch) & -2) != 0


@triton.jit
def wait(flag, epoch, phase, source, own, peers, status, limit, WORLD: tl.constexpr, REAL: tl.constexpr,
          DELAY: tl.constexpr):  # fmt: skip
    """Wait until a flag of this rank's memory has reached the epoch; 0 if it did not within limit (ns, or polls).

    All threads go by what one of them read. Whoever is the first to give up reports it, and points this rank's stores
    to its own memory from the next launch on: peers must not take what it sends out of step for data of their calls.
    """
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if _late(seen, epoch):
        abort = words(own + _ABORT)  # bit 0: a wait is over its time; bit 1: and that was reported
        polls, state = (seen * 0).to(tl.int64), seen * 0
        begin = _clock(polls, REAL)
        while _late(seen, epoch) & (state == 0):
            look = polls + 32
            while _late(seen, epoch) & (polls < look):
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                polls += 1
            if _late(seen, epoch):
                over = (_clock(polls, REAL) - begin >= limit).to(tl.int32)
                state = tl.atomic_or(abort, over, sem="relaxed", scope="gpu")
        if _late(seen, epoch):
            if tl.atomic_cas(abort, 1, 3) == 1:
                tl.store(status + 1, phase)
                tl.store(status + 2, source)
                tl.store(status + 3, epoch)
                tl.store(status + 4, seen)
                for i in tl.static_range(WORLD):
                    tl.store(peers + i, own)
                tl.atomic_xchg(status, 1, sem="release", scope="sys")
    for _ in range(DELAY):  # of tests: a slow reader, between the wait and the read
        tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    return 1 - _late(seen, epoch).to(tl.int32)


@triton.jit
def arrive(own):
    """Count this program; the epoch of the call, and whether it was the last program to come, which ends the epoch."""
    word = own.to(tl.pointer_type(tl.int64))
    before = tl.atomic_add(word, 1, sem="relaxed", scope="gpu")
    epoch = (before >> 32) + 1
    if (before & 0xFFFFFFFF) == tl.num_programs(0) - 1:
        tl.atomic_xchg(word, epoch << 32, sem="relaxed", scope="gpu")
    return epoch.to(tl.int32)


@triton.jit
def publish(peers, rank, to, block, epoch, STAGE: tl.constexpr, TO_ALL: tl.constexpr, WORLD: tl.constexpr):
    """Set the flag of a block, in the memory of all or of rank `to`, once all of the program's stores are done."""
    tl.debug_barrier()
    at = FLAGS_AT + STAGE * STAGE_AT + 4 * (rank * BLOCKS + block)
    if TO_ALL:
        for i in tl.static_range(WORLD):
            tl.atomic_xchg(words(tl.load(peers + i) + at), epoch, sem="release", scope="sys")
    else:
        tl.atomic_xchg(words(tl.load(peers + to) + at), epoch, sem="release", scope="sys")
