"""Pack, unpack and transform a tile of groups: the functions that all Triton kernels share.

A tile is a float32 or int32 tensor of shape (GROUPS, PIECES, LANES): GROUPS groups of PIECES * LANES values. Value i of
a group is at [group, i div LANES, i mod LANES]. So values that share a byte of a plane differ only in the middle index.
Triton spreads first the last index over threads, then the first one, and keeps the middle one within a thread (`swap`).
Therefore packing, unpacking and the Hadamard rounds over the middle index move no data between threads.

The bits are those of `torch_codec`. `quantize.py` says why, and sums over ranks run in rank order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from flashcomm.gpu.quantize import SCALE_NAN, quantize
from flashcomm.wire.format import StepFormat

TWO_23_BITS = tl.constexpr(0x4B000000)  # the bits of 2^23; plus a code they are the bits of 2^23 + code
SWAPS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))  # see `swap`


class Step(NamedTuple):
    """Constants of a kernel: how one step (reduce or gather) quantizes values, and the shape of its tiles."""

    BITS: int  # of a code; 16 if values are sent uncompressed
    CLIP: float  # the clip ratio, or 0 if only the whole range is tried
    HADAMARD: bool  # whether codes are in the Hadamard domain
    PIECES: int
    GROUPS: int
    LANES: int
    WORD_BYTES: int  # bytes of a plane that are loaded or stored at once: 4, or 1 (see `step_of`)
    BYTES: int = 0  # of a whole tile in a peer's memory


def step_of(
    step: StepFormat, n_pieces: int, n_groups: int, lanes: int, *, n: int = 0, words: bool = True, n_bytes: int = 0
) -> Step:
    """Return the constants of a step whose tiles have this shape.

    Args:
        n: the values of a group; 0 stands for `step.group`.
        words: whether 4 bytes of a plane may be loaded or stored at once. They are if LANES is a multiple of 4.
        n_bytes: BYTES.
    """
    n = n or step.group
    word_bytes = 4 if words and lanes % 4 == 0 else 1
    return Step(
        step.bits, step.clip_ratio(n) or 0.0, step.transforms(n), n_pieces, n_groups, lanes, word_bytes, n_bytes
    )


def pieces(step: StepFormat) -> int:
    """Return the least PIECES of a format: the number of values in a byte of its narrowest plane."""
    return 1 if step.uncompressed else max(2, 8 // min(width for width, _ in step.planes))


def warps(n_groups: int, lanes: int) -> int:
    """Return the number of warps with which each thread has 8 values, 16 bytes of bfloat16, for each middle index."""
    return max(1, min(4, n_groups * lanes // 256))


def tile_bytes(step: StepFormat, n_groups: int, itemsize: int) -> int:
    """Return the bytes of a tile of n_groups groups as `put` stores it, a multiple of 16 if n_groups is one."""
    if step.uncompressed:
        return n_groups * step.group * itemsize
    return n_groups * (step.group * step.bits // 8 + (2 if step.packed else 4))


@triton.jit
def scalar(value: tl.constexpr, like):
    """Return a constant of the type of `like`. A plain number has no type, so a loop could not change it."""
    return like * 0 + value


@triton.jit
def swap(x):
    """Swap the first two axes of a tile of pointers, of a mask or of what was loaded, if Triton is 3.7 or newer.

    Triton spreads the axes of a load or store over threads in the order of how contiguous addresses are along them.
    GROUPS and PIECES are equally contiguous. Up to 3.6 the first of such axes is spread first, since 3.7 the last one.
    """
    if SWAPS and len(x.shape) == 3:
        return tl.permute(x, (1, 0, 2))
    else:
        return x


@triton.jit
def widen(x):
    """Return x as float32. A bfloat16 is widened by its bits, which saves an instruction for every other value."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(y, dtype: tl.constexpr, BF16: tl.constexpr):
    """Return y (float32) rounded to dtype, half to even.

    With BF16 it is rounded to bfloat16 by integer operations, and returned as int16. Triton's interpreter needs that:
    its own conversion does not round.
    """
    if BF16:
        bits = y.to(tl.int32, bitcast=True)
        bits = tl.where(y == y, bits + 0x7FFF + ((bits >> 16) & 1), SCALE_NAN << 16) >> 16
        return bits.to(tl.int16)
    else:
        return y.to(dtype)


@triton.jit
def store(out, at, keep, y, BF16: tl.constexpr):
    """Round y (float32) and store it at out + at. With BF16 out is an int16 pointer to bfloat16s."""
    tl.store(swap(out + at), swap(narrow(y, out.dtype.element_ty, BF16)), mask=swap(keep))


