"""What a message looks like on the wire: the grammar of formats and the arithmetic of their bytes.

A *message* is a tensor of any shape, read as rows of `row` values (the last dimension). Each row is cut
into groups of `group` values, the last group of a row being shorter where the group does not divide the
row: a group never straddles rows. A *span* `[start, stop)` is a range of values, counted in row-major
order, whose ends lie on group boundaries; one wire buffer holds one span.

    wire buffer = [plane]...[scale][zero]       every section starts at a multiple of 16 bytes

    plane w     the code's next w bits (widest plane first, from the least significant bit up); a group of
                n values takes m = ceil(n*w/8) bytes: value i sits in byte i mod m, at bit w*(i div m)
    scale       one bfloat16 per group
    zero        one int16 per group (absent in symmetric formats, where it is -2^(bits-1))

    value = scale * (code + zero)

`docs/wire-format.md` tells the same with pictures and the reasons. Here is only arithmetic: no tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from flashcomm.errors import FormatError

ALIGN = 16  # bytes; every section of a wire buffer starts at a multiple of it
GROUPS = (16, 32, 64, 128, 256)
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
LOSSLESS = "bf16"

_STEP = re.compile(r"int(?P<bits>[1-9]\d*)(?P<options>(?:-[a-z0-9]+)*)")
_HELP = (
    "a format is int2 ... int8, optionally with -g16, -g32, -g64, -g128 or -g256 (values per scale) and -sym "
    "(no zero point), e.g. 'int4', 'int4-g32', 'int5-g64-sym'; 'int4/int8' uses the first for the reduce step "
    "and the second for the gather step; 'bf16' does not compress"
)


def default_group(bits: int) -> int:
    """Values per scale when the format does not say: 128 at 4 bits and more, 32 below."""
    return 128 if bits >= 4 else 32


@dataclass(frozen=True)
class StepFormat:
    """How the values of one step (reduce or gather) are coded.

    `bits` is 2 to 8, or 16 for values sent as they are, in the tensor's own dtype; `group` is the number of
    values that share a scale. Raises FormatError for anything else.
    """

    bits: int
    group: int
    symmetric: bool = False

    RAW_BITS: ClassVar[int] = 16

    def __post_init__(self) -> None:
        if self.bits == self.RAW_BITS:
            if self.group != default_group(self.bits) or self.symmetric:
                raise FormatError(f"'{LOSSLESS}' takes no options; {_HELP}")
        elif self.bits not in WIDTHS:
            raise FormatError(f"{self.bits} bits asked for, 2 to 8 are allowed; {_HELP}")
        elif self.group not in GROUPS:
            raise FormatError(f"a group of {self.group} asked for, {', '.join(map(str, GROUPS))} are allowed; {_HELP}")

    @property
    def lossless(self) -> bool:
        return self.bits == self.RAW_BITS

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """(width, shift) of each bit plane, widest first: 7 bits are (4, 0), (2, 4), (1, 6)."""
        out, shift = [], 0
        for width in (8, 4, 2, 1):
            if self.bits & width:
                out.append((width, shift))
                shift += width
        return tuple(out)

    def __str__(self) -> str:
        if self.lossless:
            return LOSSLESS
        group = "" if self.group == default_group(self.bits) else f"-g{self.group}"
        return f"int{self.bits}{group}{'-sym' if self.symmetric else ''}"

    @classmethod
    def parse(cls, text: str) -> StepFormat:
        if text == LOSSLESS:
            return cls(cls.RAW_BITS, default_group(cls.RAW_BITS))
        match = _STEP.fullmatch(text)
        if not match or int(match["bits"]) == cls.RAW_BITS:
            raise FormatError(f"unknown format {text!r}: {_HELP}")
        bits, group, symmetric = int(match["bits"]), None, False
        for option in match["options"].split("-")[1:]:
            if option == "sym" and not symmetric:
                symmetric = True
            elif re.fullmatch(r"g\d+", option) and group is None:
                group = int(option[1:])
            else:
                raise FormatError(f"unknown or repeated option '-{option}' in format {text!r}: {_HELP}")
        return cls(bits, default_group(bits) if group is None else group, symmetric)


@dataclass(frozen=True)
class WireFormat:
    """The two steps of a collective: `reduce` on the way to the sum, `gather` on the way back.

    `WireFormat.parse(text)` and `str(format)` are inverse. Raises FormatError.

    >>> str(WireFormat.parse("int4-g128/int8"))
    'int4/int8'
    """

    reduce: StepFormat
    gather: StepFormat

    @property
    def lossless(self) -> bool:
        return self.reduce.lossless and self.gather.lossless

    @property
    def unit(self) -> int:
        """Values a shard or chunk is made of: the larger of the two groups (they nest, both being powers of 2)."""
        return max(self.reduce.group, self.gather.group)

    def __str__(self) -> str:
        return str(self.reduce) if self.reduce == self.gather else f"{self.reduce}/{self.gather}"

    @classmethod
    def parse(cls, text: str | WireFormat) -> WireFormat:
        if isinstance(text, WireFormat):
            return text
        if not isinstance(text, str):
            raise FormatError(f"a format is a string, not {type(text).__name__}: {_HELP}")
        return _parse(text)


@lru_cache(maxsize=256)
def _parse(text: str) -> WireFormat:
    first, slash, second = text.strip().lower().partition("/")
    reduce = StepFormat.parse(first)
    return WireFormat(reduce, StepFormat.parse(second) if slash else reduce)


@dataclass(frozen=True)
class Sections:
    """Byte offsets of one wire buffer: `planes` (one offset each), `scale`, `zero`, and its whole size."""

    planes: tuple[int, ...]
    scale: int
    zero: int
    n_groups: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The byte arithmetic of messages with rows of `row` values of `itemsize` bytes, sent as `step`.

    Offsets into a message are counts of values on group boundaries of their row.
    """

    step: StepFormat
    row: int
    itemsize: int

    @property
    def groups_per_row(self) -> int:
        return -(-self.row // self.step.group)

    def groups_before(self, position: int) -> int:
        """Groups that end at or before the value `position` of the message."""
        return position // self.row * self.groups_per_row + -(-(position % self.row) // self.step.group)

    def plane_bytes_before(self, width: int, position: int) -> int:
        """Bytes of the plane of `width` bits that belong to values before `position`."""
        full, tail = divmod(self.row, self.step.group)
        per_row = full * (self.step.group * width // 8) + -(-tail * width // 8)
        return position // self.row * per_row + position % self.row * width // 8

    def sections(self, start: int, stop: int) -> Sections:
        """Where the parts of the wire buffer of the values [start, stop) lie, in bytes."""
        return _sections(self, start, stop)

    def nbytes(self, start: int, stop: int) -> int:
        """Size in bytes of the wire buffer of the values [start, stop); a multiple of 16."""
        return self.sections(start, stop).nbytes


@lru_cache(maxsize=4096)
def _sections(layout: Layout, start: int, stop: int) -> Sections:
    if layout.step.lossless:
        size = _aligned((stop - start) * layout.itemsize)
        return Sections((0,), size, size, 0, size)
    n_groups, at, planes = layout.groups_before(stop) - layout.groups_before(start), 0, []
    for width, _ in layout.step.planes:
        planes.append(at)
        at += _aligned(layout.plane_bytes_before(width, stop) - layout.plane_bytes_before(width, start))
    scale = at
    zero = scale + _aligned(2 * n_groups)
    end = zero if layout.step.symmetric else zero + _aligned(2 * n_groups)
    return Sections(tuple(planes), scale, zero, n_groups, end)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN) * ALIGN


def bounds(start: int, stop: int, row: int, unit: int, parts: int) -> list[int]:
    """The parts+1 ends of `parts` nearly equal spans of [start, stop), each on a multiple of `unit` in its row.

    Parts differ by at most one unit; with fewer units than parts some are empty. This is how a message is cut
    into chunks and a chunk into one shard per rank: a function of numbers that are equal on all ranks.
    """
    per_row = -(-row // unit)

    def to_unit(position: int) -> int:
        return position // row * per_row + -(-(position % row) // unit)

    def to_position(u: int) -> int:
        return u // per_row * row + u % per_row * unit

    first, last = to_unit(start), to_unit(stop)
    return [to_position(first + (last - first) * i // parts) for i in range(parts)] + [stop]
