"""The definition of what each collective returns, computed in one process from one tensor per rank.

There are no shards and no chunks here. Each group of values is quantized by itself, so how a message is cut cannot
change the result. Values that are summed travel in the format `fmt.reduce`, and sums travel back in `fmt.gather`.

Sums run in float32 in the order of ranks, or of nodes. They are rounded to the tensors' dtype at the end, and wherever
a step sends them uncompressed. With one rank nothing is sent, so nothing is quantized.

The argument `codec` is a module with the functions `encode` and `decode_sum` of `wire.torch_codec`. All codecs give the
same bits, but some are faster.
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
    """Return the all-reduce in which every rank sends its message to every other: each value is quantized once.

    Args:
        tensors: One message per rank, of equal shape and dtype.
        fmt: The format; only `fmt.reduce` is used.
        codec: See the module docstring.

    Returns:
        The sum, of the tensors' shape and dtype.
    """
    if len(tensors) == 1:
        return tensors[0].clone()
    return quantized_sum(tensors, fmt.reduce, codec).to(tensors[0].dtype).view(tensors[0].shape)


def two_shot(tensors: Sequence[Tensor], fmt: WireFormat, codec: ModuleType = torch_codec) -> Tensor:
    """Return the all-reduce made of reduce-scatter and all-gather: the sum is quantized a second time.

    Args:
        tensors: One message per rank, of equal shape and dtype.
        fmt: The format: values travel as `fmt.reduce`, their sum as `fmt.gather`.
        codec: See the module docstring.

    Returns:
        The sum, of the tensors' shape and dtype.
    """
    if len(tensors) == 1:
        return tensors[0].clone()
    return _gathered(quantized_sum(tensors, fmt.reduce, codec, fmt.between_steps[0]), tensors[0], fmt, codec)


def hierarchical(
    tensors: Sequence[Tensor], fmt: WireFormat, local_world_size: int, codec: ModuleType = torch_codec
) -> Tensor:
    """Return the all-reduce over nodes: summed within nodes, then across nodes in their order, then gathered.

    Args:
        tensors: One message per rank, of equal shape and dtype.
        fmt: The format: values and the sums of nodes travel as `fmt.reduce`, the total sum as `fmt.gather`.
        local_world_size: The number of ranks of a node. A node is that many consecutive ranks.
        codec: See the module docstring.

    Returns:
        The sum, of the tensors' shape and dtype.

    Raises:
        InputError: The number of ranks is not a multiple of local_world_size.
    """
    first, world_size = tensors[0], len(tensors)
    if local_world_size < 1 or world_size % local_world_size:
        raise InputError(
            f"{world_size} ranks do not make nodes of local_world_size={local_world_size}: "
            "the number of ranks must be a multiple of it"
        )
    within, across = fmt.twice_reduced.between_steps
    wires = []
    for begin in range(0, world_size, local_world_size):
        node_sum = quantized_sum(tensors[begin : begin + local_world_size], fmt.reduce, codec, within)
        wires.append(_encoded(node_sum.to(first.dtype) if across.uncompressed else node_sum, first, across, codec))
    return _gathered(_decoded(wires, first, fmt.between_steps[0], codec), first, fmt, codec)


def all_reduce(
    algorithm: str,
    tensors: Sequence[Tensor],
    fmt: WireFormat,
    local_world_size: int = 0,
    codec: ModuleType = torch_codec,
) -> Tensor:
    """Return the all-reduce by the algorithm of that name.

    Args:
        algorithm: "one_shot", "two_shot" or "hierarchical".
        tensors: One message per rank, of equal shape and dtype.
        fmt: The format.
        local_world_size: The number of ranks of a node, for "hierarchical" only.
        codec: See the module docstring.

    Returns:
        The sum, of the tensors' shape and dtype.
    """
    if algorithm == "hierarchical":
        return hierarchical(tensors, fmt, local_world_size, codec)
    return {"one_shot": one_shot, "two_shot": two_shot}[algorithm](tensors, fmt, codec)


def reduce_scatter(tensors: Sequence[Tensor], fmt: WireFormat, sizes: Sequence[int] | None = None) -> list[Tensor]:
    """Return each rank's shard of the sum, along dimension 0.

    Each shard is a message of its own, quantized as `fmt.reduce`.

    Args:
        tensors: One message per rank, of equal shape and dtype.
        fmt: The format; only `fmt.reduce` is used.
        sizes: Rows of each rank's shard, which may be 0. None: dimension 0 is a multiple of the number of ranks.
    """
    if len(tensors) == 1:
        return [tensors[0].clone()]
    shards = [t.chunk(len(tensors)) if sizes is None else t.split_with_sizes(list(sizes)) for t in tensors]
    return [one_shot([s[rank] for s in shards], fmt) for rank in range(len(tensors))]


def all_gather(tensors: Sequence[Tensor], fmt: WireFormat) -> Tensor:
    """Return all tensors, quantized and concatenated along dimension 0.

    Args:
        tensors: One tensor per rank, of equal dtype and shape, but for dimension 0. Each is a message of its own.
        fmt: The format; only `fmt.gather` is used.
    """
    if len(tensors) == 1:
        return tensors[0].clone()
    return torch.cat([quantized_sum([t], fmt.gather).to(t.dtype).view(t.shape) for t in tensors])


def all_to_all_single(
    tensors: Sequence[Tensor], fmt: WireFormat, splits: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """Return what each rank receives: its piece of every rank's tensor, concatenated along dimension 0 in rank order.

    Each piece is a message of its own, quantized as `fmt.gather`. The piece that stays on its rank is not quantized.

    Args:
        tensors: One tensor per rank, of equal dtype and shape, but for dimension 0.
        fmt: The format; only `fmt.gather` is used.
        splits: For each rank the rows of the piece that each rank receives from it. None: equal pieces.
    """
    n = len(tensors)
    splits = [[len(t) // n] * n for t in tensors] if splits is None else splits
    pieces = [t.split_with_sizes(list(sizes)) for t, sizes in zip(tensors, splits, strict=True)]

    def received(source: int, target: int) -> Tensor:
        piece = pieces[source][target]
        if source == target or fmt.gather.uncompressed:
            return piece
        return quantized_sum([piece], fmt.gather).to(piece.dtype).view(piece.shape)

    return [torch.cat([received(source, target) for source in range(n)]) for target in range(n)]


def add_rms_norm(total: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of total + residual, and that sum, as they follow an all-reduce in a layer.

    Every operation is in float32 and rounded once. `to` rounds to the dtype:

        sum = to(total + residual)                           the new residual, normalized as it is stored
        inverse = 1 / sqrt(pair_sum(sum * sum) / hidden + eps)
        normed = to(to(sum * inverse) * weight)

    Args:
        total: (..., hidden), the sum over ranks.
        residual: (..., hidden), of total's dtype.
        weight: (hidden,), of total's dtype.
        eps: Added to the mean square.

    Returns:
        normed and sum, both of total's shape and dtype.
    """
    dtype, hidden = total.dtype, total.shape[-1]
    new_residual = (total.to(torch.float32) + residual.to(torch.float32)).to(dtype)
    y = new_residual.to(torch.float32)
    squares = pair_sum(y * y)
    mean = squares / torch.full_like(squares, hidden)  # by a number CUDA would not divide but multiply
    shifted = mean + torch.tensor(eps, dtype=torch.float32, device=y.device)
    inverse = 1.0 / shifted.to(torch.float64).sqrt().to(torch.float32)  # in float32 MKL is off by a bit at times
    return (y * inverse).to(dtype) * weight, new_residual


