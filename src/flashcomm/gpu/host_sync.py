"""How the programs of `host_kernel` learn what has been stored: the words in memory, publisher, relays and waiting.

| word                   | memory | written by             | read by          | what it says                                  |
|------------------------|--------|------------------------|------------------|-----------------------------------------------|
| progress[stage][worker]| GPU    | a worker, release.gpu  | the publisher    | how many waves the worker has stored          |
| flag[stage]            | host   | publisher, release.sys | relays of peers  | how many waves are in the outbox              |
| seen[stage][peer]      | GPU    | its relay, release.gpu | workers          | the last value of the peer's flag             |

Why a tile is visible once its wave has been seen. Each word is written by a release and read by an acquire: worker to
publisher at GPU scope, publisher to relay at system scope, relay to worker at GPU scope. In the PTX memory model such a
chain is transitive. Within a program a barrier stands between the stores of all threads and the release of one thread,
and between the acquire of one thread and the loads of all.

Why no word is ever reset. A word holds epoch * MAX_WAVES + waves, and the epoch is the number of the call. Words are
compared by signed 32-bit differences. A word that is 2^31, or 2^19 calls, behind would look as if it were ahead, so no
word may fall that far behind. Therefore calls with a second stage have a counter of their own, for the words of that
stage. And the publisher moves the words of workers that a launch does not have to the current call. Epochs are counted
in GPU memory, so that CUDA graphs replay correctly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashcomm.gpu.sync import ABORT, clock, give_up, ints_at, rank_of, set_flag
from flashcomm.gpu.tile import scalar

MAX_WAVES = 4096  # of a launch
MAX_WORKERS = 128
# The state in GPU memory: counters of calls at bytes 0 and 64, `seen` at 128, `progress` at 1024.
STATE_BYTES = 1024 + 2 * 4 * MAX_WORKERS
OUTBOX = 4096  # offset in bytes of the outbox in a rank's shared memory; the flags come before it
GAVE_UP = tl.constexpr(1 << 29)  # a number of waves, in `seen`, that no launch reaches
_ABORT, _MAX_WORKERS = tl.constexpr(ABORT), tl.constexpr(MAX_WORKERS)
_FLAG_STAGE, _SEEN, _SEEN_STAGE, _PROGRESS = tl.constexpr(128), tl.constexpr(128), tl.constexpr(64), tl.constexpr(1024)


class Counter(NamedTuple):
    """A counter of calls, as `sync.arrive` expects it."""

    local: Any  # the address of the count, an int64


class Outbox(NamedTuple):
    """Run-time values of a kernel: where the outboxes and the words are, and how many workers there are."""

    table: Any  # int64 (WORLD_SIZE,): the address of each rank's shared memory
    own: Any  # address of `Message.epoch_bytes` of GPU memory: a copy of the wire bytes that this rank decodes itself
    state: Any  # address of STATE_BYTES of GPU memory, zero before the first call
    calls: Any  # a Counter of all calls
    two_stage_calls: Any  # a Counter of the calls with two stages
    n_workers: Any


@triton.jit
def _least(words, n, base, N: tl.constexpr, MAY_GIVE_UP: tl.constexpr):
    """Return the least of n <= N words in GPU memory, minus base.

    The read is an acquire: all that the writers stored before they released their words is visible afterwards. With
    MAY_GIVE_UP the result is GAVE_UP as soon as one of the words says so, whatever the others are.
    """
    if N == 1:
        return tl.atomic_add(words, 0, sem="acquire", scope="gpu") - base
    else:
        at = tl.arange(0, N)
        waves = tl.atomic_add(words + at, at * 0, mask=at < n, sem="acquire", scope="gpu") - base
        least = tl.min(tl.where(at < n, waves, 0x7FFFFFFF))
        if MAY_GIVE_UP:
            gave_up = tl.max(((at < n) & (waves >= GAVE_UP // 2)).to(tl.int32))
            least = tl.where(gave_up != 0, GAVE_UP, least)
        return least


@triton.jit
def _relay(flag, seen, ranks: tl.constexpr):
    """Copy a peer's flag from host memory to the word `seen` in GPU memory, and return its value to all threads."""
    if ranks.CLOCK:  # plain loads and stores, because a read-modify-write over PCIe may not be atomic
        tl.inline_asm_elementwise("""{
            .reg .pred p; .reg .b32 t;
            mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
            @p ld.acquire.sys.global.b32 t, [$1];
            @p st.release.gpu.global.b32 [$2], t;
            mov.b32 $0, 0; }""", "=r,l,l", [flag.to(tl.int64), seen.to(tl.int64)], tl.int32, is_pure=False, pack=1)  # fmt: skip
        return tl.atomic_add(seen, 0, sem="relaxed", scope="gpu")  # thread 0 reads the value that it has just stored
    else:
        value = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        tl.atomic_xchg(seen, value, sem="release", scope="gpu")
        return value


