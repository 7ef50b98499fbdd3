"""A call of a collective on this rank: what can be wrong with its arguments, and its result."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcomm.collectives.recent import PLAIN
from flashcomm.transports.process_group import ProcessGroupTransport
from flashcomm.wire.format import WireFormat
from flashcomm.wire.split import Exchange, Split
from flashcomm.wire.torch_codec import DTYPES

# An all-to-all passes on values of these types, too.
PASSED_ON = (
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
_MAX_DIMS = 8


class Problem(enum.IntEnum):
    """What is wrong with the arguments of a rank's call."""

    NONE = 0
    NO_TENSOR = 1
    DTYPE = 2
    DEVICE = 3
    LAYOUT = 4
    GRADIENT = 5
    DIVIDE = 6
    DIMS = 7
    OUT = 8
    FORMAT = 9
    MEMORY = 10
    RESIDUAL = 11
    WEIGHT = 12
    EPS = 13
    OVERLAP = 14
    WHOLE = 15
    SIZES = 16
    SPLITS = 17

    def text(self, x: Any, ranks: ProcessGroupTransport) -> str:
        """Return the message for the rank itself: what was given, what is allowed, what to do."""
        plain = isinstance(x, Tensor) and not x.is_nested  # nested tensors have no shape
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}" if plain else type(x).__name__
        return f"got {got}: {self.advice(ranks)}"

    def advice(self, ranks: ProcessGroupTransport) -> str:
        """Return what is allowed and what to do. Other ranks can say this, too."""
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return {
            Problem.NONE: "",
            Problem.NO_TENSOR: "x must be a torch.Tensor",
            Problem.DTYPE: f"the dtype must be one of {dtypes}; convert the tensor, or use torch.distributed for it",
            Problem.DEVICE: f"the tensor must be on {ranks.device}, the device of this Communicator; move it there",
            Problem.LAYOUT: "the tensor must be dense (strided); call .to_dense(), or .values() of a nested tensor",
            Problem.GRADIENT: "flashcomm is for inference and computes no gradients; use torch.no_grad() or .detach()",
            Problem.DIVIDE: f"dimension 0 must exist and be a multiple of the world size {ranks.world_size}; pad it",
            Problem.OUT: "out= must be contiguous, writable and of the result's shape, dtype and device; leave it out",
            Problem.OVERLAP: "out= must not share memory with x, except that all_reduce accepts x itself; leave it out",
            Problem.WHOLE: "whole= must be a number of values, at least x.numel(); leave it out",
            Problem.SIZES: f"sizes= must be {ranks.world_size} numbers of rows, at least 0 and below 2 GiB a piece: "
            "for reduce_scatter they add up to x.shape[0], for all_gather each is the x.shape[0] of its rank",
            Problem.SPLITS: "input_split_sizes and output_split_sizes must each be "
            f"{ranks.world_size} numbers of rows, at least 0 and below 2 GiB a piece. The first add up to "
            "x.shape[0], the second to the rows of the result, and both say the same for this rank itself. Leave both "
            "out for equal pieces",
            Problem.FORMAT: "format= is not a wire format; give one such as 'int4-had', or leave it out",
            Problem.MEMORY: "the tensor must have memory of its own; of a DTensor give .to_local()",
            Problem.RESIDUAL: "residual must have x's shape, dtype and device, be dense and need no gradient",
            Problem.WEIGHT: "weight must have shape (hidden,) for x (..., hidden), x's dtype and device, be dense and "
            "need no gradient: use torch.no_grad()",
            Problem.EPS: "eps must be a finite number of at least 0, such as 1e-6",
            Problem.DIMS: f"at most {_MAX_DIMS} dimensions are supported; reshape the tensor",
        }[self]


