"""The functions of gpu/tile.py and of LL tiles, compared with the torch codec, in Triton's interpreter."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from support import N_GPUS, same_bits, tough
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(N_GPUS > 0, reason="kernels are not interpreted where there is a GPU: test_on_gpus.py")

import triton.language as tl

from flashcomm.gpu import low_latency, tile, tuning
from flashcomm.gpu.quantize import quantize
from flashcomm.wire import torch_codec
from flashcomm.wire.format import StepFormat, WireFormat

N_GROUPS = 4
FORMATS = ["int8", "int7-g16", "int6-had", "int5-g128-had", "int4", "int4-had", "int3-g32-had", "int2-g16"]


def step_for(fmt: StepFormat, n_pieces: int = 0, words: bool = True) -> tile.Step:
    n_pieces = n_pieces or tile.pieces(fmt)
    return tile.step_of(fmt, n_pieces, N_GROUPS, fmt.group // n_pieces, words=words)


class Kept(NamedTuple):
    """Constants of a test's kernel besides its step."""

    BF16: bool = False


@triton.jit
def _order(step: tl.constexpr):
    """Offsets of a tile's values in a tensor of contiguous groups."""
    group = (tl.arange(0, step.GROUPS) * (step.PIECES * step.LANES))[:, None, None]
    return group + (tl.arange(0, step.PIECES) * step.LANES)[None, :, None] + tl.arange(0, step.LANES)[None, None, :]


@triton.jit
def _hadamard(x, out, back, step: tl.constexpr):
    at = _order(step)
    y = tile.hadamard(tl.load(x + at), step)
    tl.store(out + at, y)
    tl.store(back + at, tile.from_hadamard(y, step))


@triton.jit
def _quantize(x, sizes, codes, words, zero_points, step: tl.constexpr):
    at, g = _order(step), tl.arange(0, step.GROUPS)
    code, word, zero_point = quantize(tl.load(x + at), tl.load(sizes + g), step)
    tl.store(codes + at, code)
    tl.store(words + g[:, None, None], word)
    tl.store(zero_points + g[:, None, None], zero_point)


