"""Low-latency (LL) protocol, as in NCCL: each 8-byte word holds 4 bytes of payload and the call's epoch.

So small messages need neither fence nor flag, at twice the bytes. A store of 8 aligned bytes becomes visible as a
whole. A reader polls the words themselves: a tile has arrived once all of its words carry the epoch. The lower half of
a word is the payload. It is what `tile.put` would store as one word: 4 bytes of a plane (1 byte if LANES is no multiple
of 4), or the scale of a group.

LL words have an inbox of their own, one half of it for even and one for odd epochs. Every 8 bytes of it are 0 or an LL
word, whatever the formats of earlier calls. So only words that peers wrote in this call can carry its epoch. All words
that a call writes are read in that call. `collective_kernel` says why none is overwritten before it is read. A tile
that has arrived from a rank proves there what a flag would prove: that the rank has finished its earlier calls.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcomm.gpu.quantize import quantize
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
    scalar,
    swap,
)
from flashcomm.wire.format import StepFormat


def tile_bytes(step: StepFormat, n_groups: int, itemsize: int, pieces: int) -> int:
    """Return the bytes of a tile of n_groups groups as `put` stores it."""
    if step.uncompressed:
        return n_groups * step.group * itemsize * 2
    word_bytes = 4 if step.group // pieces % 4 == 0 else 1
    return n_groups * (step.group * step.bits // 8 // word_bytes + 1) * 8


@triton.jit
def _with_epoch(payload, epoch):
    """Return LL words, int64, with these 32-bit payloads."""
    return (payload.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)


@triton.jit
def put(base, y, n, epoch, out, step: tl.constexpr, BF16: tl.constexpr):
    """Quantize a tile, as `quantize` does, and store it as LL words.

    Args:
        base: int64 pointer, 16-byte aligned: where the tile is stored.
        y: float32 (GROUPS, PIECES, LANES), the values.
        n: int32 (GROUPS,), the number of values in each group.
        epoch: the epoch of this call.
        out: a pointer to the dtype in which values travel uncompressed.
        step: a `tile.Step`.
        BF16: see `tile.narrow`.
    """
    if step.BITS == 16:
        payload = narrow(y, out.dtype.element_ty, BF16)
        if payload.dtype.primitive_bitwidth == 32:
            word = _with_epoch(payload.to(tl.int32, bitcast=True), epoch)
            tl.store(swap(base + in_order(step, step.LANES)), swap(word), cache_modifier=".wt")
        else:
            pairs = payload.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            pairs = tl.reshape(pairs, (step.GROUPS, step.PIECES, step.LANES // 2, 2))
            pairs = tl.sum(pairs << (tl.arange(0, 2) * 16)[None, None, None, :], 3)
            pairs = _with_epoch(pairs, epoch)
            tl.store(swap(base + in_order(step, step.LANES // 2)), swap(pairs), cache_modifier=".wt")
    else:
        b = tl.arange(0, step.GROUPS)
        codes, word, zero_point = quantize(y, n, step)
        if step.WORD_BYTES == 4:
            codes = quads(codes, step)
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                plane = base + plane_offset(8 >> i, step) // step.WORD_BYTES
                at = plane_words(b * step.LANES, step.GROUPS * step.LANES, 8 >> i, step)
                packed = _with_epoch(pack_plane(codes, 8 >> i, step), epoch)
                tl.store(swap(plane + at), swap(packed), cache_modifier=".wt")
        if step.BITS > 5:
            word = (word & 0xFFFF) | (zero_point << 16)
        scales = base + plane_offset(0, step) // step.WORD_BYTES
        put_scales(scales, b, b >= 0, _with_epoch(word, epoch), ".wt", step)


@triton.jit
def fetch(base, epoch, x, step: tl.constexpr):
    """Load all LL words of the tile at base as they are now, bypassing L1. x: a pointer to the message's dtype."""
    if step.BITS == 16:
        LANES: tl.constexpr = step.LANES * x.dtype.element_ty.primitive_bitwidth // 32
        return (swap(tl.load(swap(base + in_order(step, LANES)), volatile=True)),)
    else:
        b = tl.arange(0, step.GROUPS)
        raw = ()
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                plane = base + plane_offset(8 >> i, step) // step.WORD_BYTES
                at = plane_words(b * step.LANES, step.GROUPS * step.LANES, 8 >> i, step)
                raw = raw + (swap(tl.load(swap(plane + at), volatile=True)),)
        # One of the threads of a group loads its scale's word, as in `put_scales`. So there are as many pointers as
        # threads. With fewer pointers Triton would repeat even a volatile load where it needs a second layout. Then
        # the payload could come from another load than the epoch that was compared.
        THREADS: tl.constexpr = step.LANES // 8 if step.LANES % 8 == 0 else 1
        thread = tl.arange(0, THREADS)[None, :]
        at = base + plane_offset(0, step) // step.WORD_BYTES + (b[:, None] + thread)
        at, here = tl.max_contiguous(at, [1, min(THREADS, 2)]), (b[:, None] >= 0) & (thread == 0)
        none = _with_epoch(scalar(0, like=epoch), epoch)
        return raw + (tl.load(at, mask=here, other=none, volatile=True),)


