"""What a message looks like on the wire: the grammar of formats and the arithmetic of their bytes.

A *message* is a tensor of any shape, read as rows of `row` values (the last dimension). Each row is cut
into groups of `group` values, the last group of a row being shorter where the group does not divide the
row: a group never straddles rows. A *span* `[start, stop)` is a range of values, counted in row-major
order, whose ends lie on group boundaries; one wire buffer holds one span.

    wire buffer = [plane]...[scale][zero]       every section starts at a multiple of 16 bytes

    plane w     the code's next w bits (widest plane first, from the least significant bit up); a group of
                n values takes m = ceil(n*w/8) bytes: value i sits in byte i mod m, at bit w*(i div m)
    scale       16 bits per group: a bfloat16; up to 5 bits the zero point is in its low bits (see `StepFormat.packed`)
    zero        8 bits per group, only from 6 bits on: the code of the value 0

    value = scale * (code - zero), in -had formats of the group's Hadamard transform

`docs/wire-format.md` tells the same with pictures and the reasons. Here is only arithmetic: no tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from flashcomm.errors import FormatError

WIRE_VERSION = 1  # of the bytes on the wire; ranks compare it. Change it with any bit that an encoder writes
ALIGN = 16  # bytes; every section of a wire buffer starts at a multiple of it
GROUPS = (16, 32, 64, 128, 256)
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
UNCOMPRESSED = "bf16"
LIMIT = 2.0**126  # see StepFormat.limit

_STEP = re.compile(r"int(?P<bits>[1-9][0-9]{0,2})(?P<options>(?:-[a-z0-9]+)*)")
_HELP = (
    "a format is int2 ... int8, optionally with -g16, -g32, -g64, -g128 or -g256 (values per scale) and -had "
    "(a Hadamard transform of each group), e.g. 'int8', 'int6-had', 'int4-g32-had'; 'int4/int8' uses the first for the "
    "reduce step and the second for the gather step; 'bf16' does not compress"
)
DEFAULT_GROUP = 64  # values per scale when the format does not say


@dataclass(frozen=True)
class StepFormat:
    """How the values of one step (reduce or gather) are coded.

    `bits` is 2 to 8, or 16 for values sent as they are, in the tensor's own dtype; `group` is the number of
    values that share a scale. With `hadamard` the Hadamard transform of each group is coded, so that one large
    value does not take the precision of all its neighbors. Raises FormatError for anything else.

    `rotated` is no format of its own: same bytes, but the values on both sides of the codec are the transforms.
    A sum of transforms is the transform of the sum, so a reduce step and a gather step with the same groups need
    no transform between them (`WireFormat.middle`).
    """

    bits: int
    group: int = DEFAULT_GROUP
    hadamard: bool = False
    in_hadamard_domain: bool = False

    RAW_BITS: ClassVar[int] = 16

    def __post_init__(self) -> None:
        if self.bits == self.RAW_BITS:
            if self.group != DEFAULT_GROUP or self.hadamard:
                raise FormatError(f"'{UNCOMPRESSED}' takes no options; {_HELP}")
        elif self.bits not in WIDTHS:
            raise FormatError(f"{self.bits} bits asked for, 2 to 8 are allowed; {_HELP}")
        elif self.group not in GROUPS:
            raise FormatError(f"a group of {self.group} asked for, {', '.join(map(str, GROUPS))} are allowed; {_HELP}")

    @property
    def uncompressed(self) -> bool:
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

    @property
    def packed(self) -> bool:
        """Up to 5 bits: the zero is in the low bits of the scale's 16, for which that gives up sign and mantissa."""
        return self.bits <= 5

    @property
    def mantissa(self) -> int:
        """Bits of the scale's mantissa: 7, or what `packed` leaves of them."""
        return 8 - self.bits if self.packed else 7

    def transforms(self, n: int) -> bool:
        """Whether a group of n values (a row's last may be short) is coded as its transform: n is a power of 2."""
        return self.hadamard and n & (n - 1) == 0

    def limit(self, n: int) -> float:
        """Magnitudes of y from here on count as not finite: below it nothing on the way to x^ overflows."""
        return LIMIT / n if self.transforms(n) else LIMIT

    def clip_ratio(self, n: int) -> float | None:
        """The smaller range tried beside that of all n values of a group, as a part of it, or None.

        Transforms look like noise, whose few largest values are not worth the precision they cost all others.
        """
        return {2: 0.6875, 3: 0.8125, 4: 0.90625}.get(self.bits) if self.transforms(n) else None

    def __str__(self) -> str:
        if self.uncompressed:
            return UNCOMPRESSED
        group = "" if self.group == DEFAULT_GROUP else f"-g{self.group}"
        return f"int{self.bits}{group}{'-had' if self.hadamard else ''}"

    @classmethod
    def parse(cls, text: str) -> StepFormat:
        if text == UNCOMPRESSED:
            return cls(cls.RAW_BITS)
        match = _STEP.fullmatch(text)
        if not match or int(match["bits"]) == cls.RAW_BITS:
            raise FormatError(f"unknown format {text!r}: {_HELP}")
        bits, group, hadamard = int(match["bits"]), None, False
        for option in match["options"].split("-")[1:]:
            if option == "had" and not hadamard:
                hadamard = True
            elif re.fullmatch(r"g[1-9][0-9]{0,3}", option) and group is None:
                group = int(option[1:])
            else:
                raise FormatError(f"unknown or repeated option '-{option}' in format {text!r}: {_HELP}")
        return cls(bits, DEFAULT_GROUP if group is None else group, hadamard)


