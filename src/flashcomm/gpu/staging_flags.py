"""How the ranks of one host take turns at staging slots: counts in memory that all of them map, and who waits for what.

Each slot of each rank goes through   put (by its rank)  ->  fetched by everybody else  ->  put again  -> ...
and per slot each rank publishes how often it has put its own bytes and how often it has fetched those of the others.
The counts a rank has reached itself lie in device memory, so that CUDA graphs replay correctly.
"""

from __future__ import annotations

import triton
import triton.language as tl

LINE = 64  # bytes from flag to flag
BEFORE_PUT, AFTER_PUT, BEFORE_FETCH, AFTER_FETCH = range(4)
_BEFORE_PUT, _AFTER_PUT, _BEFORE_FETCH = (tl.constexpr(step) for step in range(3))
_LINE = tl.constexpr(LINE)


def flag_bytes(slots: int) -> int:
    """What the flags of a rank take."""
    return 2 * slots * LINE


@triton.jit
def _read(flag, REAL: tl.constexpr):
    if REAL:  # by the one warp: host memory takes plain loads and stores, a read-modify-write may not be atomic there
        return tl.inline_asm_elementwise("ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [flag.to(tl.int64)], tl.int32, is_pure=False, pack=1)  # fmt: skip
    else:
        return tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit
def _set(flag, value, REAL: tl.constexpr):
    if REAL:
        tl.inline_asm_elementwise("st.release.sys.global.b32 [$1], $2; mov.b32 $0, 0;", "=r,l,r", [flag.to(tl.int64), value], tl.int32, is_pure=False, pack=1)  # fmt: skip
    else:
        tl.atomic_xchg(flag, value, sem="release", scope="sys")


@triton.jit(do_not_specialize=["slot", "slots", "place", "rank", "limit", "n_bytes"])
def turn(counts, flags, status, out, slot: tl.int32, slots: tl.int32, place: tl.int32, rank: tl.int32, limit: tl.int64,
         n_bytes: tl.int64, STEP: tl.constexpr, WORLD: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    """One program, one warp. counts: int32 (1 + 2 * slots * places,), device memory: whether a wait timed out, then, of
    the slots of all ranks and of those of parts of them (`place`), how often each was put, how often fetched. flags:
    int64 (2 * WORLD,), addresses of everybody's flags, then what ranks they are. limit: of a wait, in ns (REAL) or
    polls. status: int32 (5,), host memory. out: n_bytes that become 0xFF where a wait was in vain: no format has a
    number for that.
    """
    PUT: tl.constexpr = STEP == _BEFORE_PUT or STEP == _AFTER_PUT
    WAITS: tl.constexpr = STEP == _BEFORE_PUT or STEP == _BEFORE_FETCH
    count = counts + 1 + place * 2 * slots + slot + (0 if PUT else slots)
    done = tl.load(count)
    if WAITS:
        want = done + (0 if PUT else 1)
        for i in tl.static_range(WORLD):
            if (i != rank) & (tl.atomic_add(counts, 0, sem="relaxed", scope="gpu") == 0):
                base = tl.load(flags + i) + (slot + (slots if PUT else 0)).to(tl.int64) * _LINE
                flag = base.to(tl.pointer_type(tl.int32))
                seen = _read(flag, REAL)
                begin = tl.extra.cuda.globaltimer() if REAL else 0
                polls, waited = done.to(tl.int64) * 0, done.to(tl.int64) * 0
                while (seen - want < 0) & (waited < limit):
                    seen = _read(flag, REAL)
                    polls += 1
                    waited = tl.extra.cuda.globaltimer() - begin if REAL else polls
                if seen - want < 0:
                    if tl.atomic_xchg(counts, 1, sem="relaxed", scope="gpu") == 0:
                        tl.store(status + 1, 4 if PUT else 3)
                        tl.store(status + 2, tl.load(flags + WORLD + i).to(tl.int32))
                        tl.store(status + 3, want)
                        tl.store(status + 4, seen)
                        _set(status, done * 0 + 1, REAL)
    else:
        lost = tl.atomic_add(counts, 0, sem="relaxed", scope="gpu")
        tl.store(count, done + 1)
        if lost == 0:
            base = tl.load(flags + rank) + (slot + (0 if PUT else slots)).to(tl.int64) * _LINE
            _set(base.to(tl.pointer_type(tl.int32)), done + 1, REAL)
        elif not PUT:
            for at in range(0, n_bytes, 4096):
                i = at + tl.arange(0, 4096)
                tl.store(out + i, tl.full((4096,), 255, tl.uint8), mask=i < n_bytes)
