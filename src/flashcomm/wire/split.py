"""How the rows of a message are divided among ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MOST_BYTES = (1 << 31) - 1  # of a piece with explicit sizes


@dataclass(frozen=True)
class Split:
    """Rows along dimension 0, divided into one piece per rank. Pieces lie behind each other in rank order.

    Args:
        sizes: Rows of each rank's piece; may be 0. A negative size is not valid.
    """

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, sizes: object) -> Split | None:
        """Return the split of these sizes; None for None. What is not a number becomes a size that is not valid."""
        if sizes is None or isinstance(sizes, Split):
            return sizes
        if not isinstance(sizes, Iterable):
            return cls((-1,))
        return cls(tuple(n if isinstance(n, int) and not isinstance(n, bool) else -1 for n in sizes))

    @classmethod
    def even(cls, rows: int, world_size: int) -> Split:
        """Return the split into equal pieces. It does not add up to `rows` if they cannot be equal."""
        return cls((rows // world_size,) * world_size)

    @property
    def rows(self) -> int:
        """The rows of all pieces."""
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """The rows of the largest piece."""
        return max(self.sizes)

    @property
    def is_even(self) -> bool:
        """Whether all pieces have the same number of rows."""
        return len(set(self.sizes)) == 1

    def fits(self, world_size: int, row_bytes: int) -> bool:
        """Return whether there is a valid piece for each rank, with rows of so many bytes."""
        valid = len(self.sizes) == world_size and min(self.sizes, default=-1) >= 0
        return valid and self.largest * row_bytes <= MOST_BYTES


@dataclass(frozen=True)
class Exchange:
    """The two splits of a rank's all-to-all.

    Args:
        sent: Rows that this rank sends to each rank.
        received: Rows that it receives from each rank.
        explicit: Whether the caller gave sizes. If not, pieces are equal, on all ranks.
    """

    sent: Split
    received: Split
    explicit: bool = True

    def fits(self, rows: int, rank: int, world_size: int, row_bytes: int) -> bool:
        """Return whether the splits are valid for an input of this shape, as far as one rank can tell."""
        valid = self.sent.fits(world_size, row_bytes) and self.received.fits(world_size, row_bytes)
        return valid and self.sent.rows == rows and self.sent.sizes[rank] == self.received.sizes[rank]
