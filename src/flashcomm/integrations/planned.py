"""The all-reduce that follows a plan. Integrations run it in place of an engine's own all-reduce.

    planned = PlannedAllReduce(Communicator(group, plan.format), plan)
    y = planned(x, "model.layers.0.mlp.down_proj")

A plan gives each layer a wire format. Optionally, it also gives per-channel scaling and mean removal, which run before
and after the collective. The Communicator alone decides the route of a message (`Communicator.explain`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcomm.communicator import Communicator
from flashcomm.plan import Plan, is_decode
from flashcomm.routing.route import Executor, Route
from flashcomm.wire.format import WireFormat
from flashcomm.wire.torch_codec import DTYPES

MAX_DIMS = 8  # the most dimensions of a tensor that a Communicator accepts


class PlannedAllReduce:
    """The all-reduce of one group under one plan. Every decision is equal on all ranks.

    Args:
        comm: The Communicator that runs it.
        plan: A plan, a wire format for all layers, the text of a format, or the path of a plan. None: the format of
            `comm`.

    Raises:
        FormatError: The format does not exist.
        PlanError: The plan cannot be read.
    """

    def __init__(self, comm: Communicator, plan: Plan | WireFormat | str | None = None) -> None:
        self.comm = comm
        self.plan = Plan.of(comm.format if plan is None else plan)
        self._one_format = not (self.plan.layers or self.plan.decode) and self.plan.format == comm.format

    def __call__(self, x: Tensor, layer: str = "", *, out: Tensor | None = None, whole: int | None = None) -> Tensor:
        """Sum x over all ranks in the format of its layer. Every rank gets the same bits.

        Per-channel scaling and mean removal apply only if the message is low-bit.

        Args:
            x: This rank's partial sum, (..., hidden), bf16, fp16 or fp32; not modified.
            layer: The module name of the layer that x comes from. "" if it is not known: the plan's default format
                then applies, without scaling.
            out: The result; see `Communicator.all_reduce`. None: a new tensor.
            whole: If x is only some rows of a message: the number of values of that message.

        Returns:
            A tensor of x's shape and dtype; `out` if that is given.

        Raises:
            PlanError: The plan's vectors for the layer do not have x's number of channels.
            FlashcommError: As `Communicator.all_reduce` raises it.
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
        """Return the wire format of a message; arguments as in `__call__`."""
        if layer:
            return self.plan.format_of(layer, x)
        return self.plan.decode if self.plan.decode is not None and is_decode(x) else self.plan.format

    def route(self, x: Tensor, layer: str = "", whole: int | None = None) -> Route:
        """Return the route of a message; arguments as in `__call__`.

        It depends only on the shape and dtype of x, so x may be on the device "meta".
        """
        return self.comm.explain(x.shape, x.dtype, self.format_of(x, layer), whole=whole).route

    def is_low_bit(self, x: Tensor, layer: str = "", whole: int | None = None) -> bool:
        """Return whether a call would quantize x; arguments as in `__call__`.

        If not, integrations leave the message to the engine. This includes tensors that a Communicator does not accept:
        those of other dtypes or devices, sparse ones, and those of more than `MAX_DIMS` dimensions.
        """
        return self._accepts(x) and self.route(x, layer, whole).low_bit

    def is_ours(self, x: Tensor, layer: str = "", whole: int | None = None) -> bool:
        """Return whether flashcomm itself would sum x, low-bit or uncompressed; otherwise as `is_low_bit`."""
        return self._accepts(x) and self.route(x, layer, whole).executor in (Executor.PIPELINED, Executor.KERNEL)

    def _accepts(self, x: Tensor) -> bool:
        accepted = x.dtype in DTYPES and x.layout == torch.strided and x.dim() <= MAX_DIMS
        return accepted and x.device.type == self.comm.device.type
