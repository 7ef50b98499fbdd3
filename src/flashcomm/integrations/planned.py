"""All-reduce that follows a plan: what the integrations run in place of an engine's own all-reduce.

    planned = PlannedAllReduce(Communicator(group, plan.format), plan)
    y = planned(x, "model.layers.0.mlp.down_proj")

A plan gives each layer a wire format and, optionally, per-channel scaling and mean removal, which run before and after
the collective. Which route a message takes is decided by the Communicator alone (`Communicator.explain`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcomm.communicator import Communicator
from flashcomm.plan import Plan, is_decode
from flashcomm.routing.route import Route
from flashcomm.wire.format import WireFormat
from flashcomm.wire.torch_codec import DTYPES

MAX_DIMS = 8  # dimensions of a tensor that a Communicator accepts


class PlannedAllReduce:
    """The all-reduces of one group under one plan. Every decision is equal on all ranks.

    Args:
        comm: The Communicator that runs them.
        plan: A plan, a wire format for all layers, or the text of a format or path of a plan. None: the format of
            `comm`.

    Raises:
        FormatError: If the format is unknown.
        PlanError: If the plan cannot be read.
    """

    def __init__(self, comm: Communicator, plan: Plan | WireFormat | str | None = None) -> None:
        self.comm = comm
        self.plan = Plan.of(comm.format if plan is None else plan)
        self._one_format = not (self.plan.layers or self.plan.decode) and self.plan.format == comm.format

    def __call__(self, x: Tensor, layer: str = "", *, out: Tensor | None = None, whole: int | None = None) -> Tensor:
        """The sum of x over all ranks, in the format of its layer; the same bits on every rank.

        Per-channel scaling and mean removal apply only to a message that goes low-bit.

        Args:
            x: This rank's partial sum, (..., hidden), bf16, fp16 or fp32; not modified.
            layer: The module name of the layer that x comes from; "" if it is not known. Such a message takes the
                plan's default format, and no scaling.
            out: Where to put the result; see `Communicator.all_reduce`. None makes a new tensor.
            whole: Number of values of the message that x is some rows of; see `Communicator.all_reduce`.

        Returns:
            A tensor of x's shape and dtype; `out` if that is given.

        Raises:
            PlanError: If the plan's vectors for the layer do not have x's number of channels.
            FlashcommError: As `Communicator.all_reduce` does.
        """
        if self._one_format:
            return self.comm.all_reduce(x, out, whole=whole)
        fmt = self.format_of(x, layer)
        if layer and self.route(x, layer, whole).low_bit:
            world_size = self.comm.world_size
            sent = self.plan.before_reduce(layer, x, world_size)
            if sent is not x:
                total = self.comm.all_reduce(sent, format=fmt, whole=whole)
                result = self.plan.after_reduce(layer, total, world_size, x.dtype)
                return result if out is None else out.copy_(result)
        return self.comm.all_reduce(x, out, format=fmt, whole=whole)

    def format_of(self, x: Tensor, layer: str = "") -> WireFormat:
        """The wire format of a message; arguments as for a call."""
        if layer:
            return self.plan.format_of(layer, x)
        return self.plan.decode if self.plan.decode is not None and is_decode(x) else self.plan.format

    def route(self, x: Tensor, layer: str = "", whole: int | None = None) -> Route:
        """The route of a message, as the Communicator decides it; arguments as for a call.

        Only the shape and dtype of x count, so that a tensor on the device "meta" will do.
        """
        return self.comm.explain(x.shape, x.dtype, self.format_of(x, layer), whole=whole).route

    def is_low_bit(self, x: Tensor, layer: str = "", whole: int | None = None) -> bool:
        """Whether a call would quantize x; arguments as for a call.

        Integrations leave a message to the engine where this is False. That includes tensors that a Communicator does
        not accept: of other dtypes or devices, sparse ones, and those of more than `MAX_DIMS` dimensions.
        """
        accepted = x.dtype in DTYPES and x.layout == torch.strided and x.dim() <= MAX_DIMS
        return accepted and x.device.type == self.comm.device.type and self.route(x, layer, whole).low_bit