@triton.jit
def watch(peer, bases, want1, want2, epoch, region, outbox, ranks: tl.constexpr, STAGES: tl.constexpr):
    """The role relay: copy a peer's flags until it has published the wanted waves of both stages.

    If the peer publishes nothing new within the limit, or another program has given up, report that and give up.
    """
    source, base1, base2 = rank_of(peer, region), bases[0], bases[1]
    flag = tl.load(outbox.table + source)
    seen1, seen2 = ints_at(outbox.state + _SEEN + 4 * peer), ints_at(outbox.state + _SEEN + _SEEN_STAGE + 4 * peer)
    abort = ints_at(region.local + _ABORT)
    got1, got2, last = scalar(-1, like=base1), scalar(-1, like=base1), scalar(0, like=base1)
    polls, given_up = scalar(0, like=base1).to(tl.int64), tl.atomic_or(abort, 0, sem="relaxed", scope="gpu")
    begin = clock(polls, ranks)
    while ((got1 < want1) | (got2 < want2)) & (given_up == 0):
        got1 = _relay(ints_at(flag), seen1, ranks) - base1
        got2 = want2
        if STAGES == 2:
            got2 = _relay(ints_at(flag + _FLAG_STAGE), seen2, ranks) - base2
        polls += 1
        if got1 + got2 != last:
            begin, last = clock(polls, ranks), got1 + got2
        elif polls % 32 == 0:
            over = (clock(polls, ranks) - begin >= region.limit).to(tl.int32)
            given_up = over | tl.atomic_or(abort, over, sem="relaxed", scope="gpu")
    if given_up != 0:
        in_stage1 = (got1 < want1).to(tl.int32)
        least = tl.where(in_stage1 != 0, got1, got2)
        if ranks.CLOCK:  # a peer that itself waits for another one is late, too: report the one that is furthest behind
            for other in tl.static_range(ranks.WORLD_SIZE - 1):
                got = tl.load(ints_at(outbox.state + _SEEN + 4 * other), volatile=True) - base1
                if (got < want1) & ((in_stage1 == 0) | (got < least)):
                    least, source, in_stage1 = got, rank_of(other, region), scalar(1, like=in_stage1)
        give_up(tl.where(in_stage1 != 0, 1, 2), source, epoch, epoch + (least >> 12), region, ranks)
        tl.atomic_xchg(seen1, base1 + GAVE_UP, sem="release", scope="gpu")
        tl.atomic_xchg(seen2, base2 + GAVE_UP, sem="release", scope="gpu")


@triton.jit
def _publish(waves, region, outbox, ranks: tl.constexpr, STAGE: tl.constexpr):
    """Set this rank's flag in host memory, behind all stores visible here, unless the rank has given up."""
    if tl.atomic_or(ints_at(region.local + _ABORT), 0, sem="relaxed", scope="gpu") == 0:
        tl.debug_barrier()
        set_flag(ints_at(tl.load(outbox.table + region.rank) + _FLAG_STAGE * STAGE), waves, ranks)


@triton.jit
def publish_all(n_waves, bases, region, outbox, ranks: tl.constexpr, STAGES: tl.constexpr):
    """The role publisher: publish every wave of both stages once all workers have stored it.

    First it moves the words of workers that this launch does not have to the current call. Otherwise such a word could
    be 2^19 calls old in a launch that has the worker again. It would then look like a worker that is far ahead.
    """
    base1, base2 = bases[0], bases[1]
    progress1 = ints_at(outbox.state + _PROGRESS)
    progress2 = ints_at(outbox.state + _PROGRESS + 4 * _MAX_WORKERS)
    at = tl.arange(0, _MAX_WORKERS)
    tl.store(progress1 + at, at * 0 + base1, mask=at >= outbox.n_workers)
    if STAGES == 2:
        tl.store(progress2 + at, at * 0 + base2, mask=at >= outbox.n_workers)
    published1, published2 = scalar(0, like=n_waves), n_waves * (2 - STAGES)
    while (published1 < n_waves) | (published2 < n_waves):
        if published1 < n_waves:
            done1 = _least(progress1, outbox.n_workers, base1, _MAX_WORKERS, False)
            if done1 > published1:
                _publish(base1 + done1, region, outbox, ranks, 0)
                published1 = done1
        if STAGES == 2:
            done2 = _least(progress2, outbox.n_workers, base2, _MAX_WORKERS, False)
            if done2 > published2:
                _publish(base2 + done2, region, outbox, ranks, 1)
                published2 = done2


@triton.jit
def count(worker, waves, region, outbox, ranks: tl.constexpr, STAGE: tl.constexpr):
    """Set a worker's progress word: it has stored its tiles of all waves up to this one."""
    tl.debug_barrier()
    progress = ints_at(outbox.state + _PROGRESS + 4 * _MAX_WORKERS * STAGE)
    tl.atomic_xchg(progress + worker, waves, sem="release", scope="gpu")
    if not ranks.CLOCK:
        _publish(waves, region, outbox, ranks, STAGE)


@triton.jit
def wait(reached, want, bases, epoch, region, outbox, ranks: tl.constexpr, STAGE: tl.constexpr):
    """Wait until all peers have published `want` waves of a stage.

    Returns:
        The number of waves that all peers have published: `reached`, if that is enough. About GAVE_UP if a peer was
        given up.
    """
    W: tl.constexpr = ranks.WORLD_SIZE
    N: tl.constexpr = 1 if W <= 2 else 2 if W <= 3 else 4 if W <= 5 else 8 if W <= 9 else 16
    seen, base = ints_at(outbox.state + _SEEN + _SEEN_STAGE * STAGE), bases[STAGE]
    if not ranks.CLOCK:
        none = scalar(-GAVE_UP, like=want)
        for peer in tl.static_range(ranks.WORLD_SIZE - 1):
            want1, want2 = want if STAGE == 0 else none, want if STAGE == 1 else none
            watch(peer, bases, want1, want2, epoch, region, outbox, ranks, 2)
    while reached < want:
        reached = _least(seen, ranks.WORLD_SIZE - 1, base, N, True)
    for _ in range(ranks.DELAY):
        reached = tl.maximum(reached, _least(seen, ranks.WORLD_SIZE - 1, base, N, True))
    tl.debug_barrier()
    return reached
