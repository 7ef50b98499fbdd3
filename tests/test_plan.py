"""Plans: JSON there and back, first match, conditioning, what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashcomm import WireFormat
from flashcomm.errors import FormatError, PlanError
from flashcomm.plan import LayerPlan, Plan, is_decode

INT4, INT6, INT8 = (WireFormat.parse(text) for text in ("int4-had", "int6", "int8"))


def text_of(vector: torch.Tensor) -> str:
    return base64.b64encode(bytes(vector.view(torch.uint8).tolist())).decode()


def test_json_there_and_back(tmp_path: Path) -> None:
    """JSON written by hand: "shift" is int8 exponents, "offset" little-endian bfloat16 means, both in base64."""
    vectors = LayerPlan(INT4, torch.tensor([1, -2, 0], dtype=torch.int8), torch.tensor([0.5, -1.0, 2.0]).bfloat16())
    plan = Plan(INT6, INT8, {"a.*": vectors, "*": LayerPlan(INT8)}, {"hidden_size": 3}, {"by": "hand"})
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "flashcomm_plan": 1,
        "format": "int6",
        "decode": "int8",
        "layers": {"a.*": {"format": "int4-had", "shift": "Af4A", "offset": "AD+AvwBA"}, "*": "int8"},
        "model": {"hidden_size": 3},
        "made": {"by": "hand"},
    }
    again = Plan.of(str(tmp_path / "plan.json"))
    assert again.as_dict() == plan.as_dict()
    assert (again.format, again.decode) == (INT6, INT8)
    layer = again.layer("a.b")
    assert layer.scale_exponents is not None
    assert layer.channel_mean is not None
    assert layer.scale_exponents.tolist() == [1, -2, 0]
    assert layer.channel_mean.tolist() == [0.5, -1.0, 2.0]


def test_the_first_pattern_that_matches_counts() -> None:
    plan = Plan(INT6, layers={"model.layers.1.*": LayerPlan(INT4), "*.down_proj": LayerPlan(INT8)})
    assert plan.layer("model.layers.1.mlp.down_proj").format == INT4
    assert plan.layer("model.layers.11.mlp.down_proj").format == INT8
    assert plan.layer("model.layers.11.self_attn.o_proj").format == INT6


def test_a_format_is_a_plan_for_all_layers() -> None:
    plan = Plan.of("int4-had")
    x = torch.randn(2, 3, 64)
    assert plan.before_reduce("anything", x, 4) is x
    assert plan.format_of("anything", x) == INT4
    assert plan.after_reduce("anything", x, 4, x.dtype) is x
    assert Plan.of(plan) is plan
    with pytest.raises(FormatError):
        Plan.of("int12")


def test_conditioning_is_undone_after_the_sum() -> None:
    """(x - mean / world_size) * 2^exponents before, the inverse after: exact where the arithmetic is."""
    exponents, mean = torch.tensor([3, 0, -2, 7], dtype=torch.int8), torch.tensor([4.0, -8.0, 0.0, 16.0]).bfloat16()
    plan = Plan(INT8, layers={"l": LayerPlan(INT4, exponents, mean)})
    ranks = [torch.randint(-9, 9, (5, 4)).float() for _ in range(4)]
    sent = [plan.before_reduce("l", x, 4) for x in ranks]
    assert torch.equal(sent[0], (ranks[0] - torch.tensor([1.0, -2, 0, 4])) * torch.tensor([8.0, 1, 0.25, 128]))
    total = sum(sent[1:], sent[0])
    assert torch.equal(plan.after_reduce("l", total, 4, total.dtype), sum(ranks[1:], ranks[0]))


def test_the_old_names_still_work_and_warn() -> None:
    vectors = LayerPlan(INT4, torch.tensor([1, 2], dtype=torch.int8), torch.tensor([4.0, -8.0]).bfloat16())
    plan, x = Plan(INT8, layers={"l": vectors}), torch.randn(3, 2)
    with pytest.warns(DeprecationWarning, match=r"Plan\.send is now Plan\.before_reduce"):
        sent = plan.send("l", x, 2)
    with pytest.warns(DeprecationWarning, match=r"Plan\.receive is now Plan\.after_reduce"):
        total = plan.receive("l", 2 * sent, 2, x.dtype)
    assert torch.equal(sent, plan.before_reduce("l", x, 2))
    assert torch.equal(total, plan.after_reduce("l", 2 * sent, 2, x.dtype))
    with pytest.warns(DeprecationWarning, match="scale_exponents"):
        assert vectors.shift is vectors.scale_exponents
    with pytest.warns(DeprecationWarning, match="channel_mean"):
        assert vectors.offset is vectors.channel_mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conditioning_of_half_precision(dtype: torch.dtype) -> None:
    """Scales that float16 could not hold; means whose difference from x is exact in bfloat16."""
    exponents, mean = torch.tensor([20, -20], dtype=torch.int8), torch.tensor([4.0, -8.0]).bfloat16()
    plan = Plan(INT8, layers={"l": LayerPlan(INT4, exponents, mean)})
    x = torch.tensor([[3.0, -60.0], [100.0, 0.5]], dtype=dtype)
    message = plan.before_reduce("l", x, 2)
    assert message.tolist() == [[2.0**20, -56 * 2.0**-20], [98 * 2.0**20, 4.5 * 2.0**-20]]
    got = plan.after_reduce("l", message + message, 2, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, 2 * x)


def test_decoding_takes_its_own_format_and_no_conditioning() -> None:
    vectors = LayerPlan(INT4, torch.ones(4, dtype=torch.int8), torch.ones(4).bfloat16())
    plan = Plan(INT6, INT8, {"l": vectors})
    token, prompt = torch.randn(7, 1, 4), torch.randn(1, 7, 4)
    assert plan.before_reduce("l", token, 2) is token
    assert plan.format_of("l", token) == INT8
    assert plan.after_reduce("l", token, 2, token.dtype) is token
    assert plan.format_of("l", prompt) == INT4
    assert not torch.equal(plan.before_reduce("l", prompt, 2), prompt)
    assert [is_decode(torch.zeros(shape)) for shape in ((7, 1, 4), (1, 4), (7, 4), (2, 7, 4), (4,))] == [
        *(True, True, False, False, False)
    ]


def test_the_digest_is_of_what_a_plan_does() -> None:
    vectors = LayerPlan(INT4, torch.ones(4, dtype=torch.int8), torch.ones(4).bfloat16())
    others = LayerPlan(INT4, torch.ones(4, dtype=torch.int8), torch.zeros(4).bfloat16())
    plans = [
        Plan(INT6),
        Plan(INT8),
        Plan(INT6, INT8),
        Plan(INT6, layers={"l": vectors}),
        Plan(INT6, layers={"l": others}),
    ]
    assert len({plan.digest for plan in plans}) == 5
    assert Plan(INT6, made={"date": "today"}).digest == Plan(INT6).digest


def test_the_vectors_must_fit_the_row() -> None:
    plan = Plan(INT6, layers={"l": LayerPlan(INT4, torch.ones(4, dtype=torch.int8), torch.ones(4).bfloat16())})
    with pytest.raises(PlanError, match="vectors for l have 4 channels, the layer 8: it was made for another model"):
        plan.before_reduce("l", torch.zeros(2, 3, 8), 2)


def test_check_compares_layers_and_model() -> None:
    plan = Plan(INT6, layers={"*.down_proj": LayerPlan(INT4)}, model={"hidden_size": 64})
    plan.check(["m.0.down_proj", "m.0.o_proj"], SimpleNamespace(hidden_size=64))
    with pytest.raises(PlanError, match="hidden_size=64, this one has 128: run `flashcomm tune`"):
        plan.check(["m.0.down_proj"], SimpleNamespace(hidden_size=128))
    with pytest.raises(PlanError, match=r"layers that the model does not have \(\*\.down_proj\); it has h\.0\.c_proj"):
        plan.check(["h.0.c_proj"])


GOOD: dict[str, Any] = {"flashcomm_plan": 1, "format": "int8"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], "not a plan"),
        ({"format": "int8"}, "not a plan"),
        ({"flashcomm_plan": 2, "format": "int8"}, "not a plan"),
        (GOOD | {"flashcomm_plan": True}, "not a plan"),
        (GOOD | {"flashcomm_plan": 1.0}, "not a plan"),
        ({"flashcomm_plan": 1}, 'no "format"'),
        (GOOD | {"format": "int" + "9" * 5000}, "a format is"),
        (GOOD | {"format": 4}, "a format is"),
        (GOOD | {"decode": ["int4"]}, "a format is"),
        (GOOD | {"color": 1}, "unknown keys color"),
        (GOOD | {"format": "int1"}, "1 bits asked for"),
        (GOOD | {"decode": "int4-g7"}, "a group of 7"),
        (GOOD | {"layers": ["int8"]}, "must be JSON objects"),
        (GOOD | {"layers": {"a": 4}}, "layer a: give a format"),
        (GOOD | {"layers": {"a": {"format": "int4", "color": 1}}}, "layer a: give a format"),
        (GOOD | {"layers": {"a": {"format": "int4", "shift": "AAAA"}}}, "give both"),
        (GOOD | {"layers": {"a": {"format": "int4", "shift": "!", "offset": "AAA="}}}, "shift is not base64"),
        (GOOD | {"layers": {"a": {"format": "int4", "shift": "AA==", "offset": "AA=="}}}, "offset is not base64"),
        (
            GOOD | {"layers": {"a": {"format": "int4", "shift": "AAA=", "offset": "AAA="}}},
            "shift and offset must be equally long",
        ),
        (
            GOOD | {"layers": {"a": {"format": "int4", "shift": "fw==", "offset": "AAA="}}},
            r"\|shift\| <= 60 and offset finite",
        ),
        (GOOD | {"layers": {"a": {"format": "int4", "shift": "gA==", "offset": "AAA="}}}, r"\|shift\| <= 60"),  # -128
        (GOOD | {"layers": {"a": {"format": "int4", "shift": "AA==", "offset": "wH8="}}}, "offset finite"),
    ],
)
def test_refusals_name_the_file_and_the_entry(content: Any, why: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=rf"plan\.json: .*{why}"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 200_000, "is not valid JSON"),
        ('{"flashcomm_plan": 1, "format": "int8", "made": ' + "[" * 200_000, "is not valid JSON"),
        ('{"flashcomm_plan": 1, "format": "int8", "format": "int4"}', "format"),
        ('{"flashcomm_plan": ' + "1" * 5000 + "}", "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
    ids=["deep", "deep inside", "twice", "digits", "empty"],
)
def test_texts_that_no_parser_should_meet(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=rf"plan\.json.*{why}"):
        Plan.load(tmp_path / "plan.json")


def test_files_that_are_not_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no plan at .*`flashcomm tune` writes one"):
        Plan.of(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("int4")
    with pytest.raises(PlanError, match="is not valid JSON"):
        Plan.of(str(tmp_path / "text.json"))
