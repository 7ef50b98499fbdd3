"""One persistent kernel through host memory that the ranks share: collectives for GPUs without peer access.

A rank writes its quantized tiles to its *outbox*, pinned host memory that every rank maps, and reads those of its peers.
The grid is small and stays on the GPU until the call is done:

    program 0               the publisher: tells the peers which waves of this rank's tiles are in its outbox
    the next WORLD - 1      relays, one a peer: poll what a peer's publisher told, and repeat it in GPU memory
    the others              workers: worker w has tile i * n_workers + w of *wave* i

In step i a worker starts to load the peers' tiles of wave i - lag, then quantizes and stores its own tile of wave i, counts
it, and last sums what it has loaded. Loads and stores of the same threads, loads first, keep both directions of a PCIe
link busy. Separate readers and writers do not: reads queue behind writes. Two-shot has a second exchange of the sums, whose
tiles are read lag waves later still.

Who makes what visible to whom:

    word               memory  written by             read by            says
    progress[s][w]     GPU     worker w, release.gpu  the publisher      waves of stage s that worker w has stored
    flag[s]            host    publisher, release.sys  relays of peers   waves of stage s that are in the outbox
    seen[s][peer]      GPU     its relay, release.gpu workers            the peer's flag

So only the publisher pays for system-scope fences, one a wave, and only relays read flags over PCIe. All words count
waves on top of epoch * MAX_WAVES, so none is ever reset. They are compared by signed differences. The epoch is counted in
GPU memory, so that CUDA graphs replay.

Why it ends. Relays end when their peer has published all waves, or give up after the time-out and tell the workers. A
worker in step i waits for earlier waves of the peers only, so the first unfinished step of all ranks waits for nobody. The
publisher waits for workers. All of that needs the whole grid to run at once: it is a few dozen programs, and programs
0 to WORLD - 1 start first. Kernels of other streams end by themselves and then leave their place to programs that could not
start yet. Only kernels that wait for other ranks, too, could keep the place: all Communicators that run at the same time on
different streams must fit the GPU together.

Why nothing is overwritten while a peer reads it. Outboxes of even and odd epochs lie apart. A rank in epoch e + 2 has ended
epoch e + 1, in which it has seen every peer publish waves of e + 1, and a peer does so only after its own epoch e, all reads
included, has ended. So a peer may be late by one call. A rank that gave up writes to GPU memory from then on, and
publishes nothing more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcomm.gpu.sync import ABORT_AT, arrive, bytes_at, clock, give_up, words
from flashcomm.gpu.tile import expand, fetch_plane, hadamard, put, quantize, store, widen

ONE_SHOT, TWO_SHOT, REDUCE_SCATTER, ALL_GATHER = range(4)
_TWO_SHOT, _REDUCE_SCATTER, _ALL_GATHER = (tl.constexpr(kind) for kind in (TWO_SHOT, REDUCE_SCATTER, ALL_GATHER))

MAX_WAVES = 4096  # of a call, and of both stages
MAX_WORKERS = 128
SEEN, PROGRESS = 128, 1024  # bytes into a rank's state in GPU memory; the epoch comes first
STATE_BYTES = PROGRESS + 2 * 4 * MAX_WORKERS
OUTBOX = 4096  # bytes into a rank's shared host memory; its flags come first
GAVE_UP = 1 << 29  # waves that a relay tells the workers when it has given up; more than calls can count
_WAVES, _WORKERS, _SEEN_AT, _PROGRESS_AT, _OUTBOX_AT, _GAVE_UP = (
    tl.constexpr(n) for n in (MAX_WAVES, MAX_WORKERS, SEEN, PROGRESS, OUTBOX, GAVE_UP)
)
_SEEN_STAGE, _FLAG_STAGE = tl.constexpr(64), tl.constexpr(128)  # bytes from stage to stage


@triton.jit
def _least(counts, n, N: tl.constexpr, base):
    """The least of n words of GPU memory, less base; what was done before any of them was released is visible."""
    if N == 1:
        return tl.atomic_add(counts, 0, sem="acquire", scope="gpu") - base
    else:
        at = tl.arange(0, N)
        seen = tl.atomic_add(counts + at, at * 0, mask=at < n, sem="acquire", scope="gpu")
        return tl.min(tl.where(at < n, seen - base, 0x7FFFFFFF))


@triton.jit
def _relay(flag, seen, REAL: tl.constexpr):
    """Repeat a peer's flag in GPU memory; what is returned is the same for all threads."""
    if REAL:  # host memory takes plain loads and stores: a read-modify-write over PCIe may not be atomic
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
def _watch(index, rank, epoch, base, base2, want1, want2, table, state, local, peers, status, limit, WORLD: tl.constexpr,
           STAGES: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    """Relay a peer's flags until they have reached the waves wanted of both stages; else give up after limit, in ns
    (REAL) or polls, since the last change.

    index: the peer's place in `seen`, among all ranks but this one.
    """
    peer = index + (rank * 0 + index >= rank).to(tl.int32)
    flag, seen = words(tl.load(table + peer)), words(state + _SEEN_AT + 4 * index)
    seen2, flag2 = words(state + _SEEN_AT + _SEEN_STAGE + 4 * index), words(tl.load(table + peer) + _FLAG_STAGE)
    abort = words(local + ABORT_AT)
    got1, got2, last = base * 0 - 1, base * 0 - 1, base * 0
    polls, state_of = (base * 0).to(tl.int64), tl.atomic_or(abort, 0, sem="relaxed", scope="gpu")
    begin = clock(polls, REAL)
    while ((got1 < want1) | (got2 < want2)) & (state_of == 0):
        got1 = _relay(flag, seen, REAL) - base
        got2 = want2
        if STAGES == 2:
            got2 = _relay(flag2, seen2, REAL) - base2
        polls += 1
        if got1 + got2 != last:
            begin, last = clock(polls, REAL), got1 + got2
        elif polls % 32 == 0:
            over = (clock(polls, REAL) - begin >= limit).to(tl.int32)
            state_of = over | tl.atomic_or(abort, over, sem="relaxed", scope="gpu")
    if state_of != 0:
        late1 = got1 < want1
        least = tl.where(late1, got1, got2)
        if REAL:  # a peer that waits for another one is late, too: report the one that is behind most
            for k in tl.static_range(WORLD - 1):
                other = tl.load(words(state + _SEEN_AT + 4 * k), volatile=True) - base
                if late1 & (other < least):
                    least = other
                    peer = k + (rank * 0 + k >= rank).to(tl.int32)
        give_up(tl.where(late1, 1, 2), peer, epoch, epoch + (least >> 12), local, peers, status, WORLD, REAL)
        tl.atomic_xchg(seen, base + _GAVE_UP, sem="release", scope="gpu")
        tl.atomic_xchg(seen2, base2 + _GAVE_UP, sem="release", scope="gpu")


@triton.jit
def _publish(flag, value, local, REAL: tl.constexpr):
    """Set a flag of this rank in host memory, behind all that is visible to this program; not after giving up."""
    if tl.atomic_or(words(local + ABORT_AT), 0, sem="relaxed", scope="gpu") == 0:
        tl.debug_barrier()
        if REAL:
            tl.inline_asm_elementwise("""{
                .reg .pred p; .reg .b32 t;
                mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p st.release.sys.global.b32 [$1], $2;
                mov.b32 $0, 0; }""", "=r,l,r", [flag.to(tl.int64), value], tl.int32, is_pure=False, pack=1)  # fmt: skip
        else:
            tl.atomic_xchg(flag, value, sem="release", scope="sys")


@triton.jit
def _publisher(base, base2, n_waves, n_workers, rank, table, state, local, STAGES: tl.constexpr, REAL: tl.constexpr):
    """Publish each wave once all workers have stored it."""
    told1, told2, of2 = n_waves * 0, n_waves * 0, n_waves * (STAGES - 1)
    flag = tl.load(table + rank)
    while (told1 < n_waves) | (told2 < of2):
        if told1 < n_waves:
            done1 = _least(words(state + _PROGRESS_AT), n_workers, _WORKERS, base)
            if done1 > told1:
                _publish(words(flag), base + done1, local, REAL)
                told1 = done1
        if STAGES == 2:
            done2 = _least(words(state + _PROGRESS_AT + 4 * _WORKERS), n_workers, _WORKERS, base2)
            if done2 > told2:
                _publish(words(flag + _FLAG_STAGE), base2 + done2, local, REAL)
                told2 = done2


@triton.jit
def _done(worker, value, rank, table, state, local, STAGE: tl.constexpr, REAL: tl.constexpr):
    """Count that a worker has stored its tiles of a wave. In the interpreter it is the only one."""
    tl.debug_barrier()
    tl.atomic_xchg(words(state + _PROGRESS_AT + 4 * _WORKERS * STAGE) + worker, value, sem="release", scope="gpu")
    if not REAL:
        _publish(words(tl.load(table + rank) + _FLAG_STAGE * STAGE), value, local, REAL)


@triton.jit
def _reach(reached, want, epoch, base, base2, rank, table, state, local, peers, status, limit, STAGE: tl.constexpr,
           WORLD: tl.constexpr, NPEERS: tl.constexpr, REAL: tl.constexpr, DELAY: tl.constexpr):  # fmt: skip
    """Wait until all peers have published so many waves of a stage: how many they have; GAVE_UP or so if they never do."""
    counts, never = words(state + _SEEN_AT + _SEEN_STAGE * STAGE), want * 0 - _GAVE_UP
    if not REAL:
        for k in tl.static_range(WORLD - 1):
            _watch(k, rank, epoch, base, base2, want if STAGE == 0 else never, want if STAGE == 1 else never, table,
                   state, local, peers, status, limit, WORLD, 2, REAL)  # fmt: skip
    of = base2 if STAGE == 1 else base
    while reached < want:
        reached = _least(counts, WORLD - 1, NPEERS, of)
    for _ in range(DELAY):  # of tests: a slow reader, between the wait and the read
        reached = tl.maximum(reached, _least(counts, WORLD - 1, NPEERS, of))
    tl.debug_barrier()
    return reached


@triton.jit
def _places(UNIT: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, left):
    """Offsets of a tile's values (B, P, M), and which are in its first `left` units."""
    k = tl.arange(0, B)
    inside = (tl.arange(0, P) * M)[None, :, None] + tl.arange(0, M)[None, None, :]
    return (k * GROUP)[:, None, None] + inside, (k // (UNIT // GROUP) < left)[:, None, None] & (inside >= 0)


@triton.jit
def _span(tile, slice, n_units, slice_units, stride, UNITS: tl.constexpr):
    """The unit of the message at which a tile of a slice begins, and how many units of it exist."""
    unit = tile.to(tl.int64) * UNITS
    first = slice.to(tl.int64) * stride
    return first + unit, tl.minimum(slice_units - unit, n_units - first - unit)


@triton.jit
def _in_order(P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    return (tl.arange(0, B) * (P * M))[:, None, None] + (tl.arange(0, P) * M)[None, :, None] + tl.arange(0, M)[None, None, :]  # fmt: skip


@triton.jit
def _put(base, base2, y, x, HERE: tl.constexpr, THERE, BITS: tl.constexpr, CLIP: tl.constexpr, HAD: tl.constexpr,
         GROUP: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr, BF16: tl.constexpr):  # fmt: skip
    """Quantize y (float32) to a tile at base, if HERE, and at base2, if THERE; uncompressed tiles hold x's dtype."""
    if BITS == 16:
        at = _in_order(P, B, M)
        if HERE:
            store(base.to(tl.pointer_type(x.dtype.element_ty)), at, at >= 0, y, BF16)
        if THERE:
            store(base2.to(tl.pointer_type(x.dtype.element_ty)), at, at >= 0, y, BF16)
    else:
        codes, word, zero = quantize(y, tl.arange(0, B) * 0 + GROUP, BITS, CLIP, HAD, P, B, M)
        if HERE:
            put(base, codes, word, zero, BITS, P, B, M)
        if THERE:
            put(base2, codes, word, zero, BITS, P, B, M)


@triton.jit
def _fetch(base, x, here, keep, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """All of a tile as it lies there, if `here`: for `_expand`, after more loads. keep: of uncompressed values."""
    if BITS == 16:
        values = base.to(tl.pointer_type(x.dtype.element_ty)) + _in_order(P, B, M)
        return (tl.load(values, mask=keep & here, other=0.0, cache_modifier=".cg"),)
    else:
        U: tl.constexpr = 4 if M % 4 == 0 else 1
        b = tl.arange(0, B)
        some = (b >= 0) & here
        raw = ()
        for i in tl.static_range(4):
            if BITS & (8 >> i):
                plane = base + B * P * M * (BITS & (15 ^ ((16 >> i) - 1))) // 8
                raw = raw + (fetch_plane(plane, b * M, some, B * M, 8 >> i, P, M, U, ".cg"),)
        word = (base + B * P * M * BITS // 8).to(tl.pointer_type(tl.int32 if BITS > 5 else tl.int16))
        return raw + (tl.load(word + b, mask=some, other=0, cache_modifier=".cg"),)


@triton.jit
def _expand(raw, ok, BITS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """A tile's values as a product: float32 (B, P, M) and what it is to be multiplied with (B,); NaN unless ok."""
    if BITS == 16:
        return widen(raw[0]), tl.where((tl.arange(0, B) >= 0) & ok, 1.0, float("nan"))
    else:
        steps, scale = expand(raw, BITS, P, B, M)
        return steps, tl.where(ok, scale, float("nan"))


@triton.jit
def _source(i, rank, table, mine, theirs):
    """Where rank i's tile lies: in its outbox, or here if that is this rank."""
    return bytes_at(tl.where(rank == i, mine, tl.load(table + i) + theirs))


_RUN_TIME = ("rank", "n_units", "slice_units", "stride", "n_tiles", "half", "second", "limit", "lag", "local", "n_workers", "state")  # fmt: skip


@triton.jit(do_not_specialize=list(_RUN_TIME))
def persistent(
    x, out, table, peers, status, own, state: tl.int64, local: tl.int64, rank: tl.int32, n_units: tl.int64,
    slice_units: tl.int64, stride: tl.int64, n_tiles: tl.int32, half: tl.int64, second: tl.int64, limit: tl.int64,
    lag: tl.int32, n_workers: tl.int32,
    KIND: tl.constexpr, WORLD: tl.constexpr, NPEERS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    ROTATED: tl.constexpr,
    BITS1: tl.constexpr, CLIP1: tl.constexpr, HAD1: tl.constexpr, GROUP1: tl.constexpr, P1: tl.constexpr,
    BYTES1: tl.constexpr,
    BITS2: tl.constexpr, CLIP2: tl.constexpr, HAD2: tl.constexpr, GROUP2: tl.constexpr, P2: tl.constexpr,
    BYTES2: tl.constexpr,
    REAL: tl.constexpr, DELAY: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """x, out: the message of this rank and the result. table: int64 (WORLD,), addresses of everybody's shared memory.
    own: uint8, GPU memory for `half` bytes: what this rank decodes of its own. state: GPU memory of STATE_BYTES, zeroed
    at first. peers, status, local: of `sync.give_up`.

    Slices begin stride units apart and have slice_units units (the last ones may have fewer, of n_units in all) and
    n_tiles tiles of UNITS units. half: bytes of an epoch's outbox; second: bytes into it at which stage 2 lies. *1 is the
    reduce step, *2 the gather step. limit: of a wait, in ns (REAL) or polls. lag: waves, at least 1.
    """
    B1: tl.constexpr = UNITS * UNIT // GROUP1
    M1: tl.constexpr = GROUP1 // P1
    B2: tl.constexpr = UNITS * UNIT // GROUP2
    M2: tl.constexpr = GROUP2 // P2
    SLICED: tl.constexpr = KIND == _TWO_SHOT or KIND == _REDUCE_SCATTER
    SUMS: tl.constexpr = KIND != _ALL_GATHER
    GATHERS: tl.constexpr = KIND == _TWO_SHOT or KIND == _ALL_GATHER
    STAGES: tl.constexpr = 2 if KIND == _TWO_SHOT else 1
    AHEAD: tl.constexpr = min(WORLD, 4)

    program = tl.program_id(0)
    epoch = arrive(state)
    base = epoch * _WAVES
    base2 = base  # of stage 2: calls that have one are counted apart, so that no count is ever far behind
    if KIND == _TWO_SHOT:
        base2 = arrive(state + 64) * _WAVES
    n_waves = (n_tiles + n_workers - 1) // n_workers
    if not REAL:
        program += WORLD  # the interpreter runs one worker, which publishes and relays by itself
    if program == 0:
        _publisher(base, base2, n_waves, n_workers, rank, table, state, local, STAGES, REAL)
    elif program < WORLD:
        _watch(program - 1, rank, epoch, base, base2, n_waves, n_waves * (STAGES - 1), table, state, local, peers, status,
               limit, WORLD, STAGES, REAL)  # fmt: skip
    else:
        worker = program - WORLD
        parity = _OUTBOX_AT + (epoch & 1).to(tl.int64) * half
        here = own.to(tl.int64)
        given_up = tl.atomic_or(words(local + ABORT_AT), 0, sem="relaxed", scope="gpu") != 0
        outbox = tl.where(given_up, here, tl.load(table + rank) + parity)
        reached1, reached2 = rank * 0, rank * 0
        for i in range(n_waves + lag * STAGES):
            tile = i * n_workers + worker
            tile1 = tile - lag * n_workers  # of which sums are taken, or which is gathered
            tile2 = tile - 2 * lag * n_workers
            has1 = (i >= lag) & (tile1 < n_tiles)
            has2 = (i >= 2 * lag) & (tile2 < n_tiles)
            if not SLICED:
                unit, left = _span(tile, rank * 0, n_units, slice_units, stride, UNITS)
                if KIND == _ALL_GATHER:
                    at, keep = _places(UNIT, GROUP2, P2, B2, M2, left)
                else:
                    at, keep = _places(UNIT, GROUP1, P1, B1, M1, left)
                values = tl.load(x + unit * UNIT + at, mask=keep & (tile < n_tiles), other=0.0)
            if has1:
                reached1 = _reach(reached1, i - lag + 1, epoch, base, base2, rank, table, state, local, peers, status, limit, 0,
                                  WORLD, NPEERS, REAL, DELAY)  # fmt: skip
            raws1 = ()
            unit1, left1 = _span(tile1, rank if SLICED else rank * 0, n_units, slice_units, stride, UNITS)
            if SUMS:
                at1, keep1 = _places(UNIT, GROUP1, P1, B1, M1, left1)
                theirs = parity + ((rank * n_tiles if SLICED else 0) + tile1).to(tl.int64) * BYTES1
                mine = here + tile1.to(tl.int64) * BYTES1
                if BITS1 == 16:
                    mine = (x + unit1 * UNIT).to(tl.int64)
                for k in tl.static_range(AHEAD):
                    raws1 = raws1 + (_fetch(_source(k, rank, table, mine, theirs), x, has1, keep1, BITS1, P1, B1, M1),)
            if KIND == _TWO_SHOT:
                if has2:
                    reached2 = _reach(reached2, i - 2 * lag + 1, epoch, base, base2, rank, table, state, local, peers, status, limit,
                                      1, WORLD, NPEERS, REAL, DELAY)  # fmt: skip
            raws2 = ()
            if GATHERS:
                tile3 = tile2 if KIND == _TWO_SHOT else tile1
                has3 = has2 if KIND == _TWO_SHOT else has1
                _, left3 = _span(tile3, rank, n_units, slice_units, stride, UNITS)
                at3, keep3 = _places(UNIT, GROUP2, P2, B2, M2, left3)
                theirs3 = parity + second + tile3.to(tl.int64) * BYTES2
                mine3 = here + second + tile3.to(tl.int64) * BYTES2
                if KIND == _ALL_GATHER and BITS2 == 16:
                    mine3 = (x + tile3.to(tl.int64) * (UNITS * UNIT)).to(tl.int64)
                for k in tl.static_range(AHEAD):
                    _, left3 = _span(tile3, rank * 0 + k, n_units, slice_units, stride, UNITS)
                    at3, keep3 = _places(UNIT, GROUP2, P2, B2, M2, left3)
                    raws2 = raws2 + (_fetch(_source(k, rank, table, mine3, theirs3), x, has3, keep3, BITS2, P2, B2, M2),)

            if tile < n_tiles:
                if KIND == _ALL_GATHER:
                    y = widen(values)
                    if HAD2:
                        y = hadamard(y, tl.arange(0, B2), P2, B2, M2, False)
                    place = tile.to(tl.int64) * BYTES2
                    _put(bytes_at(here + place), bytes_at(outbox + place), y, x, BITS2 != 16, True, BITS2, CLIP2, HAD2,
                         GROUP2, P2, B2, M2, BF16)  # fmt: skip
                elif SLICED:
                    for target in range(WORLD):
                        slice = rank * 0 + target
                        unit, left = _span(tile, slice, n_units, slice_units, stride, UNITS)
                        at, keep = _places(UNIT, GROUP1, P1, B1, M1, left)
                        y = widen(tl.load(x + unit * UNIT + at, mask=keep, other=0.0))
                        if HAD1:
                            y = hadamard(y, tl.arange(0, B1), P1, B1, M1, False)
                        place = tl.where(
                            slice == rank,
                            here + tile.to(tl.int64) * BYTES1,
                            outbox + (slice * n_tiles + tile).to(tl.int64) * BYTES1,
                        )
                        _put(bytes_at(place), bytes_at(place), y, x, False, True if BITS1 != 16 else slice != rank,
                             BITS1, CLIP1, HAD1, GROUP1, P1, B1, M1, BF16)  # fmt: skip
                else:
                    y = widen(values)
                    if HAD1:
                        y = hadamard(y, tl.arange(0, B1), P1, B1, M1, False)
                    place = tile.to(tl.int64) * BYTES1
                    _put(bytes_at(here + place), bytes_at(outbox + place), y, x, BITS1 != 16, True, BITS1, CLIP1, HAD1,
                         GROUP1, P1, B1, M1, BF16)  # fmt: skip
            if i < n_waves:
                _done(worker, base + i + 1, rank, table, state, local, 0, REAL)

            if SUMS:
                if has1:
                    ok1 = reached1 < _GAVE_UP // 2
                    steps, scale = _expand(raws1[0], ok1, BITS1, P1, B1, M1)
                    total = steps * scale[:, None, None]
                    for k in tl.static_range(1, WORLD):
                        if k < AHEAD:
                            raw = raws1[k]
                        else:
                            raw = _fetch(_source(k, rank, table, mine, theirs), x, has1, keep1, BITS1, P1, B1, M1)
                        steps, scale = _expand(raw, ok1, BITS1, P1, B1, M1)
                        total = tl.fma(steps, tl.broadcast_to(scale[:, None, None], (B1, P1, M1)), total)
                    if HAD1 and not ROTATED:
                        total = hadamard(total, tl.arange(0, B1), P1, B1, M1, False) * (1.0 / GROUP1)
                    if KIND == _TWO_SHOT:
                        if P1 == P2 and M1 == M2:
                            again = total
                        else:
                            again = tl.reshape(total, (B2, P2, M2))
                        if HAD2 and not ROTATED:
                            again = hadamard(again, tl.arange(0, B2), P2, B2, M2, False)
                        place1 = second + tile1.to(tl.int64) * BYTES2
                        _put(bytes_at(here + place1), bytes_at(outbox + place1), again, x, True, True, BITS2, CLIP2,
                             HAD2, GROUP2, P2, B2, M2, BF16)  # fmt: skip
                    elif KIND == _REDUCE_SCATTER:  # out is the slice alone
                        store(out + tile1.to(tl.int64) * (UNITS * UNIT), at1, keep1, total, BF16)
                    else:
                        store(out + unit1 * UNIT, at1, keep1, total, BF16)
                if KIND == _TWO_SHOT:
                    if (i >= lag) & (i < n_waves + lag):
                        _done(worker, base2 + i - lag + 1, rank, table, state, local, 1, REAL)
            if GATHERS:
                if has3:
                    ok3 = (reached2 if KIND == _TWO_SHOT else reached1) < _GAVE_UP // 2
                    for k in tl.static_range(WORLD):
                        begin, left3 = _span(tile3, rank * 0 + k, n_units, slice_units, stride, UNITS)
                        at3, keep3 = _places(UNIT, GROUP2, P2, B2, M2, left3)
                        if k < AHEAD:
                            raw = raws2[k]
                        else:
                            raw = _fetch(_source(k, rank, table, mine3, theirs3), x, has3, keep3, BITS2, P2, B2, M2)
                        steps, scale = _expand(raw, ok3, BITS2, P2, B2, M2)
                        y = steps * scale[:, None, None]
                        if HAD2:
                            y = hadamard(y, tl.arange(0, B2), P2, B2, M2, False) * (1.0 / GROUP2)
                        store(out + begin * UNIT, at3, keep3, y, BF16)
