"""The kernel of all four collectives through host memory, for GPUs without peer access: one launch, few programs.

A rank stores its quantized tiles into its *outbox*, pinned host memory that every rank maps, and loads those of its peers.
The grid stays on the GPU until the call is done:

| programs            | role        | what it does                                                                        |
|---------------------|-------------|-------------------------------------------------------------------------------------|
| 0                   | publisher   | sets this rank's flag in host memory once all workers have stored a wave of tiles   |
| 1 to WORLD_SIZE - 1 | relay       | polls the flag of one peer, and repeats it in GPU memory                            |
| all others          | worker      | quantizes, stores, loads and sums tile i * n_workers + worker of every wave i       |

In step i a worker first issues its loads of the peers' tiles of wave i - stage_lag. Then it quantizes and stores its own
tile of wave i and counts it. Last it sums what it has loaded. Loads and stores of the same threads, loads first, keep both
directions of a PCIe link busy; separate readers and writers do not, because reads queue behind writes. Two-shot has a
second stage, in which workers load the quantized sums stage_lag waves later still. For the own part ranks decode the bytes
that they sent, of which they keep a copy in GPU memory.

| word                   | memory | written by             | read by          | says                                          |
|------------------------|--------|------------------------|------------------|-----------------------------------------------|
| progress[stage][worker]| GPU    | a worker, release.gpu  | the publisher    | waves that the worker has stored              |
| flag[stage]            | host   | publisher, release.sys | relays of peers  | waves that are in the outbox                  |
| seen[stage][peer]      | GPU    | its relay, release.gpu | workers          | what the peer's flag says                     |

So no worker waits for a system-scope fence or reads a flag over PCIe. Words hold epoch * MAX_WAVES + waves and are compared
by signed differences, so none is ever reset. Epochs are counted in GPU memory, so that CUDA graphs replay correctly. Calls
with a second stage are counted apart for its words, because a word must not fall behind by half of what 32 bits count.

Why the waiting ends. A relay ends when its peer has published all waves, or it gives up after the limit and says so in
`seen`. A worker in step i waits only for waves of the peers that they store in earlier steps, so the first unfinished step
of all ranks waits for nobody. The publisher waits for workers. All this needs the whole grid on the GPU at once: it is a
few dozen programs, and the first to start are those that others wait for. Kernels of other streams end, and leave their
place to programs that did not fit. Only kernels that wait for other ranks might not: Communicators that run on different
streams at the same time must fit on the GPU together.

Why no outbox is overwritten while a peer reads it. Outboxes of even and odd epochs lie apart. A rank in epoch e + 2 has
ended epoch e + 1. In that epoch it saw every peer publish a wave, and a peer does so only after its own epoch e has ended,
all loads included. So a peer may be late by one call, and no closing barrier is needed. A rank that has given up stores
into GPU memory and publishes nothing, from the next launch on: a late peer must not take its bytes for those of a call
that it missed.

In Triton's interpreter, which runs programs one after the other, a grid of one worker publishes and relays by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashcomm.gpu.collective_kernel import (
    ALL_GATHER,
    REDUCE_SCATTER,
    TWO_SHOT,
    inbox_of,
    load_tile,
    tile_at,
    values_at,
)
from flashcomm.gpu.sync import ABORT, arrive, bytes_at, clock, give_up, ints_at, set_flag
from flashcomm.gpu.tile import (
    Step,
    expand,
    fetch_plane,
    from_hadamard,
    hadamard,
    in_order,
    plane_offset,
    put,
    scalar,
    store,
)

MAX_WAVES = 4096  # of a call
MAX_WORKERS = 128
STATE_BYTES = (
    1024 + 2 * 4 * MAX_WORKERS
)  # of GPU memory: counts of calls at 0 and 64, `seen` at 128, `progress` at 1024
OUTBOX = 4096  # bytes into a rank's shared memory; flags come before it
_GAVE_UP = tl.constexpr(1 << 29)  # waves, in `seen`: more than any call has
_MAX_WAVES, _MAX_WORKERS, _ABORT = tl.constexpr(MAX_WAVES), tl.constexpr(MAX_WORKERS), tl.constexpr(ABORT)
_FLAG_STAGE, _SEEN, _SEEN_STAGE, _PROGRESS = tl.constexpr(128), tl.constexpr(128), tl.constexpr(64), tl.constexpr(1024)
_ALL_GATHER, _REDUCE_SCATTER, _TWO_SHOT = tl.constexpr(ALL_GATHER), tl.constexpr(REDUCE_SCATTER), tl.constexpr(TWO_SHOT)


class Steps(NamedTuple):
    """Constants of a kernel: how the two stages code tiles, each one a `tile.Step`. all_gather has only the second."""

    reduce: Step
    gather: Step


class Counter(NamedTuple):
    """What `sync.arrive` counts in."""

    local: Any


class Outbox(NamedTuple):
    """Run-time values of a kernel: where outboxes and words are, and how many programs work."""

    table: Any  # int64 (WORLD_SIZE,): addresses of everybody's shared memory
    own: Any  # address of GPU memory of `Message.epoch_bytes`: a copy of what this rank decodes of its own
    state: Any  # address of STATE_BYTES of GPU memory, zero before the first call
    calls: Any  # a Counter
    two_stage_calls: Any  # a Counter
    n_workers: Any


@triton.jit
def _least(words, n, base, N: tl.constexpr, MAY_GIVE_UP: tl.constexpr):
    """Return the least of n <= N words in GPU memory, minus base.

    The read is an acquire: all that the writers stored before they released their words is visible afterwards. With
    MAY_GIVE_UP the result is _GAVE_UP as soon as one of the words says so, whatever the others are.
    """
    if N == 1:
        return tl.atomic_add(words, 0, sem="acquire", scope="gpu") - base
    else:
        at = tl.arange(0, N)
        waves = tl.atomic_add(words + at, at * 0, mask=at < n, sem="acquire", scope="gpu") - base
        least = tl.min(tl.where(at < n, waves, 0x7FFFFFFF))
        if MAY_GIVE_UP:
            gave_up = tl.max(((at < n) & (waves >= _GAVE_UP // 2)).to(tl.int32))
            least = tl.where(gave_up != 0, _GAVE_UP, least)
        return least


@triton.jit
def _relay(flag, seen, ranks: tl.constexpr):
    """Repeat a flag of a peer in GPU memory. All threads get the same value of it."""
    if ranks.CLOCK:  # host memory takes plain loads and stores: a read-modify-write over PCIe may not be atomic
        tl.inline_asm_elementwise("""{
            .reg .pred p; .reg .b32 t;
            mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
            @p ld.acquire.sys.global.b32 t, [$1];
            @p st.release.gpu.global.b32 [$2], t;
            mov.b32 $0, 0; }""", "=r,l,l", [flag.to(tl.int64), seen.to(tl.int64)], tl.int32, is_pure=False, pack=1)  # fmt: skip
        return tl.atomic_add(seen, 0, sem="relaxed", scope="gpu")  # by the same thread
    else:
        value = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        tl.atomic_xchg(seen, value, sem="release", scope="gpu")
        return value


@triton.jit
def _rank_of(peer, region):
    """The rank of a peer, of those that are numbered without this one."""
    peer = scalar(0, like=region.rank) + peer
    return peer + (peer >= region.rank).to(tl.int32)


@triton.jit
def _watch(peer, bases, want1, want2, epoch, region, outbox, ranks: tl.constexpr, STAGES: tl.constexpr):
    """The role relay: until a peer has published the wanted waves of both stages, or nothing new for the limit."""
    source, base1, base2 = _rank_of(peer, region), bases[0], bases[1]
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
                    least, source, in_stage1 = got, _rank_of(other, region), scalar(1, like=in_stage1)
        give_up(tl.where(in_stage1 != 0, 1, 2), source, epoch, epoch + (least >> 12), region, ranks)
        tl.atomic_xchg(seen1, base1 + _GAVE_UP, sem="release", scope="gpu")
        tl.atomic_xchg(seen2, base2 + _GAVE_UP, sem="release", scope="gpu")


@triton.jit
def _publish(waves, region, outbox, ranks: tl.constexpr, STAGE: tl.constexpr):
    """Set this rank's flag in host memory behind all that is visible here, unless the rank has given up."""
    if tl.atomic_or(ints_at(region.local + _ABORT), 0, sem="relaxed", scope="gpu") == 0:
        tl.debug_barrier()
        set_flag(ints_at(tl.load(outbox.table + region.rank) + _FLAG_STAGE * STAGE), waves, ranks.CLOCK)


