"""Low-latency (LL) protocol, as in NCCL: each 8-byte word holds 4 bytes of payload and the call's epoch.

Small messages so need neither fence nor flag, at twice the bytes. A store of 8 aligned bytes is seen as a whole or not
at all, so a tile has arrived once all of its words carry the epoch: reading is waiting. The payload, in the lower half
of a word, is what `tile.put` would store as one word: 4 bytes of a plane, or 1 where groups are cut very short, or the
word of a scale.

LL words have an inbox of their own, one half of it for even and one for odd epochs. Every 8 bytes in it are 0 or such a
word, whatever formats the calls before had. So nothing there can be taken for a word of this call but what peers wrote
in this call. All words that a call writes are read in that call. Why none is overwritten before is said in
`collective_kernel`: a tile that has come from a rank proves, as a flag would, that the rank's earlier calls have ended.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcomm.gpu.sync import arrives_at, give_up, longs_at, poll
from flashcomm.gpu.tile import (
    expand,
    in_order,
    narrow,
    pack_plane,
    plane_offset,
    plane_words,
    put_scales,
    quads,
    quantize,
    scalar,
)
from flashcomm.wire.format import StepFormat


def tile_bytes(step: StepFormat, n_groups: int, itemsize: int, pieces: int) -> int:
    """Bytes of a tile of n_groups groups as `put` writes it."""
    if step.uncompressed:
        return n_groups * step.group * itemsize * 2
    word_bytes = 4 if step.group // pieces % 4 == 0 else 1
    return n_groups * (step.group * step.bits // 8 // word_bytes + 1) * 8


@triton.jit
def _with_epoch(payload, epoch):
    """LL words, int64, of 32-bit payloads."""
    return (payload.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)


@triton.jit
def put(base, y, n, epoch, out, step: tl.constexpr, BF16: tl.constexpr):
    """Quantize a tile (as `tile.quantize`) and store it as LL words at base (int64 pointer, 16-byte aligned).

    Uncompressed tiles hold values of the dtype that out points to; with BF16 see `tile.narrow`.
    """
    if step.BITS == 16:
        payload = narrow(y, out.dtype.element_ty, BF16)
        if payload.dtype.primitive_bitwidth == 32:
            word = _with_epoch(payload.to(tl.int32, bitcast=True), epoch)
            tl.store(base + in_order(step, step.LANES), word, cache_modifier=".wt")
        else:
            pairs = payload.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            pairs = tl.reshape(pairs, (step.GROUPS, step.PIECES, step.LANES // 2, 2))
            pairs = tl.sum(pairs << (tl.arange(0, 2) * 16)[None, None, None, :], 3)
            tl.store(base + in_order(step, step.LANES // 2), _with_epoch(pairs, epoch), cache_modifier=".wt")
    else:
        b = tl.arange(0, step.GROUPS)
        codes, word, zero_point = quantize(y, n, step)
        if step.WORD_BYTES == 4:
            codes = quads(codes, step)
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                plane = base + plane_offset(8 >> i, step) // step.WORD_BYTES
                at = plane_words(b * step.LANES, step.GROUPS * step.LANES, 8 >> i, step)
                tl.store(plane + at, _with_epoch(pack_plane(codes, 8 >> i, step), epoch), cache_modifier=".wt")
        if step.BITS > 5:
            word = (word & 0xFFFF) | (zero_point << 16)
        scales = base + plane_offset(0, step) // step.WORD_BYTES
        put_scales(scales, b, b >= 0, _with_epoch(word, epoch), ".wt", step)


@triton.jit
def fetch(base, epoch, x, step: tl.constexpr):
    """All LL words of the tile at base as they are now, past the L1 cache. x: a pointer to the message's dtype."""
    if step.BITS == 16:
        LANES: tl.constexpr = step.LANES * x.dtype.element_ty.primitive_bitwidth // 32
        return (tl.load(base + in_order(step, LANES), volatile=True),)
    else:
        b = tl.arange(0, step.GROUPS)
        raw = ()
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                plane = base + plane_offset(8 >> i, step) // step.WORD_BYTES
                at = plane_words(b * step.LANES, step.GROUPS * step.LANES, 8 >> i, step)
                raw = raw + (tl.load(plane + at, volatile=True),)
        # One of the threads of a group loads its scale's word, as in `put_scales`. That makes as many pointers as
        # threads: of fewer ones Triton repeats even a volatile load where a second layout is wanted, and what it then
        # finds in the lower half is not what it found in the upper one.
        THREADS: tl.constexpr = step.LANES // 8 if step.LANES % 8 == 0 else 1
        thread = tl.arange(0, THREADS)[None, :]
        at = base + plane_offset(0, step) // step.WORD_BYTES + (b[:, None] + thread)
        at, here = tl.max_contiguous(at, [1, min(THREADS, 2)]), (b[:, None] >= 0) & (thread == 0)
        none = _with_epoch(scalar(0, like=epoch), epoch)
        return raw + (tl.load(at, mask=here, other=none, volatile=True),)


