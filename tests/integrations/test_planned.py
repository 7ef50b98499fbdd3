"""The all-reduce of all integrations: formats by layer, scaling only for low-bit messages, a single decision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import raise_first, run_ranks

from flashcomm import Communicator, WireFormat, reference
from flashcomm.errors import PlanError
from flashcomm.integrations.planned import PlannedAllReduce
from flashcomm.plan import LayerPlan, Plan

WORLD_SIZE, HIDDEN = 3, 64
INT4, INT6, INT8 = (WireFormat.parse(text) for text in ("int4", "int6-g32", "int8"))
LAYER = "model.layers.1.mlp.down_proj"


def scaled_plan() -> Plan:
    """int6 by default, int4 for decoding, and one layer in int8 with a scale and a mean for each channel."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randint(-3, 4, (HIDDEN,), dtype=torch.int8, generator=generator)
    means = torch.randn(HIDDEN, generator=generator).bfloat16()
    return Plan(INT6, INT4, {"*.1.mlp.down_proj": LayerPlan(INT8, scales, means), "*": LayerPlan(INT8)})


def on_ranks(body: Any, min_bytes: int = 0) -> None:
    """Run body(planned, rank) on every rank."""

    def rank_main(group: Any, rank: int) -> None:
        plan = scaled_plan()
        with Communicator(group, plan.format, min_bytes=min_bytes, plan=plan.digest) as comm:
            body(PlannedAllReduce(comm, plan), rank)

    raise_first(run_ranks(WORLD_SIZE, rank_main))


def messages(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(WORLD_SIZE)]


def by_hand(given: list[torch.Tensor], fmt: WireFormat, plan: Plan | None = None) -> torch.Tensor:
    """Return the reference's sum. With a plan, values are scaled before it and scaled back after it."""
    if plan is None:
        return reference.one_shot(given, fmt)
    total = reference.one_shot([plan.before_reduce(LAYER, x, WORLD_SIZE) for x in given], fmt)
    return plan.after_reduce(LAYER, total, WORLD_SIZE, torch.bfloat16)


def test_each_layer_takes_its_format_and_scaling() -> None:
    def body(planned: PlannedAllReduce, rank: int) -> None:
        tokens, one_token = messages(2, 20, HIDDEN), messages(2, 1, HIDDEN)
        expected = {
            LAYER: by_hand(tokens, INT8, planned.plan),
            "model.layers.2.mlp.down_proj": by_hand(tokens, INT8),
            "": by_hand(tokens, INT6),  # the pattern "*" names layers; a message without a name is none of them
        }
        for layer, want in expected.items():
            assert torch.equal(planned(tokens[rank], layer), want)
            out = torch.full_like(want, float("nan"))
            assert planned(tokens[rank], layer, out=out) is out
            assert torch.equal(out, want)
            assert torch.equal(planned(one_token[rank], layer), by_hand(one_token, INT4))
        assert planned.comm.calls == {"all_reduce/one_shot": 9}

    on_ranks(body)


def test_a_message_that_is_not_low_bit_is_not_scaled() -> None:
    """The plan's vectors would change the low bits of the backend's sum."""

    def body(planned: PlannedAllReduce, rank: int) -> None:
        given = messages(20, HIDDEN)
        assert not planned.is_low_bit(given[rank], LAYER)
        unplanned = planned.comm.all_reduce(given[rank], format="none")
        assert torch.equal(planned(given[rank], LAYER), unplanned)
        assert planned.comm.calls == {"all_reduce/backend": 2}

    on_ranks(body, min_bytes=1 << 20)


def test_rows_of_a_larger_message_go_its_route() -> None:
    """7,680 bytes are below min_bytes. As a part of 15,360 bytes they are low-bit and scaled."""

    def body(planned: PlannedAllReduce, rank: int) -> None:
        given = messages(60, HIDDEN)
        whole = 2 * given[rank].numel()
        assert not planned.is_low_bit(given[rank], LAYER)
        assert planned.is_low_bit(given[rank], LAYER, whole)
        assert torch.equal(planned(given[rank], LAYER, whole=whole), by_hand(given, INT8, planned.plan))

    on_ranks(body, min_bytes=10_000)


def test_what_a_communicator_does_not_accept_is_not_low_bit() -> None:
    def body(planned: PlannedAllReduce, rank: int) -> None:
        assert planned.is_low_bit(torch.zeros(20, HIDDEN))
        for other in (
            torch.zeros(20, HIDDEN, dtype=torch.float64),
            torch.zeros(20, HIDDEN, dtype=torch.int64),
            torch.zeros(20, HIDDEN).to_sparse(),
            torch.zeros(20, HIDDEN, device="meta"),
            torch.zeros(1, 1, 1, 1, 1, 1, 1, 20, HIDDEN),
            torch.zeros(0, HIDDEN),
        ):
            assert not planned.is_low_bit(other)

    on_ranks(body)


def test_a_format_in_place_of_a_plan() -> None:
    def rank_main(group: Any, rank: int) -> None:
        given = messages(20, HIDDEN)
        with Communicator(group, INT4, min_bytes=0) as comm:
            for plan, fmt in ((None, INT4), ("int8", INT8), (INT6, INT6)):
                planned = PlannedAllReduce(comm, plan)
                assert torch.equal(planned(given[rank], LAYER), by_hand(given, fmt))
                assert planned.route(given[rank], LAYER).format == fmt

    raise_first(run_ranks(WORLD_SIZE, rank_main))


def test_a_plan_for_other_widths() -> None:
    def body(planned: PlannedAllReduce, rank: int) -> None:
        with pytest.raises(PlanError, match="have 64 channels, the layer 128"):
            planned(torch.zeros(20, 2 * HIDDEN), LAYER)

    on_ranks(body)
