"""The wire format of docs/wire-format.md once more, in plain numbers. It shares no code with the codecs."""

from __future__ import annotations

import struct


def rounded(x: float) -> float:
    """To float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def by_hand(values: list[float], bits: int, clip_ratio: float | None) -> list[float]:
    """A group of values or of transforms as it is after encoding and decoding.

    With a clip ratio the smaller range is taken where it gives the smaller error.
    """
    cut, levels = 1 << (15 + bits if bits <= 5 else 16), 2**bits - 1

    def roundtrip(low: float, high: float) -> tuple[float, list[float]]:
        needed = max(rounded(rounded(high - low) / levels), 2.0**-110)
        bits_of_scale = -(-struct.unpack("<I", struct.pack("<f", needed))[0] // cut) * cut
        scale = struct.unpack("<f", struct.pack("<I", bits_of_scale))[0]
        inverse = rounded(1 / scale)
        zero = -round(rounded(low * inverse))
        codes = [min(max(round(rounded(v * inverse)) + zero, 0), levels) for v in values]
        return inverse, [scale * (code - zero) for code in codes]

    low, high = min(*values, 0.0), max(*values, 0.0)
    inverse, whole = roundtrip(low, high)
    if clip_ratio is None:
        return whole

    def error(decoded: list[float]) -> int:
        errors = (rounded(rounded(v - d) * inverse) for v, d in zip(values, decoded, strict=True))
        return sum(round(16 * e) ** 2 for e in errors)

    smaller = roundtrip(rounded(low * clip_ratio), rounded(high * clip_ratio))[1]
    return smaller if error(smaller) < error(whole) else whole


def transform(values: list[float]) -> list[float]:
    y, h = list(values), 1
    while h < len(y):
        y = [rounded(y[i ^ h] - y[i]) if i & h else rounded(y[i] + y[i ^ h]) for i in range(len(y))]
        h *= 2
    return y
