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
FLAGS_AT, ABORT_AT, DATA_AT = (tl.constexpr(at) for at in (FLAGS, ABORT, DATA))


@triton.jit
def bytes_at(address):
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def words(address):
    return address.to(tl.pointer_type(tl.int32))


@triton.jit
def long_words(address):
    return tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def home(source, rank, own, local):
    """Where what comes from a rank arrives."""
    return tl.where(source == rank, local, own)


@triton.jit
def clock(polls, REAL: tl.constexpr):
    if REAL:
        return tl.extra.cuda.globaltimer()
    else:
        return polls


@triton.jit
def _late(flag, epoch, MAPPED: tl.constexpr):
    """1 while a flag is neither of this call nor of the next one, in which a peer may be already; one thread reads it.

    Mapped host memory takes plain loads and stores: a read-modify-write over PCIe may not be atomic. A pause between
    two of them leaves the link to the data.
    """
    if MAPPED:
        return tl.inline_asm_elementwise("""{
            .reg .pred p, q; .reg .b32 t;
            mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; setp.ne.u32 q, t, t;
            @!p bra known;
            ld.acquire.sys.global.b32 t, [$1]; sub.s32 t, t, $2; and.b32 t, t, -2; setp.ne.s32 q, t, 0;
            @q nanosleep.u32 100;
            known: barrier.sync.aligned 0; barrier.red.or.pred q, 0, q;
            selp.b32 $0, 1, 0, q; }""", "=r,l,r", [flag.to(tl.int64), epoch], tl.int32, False, 1)  # fmt: skip
    else:
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        return (((seen - epoch) & -2) != 0).to(tl.int32)


@triton.jit
def _set(flag, value, MAPPED: tl.constexpr):
    """Store a flag behind all of this program's stores."""
    if MAPPED:
        tl.inline_asm_elementwise("""{
            .reg .pred p; .reg .b32 t;
            mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p st.release.sys.global.b32 [$1], $2;
            mov.b32 $0, 0; }""", "=r,l,r", [flag.to(tl.int64), value], tl.int32, is_pure=False, pack=1)  # fmt: skip
    else:
        tl.atomic_xchg(flag, value, sem="release", scope="sys")


@triton.jit
def give_up(phase, source, epoch, seen, local, peers, status, WORLD: tl.constexpr, REAL: tl.constexpr):
    """Of a wait that is over its time. Whoever is the first reports it, and points this rank's stores to its own memory
    from the next launch on: peers must not take what it sends out of step for data of their calls.
    """
    if tl.atomic_cas(words(local + ABORT_AT), 1, 3) == 1:
        tl.store(status + 1, phase)
        tl.store(status + 2, source)
        tl.store(status + 3, epoch)
        tl.store(status + 4, seen)
        for i in tl.static_range(WORLD):
            tl.store(peers + i, local)
        _set(status, epoch * 0 + 1, REAL)  # host memory, whatever peers write to


@triton.jit
def wait(flag, epoch, phase, source, local, peers, status, limit, WORLD: tl.constexpr, REAL: tl.constexpr,
         MAPPED: tl.constexpr, DELAY: tl.constexpr):  # fmt: skip
    """Wait until a flag of this rank's memory has reached the epoch; 0 if it did not within limit (ns, or polls).

    All threads go by what one of them read.
    """
    late = _late(flag, epoch, MAPPED)
    if late != 0:
        abort = words(local + ABORT_AT)  # bit 0: a wait is over its time; bit 1: and that was reported
        polls, state = (late * 0).to(tl.int64), late * 0
        begin = clock(polls, REAL)
        while (late != 0) & (state == 0):
            look = polls + 32
            while (late != 0) & (polls < look):
                late = _late(flag, epoch, MAPPED)
                polls += 1
            if late != 0:
                over = (clock(polls, REAL) - begin >= limit).to(tl.int32)
                state = tl.atomic_or(abort, over, sem="relaxed", scope="gpu")
        if late != 0:
            give_up(phase, source, epoch, tl.load(flag, volatile=True), local, peers, status, WORLD, REAL)
    for _ in range(DELAY):  # of tests: a slow reader, between the wait and the read
        late |= _late(flag, epoch, MAPPED) & late
    tl.debug_barrier()
    return 1 - late


@triton.jit
def arrive(local):
    """Count this program; the epoch of the call, and whether it was the last program to come, which ends the epoch."""
    word = local.to(tl.pointer_type(tl.int64))
    before = tl.atomic_add(word, 1, sem="relaxed", scope="gpu")
    epoch = (before >> 32) + 1
    if (before & 0xFFFFFFFF) == tl.num_programs(0) - 1:
        tl.atomic_xchg(word, epoch << 32, sem="relaxed", scope="gpu")
    return epoch.to(tl.int32)


@triton.jit
def publish(peers, rank, to, block, epoch, STAGE: tl.constexpr, TO_ALL: tl.constexpr, WORLD: tl.constexpr,
            MAPPED: tl.constexpr):  # fmt: skip
    """Set the flag of a block, in the memory of all or of rank `to`, once all of the program's stores are done."""
    tl.debug_barrier()
    at = FLAGS_AT + STAGE * STAGE_AT + 4 * (rank * BLOCKS + block)
    if TO_ALL:
        for i in tl.static_range(WORLD):
            _set(words(tl.load(peers + i) + at), epoch, MAPPED)
    else:
        _set(words(tl.load(peers + to) + at), epoch, MAPPED)
