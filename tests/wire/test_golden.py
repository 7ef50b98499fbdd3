"""Wire bytes, written by hand from docs/wire-format.md. A change of any of them is a change of the format."""

from dataclasses import replace

import pytest
import torch

from flashcomm.codecs import codec_for
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat

CODECS = [torch_codec, codec_for("cpu")]


def wire(
    codec: object, fmt: str | StepFormat, values: list[float], row: int, dtype: torch.dtype = torch.float32
) -> bytes:
    x, step = torch.tensor(values, dtype=dtype), StepFormat.parse(fmt) if isinstance(fmt, str) else fmt
    layout = Layout(step, row, dtype.itemsize)
    out = torch.full((layout.nbytes(0, x.numel()),), 0xEE, dtype=torch.uint8)
    codec.encode(x, layout, 0, x.numel(), out)  # type: ignore[attr-defined]
    return bytes(out.tolist())


def decoded(codec: object, fmt: str, content: bytes, count: int) -> list[float]:
    """The sum of two ranks' buffers of one row, both with this content."""
    out = torch.full((count,), 123.0)
    wires = torch.tensor([list(content)] * 2, dtype=torch.uint8)
    codec.decode_sum(wires, Layout(StepFormat.parse(fmt), count, 4), 0, count, out, torch.float32)  # type: ignore[attr-defined]
    return out.tolist()


