"""Wire bytes written down by hand from docs/wire-format.md: whoever changes one of them changes the format."""

import pytest
import torch

from flashcomm.wire import codec_for, torch_codec
from flashcomm.wire.format import Layout, StepFormat

CODECS = [torch_codec, codec_for("cpu")]


def wire(codec: object, fmt: str, values: list[float], row: int, dtype: torch.dtype = torch.float32) -> bytes:
    x = torch.tensor(values, dtype=dtype)
    layout = Layout(StepFormat.parse(fmt), row, dtype.itemsize)
    out = torch.full((layout.nbytes(0, x.numel()),), 0xEE, dtype=torch.uint8)
    codec.encode(x, layout, 0, x.numel(), out)  # type: ignore[attr-defined]
    return bytes(out.tolist())


def pad(*parts: bytes) -> bytes:
    """Sections one after the other, each padded with zeros to a multiple of 16 bytes."""
    return b"".join(p.ljust(-(-len(p) // 16) * 16, b"\0") for p in parts)


RAMP = [float(v) for v in range(-5, 11)]  # 16 values, min -5, max 10: at 4 bits the scale is 15/15 = 1, the zero -5


@pytest.mark.parametrize("codec", CODECS)
class TestGolden:
    def test_int4(self, codec: object) -> None:
        """Codes 0..15; byte i holds codes i (low nibble) and i + 8 (high). Scale 1.0 = 0x3F80, zero -5 = 0xFFFB."""
        codes = bytes([i | (i + 8) << 4 for i in range(8)])
        assert wire(codec, "int4-g16", RAMP, 16) == pad(codes, b"\x80\x3f", b"\xfb\xff")

    def test_int8(self, codec: object) -> None:
        """-100..155 is 255 steps of 1: the code is the value plus 100."""
        values = [-100.0, 155.0, 0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -1.5, 99.0, 100.0, 27.4, 27.6, 154.0, -99.0]
        codes = bytes([0, 255, 100, 101, 99, 100, 102, 102, 100, 98, 199, 200, 127, 128, 254, 1])  # ties to even
        assert wire(codec, "int8-g16", values, 16) == pad(codes, b"\x80\x3f", (-100).to_bytes(2, "little", signed=True))

    def test_int2(self, codec: object) -> None:
        """0..3 is 3 steps of 1; byte i holds codes i, i+4, i+8, i+12 in bits 0-1, 2-3, 4-5, 6-7."""
        codes = [0, 1, 2, 3, 3, 2, 1, 0, 1, 1, 2, 2, 0, 3, 0, 3]
        packed = bytes([codes[i] | codes[i + 4] << 2 | codes[i + 8] << 4 | codes[i + 12] << 6 for i in range(4)])
        assert wire(codec, "int2-g16", [float(c) for c in codes], 16) == pad(packed, b"\x80\x3f", b"\0\0")

    def test_int3_is_2_and_1_bits(self, codec: object) -> None:
        codes = [0, 7, 1, 6, 2, 5, 3, 4, 4, 3, 5, 2, 6, 1, 7, 0]
        low = bytes([sum((codes[i + 4 * p] & 3) << 2 * p for p in range(4)) for i in range(4)])
        high = bytes([sum((codes[i + 2 * p] >> 2) << p for p in range(8)) for i in range(2)])
        assert wire(codec, "int3-g16", [float(c) for c in codes], 16) == pad(low, high, b"\x80\x3f", b"\0\0")

    def test_int7_is_4_and_2_and_1_bits(self, codec: object) -> None:
        """0..127 by 127 steps of 1."""
        codes = [0, 127, 16, 64, 1, 2, 4, 8, 32, 100, 99, 98, 97, 96, 95, 94]
        low = bytes([(codes[i] & 15) | (codes[i + 8] & 15) << 4 for i in range(8)])
        middle = bytes([sum((codes[i + 4 * p] >> 4 & 3) << 2 * p for p in range(4)) for i in range(4)])
        high = bytes([sum((codes[i + 2 * p] >> 6) << p for p in range(8)) for i in range(2)])
        assert wire(codec, "int7-g16", [float(c) for c in codes], 16) == pad(low, middle, high, b"\x80\x3f", b"\0\0")

    def test_symmetric_sends_no_zero(self, codec: object) -> None:
        """int4-sym: max|x| 7 over 7 levels is 1; code = value + 8."""
        values = [-7.0, 7.0, 0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0, 5.0, -5.0, 6.0, -6.0, 0.0]
        codes = [int(v) + 8 for v in values]
        packed = bytes([codes[i] | codes[i + 8] << 4 for i in range(8)])
        assert wire(codec, "int4-g16-sym", values, 16) == pad(packed, b"\x80\x3f")

    def test_short_groups_end_a_row(self, codec: object) -> None:
        """Rows of 21: a group of 16 and one of 5, whose 5 codes take 3 bytes: (0,3) (1,4) (2)."""
        tail = [0.0, 15.0, 7.0, 3.0, 1.0]
        full = bytes([i | (i + 8) << 4 for i in range(8)])
        short = bytes([0 | 3 << 4, 15 | 1 << 4, 7])
        rows = wire(codec, "int4-g16", (RAMP + tail) * 2, 21)
        assert rows == pad((full + short) * 2, b"\x80\x3f" * 4, b"\xfb\xff\0\0" * 2)

    def test_scale_is_rounded_up(self, codec: object) -> None:
        """(1 - 0) / 15 = 0.0666667 = 0x3D888889: the next bfloat16 is 0x3D89; 1 / 0.06689453 rounds to code 15."""
        got = wire(codec, "int4-g16", [1.0] + [0.0] * 15, 16)
        assert got == pad(bytes([15, 0, 0, 0, 0, 0, 0, 0]), b"\x89\x3d", b"\0\0")

    def test_zeros(self, codec: object) -> None:
        """An all-zero group has the smallest scale, 2^-110 = 0x0880, and codes and zero 0."""
        assert wire(codec, "int4-g16", [0.0] * 16, 16) == pad(b"\0" * 8, b"\x80\x08", b"\0\0")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**126, -(2.0**126)])
    def test_not_finite(self, codec: object, bad: float) -> None:
        """One bad value: scale NaN = 0x7FC0, codes and zero 0, in its group only."""
        values = [*RAMP, bad, *RAMP[1:]]
        codes = bytes([i | (i + 8) << 4 for i in range(8)])
        assert wire(codec, "int4-g16", values, 32) == pad(codes + b"\0" * 8, b"\x80\x3f\xc0\x7f", b"\xfb\xff\0\0")

    def test_lossless_is_the_values(self, codec: object) -> None:
        """bf16 1.0 = 0x3F80, -2.0 = 0xC000, little-endian, padded to 16."""
        assert wire(codec, "bf16", [1.0, -2.0], 2, torch.bfloat16) == pad(b"\x80\x3f\x00\xc0")