@dataclass(frozen=True)
class Call:
    """The arguments of a call, not checked yet.

    Attributes:
        op: One of `routing.route.OPS`.
        x: The input.
        out: The result; None: a new tensor.
        format: The wire format or its text; None: that of the Communicator.
        whole: See `Communicator.all_reduce`.
        split: Rows of each rank's piece in reduce_scatter and all_gather. None: equal pieces.
        exchange: The splits of an all-to-all. None if x has no rows, or if no splits follow from the arguments.
        norm: residual, weight and eps of all_reduce_add_rms_norm.
    """

    op: str
    x: Any
    out: Any
    format: str | WireFormat | None
    whole: Any = None
    split: Split | None = None
    exchange: Exchange | None = None
    norm: tuple[Any, Any, Any] | None = None

    @property
    def pieces(self) -> Split | None:
        """The split, if pieces are not equal."""
        return None if self.split is None or self.split.is_even else self.split

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The rows that routing depends on: of each rank's piece or, of an all-to-all, those that this rank sends."""
        if self.exchange:
            return self.exchange.sent.sizes if self.exchange.explicit else None
        return self.pieces.sizes if self.pieces else None

    @property
    def rows(self) -> int | None:
        """What ranks compare in place of dimension 0, if that may differ between ranks."""
        return -1 if self.exchange else self.pieces.rows if self.pieces else None

    def same(self, transport: str) -> tuple[object, ...]:
        """Return what else must be equal on all ranks, if low-bit messages take this transport."""
        by_group = self.exchange and (self.exchange.explicit or transport == "process_group")
        return self.whole, self.pieces, self.norm and self.norm[2], by_group

    def result(self, ranks: ProcessGroupTransport) -> Tensor:
        """Return `out`, or a new tensor for the result."""
        if self.out is None:
            return torch.empty(self._shape(ranks), dtype=self.x.dtype, device=self.x.device)
        return self.out  # type: ignore[no-any-return]

    def problem(self, ranks: ProcessGroupTransport) -> Problem:
        """Return what is wrong with the arguments, or `Problem.NONE`."""
        x, out = self.x, self.out
        if problem := _problem_with(x, ranks.device, PASSED_ON if self.op == "all_to_all_single" else ()):
            return problem
        if self.op in ("reduce_scatter", "all_gather") and (
            x.dim() == 0 or (self.op == "reduce_scatter" and self.split is None and x.shape[0] % ranks.world_size)
        ):
            return Problem.DIVIDE
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        if self.op == "all_to_all_single" and not (
            self.exchange and self.exchange.fits(len(x), ranks.rank, ranks.world_size, row_bytes)
        ):
            return Problem.SPLITS
        if self.split is not None and not (
            self.split.fits(ranks.world_size, row_bytes)
            and x.shape[0] == (self.split.sizes[ranks.rank] if self.op == "all_gather" else self.split.rows)
        ):
            return Problem.SIZES
        if out is not None and not (
            isinstance(out, Tensor)
            and out.shape == self._shape(ranks)
            and (out.dtype, out.device) == (x.dtype, x.device)
            and out.layout == torch.strided
            and out.is_contiguous()
            and not out.is_neg()
            and not (out.requires_grad and torch.is_grad_enabled())
            and (torch.is_inference_mode_enabled() or not out.is_inference())
        ):
            return Problem.OUT
        if out is not None and _overlap(x, out) and not (self.op == "all_reduce" and _same_memory(x, out)):
            return Problem.OVERLAP
        if self.whole is not None and (not isinstance(self.whole, int) or self.whole < max(1, x.numel())):
            return Problem.WHOLE
        return self._problem_with_norm(ranks.device) if self.norm else Problem.NONE

    def _shape(self, ranks: ProcessGroupTransport) -> tuple[int, ...]:
        rows, *rest = self.x.shape or (1,)
        if self.exchange:
            return (self.exchange.received.rows, *rest)
        if self.op == "all_gather":
            return (self.split.rows if self.split else rows * ranks.world_size, *rest)
        if self.op == "reduce_scatter":
            return (self.split.sizes[ranks.rank] if self.split else rows // ranks.world_size, *rest)
        return tuple(self.x.shape)

    def _problem_with_norm(self, device: torch.device) -> Problem:
        x, (residual, weight, eps) = self.x, self.norm  # type: ignore[misc]
        for other, shape, wrong in ((residual, x.shape, Problem.RESIDUAL), (weight, x.shape[-1:], Problem.WEIGHT)):
            if _problem_with(other, device):
                return wrong
            if (other.shape, other.dtype, other.device) != (shape, x.dtype, x.device):
                return wrong
        if x.dim() == 0:
            return Problem.WEIGHT
        return Problem.NONE if isinstance(eps, (int, float)) and 0 <= eps < math.inf else Problem.EPS


def exchange_of(x: Any, out: Any, received: object, sent: object, world_size: int) -> Exchange | None:
    """Return the splits of an all-to-all, not checked yet; None if x has no rows or no splits follow from it.

    Args:
        x: The input.
        out: The output, or None.
        received: Rows from each rank. None: equal pieces of out or, if there is none, of a result like x.
        sent: Rows for each rank. None: equal pieces of x.
        world_size: Ranks of the group.
    """
    if not isinstance(x, Tensor) or x.is_nested or x.dim() == 0 or (received is None and sent is not None is out):
        return None
    like = out if isinstance(out, Tensor) and not out.is_nested and out.dim() else x
    splits = Split.of(sent) or Split.even(len(x), world_size), Split.of(received) or Split.even(len(like), world_size)
    return Exchange(*splits, explicit=sent is not None or received is not None)


def _problem_with(x: Any, device: torch.device, more_dtypes: tuple[torch.dtype, ...] = ()) -> Problem:
    """Return what makes x no input of any collective, or `Problem.NONE`."""
    if not isinstance(x, Tensor):
        return Problem.NO_TENSOR
    if x.dtype not in DTYPES and x.dtype not in more_dtypes:
        return Problem.DTYPE
    if x.device.type != device.type or x.device.index not in (None, device.index):
        return Problem.DEVICE
    if x.layout != torch.strided or x.is_nested:
        return Problem.LAYOUT
    if type(x) not in PLAIN and x.numel() and x.data_ptr() == 0:
        return Problem.MEMORY
    if x.requires_grad and torch.is_grad_enabled():
        return Problem.GRADIENT
    return Problem.DIMS if x.dim() > _MAX_DIMS else Problem.NONE


def _same_memory(x: Tensor, out: Tensor) -> bool:
    return x.data_ptr() == out.data_ptr() and x.is_contiguous()


def _overlap(x: Tensor, out: Tensor) -> bool:
    """Return whether the memory from x's first value to its last overlaps that of out, which is contiguous."""
    if not x.numel() or not out.numel():
        return False
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    begin, end = x.data_ptr(), x.data_ptr() + span * x.element_size()
    return begin < out.data_ptr() + out.numel() * out.element_size() and out.data_ptr() < end
