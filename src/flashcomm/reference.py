"""What each collective returns, over a list of tensors, one per rank, in one process: the definition of results.

No ranks, shards or chunks appear here: a group of values is coded by itself, so how a message is cut cannot matter.
With a world of one nothing travels and nothing is coded. `fmt.reduce` codes what goes to the sum, `fmt.gather` what
comes back; sums run in float32 in rank order and are rounded to the tensors' dtype once, at the very end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat, WireFormat


def one_shot(tensors: Sequence[Tensor], fmt: WireFormat) -> Tensor:
    """All-reduce in which everybody sends everything to everybody: each value is coded once, as `fmt.reduce`."""
    if len(tensors) == 1:
        return tensors[0].clone()
    return _sum(tensors, fmt.reduce).to(tensors[0].dtype).view(tensors[0].shape)


def two_shot(tensors: Sequence[Tensor], fmt: WireFormat) -> Tensor:
    """All-reduce as reduce-scatter and all-gather: the sum is coded a second time, as `fmt.gather`."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.clone()
    total = _sum(tensors, fmt.reduce)
    if fmt.gather.lossless:  # the sum travels in the tensors' dtype
        total = total.to(first.dtype)
    return _through_wire(total, first, fmt.gather).to(first.dtype).view(first.shape)


def reduce_scatter(tensors: Sequence[Tensor], fmt: WireFormat) -> list[Tensor]:
    """Per rank its slice of the sum along dimension 0; each slice is a message of its own, coded as `fmt.reduce`."""
    if len(tensors) == 1:
        return [tensors[0].clone()]
    slices = [t.chunk(len(tensors)) for t in tensors]
    return [one_shot([s[rank] for s in slices], fmt) for rank in range(len(tensors))]


def all_gather(tensors: Sequence[Tensor], fmt: WireFormat) -> Tensor:
    """All tensors, concatenated along dimension 0, each a message of its own, coded as `fmt.gather`."""
    if len(tensors) == 1:
        return tensors[0].clone()
    return torch.cat([_through_wire(t, t, fmt.gather).to(t.dtype).view(t.shape) for t in tensors])


def _sum(tensors: Sequence[Tensor], step: StepFormat) -> Tensor:
    total = _through_wire(tensors[0], tensors[0], step)
    for tensor in tensors[1:]:
        total = total + _through_wire(tensor, tensor, step)
    return total


def _through_wire(values: Tensor, message: Tensor, step: StepFormat) -> Tensor:
    """`values`, which belong to `message`, encoded and decoded: float32, flat."""
    if values.numel() == 0:
        return values.reshape(-1).to(torch.float32)
    layout = Layout(step, message.shape[-1] if message.dim() else 1, message.element_size())
    wire = torch.empty(layout.nbytes(0, values.numel()), dtype=torch.uint8, device=values.device)
    torch_codec.encode(values.contiguous().view(-1), layout, 0, values.numel(), wire)
    return torch_codec.decode(wire, layout, 0, values.numel(), message.dtype)