def pair_sum(q: Tensor) -> Tensor:
    """Return the sum of each row of q (..., n), float32 and not negative, as (..., 1).

    Neighbors are added, then neighboring sums, and so on. A number without a neighbor is kept as it is. Vectors and
    tiles of any width can follow this order.
    """
    while q.shape[-1] > 1:
        if q.shape[-1] % 2:
            q = torch.nn.functional.pad(q, (0, 1))
        q = q[..., 0::2] + q[..., 1::2]
    return q


def quantized_sum(
    tensors: Sequence[Tensor],
    step: StepFormat,
    codec: ModuleType = torch_codec,
    decode_step: StepFormat | None = None,
) -> Tensor:
    """Return the sum of the tensors, each of which is quantized first.

    Args:
        tensors: Messages of equal shape and dtype.
        step: The format in which they are encoded.
        codec: See the module docstring.
        decode_step: The format in which they are decoded, if that differs: `step` in the Hadamard domain.

    Returns:
        float32, flat.
    """
    return _decoded([_encoded(t, t, step, codec) for t in tensors], tensors[0], decode_step or step, codec)


def _gathered(total: Tensor, message: Tensor, fmt: WireFormat, codec: ModuleType) -> Tensor:
    """The result of the gather step.

    total: float32, flat, the sum of messages like `message`, decoded as `fmt.between_steps[0]`.
    """
    resend = fmt.between_steps[1]
    wire = _encoded(total.to(message.dtype) if resend.uncompressed else total, message, resend, codec)
    return _decoded([wire], message, fmt.gather, codec).to(message.dtype).view(message.shape)


def _encoded(values: Tensor, message: Tensor, step: StepFormat, codec: ModuleType) -> Tensor:
    """The wire buffer of `values`, with the layout of `message`."""
    layout, n = _layout(message, step), values.numel()
    if n == 0:  # also if rows have no values
        return torch.empty(0, dtype=torch.uint8, device=values.device)
    wire = torch.empty(layout.nbytes(0, n), dtype=torch.uint8, device=values.device)
    codec.encode(values.contiguous().view(-1), layout, 0, n, wire)
    return wire


def _decoded(wires: Sequence[Tensor], message: Tensor, step: StepFormat, codec: ModuleType) -> Tensor:
    """The sum of wire buffers with the layout of `message`: float32, flat."""
    total = torch.empty(message.numel(), dtype=torch.float32, device=message.device)
    if message.numel():
        codec.decode_sum(torch.stack(list(wires)), _layout(message, step), 0, message.numel(), total, message.dtype)
    return total


def _layout(message: Tensor, step: StepFormat) -> Layout:
    return Layout(step, message.shape[-1] if message.dim() else 1, message.element_size())