@triton.jit
def _unlike(raw, epoch):
    """The upper halves of words exclusive or the epoch: 0 where they carry it.

    Not differences: of those and their maximum ptxas 12.8 makes one instruction which adds (VIADDMNMX), see LOG.md.
    """
    return ((raw >> 32).to(tl.int32) ^ epoch).to(tl.uint32, bitcast=True)


@triton.jit
def _missing(raw, epoch):
    """0 if all words of a tile carry the epoch, else 1: the same for all threads."""
    most = _unlike(raw[len(raw) - 1], epoch)
    for i in tl.static_range(len(raw) - 1):  # planes, of which a thread has all along the middle axis
        late = tl.max(_unlike(raw[i], epoch), 1)
        late = tl.reshape(late, (late.shape[0], most.shape[1], late.shape[1] // most.shape[1]))
        most = tl.maximum(most, tl.max(late, 2))
    return (tl.max(most) != 0).to(tl.int32)


@triton.jit
def _look_at_tile(place, epoch, ranks: tl.constexpr, step: tl.constexpr):
    """A `LOOK` of `sync.poll`: the words of a tile, and 1 unless all carry the epoch. place: as base and x of `fetch`."""
    raw = fetch(place[0], epoch, place[1], step)
    return raw, _missing(raw, epoch)


@triton.jit
def expand_words(raw, x, step: tl.constexpr):
    """A tile's values as a product, as `tile.expand`, of what `fetch` gave."""
    if step.BITS == 16:
        payload = raw[0].to(tl.int32)
        if x.dtype.element_ty.primitive_bitwidth == 32:
            y = payload.to(tl.float32, bitcast=True)
        else:
            payload = tl.broadcast_to(payload[:, :, :, None], (step.GROUPS, step.PIECES, step.LANES // 2, 2))
            payload = tl.reshape(payload, (step.GROUPS, step.PIECES, step.LANES))
            odd = (tl.arange(0, step.LANES) % 2 == 1)[None, None, :]
            if x.dtype.element_ty == tl.bfloat16:
                y = tl.where(odd, payload & -65536, payload << 16).to(tl.float32, bitcast=True)
            else:
                y = tl.where(odd, payload >> 16, payload).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return y, tl.full((step.GROUPS,), 1.0, tl.float32)
    else:
        low = ()
        for i in tl.static_range(len(raw) - 1):
            low = low + (raw[i].to(tl.int32),)
        low = low + (tl.sum(raw[len(raw) - 1].to(tl.int32), 1),)  # of one word and zeros
        return expand(low, step)


@triton.jit
def wait(
    base, raw, epoch, epoch_bytes, source, x, region, ranks: tl.constexpr, step: tl.constexpr, STAGE: tl.constexpr
):
    """Wait until the tile at base, of which raw was fetched, has arrived from rank `source`.

    Returns:
        The tile as `tile.expand` gives it, and 1; NaN and 0 if it has not arrived within the limit.
    """
    place = (base, x)
    late = _missing(raw, epoch)
    raw, late = poll(_look_at_tile, place, epoch, raw, late, region, ranks, step)
    if late != 0:  # what did arrive: words of an earlier call, in this half or, of the call before, in the other
        here = (tl.load(base, volatile=True) >> 32).to(tl.int32)
        other = (tl.load(base + (1 - 2 * (epoch & 1)) * (epoch_bytes // 8), volatile=True) >> 32).to(tl.int32)
        seen = tl.maximum(tl.where(here == epoch, epoch - 1, here), other)
        give_up(STAGE + 1, source, epoch, seen, region, ranks)
    for _ in range(ranks.DELAY // 16):
        raw = fetch(base, epoch, x, step)
    steps, scale = expand_words(raw, x, step)
    return steps, tl.where(late == 0, scale, float("nan")), (late == 0).to(tl.int32)


@triton.jit
def sum_tiles(x, tile, offset, epoch, message, region, ranks: tl.constexpr, step: tl.constexpr):
    """The sum of all ranks' tiles, in rank order, float32, each taken when it has arrived; and 1 if all have."""
    AHEAD: tl.constexpr = min(ranks.WORLD_SIZE, 2 if step.BITS * step.PIECES > 32 else 4)  # as registers allow
    bases, raws, ok = (), (), scalar(1, like=region.rank)
    total = tl.zeros((step.GROUPS, step.PIECES, step.LANES), tl.float32)
    for k in tl.static_range(ranks.WORLD_SIZE + AHEAD):  # AHEAD tiles are under way at once
        if k >= AHEAD:
            steps, scale, came = wait(bases[k - AHEAD], raws[k - AHEAD], epoch, message.epoch_bytes, k - AHEAD, x, region, ranks, step, 0)  # fmt: skip
            ok &= came
            if k == AHEAD:
                total = steps * scale[:, None, None]
            else:
                total = tl.fma(steps, tl.broadcast_to(scale[:, None, None], total.shape), total)
        if k < ranks.WORLD_SIZE:
            base = longs_at(arrives_at(k, region) + offset + (k * message.n_tiles + tile).to(tl.int64) * step.BYTES)
            bases, raws = bases + (base,), raws + (fetch(base, epoch, x, step),)
    return total, ok
