"""What each collective returns, over a list of tensors, one per rank, in one process: the definition of results.

No ranks, shards or chunks appear here: a group of values is coded by itself, so how a message is cut cannot matter.
With a world of one nothing travels and nothing is coded. `fmt.reduce` codes what goes to the sum, `fmt.gather` what
comes back; sums run in float32 in rank order and are rounded to the tensors' dtype once, at the very end.

`codec`: another module with `encode` and `decode_sum`, all of which give the same bits as the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat, WireFormat


def one_shot(tensors: Sequence[Tensor], fmt: WireFormat, codec: ModuleType = torch_codec) -> Tensor:
    """All-reduce in which everybody sends everything to everybody: each value is coded once, as `fmt.reduce`."""
    if len(tensors) == 1:
        return tensors[0].clone()
    return coded_sum(tensors, fmt.reduce, codec).to(tensors[0].dtype).view(tensors[0].shape)


def two_shot(tensors: Sequence[Tensor], fmt: WireFormat, codec: ModuleType = torch_codec) -> Tensor:
    """All-reduce as reduce-scatter and all-gather: the sum is coded a second time, as `fmt.gather`."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.clone()
    reduce, gather = fmt.middle
    total = coded_sum(tensors, fmt.reduce, codec, reduce)
    if gather.lossless:  # the sum travels in the tensors' dtype
        total = total.to(first.dtype)
    wire = _encoded(total, first, gather, codec)
    return _decoded([wire], first, fmt.gather, codec).to(first.dtype).view(first.shape)


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
    return torch.cat([coded_sum([t], fmt.gather).to(t.dtype).view(t.shape) for t in tensors])


def coded_sum(
    tensors: Sequence[Tensor],
    step: StepFormat,
    codec: ModuleType = torch_codec,
    wanted: StepFormat | None = None,
) -> Tensor:
    """The sum of the tensors, each coded as `step`, decoded as `wanted`: float32, flat."""
    return _decoded([_encoded(t, t, step, codec) for t in tensors], tensors[0], wanted or step, codec)


def _encoded(values: Tensor, message: Tensor, step: StepFormat, codec: ModuleType) -> Tensor:
    """The wire buffer of `values`, which belong to `message`."""
    layout, n = _layout(message, step), values.numel()
    if n == 0:  # also rows of no values
        return torch.empty(0, dtype=torch.uint8, device=values.device)
    wire = torch.empty(layout.nbytes(0, n), dtype=torch.uint8, device=values.device)
    codec.encode(values.contiguous().view(-1), layout, 0, n, wire)
    return wire


def _decoded(wires: Sequence[Tensor], message: Tensor, step: StepFormat, codec: ModuleType) -> Tensor:
    total = torch.empty(message.numel(), dtype=torch.float32, device=message.device)
    if message.numel():
        codec.decode_sum(torch.stack(list(wires)), _layout(message, step), 0, message.numel(), total, message.dtype)
    return total


def _layout(message: Tensor, step: StepFormat) -> Layout:
    return Layout(step, message.shape[-1] if message.dim() else 1, message.element_size())
