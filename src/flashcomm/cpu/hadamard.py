"""The Hadamard transform as vector code. Additions are those of `torch_codec.hadamard`, in the same order.

The values of a group are spread over P = 1, 2 or 4 vectors: value i is lane i div P of vector i mod P. This is how
values come from memory: an int32 holds two bfloat16, or four codes. In this layout, rounds between vectors move no
value to another lane.
"""

from __future__ import annotations

from flashcomm.cpu.vector import Vec

_REGISTER_LANES = 16  # float32 lanes of the widest register: values this far apart are in different registers


def hadamard(vectors: list[Vec], n: int) -> list[Vec]:
    """Return the transform of every n consecutive values, n a power of two."""
    vectors, h = list(vectors), 1
    while h < n:
        if h < len(vectors):
            for i in range(len(vectors)):
                if not i & h:
                    a, b = vectors[i], vectors[i + h]
                    vectors[i], vectors[i + h] = a + b, a - b
        else:
            vectors = [_round_within(x, h // len(vectors)) for x in vectors]
        h *= 2
    return vectors


def _round_within(x: Vec, apart: int) -> Vec:
    """Return x with the lanes `apart` from each other replaced by their sum and their difference."""
    other = x.shuffle([lane ^ apart for lane in range(x.lanes)])
    is_second = [bool(lane & apart) for lane in range(x.lanes)]
    if apart >= _REGISTER_LANES:
        return (other + x).shuffle([lane + x.lanes * is_second[lane] for lane in range(x.lanes)], other - x)
    # one instruction computes other + x and other - x: a product with 1 or -1 is exact
    return x.intrinsic("fmuladd", x.like([-1 if second else 1 for second in is_second]), other)
