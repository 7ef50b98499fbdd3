"""The measures of `probe`."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import Words, tiny

from flashcomm.accuracy import probe
from flashcomm.plan import Plan


@pytest.mark.parametrize("depth", probe.DEPTHS)
def test_a_haystack_has_the_needle_at_its_depth_and_the_answer_at_its_end(depth: float) -> None:
    hay = torch.zeros(1000, dtype=torch.int64)
    ids, n = probe._haystack(Words(), hay, 200, depth, 48213)
    assert (ids.numel(), n) == (200, 1)
    assert ids[-1] == 5  # the number, five letters long
    (first,) = (ids != 0).nonzero()[0].tolist()
    assert first == int((200 - 8 - 7 - 1) * depth)


def test_found_means_every_token_of_the_answer() -> None:
    logits = torch.zeros(2, 5)
    logits[0, 3] = logits[1, 4] = 9.0
    assert probe._score(logits, torch.tensor([3, 4]))[0]
    found, nats = probe._score(logits, torch.tensor([3, 2]))
    assert not found
    assert nats == pytest.approx(2 * math.log(math.exp(9) + 4) - 9, rel=1e-4)


def test_generation_counts_tokens_before_the_first_difference() -> None:
    model = tiny()
    prompts = torch.randint(0, 200, (4, 8))
    plans = {"none again": Plan.of("none"), "int2": Plan.of("int2")}
    rows = probe.generation(model, prompts, 5, plans, 2, "two_shot", 3)
    by_name = {row["format"]: row for row in rows}
    assert set(by_name) == {"one rank", "none again", "int2"}
    assert by_name["none again"]["never_pct"] == 100
    assert by_name["none again"]["mean_same"] == 5
    assert by_name["int2"]["mean_same"] < 5
