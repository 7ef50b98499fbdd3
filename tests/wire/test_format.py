"""The grammar of formats and the arithmetic of wire bytes."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcomm.errors import FormatError
from flashcomm.wire.format import GROUPS, WIDTHS, Layout, StepFormat, WireFormat, bounds

STEPS = [StepFormat(*v) for v in itertools.product(WIDTHS, GROUPS, (False, True))] + [StepFormat.parse("none")]
steps = st.sampled_from(STEPS)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_str_and_parse_are_inverse(step: StepFormat) -> None:
    assert StepFormat.parse(str(step)) == step
    for other in (StepFormat.parse("int4"), StepFormat.parse("int8-g32-had"), StepFormat.parse("none")):
        fmt = WireFormat(step, other)
        assert WireFormat.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    ("text", "bits", "group", "hadamard"),
    [
        ("int4", 4, 64, False),
        ("int3", 3, 64, False),
        ("int2-had", 2, 64, True),
        ("int8-g256", 8, 256, False),
        ("int5-g32-had", 5, 32, True),
        ("int5-had-g32", 5, 32, True),
        (" INT4-G32 ", 4, 32, False),
    ],
)
def test_what_a_text_means(text: str, bits: int, group: int, hadamard: bool) -> None:
    fmt = WireFormat.parse(text)
    assert fmt.reduce == fmt.gather == StepFormat(bits, group, hadamard)
    assert not fmt.reduce.in_hadamard_domain


def test_canonical_text() -> None:
    assert str(WireFormat.parse("int4-g64/int8-g64")) == "int4/int8"
    assert str(WireFormat.parse("int4/int4-g64")) == "int4"
    assert str(WireFormat.parse("int5-had-g32")) == "int5-g32-had"
    assert str(WireFormat.parse("none/int8")) == "none/int8"


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
            "int4-sym",
            "int4-had-had",
            "int4-foo",
            "int04",
            "int",
            "fp8",
            "int4/",
            "/",
            "none-g32",
        ],
        *("none-had", "int4/int8/int8", ""),
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


def test_up_to_5_bits_scale_and_zero_point_share_16_bits() -> None:
    assert {b: (StepFormat(b).packed, StepFormat(b).mantissa) for b in WIDTHS} == {
        2: (True, 6), 3: (True, 5), 4: (True, 4), 5: (True, 3), 6: (False, 7), 7: (False, 7), 8: (False, 7),
    }  # fmt: skip


def test_what_is_transformed_and_may_be_clipped() -> None:
    plain, four, six = (StepFormat.parse(text) for text in ("int4", "int4-had", "int6-had"))
    assert [n for n in range(1, 65) if four.transforms(n)] == [1, 2, 4, 8, 16, 32, 64]
    assert not any(plain.transforms(n) for n in (1, 16, 64))
    assert {b: StepFormat(b, 64, True).clip_ratio(64) for b in (2, 3, 4)} == {2: 11 / 16, 3: 13 / 16, 4: 29 / 32}
    assert plain.clip_ratio(64) is six.clip_ratio(64) is four.clip_ratio(40) is None


@pytest.mark.parametrize(
    ("text", "in_hadamard_domain"),
    [("int4-had", True), ("int4-had/int8-had", True), ("int4-had/int8", False), ("int4/int8-had", False),
     ("int4-had/int8-g32-had", False), ("int4", False), ("none", False), ("int4-had/none", False)],
)  # fmt: skip
def test_between_steps_with_equal_groups_nothing_is_transformed(text: str, in_hadamard_domain: bool) -> None:
    fmt = WireFormat.parse(text)
    assert fmt.between_steps == (
        replace(fmt.reduce, in_hadamard_domain=in_hadamard_domain),
        replace(fmt.gather, in_hadamard_domain=in_hadamard_domain),
    )


def test_the_old_name_still_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"WireFormat\.uncompressed"):
        assert WireFormat.parse("none").lossless


def test_bytes_of_a_real_message() -> None:
    """512 tokens of hidden size 600, as int4 and as int6: a row has 9 groups of 64 values and one of 24."""
    at = Layout(StepFormat.parse("int4"), 600, 2).sections(0, 512 * 600)
    assert at.planes == (0,)
    assert at.scale == 512 * 300
    assert at.zero_point == at.nbytes == 512 * (300 + 2 * 10)
    assert at.n_groups == 512 * 10
    at = Layout(StepFormat.parse("int6-had"), 600, 2).sections(0, 512 * 600)
    assert at.planes == (0, 512 * 300)
    assert (at.scale, at.zero_point, at.nbytes) == (512 * 450, 512 * (450 + 2 * 10), 512 * (450 + 3 * 10))
    assert Layout(StepFormat.parse("none"), 576, 4).nbytes(0, 576) == 576 * 4


@pytest.mark.parametrize(
    ("text", "bits"),
    [("int8", 8.375), ("int7", 7.375), ("int6", 6.375), ("int5", 5.25), ("int4", 4.25), ("int3", 3.25), ("int2", 2.25),
     ("int4-g32", 4.5), ("int4-had", 4.25), ("int6-g256-had", 6.09375), ("none", 16.0)],
)  # fmt: skip
def test_bits_per_value(text: str, bits: float) -> None:
    """A group has 16 bits more than its codes in formats of up to 5 bits, else 24 bits."""
    fmt = WireFormat.parse(text)
    assert Layout(fmt.reduce, 4096, 2).nbytes(0, 4096 * 64) * 8 == bits * 4096 * 64
    assert fmt.bits == bits
    assert WireFormat.parse(f"{text}/none").bits == (bits + 16) / 2


rows = st.integers(1, 700)


@given(steps, rows, st.integers(1, 40), st.integers(1, 9), st.data())
def test_ranges_make_up_the_message_and_split_no_group(
    step: StepFormat, row: int, n_rows: int, count: int, data: st.DataObject
) -> None:
    """Ranges are in order and complete, start at units, and differ by at most one unit. Their groups add up."""
    unit = data.draw(st.sampled_from([g for g in GROUPS if g >= step.group] or [step.group]))
    ends = bounds(0, row * n_rows, row, unit, count)
    assert len(ends) == count + 1
    assert ends[0] == 0
    assert ends[-1] == row * n_rows
    assert all(a <= b for a, b in itertools.pairwise(ends))
    assert all(end % row % unit == 0 for end in ends)
    layout, per_row = Layout(step, row, 2), -(-row // unit)
    units = [b // row * per_row + -(-(b % row) // unit) for b in ends]
    counts = [b - a for a, b in itertools.pairwise(units)]
    assert max(counts) - min(counts) <= 1
    groups = [layout.sections(a, b).n_groups for a, b in itertools.pairwise(ends)]
    assert step.uncompressed or sum(groups) == layout.groups_per_row * n_rows
    inner = bounds(ends[0], ends[1], row, unit, 3)  # shards of a chunk lie inside it
    assert inner[0] == ends[0]
    assert inner[-1] == ends[1]


@given(steps, rows, st.integers(1, 30))
def test_sections_are_aligned_and_hold_their_content(step: StepFormat, row: int, n_rows: int) -> None:
    layout = Layout(step, row, 2)
    at = layout.sections(0, row * n_rows)
    edges = [*at.planes, at.scale, at.zero_point, at.nbytes]
    assert all(edge % 16 == 0 for edge in edges)
    assert edges == sorted(edges)
    if step.uncompressed:
        assert 0 <= at.nbytes - row * n_rows * 2 < 16
        return
    for (width, _), begin, end in zip(step.planes, edges, edges[1:], strict=False):
        content = sum(-(-min(step.group, row - c) * width // 8) for c in range(0, row, step.group)) * n_rows
        assert 0 <= end - begin - content < 16
    assert 0 <= at.zero_point - at.scale - 2 * at.n_groups < 16
    assert at.nbytes - at.zero_point == (0 if step.bits <= 5 else -(-at.n_groups // 16) * 16)


def test_the_uncompressed_format_keeps_its_old_name() -> None:
    assert WireFormat.parse("bf16") == WireFormat.parse("none")
    assert str(WireFormat.parse("bf16")) == "none"
    assert str(WireFormat.parse("int4/bf16")) == "int4/none"
