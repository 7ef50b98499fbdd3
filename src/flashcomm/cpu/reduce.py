"""Sums and maxima over the lanes of vectors, of many vectors at once: one vector alone would keep few lanes busy.

A *block* is a power of two of neighboring lanes that become one number.
"""

from __future__ import annotations

from flashcomm.cpu.vector import Vec, width

REGISTER = 512  # bits of the widest registers


def folded(parts: list[Vec], how: str) -> Vec:
    """Of all lanes of all parts, in as many lanes as fit one register; zeros may be added.

    how: "+", or an intrinsic such as "smax".
    """
    whole = parts[0]
    for part in parts[1:]:
        whole = _both(whole, part, how)
    whole = whole.shuffle(range(1 << (whole.lanes - 1).bit_length()), whole.like(0))
    while whole.lanes * width(whole.element) > REGISTER:
        half = whole.lanes // 2
        whole = _both(whole.shuffle(range(half)), whole.shuffle(range(half, 2 * half)), how)
    return whole


def halved(rows: list[Vec], block: int, how: str) -> Vec:
    """One or two vectors as one, the halves of each block become one block, in order."""
    first = [lane for lane in range(len(rows) * rows[0].lanes) if not lane & (block // 2)]
    first_half, second_half = (rows[0].shuffle(lanes, rows[-1]) for lanes in (first, [i + block // 2 for i in first]))
    return _both(first_half, second_half, how)


def reduced(rows: list[Vec], block: int, how: str) -> Vec:
    """Each block of each of the rows, a power of two of them, as one number, in order."""
    while block > 1:
        rows = [halved(rows[i : i + 2], block, how) for i in range(0, len(rows), 2)]
        block //= 2
    while len(rows) > 1:
        rows = [a.shuffle(range(2 * a.lanes), b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


def _both(a: Vec, b: Vec, how: str) -> Vec:
    return a + b if how == "+" else a.intrinsic(how, b)