def pad(*parts: bytes) -> bytes:
    """Sections one after the other, each padded with zeros to a multiple of 16 bytes."""
    return b"".join(p.ljust(-(-len(p) // 16) * 16, b"\0") for p in parts)


RAMP = [
    float(v) for v in range(-5, 11)
]  # 16 values, min -5, max 10: at 4 bits the scale is 15/15 = 1, the zero point 5
RAMP_CODES = bytes([i | (i + 8) << 4 for i in range(8)])


@pytest.mark.parametrize("codec", CODECS)
class TestGolden:
    """Formats and their bytes. Up to 5 bits, scale and zero point share 16 bits: scale 1.0 is 0x3F80 << 1 = 0x7F00."""

    def test_int4(self, codec: object) -> None:
        """Codes 0..15; byte i holds codes i (low nibble) and i + 8 (high). Scale 1, zero point 5: 0x7F05."""
        content = pad(RAMP_CODES, b"\x05\x7f")
        assert wire(codec, "int4-g16", RAMP, 16) == content
        assert decoded(codec, "int4-g16", content, 16) == [2 * v for v in RAMP]

    def test_int2(self, codec: object) -> None:
        """0..3 is 3 steps of 1; byte i holds codes i, i+4, i+8, i+12 in bits 0-1, 2-3, 4-5, 6-7."""
        codes = [0, 1, 2, 3, 3, 2, 1, 0, 1, 1, 2, 2, 0, 3, 0, 3]
        packed = bytes([codes[i] | codes[i + 4] << 2 | codes[i + 8] << 4 | codes[i + 12] << 6 for i in range(4)])
        assert wire(codec, "int2-g16", [float(c) for c in codes], 16) == pad(packed, b"\x00\x7f")

    def test_int3_is_2_and_1_bits(self, codec: object) -> None:
        """-7..0: zero point 7."""
        codes = [0, 7, 1, 6, 2, 5, 3, 4, 4, 3, 5, 2, 6, 1, 7, 0]
        low = bytes([sum((codes[i + 4 * p] & 3) << 2 * p for p in range(4)) for i in range(4)])
        high = bytes([sum((codes[i + 2 * p] >> 2) << p for p in range(8)) for i in range(2)])
        assert wire(codec, "int3-g16", [c - 7.0 for c in codes], 16) == pad(low, high, b"\x07\x7f")

    def test_int5_is_4_and_1_bits(self, codec: object) -> None:
        """-30..1 is 31 steps of 1, zero point 30 = 0x1E."""
        codes = [0, 31, 1, 30, 2, 29, 15, 16, 17, 14, 7, 8, 20, 11, 28, 3]
        low = bytes([(codes[i] & 15) | (codes[i + 8] & 15) << 4 for i in range(8)])
        high = bytes([sum((codes[i + 2 * p] >> 4) << p for p in range(8)) for i in range(2)])
        content = pad(low, high, b"\x1e\x7f")
        assert wire(codec, "int5-g16", [c - 30.0 for c in codes], 16) == content
        assert decoded(codec, "int5-g16", content, 16) == [2 * (c - 30.0) for c in codes]

    def test_int6_is_4_and_2_bits(self, codec: object) -> None:
        """-20..43 is 63 steps of 1. From 6 bits on the zero point is a byte of its own: 20 = 0x14."""
        codes = [0, 63, 20, 1, 62, 2, 61, 4, 8, 16, 32, 33, 48, 47, 15, 19]
        low = bytes([(codes[i] & 15) | (codes[i + 8] & 15) << 4 for i in range(8)])
        high = bytes([sum((codes[i + 4 * p] >> 4) << 2 * p for p in range(4)) for i in range(4)])
        content = pad(low, high, b"\x80\x3f", b"\x14")
        assert wire(codec, "int6-g16", [c - 20.0 for c in codes], 16) == content
        assert decoded(codec, "int6-g16", content, 16) == [2 * (c - 20.0) for c in codes]

    def test_int7_is_4_and_2_and_1_bits(self, codec: object) -> None:
        """0..127 by 127 steps of 1."""
        codes = [0, 127, 16, 64, 1, 2, 4, 8, 32, 100, 99, 98, 97, 96, 95, 94]
        low = bytes([(codes[i] & 15) | (codes[i + 8] & 15) << 4 for i in range(8)])
        middle = bytes([sum((codes[i + 4 * p] >> 4 & 3) << 2 * p for p in range(4)) for i in range(4)])
        high = bytes([sum((codes[i + 2 * p] >> 6) << p for p in range(8)) for i in range(2)])
        assert wire(codec, "int7-g16", [float(c) for c in codes], 16) == pad(low, middle, high, b"\x80\x3f", b"\0")

    def test_int8(self, codec: object) -> None:
        """-100..155 is 255 steps of 1: the code is the value plus 100."""
        values = [-100.0, 155.0, 0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -1.5, 99.0, 100.0, 27.4, 27.6, 154.0, -99.0]
        codes = bytes([0, 255, 100, 101, 99, 100, 102, 102, 100, 98, 199, 200, 127, 128, 254, 1])  # ties to even
        assert wire(codec, "int8-g16", values, 16) == pad(codes, b"\x80\x3f", b"\x64")

    def test_short_groups_end_a_row(self, codec: object) -> None:
        """Rows of 21: a group of 16 and one of 5, whose 5 codes take 3 bytes: (0,3) (1,4) (2)."""
        tail = [0.0, 15.0, 7.0, 3.0, 1.0]
        short = bytes([0 | 3 << 4, 15 | 1 << 4, 7])
        rows = wire(codec, "int4-g16", (RAMP + tail) * 2, 21)
        assert rows == pad((RAMP_CODES + short) * 2, b"\x05\x7f\x00\x7f" * 2)

    def test_the_range_holds_zero(self, codec: object) -> None:
        """100..115: the range is 0..115, the scale 115/15 = 0x40F55555, rounded up 0x40F8 = 7.75, shifted 0x81F0."""
        codes = [13] * 5 + [14] * 8 + [15] * 3  # 104 / 7.75 = 13.42, 105: 13.55, 112: 14.45, 113: 14.58
        packed = bytes([codes[i] | codes[i + 8] << 4 for i in range(8)])
        assert wire(codec, "int4-g16", [100.0 + i for i in range(16)], 16) == pad(packed, b"\xf0\x81")

    def test_scale_is_rounded_up(self, codec: object) -> None:
        """To 5 significant bits with int4, whose zero point takes 4 bits; to 8 if the zero point is a byte of its own.

        1/15 = 0x3D888889: up to 0x3D90 = 0.0703, shifted 0x7B20; 1 / 0.0703 = 14.2.
        1/255 = 0x3B808081: up to 0x3B81 = 0.003937; 1 / 0.003937 = 254.01.
        """
        values = [1.0] + [0.0] * 15
        assert wire(codec, "int4-g16", values, 16) == pad(b"\x0e" + b"\0" * 7, b"\x20\x7b")
        assert wire(codec, "int8-g16", values, 16) == pad(b"\xfe" + b"\0" * 15, b"\x81\x3b", b"\0")

    @pytest.mark.parametrize("fmt", ["int4-g16", "int4-g16-had"])
    def test_zeros(self, codec: object, fmt: str) -> None:
        """An all-zero group has the smallest scale, 2^-110 = 0x0880, shifted 0x1100, and codes and zero point 0."""
        assert wire(codec, fmt, [0.0] * 16, 16) == pad(b"\0" * 8, b"\x00\x11")
        assert wire(codec, fmt.replace("4", "8"), [-0.0] * 16, 16) == pad(b"\0" * 16, b"\x80\x08", b"\0")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**126, -(2.0**126)])
    def test_not_finite(self, codec: object, bad: float) -> None:
        """One bad value: scale NaN = 0x7FC0, shifted 0xFF80, codes and zero point 0, in its group only."""
        values = [*RAMP, bad, *RAMP[1:]]
        assert wire(codec, "int4-g16", values, 32) == pad(RAMP_CODES + b"\0" * 8, b"\x05\x7f\x80\xff")
        for bits, planes in ((6, (8, 4)), (8, (16,))):
            got = wire(codec, f"int{bits}-g16", values[16:], 16)
            assert got == pad(*(b"\0" * p for p in planes), b"\xc0\x7f", b"\0")

    def test_uncompressed_is_the_values(self, codec: object) -> None:
        """bf16 1.0 = 0x3F80, -2.0 = 0xC000, little-endian, padded to 16."""
        assert wire(codec, "none", [1.0, -2.0], 2, torch.bfloat16) == pad(b"\x80\x3f\x00\xc0")


def had(a: float, b: float, c: float, n: int = 16) -> list[float]:
    """n values, of which only the first three are not 0. The transform repeats a+b+c, a-b+c, a+b-c, a-b-c."""
    return [a, b, c] + [0.0] * (n - 3)


@pytest.mark.parametrize("codec", CODECS)
class TestGoldenHadamard:
    def test_int4(self, codec: object) -> None:
        """The transform is 10, 1, 4, -5, ...: scale 1, zero point 5, codes 15, 6, 9, 0. No error: the whole range."""
        content = pad(b"\xff\x66\x99\x00" * 2, b"\x05\x7f")
        assert wire(codec, "int4-g16-had", had(2.5, 4.5, 3.0), 16) == content
        assert decoded(codec, "int4-g16-had", content, 16) == had(5.0, 9.0, 6.0)
        in_hadamard_domain = replace(StepFormat.parse("int4-g16-had"), in_hadamard_domain=True)
        assert wire(codec, in_hadamard_domain, [10.0, 1.0, 4.0, -5.0] * 4, 16) == content

    def test_int6(self, codec: object) -> None:
        """The transform is 43, 3, 20, -20, ...: scale 1, zero point 20, codes 63, 23, 40, 0: of 4 bits 15, 7, 8, 0."""
        content = pad(b"\xff\x77\x88\x00" * 2, b"\xff\x55\xaa\x00", b"\x80\x3f", b"\x14")
        assert wire(codec, "int6-g16-had", had(11.5, 20.0, 11.5), 16) == content
        assert decoded(codec, "int6-g16-had", content, 16) == had(23.0, 40.0, 23.0)

    def test_the_clipped_range_is_chosen(self, codec: object) -> None:
        """The transform is 15, and 15 times 4.53125.

        Whole range, scale 1: 15 times the code 5, off by 0.469 = 7.5 sixteenths, so the error is 15 * 8^2 = 960.
        29/32 of it, scale 0.90625 = 0x3F68: 5 * 0.90625 is exact, and 15 becomes 13.59375, off by 22.5 sixteenths:
        22^2 = 484. The scale shifted is 0x7ED0.
        """
        mean = (15 - 4.53125) / 16
        content = pad(b"\x5f" + b"\x55" * 7, b"\xd0\x7e")
        assert wire(codec, "int4-g16-had", [4.53125 + mean] + [mean] * 15, 16) == content
        mean = (13.59375 - 4.53125) / 16
        assert decoded(codec, "int4-g16-had", content, 16) == [2 * (4.53125 + mean)] + [2 * mean] * 15

    def test_the_clipped_range_is_not_chosen(self, codec: object) -> None:
        """The transform is 15, and 15 times 4.59375.

        Whole range: off by 6.5 sixteenths, 15 * 6^2 = 540; clipped: 15 * 1 + 22^2 = 499. As 4.625, that is 6 and 1.5:
        15 * 6^2 = 540 and 15 * 2^2 + 22^2 = 544, the whole range, scale 1, is better: codes 15 and 5.
        """
        mean = (15 - 4.59375) / 16
        assert wire(codec, "int4-g16-had", [4.59375 + mean] + [mean] * 15, 16)[16:18] == b"\xd0\x7e"
        mean = (15 - 4.625) / 16
        assert wire(codec, "int4-g16-had", [4.625 + mean] + [mean] * 15, 16) == pad(b"\x5f" + b"\x55" * 7, b"\x00\x7f")

    def test_tails(self, codec: object) -> None:
        """The last 4 values of a row of 20 are transformed. The last 5 of a row of 21 are quantized as they are."""
        row, full = had(2.5, 4.5, 3.0), b"\xff\x66\x99\x00" * 2
        got = wire(codec, "int4-g16-had", row + had(2.5, 4.5, 3.0, 4), 20)
        assert got == pad(full + b"\x9f\x06", b"\x05\x7f\x05\x7f")
        assert decoded(codec, "int4-g16-had", got, 20) == had(5.0, 9.0, 6.0) + had(5.0, 9.0, 6.0, 4)
        got = wire(codec, "int4-g16-had", [*row, 0.0, 15.0, 7.0, 3.0, 1.0], 21)
        assert got == pad(full + b"\x30\x1f\x07", b"\x05\x7f\x00\x7f")
        assert decoded(codec, "int4-g16-had", got, 21) == [*had(5.0, 9.0, 6.0), 0.0, 30.0, 14.0, 6.0, 2.0]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**126, -(2.0**126)])
    def test_not_finite(self, codec: object, bad: float) -> None:
        values = [*had(2.5, 4.5, 3.0), bad, *RAMP[1:]]
        got = wire(codec, "int4-g16-had", values, 32)
        assert got == pad(b"\xff\x66\x99\x00" * 2 + b"\0" * 8, b"\x05\x7f\x80\xff")
        assert all(v != v for v in decoded(codec, "int4-g16-had", got, 32)[16:])