@triton.jit
def _publish_all(n_waves, bases, region, outbox, ranks: tl.constexpr, STAGES: tl.constexpr):
    """The role publisher: publish every wave of both stages once all workers have stored it.

    First it moves the words of workers that this launch does not have to the current call. Left alone, such a word
    would fall behind by half of what 32 bits count after 2^19 calls, and then look like a worker that is far ahead.
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
def _count(worker, waves, region, outbox, ranks: tl.constexpr, STAGE: tl.constexpr):
    """Tell the publisher that a worker has stored its tiles of a wave."""
    tl.debug_barrier()
    progress = ints_at(outbox.state + _PROGRESS + 4 * _MAX_WORKERS * STAGE)
    tl.atomic_xchg(progress + worker, waves, sem="release", scope="gpu")
    if not ranks.CLOCK:
        _publish(waves, region, outbox, ranks, STAGE)


@triton.jit
def _wait(reached, want, bases, epoch, region, outbox, ranks: tl.constexpr, STAGE: tl.constexpr):
    """Wait until all peers have published so many waves of a stage.

    Returns:
        The waves they all have published: `reached` if those are enough; about _GAVE_UP if they never will be.
    """
    W: tl.constexpr = ranks.WORLD_SIZE
    N: tl.constexpr = 1 if W <= 2 else 2 if W <= 3 else 4 if W <= 5 else 8 if W <= 9 else 16
    seen, base = ints_at(outbox.state + _SEEN + _SEEN_STAGE * STAGE), bases[STAGE]
    if not ranks.CLOCK:
        none = scalar(-_GAVE_UP, like=want)
        for peer in tl.static_range(ranks.WORLD_SIZE - 1):
            want1, want2 = want if STAGE == 0 else none, want if STAGE == 1 else none
            _watch(peer, bases, want1, want2, epoch, region, outbox, ranks, 2)
    while reached < want:
        reached = _least(seen, ranks.WORLD_SIZE - 1, base, N, True)
    for _ in range(ranks.DELAY):
        reached = tl.maximum(reached, _least(seen, ranks.WORLD_SIZE - 1, base, N, True))
    tl.debug_barrier()
    return reached


@triton.jit
def _fetch(source, place, x, here, region, outbox, step: tl.constexpr):
    """Rank `source`'s tile as it lies there, for `expand` after more loads; nothing is loaded unless `here`.

    place: where the tile is, in bytes into a peer's shared memory, and the address of this rank's copy of its own.
    """
    base = bytes_at(tl.where(region.rank == source, place[1], tl.load(outbox.table + source) + place[0]))
    if step.BITS == 16:
        at = in_order(step, step.LANES)
        values = base.to(tl.pointer_type(x.dtype.element_ty)) + at
        return (tl.load(values, mask=(at >= 0) & here, other=0.0, cache_modifier=".cg"),)
    else:
        b = tl.arange(0, step.GROUPS)
        keep = (b >= 0) & here
        raw = ()
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                plane = base + plane_offset(8 >> i, step)
                raw = raw + (fetch_plane(plane, b * step.LANES, keep, step.GROUPS * step.LANES, 8 >> i, ".cg", step),)
        words = (base + plane_offset(0, step)).to(tl.pointer_type(tl.int32 if step.BITS > 5 else tl.int16))
        return raw + (tl.load(words + b, mask=keep, other=0, cache_modifier=".cg"),)


@triton.jit
def _fetch_first(place, x, here, region, outbox, ranks: tl.constexpr, step: tl.constexpr):
    """The tiles of the first ranks, as many as registers are spent on before they are needed."""
    raws = ()
    for i in tl.static_range(min(ranks.WORLD_SIZE, 4)):
        raws = raws + (_fetch(i, place, x, here, region, outbox, step),)
    return raws


@triton.jit
def _sum(raws, reached, place, x, region, outbox, ranks: tl.constexpr, step: tl.constexpr):
    """The sum of everybody's tile in rank order, float32; NaN if peers never came. Products are exact: fma changes no bit."""
    total = tl.zeros((step.GROUPS, step.PIECES, step.LANES), tl.float32)
    for i in tl.static_range(ranks.WORLD_SIZE):
        raw = raws[i] if i < len(raws) else _fetch(i, place, x, reached >= 0, region, outbox, step)
        steps, scale = expand(raw, step)
        scale = tl.where(reached < _GAVE_UP // 2, scale, float("nan"))
        if i == 0:
            total = steps * scale[:, None, None]
        else:
            total = tl.fma(steps, tl.broadcast_to(scale[:, None, None], total.shape), total)
    return total


@triton.jit
def _send(y, at, base, own, out, call: tl.constexpr, step: tl.constexpr, COPY: tl.constexpr):
    """Quantize a tile to `at` bytes behind base and, if COPY, behind own."""
    n = tl.full((step.GROUPS,), step.PIECES * step.LANES, tl.int32)
    put(bytes_at(base + at), y, n, out, step, call.BF16)
    if COPY:
        put(bytes_at(own + at), y, n, out, step, call.BF16)


@triton.jit
def _encode(x, out, y, tile, outbox_address, region, outbox, message, call: tl.constexpr, ranks: tl.constexpr,
            step: tl.constexpr):  # fmt: skip
    """Quantize this rank's tile y of a wave; where shards have destinations, the tiles of all shards of x instead."""
    if call.ALGORITHM == _TWO_SHOT or call.ALGORITHM == _REDUCE_SCATTER:
        for target in range(ranks.WORLD_SIZE):
            shard = scalar(0, like=region.rank) + target
            y = load_tile(x, tile, shard, message, call, step)
            if step.HADAMARD:
                y = hadamard(y, step)
            sent = outbox_address + (shard * message.n_tiles + tile).to(tl.int64) * step.BYTES
            base = tl.where(shard == region.rank, outbox.own + tile.to(tl.int64) * step.BYTES, sent)
            _send(y, scalar(0, like=sent), base, base, out, call, step, False)
    else:
        if step.HADAMARD:
            y = hadamard(y, step)
        _send(y, tile.to(tl.int64) * step.BYTES, outbox_address, outbox.own, out, call, step, True)


@triton.jit
def _work(x, out, worker, n_waves, bases, epoch, region, outbox, message, call: tl.constexpr, ranks: tl.constexpr,
          steps: tl.constexpr):  # fmt: skip
    """The role worker."""
    SHARDED: tl.constexpr = call.ALGORITHM == _TWO_SHOT or call.ALGORITHM == _REDUCE_SCATTER
    GATHERS_FIRST: tl.constexpr = call.ALGORITHM == _ALL_GATHER
    STAGES: tl.constexpr = 2 if call.ALGORITHM == _TWO_SHOT else 1
    reduce: tl.constexpr = steps.reduce
    gather: tl.constexpr = steps.gather
    first: tl.constexpr = gather if GATHERS_FIRST else reduce
    lag = message.stage_lag
    data = inbox_of(epoch, message)
    given_up = tl.atomic_or(ints_at(region.local + _ABORT), 0, sem="relaxed", scope="gpu") != 0
    sent = tl.where(given_up, outbox.own, tl.load(outbox.table + region.rank) + data)
    none = scalar(0, like=region.rank)
    reached1, reached2 = none, none
    for i in range(n_waves + lag * STAGES):
        tile = i * outbox.n_workers + worker
        tile1, tile2 = tile - lag * outbox.n_workers, tile - 2 * lag * outbox.n_workers
        has1, has2 = (i >= lag) & (tile1 < message.n_tiles), (i >= 2 * lag) & (tile2 < message.n_tiles)
        y = tl.zeros((first.GROUPS, first.PIECES, first.LANES), tl.float32)
        if not SHARDED:
            y = load_tile(x, tl.minimum(tile, message.n_tiles - 1), none, message, call, first)

        if has1:
            reached1 = _wait(reached1, i - lag + 1, bases, epoch, region, outbox, ranks, 0)
        shard_tile = (region.rank * message.n_tiles if SHARDED else none) + tile1
        place1 = (data + shard_tile.to(tl.int64) * first.BYTES, outbox.own + tile1.to(tl.int64) * first.BYTES)
        raws1 = _fetch_first(place1, x, has1, region, outbox, ranks, first)
        if STAGES == 2:
            if has2:
                reached2 = _wait(reached2, i - 2 * lag + 1, bases, epoch, region, outbox, ranks, 1)
            offset2 = message.stage2_offset + tile2.to(tl.int64) * gather.BYTES
            place2 = (data + offset2, outbox.own + offset2)
            raws2 = _fetch_first(place2, x, has2, region, outbox, ranks, gather)

        if tile < message.n_tiles:
            _encode(x, out, y, tile, sent, region, outbox, message, call, ranks, first)
        if i < n_waves:
            _count(worker, bases[0] + i + 1, region, outbox, ranks, 0)

        if has1:
            if GATHERS_FIRST:
                _store_all(out, raws1, reached1, tile1, place1, x, region, outbox, message, call, ranks, gather)
            else:
                total = _sum(raws1, reached1, place1, x, region, outbox, ranks, reduce)
                if reduce.HADAMARD and not call.SUM_IN_HADAMARD:
                    total = from_hadamard(total, reduce)
                if STAGES == 2:
                    if reduce.PIECES != gather.PIECES or reduce.LANES != gather.LANES:
                        total = tl.reshape(total, (gather.GROUPS, gather.PIECES, gather.LANES))
                    if gather.HADAMARD and not call.SUM_IN_HADAMARD:
                        total = hadamard(total, gather)
                    at = message.stage2_offset + tile1.to(tl.int64) * gather.BYTES
                    _send(total, at, sent, outbox.own, out, call, gather, True)
                else:
                    unit, left = tile_at(tile1, region.rank if SHARDED else none, message, call)
                    at, keep = values_at(left, call.UNIT, reduce)
                    if SHARDED:  # out is the shard alone
                        unit -= region.rank.to(tl.int64) * message.shard_stride
                    store(out + unit * call.UNIT, at, keep, total, call.BF16)
        if STAGES == 2:
            if (i >= lag) & (i < n_waves + lag):
                _count(worker, bases[1] + i - lag + 1, region, outbox, ranks, 1)
            if has2:
                _store_all(out, raws2, reached2, tile2, place2, x, region, outbox, message, call, ranks, gather)


@triton.jit
def _store_all(out, raws, reached, tile, place, x, region, outbox, message, call: tl.constexpr,
               ranks: tl.constexpr, step: tl.constexpr):  # fmt: skip
    """Decode a tile of every rank's shard to its place in out."""
    for i in tl.static_range(ranks.WORLD_SIZE):
        raw = raws[i] if i < len(raws) else _fetch(i, place, x, reached >= 0, region, outbox, step)
        steps, scale = expand(raw, step)
        y = steps * tl.where(reached < _GAVE_UP // 2, scale, float("nan"))[:, None, None]
        if step.HADAMARD:
            y = from_hadamard(y, step)
        unit, left = tile_at(tile, scalar(0, like=region.rank) + i, message, call)
        at, keep = values_at(left, call.UNIT, step)
        store(out + unit * call.UNIT, at, keep, y, call.BF16)


@triton.jit
def host_collective(x, out, region, outbox, message, call: tl.constexpr, ranks: tl.constexpr, steps: tl.constexpr):
    """One program of a collective.

    Args:
        x, out: the message and the result of this rank, 16-byte aligned; in an all-reduce they may be the same.
        region: a `sync.Region`, of which `own` is not used. outbox: an `Outbox`. message: a `collective_kernel.Message`,
            with a stage_lag of at least 1. call: a `collective_kernel.Collective`. ranks: a `sync.Ranks`.
        steps: a `Steps`.
    """
    STAGES: tl.constexpr = 2 if call.ALGORITHM == _TWO_SHOT else 1
    role = tl.program_id(0)
    if not ranks.CLOCK:
        role += ranks.WORLD_SIZE
    epoch = arrive(outbox.calls)
    bases = (epoch * _MAX_WAVES, epoch * _MAX_WAVES)
    if STAGES == 2:
        bases = (epoch * _MAX_WAVES, arrive(outbox.two_stage_calls) * _MAX_WAVES)
    n_waves = (message.n_tiles + outbox.n_workers - 1) // outbox.n_workers
    if role == 0:
        _publish_all(n_waves, bases, region, outbox, ranks, STAGES)
    elif role < ranks.WORLD_SIZE:
        _watch(role - 1, bases, n_waves, n_waves * (STAGES - 1), epoch, region, outbox, ranks, STAGES)
    else:
        _work(x, out, role - ranks.WORLD_SIZE, n_waves, bases, epoch, region, outbox, message, call, ranks, steps)
