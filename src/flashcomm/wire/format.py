"""Wire formats: how the values of a message are quantized, and where each bit lies in the bytes that are sent.

The method is asymmetric group quantization. Each row of a message is cut into groups of, say, 64 values. A group is
sent as a small integer for each value, its *code*, and two numbers that all its values share, a scale and a zero
point:

    value = scale * (code - zero_point)

The zero point is the code of the value 0. It lets the codes cover just the range of the values, even if that range is
not symmetric around 0. Formats that end in `-had` quantize the group's Hadamard transform instead of its values. The
transform consists of sums and differences that spread one large value over the whole group. So that value does not cost
all the others their precision.

The layout. A message is a tensor of any shape, read as rows of its last dimension. The last group of a row is shorter
where the group size does not divide the row; no group straddles two rows. One wire buffer holds a range [start, stop)
of the message's values, counted in row-major order, whose ends lie on group boundaries:

    wire buffer = [plane]...[scales][zero points]       every section starts at a multiple of 16 bytes

    plane          the next w bits of all codes, from the lowest up, in planes of w = 8, 4, 2 or 1 bits, widest first.
                   A group of n values takes m = ceil(n*w/8) bytes: value i is in byte i mod m, at bit w*(i div m)
    scales         16 bits per group: a bfloat16. Up to 5 bits its low bits hold the zero point (`StepFormat.packed`)
    zero points    8 bits per group, only from 6 bits on

`docs/wire-format.md` has pictures and the reasons. This module is arithmetic on integers: it touches no tensor.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from flashcomm.errors import FormatError

WIRE_VERSION = 1  # of the bytes on the wire; ranks compare it. Change it with any bit that an encoder writes
ALIGN = 16  # bytes; every section of a wire buffer starts at a multiple of it
GROUPS = (16, 32, 64, 128, 256)
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
UNCOMPRESSED = "none"
_UNCOMPRESSED = (UNCOMPRESSED, "bf16")  # the second name is that of flashcomm 0.1, kept as an alias
LIMIT = 2.0**126  # from this magnitude on values count as not finite, see StepFormat.limit

_STEP = re.compile(r"int(?P<bits>[1-9][0-9]{0,2})(?P<options>(?:-[a-z0-9]+)*)")
_HELP = (
    "a format is int2 ... int8, optionally with -g16, -g32, -g64, -g128 or -g256 (values per scale) and -had "
    "(a Hadamard transform of each group), e.g. 'int8', 'int6-had', 'int4-g32-had'; 'int4/int8' uses the first for the "
    "reduce step and the second for the gather step; 'none' does not compress"
)
DEFAULT_GROUP = 64  # values per scale when the format does not say


@dataclass(frozen=True)
class StepFormat:
    """How the values of one step of a collective, reduce or gather, are quantized.

    Args:
        bits: Bits of a code: 2 to 8, or 16 for values that are sent as they are, in the tensor's own dtype.
        group: The number of neighboring values that share a scale and a zero point.
        hadamard: Whether the Hadamard transform of each group is quantized instead of its values.
        in_hadamard_domain: Whether the values on both sides of the codec are such transforms already. The bytes on
            the wire are the same, and the format's text does not show it. A sum of transforms is the transform of the
            sum, so no transform is needed between two steps with equal groups (see `WireFormat.between_steps`).

    Raises:
        FormatError: There is no such format.
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
        """Whether values are sent as they are."""
        return self.bits == self.RAW_BITS

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """(width, shift) in bits of each bit plane, widest first: 7 bits are (4, 0), (2, 4), (1, 6)."""
        out, shift = [], 0
        for width in (8, 4, 2, 1):
            if self.bits & width:
                out.append((width, shift))
                shift += width
        return tuple(out)

    @property
    def packed(self) -> bool:
        """Whether 16 bits hold both scale and zero point: up to 5 bits, where the scale has fewer bits."""
        return self.bits <= 5

    @property
    def mantissa(self) -> int:
        """Bits of the scale's mantissa: 7 as in bfloat16, fewer if `packed`."""
        return 8 - self.bits if self.packed else 7

    def transforms(self, n: int) -> bool:
        """Return whether the transform of a group of n values is quantized: only if n is a power of 2."""
        return self.hadamard and n & (n - 1) == 0

    def limit(self, n: int) -> float:
        """Return the magnitude from which on a group of n values counts as not finite.

        The limit applies to the numbers that are quantized: the values, or their transform. Below it no decoding
        overflows.
        """
        return LIMIT / n if self.transforms(n) else LIMIT

    def clip_ratio(self, n: int) -> float | None:
        """Return the size of the second range that is tried, relative to the range of all n values, or None.

        A transform looks like noise. With few bits it can be better to clamp its largest values, which gives all the
        others more precision. So a group is quantized in both ranges, and the result with the smaller square error is
        sent.
        """
        return {2: 0.6875, 3: 0.8125, 4: 0.90625}.get(self.bits) if self.transforms(n) else None

    def __str__(self) -> str:
        if self.uncompressed:
            return UNCOMPRESSED
        group = "" if self.group == DEFAULT_GROUP else f"-g{self.group}"
        return f"int{self.bits}{group}{'-had' if self.hadamard else ''}"

    @classmethod
    def parse(cls, text: str) -> StepFormat:
        """Return the step with this text, e.g. "int4-g32-had".

        Raises:
            FormatError: There is no such format.
        """
        if text in _UNCOMPRESSED:
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
    """The formats of the two steps of a collective. `WireFormat.parse(text)` and `str(format)` are inverse.

    Args:
        reduce: The format of the values that ranks send to be summed.
        gather: The format of the sums that ranks send back.

    Example:
        >>> str(WireFormat.parse("int4-g64/int8"))
        'int4/int8'
    """

    reduce: StepFormat
    gather: StepFormat

    @property
    def uncompressed(self) -> bool:
        """Whether both steps send values as they are."""
        return self.reduce.uncompressed and self.gather.uncompressed

    @property
    def lossless(self) -> bool:
        """Deprecated name of `uncompressed`."""
        why = "WireFormat.lossless is now WireFormat.uncompressed; the old name goes with the next release"
        warnings.warn(why, DeprecationWarning, stacklevel=2)
        return self.uncompressed

    @property
    def unit(self) -> int:
        """The number of values at multiples of which, in a row, shards and chunks start. So no group is split.

        It is the larger of the two group sizes, as both are powers of 2.
        """
        return max(self.reduce.group, self.gather.group)

    @property
    def bits(self) -> float:
        """Bits per value on the wire, with scales and zero points: the mean of both steps, in rows of whole groups."""
        return (_bits(self.reduce) + _bits(self.gather)) / 2

    @property
    def between_steps(self) -> tuple[StepFormat, StepFormat]:
        """The formats to decode the reduce step with and to encode its sum with.

        They stay in the Hadamard domain if both steps transform the same groups.
        """
        a, b = self.reduce, self.gather
        if a.hadamard and b.hadamard and a.group == b.group:
            return replace(a, in_hadamard_domain=True), replace(b, in_hadamard_domain=True)
        return a, b

    @property
    def twice_reduced(self) -> WireFormat:
        """The format with the reduce step's format in both steps, for sums within nodes and then across them."""
        return WireFormat(self.reduce, self.reduce)

    def __str__(self) -> str:
        return str(self.reduce) if self.reduce == self.gather else f"{self.reduce}/{self.gather}"

    @classmethod
    def parse(cls, text: str | WireFormat) -> WireFormat:
        """Return the format with this text, e.g. "int4-had" or "int4/int8" (reduce step / gather step).

        Raises:
            FormatError: There is no such format.
        """
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
    """Where the sections of one wire buffer begin, as byte offsets.

    Args:
        planes: One offset per bit plane.
        scale: The offset of the scales.
        zero_point: The offset of the zero points; the buffer's end where scales hold them.
        n_groups: The number of groups in the buffer.
        nbytes: The size of the buffer in bytes, padding included.
    """

    planes: tuple[int, ...]
    scale: int
    zero_point: int
    n_groups: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The byte arithmetic of a message. A position is the number of values before it, and lies on a group boundary.

    Args:
        step: The format of the message.
        row: The number of values in a row.
        itemsize: Bytes of a value of the tensor.
    """

    step: StepFormat
    row: int
    itemsize: int

    @property
    def groups_per_row(self) -> int:
        """The number of groups in a row, a shorter last one included."""
        return -(-self.row // self.step.group)

    def groups_before(self, position: int) -> int:
        """Return the number of groups before the value at `position`."""
        return position // self.row * self.groups_per_row + -(-(position % self.row) // self.step.group)

    def plane_bytes_before(self, width: int, position: int) -> int:
        """Return the bytes that the values before `position` take in the plane of `width` bits."""
        full, tail = divmod(self.row, self.step.group)
        per_row = full * (self.step.group * width // 8) + -(-tail * width // 8)
        return position // self.row * per_row + position % self.row * width // 8

    def sections(self, start: int, stop: int) -> Sections:
        """Return where the sections of the wire buffer of the values [start, stop) begin."""
        return _sections(self, start, stop)

    def nbytes(self, start: int, stop: int) -> int:
        """Return the size in bytes of the wire buffer of the values [start, stop), a multiple of 16."""
        return self.sections(start, stop).nbytes

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the padding of the wire buffer of the values [start, stop), as byte ranges [a, b). It is all zeros."""
        at = self.sections(start, stop)
        if self.step.uncompressed:
            return [((stop - start) * self.itemsize, at.nbytes)]
        used = [self.plane_bytes_before(w, stop) - self.plane_bytes_before(w, start) for w, _ in self.step.planes]
        begins = [*at.planes, at.scale] if self.step.packed else [*at.planes, at.scale, at.zero_point]
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
    zero_point = at + _aligned(2 * n_groups)
    end = zero_point if layout.step.packed else zero_point + _aligned(n_groups)
    return Sections(tuple(planes), at, zero_point, n_groups, end)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN) * ALIGN


def bounds(start: int, stop: int, row: int, unit: int, count: int) -> list[int]:
    """Return the count + 1 ends of `count` nearly equal ranges that [start, stop) is cut into.

    This is how a message is cut into chunks, and a chunk into one shard per rank. All arguments are equal on all ranks.

    Args:
        start: The first value of the range.
        stop: The value after the last one.
        row: The number of values in a row.
        unit: Ranges start at multiples of this many values in their row, and differ in size by at most one such unit.
        count: The number of ranges. If there are fewer units than that, some ranges are empty.
    """
    per_row = -(-row // unit)

    def to_unit(position: int) -> int:
        return position // row * per_row + -(-(position % row) // unit)

    def to_position(u: int) -> int:
        return u // per_row * row + u % per_row * unit

    first, last = to_unit(start), to_unit(stop)
    return [to_position(first + (last - first) * i // count) for i in range(count)] + [stop]