@triton.jit
def _unlike(raw, epoch):
    """Return the upper halves of words XOR the epoch, uint32: 0 for words that carry it.

    A difference would not do: ptxas 12.8 merges it with the maximum that follows into VIADDMNMX, which adds (LOG.md).
    """
    return ((raw >> 32).to(tl.int32) ^ epoch).to(tl.uint32, bitcast=True)


@triton.jit
def _missing(raw, epoch):
    """Return 0 if all words of a tile carry the epoch, else 1, the same for all threads."""
    most = _unlike(raw[len(raw) - 1], epoch)
    for i in tl.static_range(len(raw) - 1):  # the planes; a thread holds all words along the middle axis
        late = tl.max(_unlike(raw[i], epoch), 1)
        late = tl.reshape(late, (late.shape[0], most.shape[1], late.shape[1] // most.shape[1]))
        most = tl.maximum(most, tl.max(late, 2))
    return (tl.max(most) != 0).to(tl.int32)


@triton.jit
def _look_at_tile(place, epoch, ranks: tl.constexpr, step: tl.constexpr):
    """Load a tile, as a `LOOK` of `sync.poll`: words, and 0 if all carry the epoch. place: base and x of `fetch`."""
    raw = fetch(place[0], epoch, place[1], step)
    return raw, _missing(raw, epoch)


@triton.jit
def expand_words(raw, x, step: tl.constexpr):
    """Return a tile's values as a product, as `tile.expand` does. raw: the words that `fetch` returned."""
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
        low = low + (tl.sum(raw[len(raw) - 1].to(tl.int32), 1),)  # all but one of the summands are 0
        return expand(low, step)


@triton.jit
def wait(
    base, raw, epoch, epoch_bytes, source, x, region, ranks: tl.constexpr, step: tl.constexpr, STAGE: tl.constexpr
):
    """Wait until the tile at base has arrived from rank `source`.

    Args:
        base: int64 pointer to the tile.
        raw: the words that `fetch` has loaded from it.
        epoch: the epoch of this call.
        epoch_bytes: the bytes from the half of even epochs to that of odd ones.
        source: the rank that sends the tile.
        x: a pointer to the message's dtype.
        region: a `sync.Region`.
        ranks: a `sync.Ranks`.
        step: a `tile.Step`.
        STAGE: 0 for the quantized message, 1 for the quantized sum.

    Returns:
        The tile as two factors (see `tile.expand`), and 1. If it has not arrived within the limit, the second factor is
        NaN and the third result 0.
    """
    place = (base, x)
    late = _missing(raw, epoch)
    raw, late = poll(_look_at_tile, place, epoch, raw, late, region, ranks, step)
    if late != 0:  # find the last call that arrived: the previous one is in the other half, one before it in this half
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
    """Return the float32 sum of all ranks' tiles in rank order, and 1 if all have arrived in time, else 0."""
    AHEAD: tl.constexpr = min(ranks.WORLD_SIZE, 2 if step.BITS * step.PIECES > 32 else 4)  # as registers allow
    bases, raws, ok = (), (), scalar(1, like=region.rank)
    total = tl.zeros((step.GROUPS, step.PIECES, step.LANES), tl.float32)
    for k in tl.static_range(ranks.WORLD_SIZE + AHEAD):  # loads of AHEAD tiles are in flight at once
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