@triton.jit
def _planes(codes, planes, back, step: tl.constexpr):
    """Pack codes plane by plane, each plane group by group, and unpack them again."""
    at, g = _order(step), tl.arange(0, step.GROUPS)
    GROUP: tl.constexpr = step.PIECES * step.LANES
    code = tl.load(codes + at)
    if step.WORD_BYTES == 4:
        code = tile.quads(code, step)
    found = code * 0
    for i in tl.static_range(4):
        if step.BITS & (8 >> i):
            plane = planes + tile.plane_offset(8 >> i, step)
            begin = g * (GROUP * (8 >> i) // 8)
            tile.put_plane(plane, begin, g >= 0, code, step.LANES, 8 >> i, step)
            found |= tile.unpack_plane(
                tile.fetch_plane(plane, begin, g >= 0, step.LANES, 8 >> i, "", step), 8 >> i, step
            )
    origin = tl.zeros((step.GROUPS,), tl.int32)
    steps, _ = tile.values(found, origin, origin, step)
    tl.store(back + at, steps)


@triton.jit
def _put(x, sizes, base, step: tl.constexpr, kept: tl.constexpr):
    tile.put(base, tl.load(x + _order(step)), tl.load(sizes + tl.arange(0, step.GROUPS)), x, step, kept.BF16)


@triton.jit
def _expand(base, out, x, step: tl.constexpr):
    steps, scale = tile.expand(tile.fetch(base, x, step), step)
    tl.store(out + _order(step), steps * scale[:, None, None])


@triton.jit
def _put_ll(x, like, sizes, base, epoch, step: tl.constexpr, kept: tl.constexpr):
    y, n = tl.load(x + _order(step)), tl.load(sizes + tl.arange(0, step.GROUPS))
    low_latency.put(base, y, n, epoch + 0, like, step, kept.BF16)


@triton.jit
def _expand_ll(base, out, late, x, epoch, step: tl.constexpr):
    raw = low_latency.fetch(base, epoch + 0, x, step)
    steps, scale = low_latency.expand_words(raw, x, step)
    tl.store(out + _order(step), steps * scale[:, None, None])
    tl.store(late, low_latency._missing(raw, epoch + 0))


@triton.jit
def _narrow(x, out, kept: tl.constexpr):
    i = tl.arange(0, 64)
    tile.store(out, i, i >= 0, tl.load(x + i), kept.BF16)


@triton.jit
def _widen(wide, bf16):
    i = tl.arange(0, 64)
    tl.store(wide + i, tile.widen(tl.load(bf16 + i)))


@triton.jit
def _scalar(counts, out):
    n = tl.load(counts)
    total = tile.scalar(3, like=n)
    for _ in range(4):  # the loop could not change a plain 3
        total += n
    tl.store(out, total)


def groups(fmt: StepFormat, seed: int = 0) -> Tensor:
    """Groups with values of very different size. One group is not finite, one is constant."""
    x = tough((N_GROUPS, fmt.group), torch.float32, seed)
    x[1, fmt.group // 2] = float("inf") if seed % 2 else float("nan")
    x[2] = 1.7 * (seed + 1)
    return x


def quantized(x: Tensor, fmt: StepFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale words and zero points of the torch codec, int32."""
    codes, scale, zero_point = torch_codec.quantize(x, fmt)
    return codes.int(), torch_codec.pack_scales(scale, zero_point, fmt).int() & 0xFFFF, zero_point.int()


def dequantized(x: Tensor, fmt: StepFormat) -> Tensor:
    """The decoded values y^ of the torch codec, which are in the Hadamard domain in -had formats."""
    return torch_codec.dequantize(*torch_codec.quantize(x, fmt))


def into_domain(x: Tensor, fmt: StepFormat) -> Tensor:
    return torch_codec.hadamard(x) if fmt.hadamard else x


def sizes(fmt: StepFormat) -> Tensor:
    return torch.full((N_GROUPS,), fmt.group, dtype=torch.int32)


@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("n_pieces", [1, 4, 8])
def test_hadamard_is_that_of_the_torch_codec_and_has_an_inverse(group: int, n_pieces: int) -> None:
    fmt = StepFormat(8, group, True)
    x = torch.randint(-1000, 1000, (N_GROUPS, group)).float()  # so that the inverse is exact
    out, back = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    _hadamard[(1,)](x, out, back, step_for(fmt, n_pieces))
    assert torch.equal(out, torch_codec.hadamard(x))
    assert torch.equal(back, x)


def test_hadamard_rounds_in_the_order_of_the_definition() -> None:
    fmt = StepFormat(8, 128, True)
    x = tough((N_GROUPS, 128), torch.float32)
    out = torch.empty_like(x)
    _hadamard[(1,)](x, out, torch.empty_like(x), step_for(fmt, 4))
    assert same_bits(out, torch_codec.hadamard(x))


@pytest.mark.parametrize("name", FORMATS)
def test_quantize(name: str) -> None:
    fmt = StepFormat.parse(name)
    for seed in range(3):
        x = groups(fmt, seed)
        codes, words, zero_points = (torch.full_like(t, -1, dtype=torch.int32) for t in (x, x[:, 0], x[:, 0]))
        _quantize[(1,)](into_domain(x, fmt), sizes(fmt), codes, words, zero_points, step_for(fmt))
        want = quantized(x, fmt)
        assert torch.equal(codes, want[0])
        assert torch.equal(words & 0xFFFF, want[1])
        assert torch.equal(zero_points, want[2])


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_planes_are_those_of_the_torch_codec_and_unpack(name: str, words: bool) -> None:
    fmt = StepFormat.parse(name)
    step = step_for(fmt, words=words)
    codes = torch.randint(0, fmt.levels + 1, (N_GROUPS, fmt.group), dtype=torch.int32)
    planes = torch.full((N_GROUPS * fmt.group * fmt.bits // 8,), 0xEE, dtype=torch.uint8)
    back = torch.full(codes.shape, torch.nan)
    _planes[(1,)](codes, planes, back, step)
    want = [torch_codec.pack(codes, width, shift).reshape(-1) for width, shift in fmt.planes]
    assert torch.equal(planes, torch.cat(want).to(torch.uint8))
    assert torch.equal(back, codes.float())


@pytest.mark.parametrize("name", FORMATS)
def test_a_tile_comes_back_as_what_the_torch_codec_makes_of_it(name: str) -> None:
    """In the layouts of the collectives' kernels. No byte behind the tile is written."""
    fmt = StepFormat.parse(name)
    step = step_for(fmt, tuning._pieces(fmt))
    n_bytes = tile.tile_bytes(fmt, N_GROUPS, 4)
    for seed in range(2):
        x = groups(fmt, seed)
        base, out = torch.full((n_bytes + 64,), 0xEE, dtype=torch.uint8), torch.full_like(x, 7.0)
        _put[(1,)](into_domain(x, fmt), sizes(fmt), base, step, Kept())
        assert (base[n_bytes:] == 0xEE).all()
        _expand[(1,)](base, out, x, step)
        assert same_bits(out, dequantized(x, fmt))


def test_an_uncompressed_tile_holds_the_messages_dtype() -> None:
    fmt = StepFormat.parse("none")
    x, step = tough((N_GROUPS, fmt.group), torch.float32), step_for(fmt)
    base, out = torch.zeros(tile.tile_bytes(fmt, N_GROUPS, 4), dtype=torch.uint8), torch.empty_like(x)
    _put[(1,)](x, sizes(fmt), base, step, Kept())
    assert torch.equal(base.view(torch.float32).view(x.shape), x)
    _expand[(1,)](base, out, x, step)
    assert same_bits(out, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*FORMATS, "none"])
def test_a_tile_by_the_ll_protocol(name: str, dtype: torch.dtype) -> None:
    """All words carry the epoch, no word behind the tile is written, and the values are those of a tile with flags."""
    fmt = StepFormat.parse(name)
    step, by_hand = step_for(fmt, tuning._pieces(fmt)), dtype == torch.bfloat16
    n_words = low_latency.tile_bytes(fmt, N_GROUPS, dtype.itemsize, step.PIECES) // 8
    x = groups(fmt).to(dtype).float() if not fmt.uncompressed else tough((N_GROUPS, fmt.group), dtype).float()
    base, out = torch.zeros(n_words + 8, dtype=torch.int64), torch.full_like(x, 7.0)
    late, like = torch.empty(1, dtype=torch.int32), torch.empty(16, dtype=dtype)
    _put_ll[(1,)](
        into_domain(x, fmt), like.view(torch.int16) if by_hand else like, sizes(fmt), base, 41, step, Kept(by_hand)
    )
    assert (base[:n_words] >> 32 == 41).all()
    assert (base[n_words:] == 0).all()
    _expand_ll[(1,)](base, out, late, like, 41, step)
    assert late.item() == 0
    assert same_bits(out, x if fmt.uncompressed else dequantized(x, fmt))
    for missing in {0, n_words // 2, n_words - 1}:  # a word of the call before the last
        kept = base[missing].item()
        base[missing] = kept - (2 << 32)
        _expand_ll[(1,)](base, out, late, like, 41, step)
        assert late.item() == 1, missing
        base[missing] = kept


def test_narrow_rounds_half_to_even() -> None:
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (64,), dtype=torch.int64).int()
    bits[:6] = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, -0x800000, 0x7F800001])  # ties, max, nan
    x = bits.view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.zeros(64, dtype=dtype)
        _narrow[(1,)](x, out.view(torch.int16) if dtype == torch.bfloat16 else out, Kept(dtype == torch.bfloat16))
        assert same_bits(out, x.to(dtype))


def test_widen() -> None:
    wide, bf16 = torch.empty(64), torch.randn(64).bfloat16()
    _widen[(1,)](wide, bf16)
    assert torch.equal(wide, bf16.float())


def test_a_scalar_has_the_type_of_what_it_is_like() -> None:
    for dtype in (torch.int32, torch.int64):
        out = torch.zeros(1, dtype=dtype)
        _scalar[(1,)](torch.tensor([5], dtype=dtype), out)
        assert out.item() == 23


@pytest.mark.parametrize(
    "name", ["int4", "int6-had/int7-had", "int8-g128/int5-g16", "int3-g32-had/int4-g64-had", "none"]
)
def test_a_tile_is_cut_alike_for_both_steps(name: str) -> None:
    fmt = WireFormat.parse(name)
    for how in tuning.tunings(fmt):
        tiles = tuning.tiles_of(fmt, 2, how)
        for step, wanted in ((tiles.reduce, fmt.reduce), (tiles.gather, fmt.gather)):
            assert wanted.group == step.PIECES * step.LANES
            assert step.GROUPS * wanted.group == tiles.units * fmt.unit == how.tile_numel
            assert step.BYTES % 16 == 0