@triton.jit
def in_order(step: tl.constexpr, LANES: tl.constexpr):
    """Return offsets (GROUPS, PIECES, LANES), piece by piece, so that neighboring threads access neighboring values."""
    group = (tl.arange(0, step.GROUPS) * LANES)[:, None, None]
    return (tl.arange(0, step.PIECES) * (step.GROUPS * LANES))[None, :, None] + group + tl.arange(0, LANES)[None, None, :]  # fmt: skip


@triton.jit
def _round(y, H: tl.constexpr, step: tl.constexpr):
    """Do one round of the Hadamard transform: sums and differences of values H apart.

    The partner of a value is the integer sum of both bit patterns minus the value's own. The compiler turns this into a
    register move or a shuffle. A reduction works in any layout. `tl.split` would move the tile to another one.
    """
    is_second = tl.arange(0, 2)[None, None, None, :, None] == 1
    if H < step.LANES:
        pairs = tl.reshape(y, (step.GROUPS, step.PIECES, step.LANES // (2 * H), 2, H))
    else:
        pairs = tl.reshape(y, (step.GROUPS, step.PIECES * step.LANES // (2 * H), 1, 2, H))
    bits = pairs.to(tl.int32, bitcast=True)
    partner = tl.sum(bits, 3, keep_dims=True) - bits
    partner = partner.to(tl.int64).to(tl.int32).to(tl.float32, bitcast=True)  # sums have 64 bits in the interpreter
    y = tl.fma(pairs, tl.where(is_second, -1.0, 1.0), partner)
    return tl.reshape(y, (step.GROUPS, step.PIECES, step.LANES))


@triton.jit
def hadamard(y, step: tl.constexpr):
    """Return the Hadamard transform of each group, not normalized, with rounds in the order of `torch_codec`."""
    for i in tl.static_range(8):
        if (1 << i) < step.PIECES * step.LANES:
            y = _round(y, 1 << i, step)
    return y


@triton.jit
def from_hadamard(y, step: tl.constexpr):
    """Return the values whose Hadamard transforms are y."""
    return hadamard(y, step) * (1.0 / (step.PIECES * step.LANES))


@triton.jit
def quads(codes, step: tl.constexpr):
    """Return four neighboring codes as the bytes of a 32-bit word, int32 (GROUPS, PIECES, LANES / 4)."""
    four = tl.reshape(codes, (step.GROUPS, step.PIECES, step.LANES // 4, 4))
    return tl.sum(four << (tl.arange(0, 4) * 8)[None, None, None, :], 3)


@triton.jit
def plane_words(begin, STRIDE: tl.constexpr, WIDTH: tl.constexpr, step: tl.constexpr):
    """Return the offsets of a plane's words, in words: (GROUPS, WIDTH * PIECES / 8, LANES / WORD_BYTES).

    A group has WIDTH * PIECES / 8 runs of LANES bytes in the plane. The first one is begin (GROUPS,) bytes into the
    plane, and runs are STRIDE bytes apart.
    """
    RUNS: tl.constexpr = WIDTH * step.PIECES // 8
    runs = (tl.arange(0, RUNS) * (STRIDE // step.WORD_BYTES))[None, :, None]
    return (begin // step.WORD_BYTES)[:, None, None] + runs + tl.arange(0, step.LANES // step.WORD_BYTES)[None, None, :]


@triton.jit
def _plane_pointers(plane, begin, STRIDE: tl.constexpr, WIDTH: tl.constexpr, step: tl.constexpr):
    """Return pointers to `plane_words`. The hint gives a thread the words of the 8 values that it holds as bfloat16."""
    at = plane_words(begin, STRIDE, WIDTH, step)
    if step.WORD_BYTES == 4:
        return tl.max_contiguous(plane.to(tl.pointer_type(tl.int32)) + at, [1, 1, 2 if step.LANES > 4 else 1])
    else:
        return plane + at


@triton.jit
def pack_plane(codes, WIDTH: tl.constexpr, step: tl.constexpr):
    """Return the plane of WIDTH bits, int32, shaped as `plane_words`. codes: `quads`, or codes if WORD_BYTES is 1."""
    SHIFT: tl.constexpr = step.BITS & (15 ^ (2 * WIDTH - 1))  # the bits in wider planes
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * (0x01010101 if step.WORD_BYTES == 4 else 1)
    part = codes
    if step.BITS != WIDTH:
        part = (codes >> SHIFT) & MASK
    if WIDTH < 8:
        part = tl.reshape(part, (step.GROUPS, 8 // WIDTH, WIDTH * step.PIECES // 8, step.LANES // step.WORD_BYTES))
        part = tl.sum(part << (tl.arange(0, 8 // WIDTH) * WIDTH)[None, :, None, None], 1)
    return part


@triton.jit
def put_plane(plane, begin, keep, codes, STRIDE: tl.constexpr, WIDTH: tl.constexpr, step: tl.constexpr):
    """Store the plane of WIDTH bits at plane (uint8 pointer), with the groups in keep (GROUPS,).

    Args:
        begin, STRIDE: see `plane_words`.
        codes: codes if WORD_BYTES is 1. If it is 4, `quads`, and plane and begin must be multiples of 4.
    """
    part = pack_plane(codes, WIDTH, step)
    at = _plane_pointers(plane, begin, STRIDE, WIDTH, step)
    tl.store(swap(at), swap(part.to(at.dtype.element_ty)), mask=swap(keep[:, None, None]))


@triton.jit
def fetch_plane(plane, begin, keep, STRIDE: tl.constexpr, WIDTH: tl.constexpr, CACHE: tl.constexpr, step: tl.constexpr):
    """Load what `put_plane` stored, 0 for groups that are not in keep."""
    at = _plane_pointers(plane, begin, STRIDE, WIDTH, step)
    return swap(tl.load(swap(at), mask=swap(keep[:, None, None]), other=0, cache_modifier=CACHE))


@triton.jit
def unpack_plane(packed, WIDTH: tl.constexpr, step: tl.constexpr):
    """Return the bits of one plane at their places in codes, or in `quads` if WORD_BYTES is 4.

    In quads of up to 7 bits each byte is twice the code, see `values`.
    """
    WIDER: tl.constexpr = step.BITS & (15 ^ (2 * WIDTH - 1))
    SHIFT: tl.constexpr = WIDER + (1 if step.WORD_BYTES == 4 and step.BITS < 8 else 0)
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * (0x01010101 if step.WORD_BYTES == 4 else 1)
    packed = packed.to(tl.int32)
    if WIDTH == 8:
        return packed
    else:
        places = (tl.arange(0, 8 // WIDTH) * WIDTH)[None, :, None, None]
        part = (packed[:, None, :, :] >> places) & MASK
        return tl.reshape(part, (step.GROUPS, step.PIECES, step.LANES // step.WORD_BYTES)) << SHIFT


@triton.jit
def put_scales(out, at, keep, word, CACHE: tl.constexpr, step: tl.constexpr):
    """Store word (GROUPS, 1, 1) at out + at (GROUPS,). Of the threads that hold a word, one stores it.

    The pointers have the same layout as those of a plane, so that no word goes through shared memory.
    """
    at = at[:, None, None]
    if step.LANES % 8 == 0:
        thread = tl.arange(0, step.LANES // 8)[None, None, :]
        to = tl.max_contiguous(out + (at + thread), [1, 1, min(step.LANES // 8, 2)])
        word = tl.broadcast_to(word, (step.GROUPS, 1, step.LANES // 8)).to(out.dtype.element_ty)
        tl.store(swap(to), swap(word), mask=swap(keep[:, None, None] & (thread == 0)), cache_modifier=CACHE)
    else:
        tl.store(out + at, word.to(out.dtype.element_ty), mask=keep[:, None, None], cache_modifier=CACHE)


@triton.jit
def plane_offset(WIDTH: tl.constexpr, step: tl.constexpr):
    """Return the offset in bytes of the plane of WIDTH bits in a tile, or for WIDTH 0 that of the scale words."""
    WIDER: tl.constexpr = step.BITS & (15 ^ (2 * WIDTH - 1)) if WIDTH > 0 else step.BITS
    return step.GROUPS * step.PIECES * step.LANES * WIDER // 8


@triton.jit
def put(base, y, n, out, step: tl.constexpr, BF16: tl.constexpr):
    """Quantize a tile, as `quantize` does, and store it.

    The order of bytes is not that of a wire buffer: neighboring threads store neighboring bytes. A plane has the first
    runs of all groups, then the second ones, and so on. Behind the planes come the scale words. From 6 bits on a scale
    word has 32 bits, with the zero point in the upper half.

    Args:
        base: uint8 pointer, 16-byte aligned: where the tile is stored.
        y, n: see `quantize`.
        out: a pointer to the dtype in which values travel uncompressed.
        BF16: see `narrow`.
    """
    if step.BITS == 16:
        at = in_order(step, step.LANES)
        store(base.to(tl.pointer_type(out.dtype.element_ty)), at, at >= 0, y, BF16)
    else:
        b = tl.arange(0, step.GROUPS)
        codes, word, zero_point = quantize(y, n, step)
        if step.WORD_BYTES == 4:
            codes = quads(codes, step)
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                plane = base + plane_offset(8 >> i, step)
                put_plane(plane, b * step.LANES, b >= 0, codes, step.GROUPS * step.LANES, 8 >> i, step)
        words = base + plane_offset(0, step)
        if step.BITS > 5:
            put_scales(words.to(tl.pointer_type(tl.int32)), b, b >= 0, (word & 0xFFFF) | (zero_point << 16), "", step)
        else:
            put_scales(words.to(tl.pointer_type(tl.int16)), b, b >= 0, word, "", step)


@triton.jit
def fetch(base, x, step: tl.constexpr):
    """Load the raw words of a tile that `put` stored, for `expand` to decode later.

    x: a pointer to the message's dtype, in which values travel uncompressed.
    """
    if step.BITS == 16:
        at = base.to(tl.pointer_type(x.dtype.element_ty)) + in_order(step, step.LANES)
        return (swap(tl.load(swap(at), cache_modifier=".cg")),)
    else:
        b = tl.arange(0, step.GROUPS)
        raw = ()
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                plane = base + plane_offset(8 >> i, step)
                raw = raw + (fetch_plane(plane, b * step.LANES, b >= 0, step.GROUPS * step.LANES, 8 >> i, ".cg", step),)
        words = (base + plane_offset(0, step)).to(tl.pointer_type(tl.int32 if step.BITS > 5 else tl.int16))
        return raw + (tl.load(words + b, cache_modifier=".cg"),)


@triton.jit
def values(codes, word, zero_point, step: tl.constexpr):
    """Return code - zero_point and scale as float32.

    Args:
        codes: the results of `unpack_plane` for all planes, combined by OR.
        word: (GROUPS,), the scale words.
        zero_point: (GROUPS,), the zero points; not used up to 5 bits, where the scale words hold them.

    Returns:
        code - zero_point, float32 (GROUPS, PIECES, LANES), and scale, float32 (GROUPS,).
    """
    LEVELS: tl.constexpr = (1 << step.BITS) - 1
    word = word.to(tl.int32) & 0xFFFF
    if step.BITS <= 5:
        zero_point = word & LEVELS
        word = (word >> step.BITS) << (step.BITS - 1)
    zero_point = zero_point.to(tl.int32)[:, None, None]
    if step.WORD_BYTES == 4:
        # Each code is put at bit 1 or bit 9 of the float 2^23 + 2^17 * (low bits of the zero point). That takes one
        # shift for two codes, then a mask and an OR for each. Mask and OR are one instruction, because the number is no
        # constant. For a code at bit 0 the compiler would need two instructions to cut it out.
        above = TWO_23_BITS | ((zero_point & 63) << 17)
        origin, base = zero_point.to(tl.float32), above.to(tl.float32, bitcast=True)
        lane = tl.arange(0, step.LANES)[None, None, :]
        odd, upper = lane % 2 == 1, lane % 4 >= 2
        shape: tl.constexpr = (step.GROUPS, step.PIECES, step.LANES // 4, 4)
        codes = tl.reshape(tl.broadcast_to(codes[:, :, :, None], shape), (step.GROUPS, step.PIECES, step.LANES))
        if step.BITS < 8:
            codes = tl.where(upper, codes >> 16, codes)
        else:
            codes = tl.where(upper, codes >> 15, codes << 1)
        codes = ((codes & tl.where(odd, LEVELS << 9, LEVELS << 1)) | above).to(tl.float32, bitcast=True)
        below = tl.where(odd, base * (-1.0 / 512) - origin, base * (-1.0 / 2) - origin)
        steps = tl.fma(codes, tl.where(odd, 1.0 / 512, 1.0 / 2), below)
    else:
        origin = (zero_point | TWO_23_BITS).to(tl.float32, bitcast=True)
        steps = (codes | TWO_23_BITS).to(tl.float32, bitcast=True) - origin
    return steps, (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def expand(raw, step: tl.constexpr):
    """Return a tile's values as two factors. Their product is exact, so `tl.fma` may add it to a sum.

    Args:
        raw: the result of `fetch`, or planes, scale words and, from 6 bits on, zero points.

    Returns:
        code - zero_point, float32 (GROUPS, PIECES, LANES), and scale, float32 (GROUPS,).
    """
    if step.BITS == 16:
        return widen(raw[0]), tl.full((step.GROUPS,), 1.0, tl.float32)
    else:
        codes = tl.zeros((step.GROUPS, step.PIECES, step.LANES // step.WORD_BYTES), tl.int32)
        for i in tl.static_range(4):
            if step.BITS & (8 >> i):
                codes |= unpack_plane(raw[0], 8 >> i, step)
                raw = raw[1:]
        if len(raw) > 1:
            return values(codes, raw[0], raw[1], step)
        else:
            return values(codes, raw[0], (raw[0].to(tl.int32) >> 16) & 0xFF, step)
