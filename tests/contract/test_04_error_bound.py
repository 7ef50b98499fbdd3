"""Point 4 of the contract: the error has a tight bound per element."""

from __future__ import annotations

import pytest
import torch
from support import tough

from flashcomm import WireFormat, reference
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout

pytestmark = pytest.mark.contract(4)


def test_the_error_of_two_steps_is_within_the_sum_of_their_bounds() -> None:
    """Half a step for every rank, half a step for the second pass, one rounding to the dtype."""
    fmt = WireFormat.parse("int4/int6")
    tensors = [tough((6, 576), torch.float32, r) for r in range(4)]
    layout = Layout(fmt.reduce, 576, 4)
    limit = sum(torch_codec.error_bound(t.view(-1), layout, 0, t.numel()) for t in tensors)
    first = reference.one_shot(tensors, fmt)
    limit = limit + torch_codec.error_bound(first.view(-1), Layout(fmt.gather, 576, 4), 0, first.numel())
    exact = torch.stack([t.double() for t in tensors]).sum(0)
    error = (reference.two_shot(tensors, fmt).double() - exact).abs().view(-1)
    rounding = torch.stack([t.double().abs() for t in tensors]).sum(0).view(-1) * 4 * 2**-23
    assert (error <= limit.double() + rounding).all()
    assert (error / limit).max() > 0.7
