"""The grammar of formats and the arithmetic of wire bytes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcomm.errors import FormatError
from flashcomm.wire.format import GROUPS, WIDTHS, Layout, StepFormat, WireFormat, bounds

STEPS = [StepFormat(*v) for v in itertools.product(WIDTHS, GROUPS, (False, True))] + [StepFormat.parse("bf16")]
steps = st.sampled_from(STEPS)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_str_and_parse_are_inverse(step: StepFormat) -> None:
    assert StepFormat.parse(str(step)) == step
    for other in (StepFormat.parse("int4"), StepFormat.parse("int8-g32-sym"), StepFormat.parse("bf16")):
        fmt = WireFormat(step, other)
        assert WireFormat.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    ("text", "bits", "group", "symmetric"),
    [
        ("int4", 4, 128, False),
        ("int3", 3, 32, False),
        ("int2-sym", 2, 32, True),
        ("int8-g256", 8, 256, False),
        ("int5-g64-sym", 5, 64, True),
        ("int5-sym-g64", 5, 64, True),
        (" INT4-G32 ", 4, 32, False),
    ],
)
def test_what_a_text_means(text: str, bits: int, group: int, symmetric: bool) -> None:
    fmt = WireFormat.parse(text)
    assert fmt.reduce == fmt.gather == StepFormat(bits, group, symmetric)


def test_canonical_text() -> None:
    assert str(WireFormat.parse("int4-g128/int8-g128")) == "int4/int8"
    assert str(WireFormat.parse("int4/int4-g128")) == "int4"
    assert str(WireFormat.parse("bf16/int8")) == "bf16/int8"


@pytest.mark.parametrize(
    "text",
    [
        *[
            "int1",
            "int9",
            "int16",
            "int4-g48",
            "int4-g512",
            "int4-g32-g32",
            "int4-sym-sym",
            "int4-foo",
            "int04",
            "int",
            "fp8",
            "int4/",
            "/",
            "bf16-g32",
        ],
        *("bf16-sym", "int4/int8/int8", ""),
    ],
)
def test_unknown_formats_say_what_is_allowed(text: str) -> None:
    with pytest.raises(FormatError, match=r"a format is int2 \.\.\. int8"):
        WireFormat.parse(text)


@pytest.mark.parametrize("value", [None, 4, b"int4"])
def test_a_format_is_a_string(value: object) -> None:
    with pytest.raises(FormatError, match="a format is a string"):
        WireFormat.parse(value)  # type: ignore[arg-type]


def test_planes() -> None:
    planes = {bits: StepFormat(bits, 128).planes for bits in WIDTHS}
    assert planes[8] == ((8, 0),)
    assert planes[7] == ((4, 0), (2, 4), (1, 6))
    assert planes[6] == ((4, 0), (2, 4))
    assert planes[5] == ((4, 0), (1, 4))
    assert planes[4] == ((4, 0),)
    assert planes[3] == ((2, 0), (1, 2))
    assert planes[2] == ((2, 0),)


def test_bytes_of_a_real_message() -> None:
    """512 tokens of hidden size 576 as int4: codes, and 5 scales and zeros a row (4 groups of 128 and one of 64)."""
    layout = Layout(StepFormat.parse("int4"), 576, 2)
    at = layout.sections(0, 512 * 576)
    assert at.planes == (0,)
    assert at.scale == 512 * 288
    assert at.zero == 512 * (288 + 10)
    assert at.nbytes == 512 * (288 + 10 + 10)
    assert at.n_groups == 512 * 5
    assert Layout(StepFormat.parse("bf16"), 576, 4).nbytes(0, 576) == 576 * 4


def test_bits_per_value_of_the_default_formats() -> None:
    """int4: 4 + 32/128 bits; int8: 8.25; int2: 2 + 32/32."""
    for text, bits in (("int4", 4.25), ("int8", 8.25), ("int2", 3.0), ("int5-g64-sym", 5.25), ("int3", 4.0)):
        assert Layout(StepFormat.parse(text), 4096, 2).nbytes(0, 4096 * 64) * 8 == bits * 4096 * 64


rows = st.integers(1, 700)


@given(steps, rows, st.integers(1, 40), st.integers(1, 9), st.data())
def test_parts_tile_the_message_on_group_boundaries(
    step: StepFormat, row: int, n_rows: int, parts: int, data: st.DataObject
) -> None:
    """Parts are in order, complete, cut on units, equal to within one unit, and their sizes add up."""
    unit = data.draw(st.sampled_from([g for g in GROUPS if g >= step.group] or [step.group]))
    ends = bounds(0, row * n_rows, row, unit, parts)
    assert len(ends) == parts + 1
    assert ends[0] == 0
    assert ends[-1] == row * n_rows
    assert all(a <= b for a, b in itertools.pairwise(ends))
    assert all(end % row % unit == 0 for end in ends)
    layout, per_row = Layout(step, row, 2), -(-row // unit)
    units = [b // row * per_row + -(-(b % row) // unit) for b in ends]
    counts = [b - a for a, b in itertools.pairwise(units)]
    assert max(counts) - min(counts) <= 1
    groups = [layout.sections(a, b).n_groups for a, b in itertools.pairwise(ends)]
    assert step.lossless or sum(groups) == layout.groups_per_row * n_rows
    inner = bounds(ends[0], ends[1], row, unit, 3)  # shards of a chunk lie inside it
    assert inner[0] == ends[0]
    assert inner[-1] == ends[1]


@given(steps, rows, st.integers(1, 30))
def test_sections_are_aligned_and_hold_their_content(step: StepFormat, row: int, n_rows: int) -> None:
    layout = Layout(step, row, 2)
    at = layout.sections(0, row * n_rows)
    edges = [*at.planes, at.scale, at.zero, at.nbytes]
    assert all(edge % 16 == 0 for edge in edges)
    assert edges == sorted(edges)
    if step.lossless:
        assert 0 <= at.nbytes - row * n_rows * 2 < 16
        return
    for (width, _), begin, end in zip(step.planes, edges, edges[1:], strict=False):
        content = sum(-(-min(step.group, row - c) * width // 8) for c in range(0, row, step.group)) * n_rows
        assert 0 <= end - begin - content < 16
    assert 0 <= at.zero - at.scale - 2 * at.n_groups < 16
    assert at.nbytes - at.zero == (0 if step.symmetric else -(-2 * at.n_groups // 16) * 16)