@dataclass(frozen=True)
class WireFormat:
    """The two steps of a collective: `reduce` on the way to the sum, `gather` on the way back.

    `WireFormat.parse(text)` and `str(format)` are inverse. Raises FormatError.

    >>> str(WireFormat.parse("int4-g64/int8"))
    'int4/int8'
    """

    reduce: StepFormat
    gather: StepFormat

    @property
    def uncompressed(self) -> bool:
        return self.reduce.uncompressed and self.gather.uncompressed

    @property
    def unit(self) -> int:
        """Values a shard or chunk is made of: the larger of the two groups (they nest, both being powers of 2)."""
        return max(self.reduce.group, self.gather.group)

    @property
    def bits(self) -> float:
        """Bits per value on the wire in rows of whole groups, scales and zeros included: the mean of both steps."""
        return (_bits(self.reduce) + _bits(self.gather)) / 2

    @property
    def between_steps(self) -> tuple[StepFormat, StepFormat]:
        """How to decode the reduce step and encode its sum: rotated where both steps transform the same groups."""
        a, b = self.reduce, self.gather
        if a.hadamard and b.hadamard and a.group == b.group:
            return replace(a, in_hadamard_domain=True), replace(b, in_hadamard_domain=True)
        return a, b

    @property
    def twice_reduced(self) -> WireFormat:
        """Two reduce steps, one after the other."""
        return WireFormat(self.reduce, self.reduce)

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


def _bits(step: StepFormat) -> float:
    return step.bits if step.uncompressed else step.bits + (16 if step.packed else 24) / step.group


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

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The bytes [a, b) between sections of the wire buffer of the values [start, stop), which are zeros."""
        at = self.sections(start, stop)
        if self.step.uncompressed:
            return [((stop - start) * self.itemsize, at.nbytes)]
        used = [self.plane_bytes_before(w, stop) - self.plane_bytes_before(w, start) for w, _ in self.step.planes]
        begins = [*at.planes, at.scale] if self.step.packed else [*at.planes, at.scale, at.zero]
        sizes = [*used, 2 * at.n_groups, at.n_groups][: len(begins)]
        gaps = [(a + size, b) for a, size, b in zip(begins, sizes, [*begins[1:], at.nbytes], strict=True)]
        return [(a, b) for a, b in gaps if a < b]


@lru_cache(maxsize=4096)
def _sections(layout: Layout, start: int, stop: int) -> Sections:
    if layout.step.uncompressed:
        size = _aligned((stop - start) * layout.itemsize)
        return Sections((0,), size, size, 0, size)
    n_groups, at, planes = layout.groups_before(stop) - layout.groups_before(start), 0, []
    for width, _ in layout.step.planes:
        planes.append(at)
        at += _aligned(layout.plane_bytes_before(width, stop) - layout.plane_bytes_before(width, start))
    scale = at
    zero = scale + _aligned(2 * n_groups)
    end = zero if layout.step.packed else zero + _aligned(n_groups)
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
