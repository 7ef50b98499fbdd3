"""Sums and maxima over the lanes of many vectors at once, as the last steps for a single vector would use few lanes.

A *block* is a power of two of neighboring lanes that are reduced to one number.
"""

from __future__ import annotations

from flashcomm.cpu.vector import Vec, width

REGISTER_BITS = 512  # of the widest register (AVX-512)


def fold(vectors: list[Vec], op: str) -> Vec:
    """Reduce all lanes of all vectors to as many lanes as fit one register. Zeros may be added to the operands.

    op: "+", or an intrinsic such as "smax".
    """
    whole = vectors[0]
    for vector in vectors[1:]:
        whole = _apply(whole, vector, op)
    whole = whole.shuffle(range(1 << (whole.lanes - 1).bit_length()), whole.like(0))
    while whole.lanes * width(whole.element) > REGISTER_BITS:
        half = whole.lanes // 2
        whole = _apply(whole.shuffle(range(half)), whole.shuffle(range(half, 2 * half)), op)
    return whole


def halve(rows: list[Vec], block: int, op: str) -> Vec:
    """Combine the two halves of each block. Return the blocks of all vectors, one or two of them, in one vector."""
    first = [lane for lane in range(len(rows) * rows[0].lanes) if not lane & (block // 2)]
    first_half, second_half = (rows[0].shuffle(lanes, rows[-1]) for lanes in (first, [i + block // 2 for i in first]))
    return _apply(first_half, second_half, op)


def reduce(rows: list[Vec], block: int, op: str) -> Vec:
    """Return one number for each block of each row, in order. The number of rows is a power of two."""
    while block > 1:
        rows = [halve(rows[i : i + 2], block, op) for i in range(0, len(rows), 2)]
        block //= 2
    while len(rows) > 1:
        rows = [a.shuffle(range(2 * a.lanes), b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


def _apply(a: Vec, b: Vec, op: str) -> Vec:
    return a + b if op == "+" else a.intrinsic(op, b)
