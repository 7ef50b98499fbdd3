"""What each collective returns, over a list of tensors, one per rank, in one process: the definition of results.

No ranks, shards or chunks appear here: a group of values is coded by itself, so how a message is cut cannot matter.
With a world of one nothing travels and nothing is coded. `fmt.reduce` codes what goes to the sum, `fmt.gather` what
comes back; sums run in float32 in the order of ranks, or of nodes, and are rounded to the tensors' dtype at the end,
and where a step that carries sums is lossless.

`codec`: another module with `encode` and `decode_sum`, all of which give the same bits as the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from flashcomm.errors import InputError
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, StepFormat, WireFormat


def one_shot(tensors: Sequence[Tensor], fmt: WireFormat, codec: ModuleType = torch_codec) -> Tensor:
    """All-reduce in which everybody sends everything to everybody: each value is coded once, as `fmt.reduce`."""
    if len(tensors) == 1:
        return tensors[0].clone()
    return coded_sum(tensors, fmt.reduce, codec).to(tensors[0].dtype).view(tensors[0].shape)


def two_shot(tensors: Sequence[Tensor], fmt: WireFormat, codec: ModuleType = torch_codec) -> Tensor:
    """All-reduce as reduce-scatter and all-gather: the sum is coded a second time, as `fmt.gather`."""
    if len(tensors) == 1:
        return tensors[0].clone()
    return _gathered(coded_sum(tensors, fmt.reduce, codec, fmt.between_steps[0]), tensors[0], fmt, codec)


def hierarchical(
    tensors: Sequence[Tensor], fmt: WireFormat, local_world_size: int, codec: ModuleType = torch_codec
) -> Tensor:
    """All-reduce over nodes of `local_world` consecutive ranks: summed within nodes, those sums summed in the order of
    nodes, and that gathered. Three roundings: values and nodes' sums as `fmt.reduce`, the sum of all as `fmt.gather`.

    Raises InputError where the ranks do not make such nodes.
    """
    first, world_size = tensors[0], len(tensors)
    if local_world_size < 1 or world_size % local_world_size:
        raise InputError(f"{world_size} ranks do not make nodes of {local_world_size}")
    within, across = fmt.twice_reduced.between_steps
    wires = []
    for begin in range(0, world_size, local_world_size):
        part = coded_sum(tensors[begin : begin + local_world_size], fmt.reduce, codec, within)
        wires.append(_encoded(part.to(first.dtype) if across.uncompressed else part, first, across, codec))
    return _gathered(_decoded(wires, first, fmt.between_steps[0], codec), first, fmt, codec)


def all_reduce(
    algorithm: str,
    tensors: Sequence[Tensor],
    fmt: WireFormat,
    local_world_size: int = 0,
    codec: ModuleType = torch_codec,
) -> Tensor:
    """The coded algorithm of that name; local_world is for `hierarchical`."""
    if algorithm == "hierarchical":
        return hierarchical(tensors, fmt, local_world_size, codec)
    return {"one_shot": one_shot, "two_shot": two_shot}[algorithm](tensors, fmt, codec)


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


def add_rms_norm(total: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What follows an all-reduce in a layer: RMS norm of total + residual, and that sum, both of total's dtype.

    total, residual: (..., hidden), of one dtype; weight: (hidden,), of the same. With every operation in float32 and
    rounded once, `to` being the rounding to the dtype:

        sum = to(total + residual)                           the new residual: what is stored is what is normalized
        inverse = 1 / sqrt(pair_sum(sum * sum) / hidden + eps)
        normed = to(to(sum * inverse) * weight)
    """
    dtype, hidden = total.dtype, total.shape[-1]
    new_residual = (total.to(torch.float32) + residual.to(torch.float32)).to(dtype)
    y = new_residual.to(torch.float32)
    squares = pair_sum(y * y)
    mean = squares / torch.full_like(squares, hidden)  # by a tensor: by a number CUDA multiplies
    shifted = mean + torch.tensor(eps, dtype=torch.float32, device=y.device)
    inverse = 1.0 / shifted.to(torch.float64).sqrt().to(torch.float32)  # in float32 MKL's root is off by a bit at times
    return (y * inverse).to(dtype) * weight, new_residual


def pair_sum(q: Tensor) -> Tensor:
    """The sum of each row of q (..., n), float32 and not negative, as (..., 1): neighbors are added, then neighboring
    sums, and so on; one without a neighbor goes on as it is."""
    while q.shape[-1] > 1:
        if q.shape[-1] % 2:
            q = torch.nn.functional.pad(q, (0, 1))
        q = q[..., 0::2] + q[..., 1::2]
    return q


def _gathered(total: Tensor, message: Tensor, fmt: WireFormat, codec: ModuleType) -> Tensor:
    """What comes back of a sum (float32, flat, decoded as `fmt.middle` says) of messages: coded as `fmt.gather`."""
    resend = fmt.between_steps[1]
    wire = _encoded(total.to(message.dtype) if resend.uncompressed else total, message, resend, codec)
    return _decoded([wire], message, fmt.gather, codec).to(message.dtype).view(message.shape)


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
