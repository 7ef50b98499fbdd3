"""The Hadamard transform as vector code, in the order of `torch_codec.hadamard`: each sum rounded once, as there.

Values are spread over one, two or four vectors ("parts"): value i is lane i div P of part i mod P. So they come from
memory anyway (two bfloat16 are one int32, four codes too), and rounds between parts move no value to another lane.
"""

from __future__ import annotations

from flashcomm.cpu.vector import Vec

_REGISTER = 16  # float32 lanes of the widest registers: between values further apart lanes need not move either


def hadamard(parts: list[Vec], n: int) -> list[Vec]:
    """H of every n values in a row, n a power of two."""
    parts, h = list(parts), 1
    while h < n:
        if h < len(parts):
            for i in range(len(parts)):
                if not i & h:
                    a, b = parts[i], parts[i + h]
                    parts[i], parts[i + h] = a + b, a - b
        else:
            parts = [_round(part, h // len(parts)) for part in parts]
        h *= 2
    return parts


def _round(x: Vec, apart: int) -> Vec:
    """The lanes `apart` from each other become their sum and their difference."""
    other = x.shuffle([lane ^ apart for lane in range(x.lanes)])
    second = [bool(lane & apart) for lane in range(x.lanes)]
    if apart >= _REGISTER:
        return (other + x).shuffle([lane + x.lanes * second[lane] for lane in range(x.lanes)], other - x)
    # other + x or other - x in one instruction, for a product with 1 or -1 rounds nothing
    return x.intrinsic("fmuladd", x.like([-1 if is_second else 1 for is_second in second]), other)
