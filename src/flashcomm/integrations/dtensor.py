"""Tensor-parallel styles for `parallelize_module` whose collectives are low-bit, in place of torch's own:

    FlashRowwiseParallel      RowwiseParallel      Partial to Replicate: all-reduce; Partial to Shard: reduce-scatter
    FlashColwiseParallel      ColwiseParallel      an input of layout Shard: all-gather
    FlashPrepareModuleInput   PrepareModuleInput   inputs from Shard to Replicate: all-gather

    parallelize_module(mlp, mesh, {"up": ColwiseParallel(), "down": FlashRowwiseParallel(format="int4-had")})

Arguments are those of torch's styles, and `format`: a wire format; without it FLASHCOMM_FORMAT or the default decides.
An all-reduce goes as `flashcomm.all_reduce` does, so that small ones stay exact; a reduce-scatter or all-gather is
coded whatever its size. What takes gradients, embeddings, other dtypes and layouts sharded along the last dimension
keep torch's own path. All of it compiles (`fullgraph=True`), and no length of input compiles again.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional

from flashcomm import ops
from flashcomm.wire.format import WireFormat
from flashcomm.wire.torch_codec import DTYPES


@dataclass(frozen=True)
class Link:
    """What a style knows of its mesh: the Communicator's name, the number of ranks, this one."""

    name: str
    world_size: int
    rank: int

    @classmethod
    def over(cls, mesh: DeviceMesh, format: str | None) -> Link:
        group = mesh.get_group()
        return cls(ops.op_name(format, group), group.size(), mesh.get_local_rank())

    def all_reduce(self, partial: Tensor) -> Tensor:
        return ops.all_reduce_by_name(partial, self.name)

    def reduce_scatter(self, partial: Tensor, dim: int) -> Tensor:
        """This rank's part along dim of the sum; parts are those of torch.chunk, so that the last may be smaller."""
        rows = partial.movedim(dim, 0)
        share = -(-rows.shape[0] // self.world_size)
        part = ops.reduce_scatter_by_name(_padded(rows, share * self.world_size), self.name, self.world_size)
        mine = max(0, min(share, rows.shape[0] - self.rank * share))
        return part[:mine].movedim(0, dim).contiguous()

    def all_gather(self, part: Tensor, dim: int, length: int) -> Tensor:
        """The whole of the tensor, `length` long along dim, of which this rank has the part that torch.chunk gives."""
        share = -(-length // self.world_size)
        rows = _padded(part.movedim(dim, 0), share)
        return ops.all_gather_by_name(rows, self.name, self.world_size)[:length].movedim(0, dim).contiguous()


class FlashRowwiseParallel(RowwiseParallel):
    """RowwiseParallel with a low-bit sum of what the ranks computed; a Linear's bias is added after it, exactly.

    output_layouts Replicate(): all-reduce. Shard(d), for sequence-parallel blocks: reduce-scatter along d.
    """

    def __init__(self, *, format: str | WireFormat | None = None, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.format = _checked(format)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._link = Link.over(device_mesh, self.format)
        module = super()._apply(module, device_mesh)
        if getattr(module, "bias", None) is not None and type(module).forward is nn.Linear.forward:
            module.forward = types.MethodType(_linear_without_bias, module)
        return module

    def _prepare_output_fn(  # type: ignore[override]  # a static method in the parent, called in the same way
        self, output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        if outputs.requires_grad:
            torchs: Any = RowwiseParallel._prepare_output_fn
            return torchs(output_layouts, use_local_output, mod, outputs, device_mesh)
        layout, summed = output_layouts[0], None
        if _is_sum(outputs) and outputs.dtype in DTYPES:
            if layout.is_replicate():
                summed = self._link.all_reduce(_local(outputs))
            elif _takes(layout, outputs):
                summed = self._link.reduce_scatter(_local(outputs), layout.dim % outputs.ndim)
        if summed is None:
            result = outputs.redistribute(placements=output_layouts)
        else:
            result = DTensor.from_local(
                summed, device_mesh, output_layouts, run_check=False, shape=outputs.shape, stride=_strides(outputs)
            )
        if _withholds_bias(mod):
            result = result + mod.bias
        return _local(result) if use_local_output else result


class FlashColwiseParallel(ColwiseParallel):
    """ColwiseParallel whose input, where its layout is Shard(d), comes together in a low-bit all-gather.

    For several Linears of one input use FlashPrepareModuleInput on their parent: it gathers once.
    """

    def __init__(self, *, format: str | WireFormat | None = None, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.format = _checked(format)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._link = Link.over(device_mesh, self.format)
        return super()._apply(module, device_mesh)

    def _prepare_input_fn(  # type: ignore[override]  # a static method in the parent, called in the same way
        self, input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        given = _whole(inputs[0], device_mesh, input_layouts[0], self._link)
        torchs: Any = ColwiseParallel._prepare_input_fn
        layouts = input_layouts if given is inputs[0] else desired_input_layouts
        return torchs(layouts, desired_input_layouts, mod, (given, *inputs[1:]), device_mesh)


class FlashPrepareModuleInput(PrepareModuleInput):
    """PrepareModuleInput whose inputs that go from Shard(d) to Replicate() come together in a low-bit all-gather."""

    def __init__(self, *, format: str | WireFormat | None = None, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.format = _checked(format)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._link = Link.over(device_mesh, self.format)
        return super()._apply(module, device_mesh)

    def _prepare_input_arg(
        self, input: Any, mesh: DeviceMesh, input_layout: Placement | None, desired_layout: Placement | None
    ) -> Any:
        if input_layout is None or desired_layout is None or not desired_layout.is_replicate():
            return super()._prepare_input_arg(input, mesh, input_layout, desired_layout)
        given = _whole(input, mesh, input_layout, self._link)
        layout = input_layout if given is input else desired_layout
        return super()._prepare_input_arg(given, mesh, layout, desired_layout)


def _whole(given: Any, mesh: DeviceMesh, layout: Placement, link: Link) -> Any:
    """A replicated DTensor of what is sharded so that a low-bit all-gather fits; anything else as it was given."""
    if not isinstance(given, Tensor) or given.requires_grad or given.dtype not in DTYPES:
        return given
    sharded = given if isinstance(given, DTensor) else DTensor.from_local(given, mesh, (layout,), run_check=False)
    (placed, *others) = sharded.placements
    if others or not _takes(placed, sharded):
        return given
    dim = placed.dim % sharded.ndim  # type: ignore[attr-defined]
    whole = link.all_gather(_local(sharded), dim, sharded.shape[dim])
    return DTensor.from_local(whole, mesh, (Replicate(),), run_check=False)


def _linear_without_bias(self: nn.Linear, input: Tensor) -> Tensor:
    """nn.Linear's forward, but for inference without the bias: FlashRowwiseParallel adds it after the sum."""
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (input, self.weight, self.bias))
    return functional.linear(input, self.weight, self.bias if training else None)


def _withholds_bias(module: nn.Module) -> bool:
    return getattr(module.forward, "__func__", None) is _linear_without_bias


def _is_sum(x: Any) -> bool:
    return len(x.placements) == 1 and type(x.placements[0]) is Partial and x.placements[0].reduce_op == "sum"


def _takes(layout: Any, x: DTensor) -> bool:
    """Whether a layout is sharded along a dimension that is not a row's."""
    return type(layout) is Shard and layout.dim % x.ndim != x.ndim - 1


def _local(x: DTensor) -> Tensor:
    local = x.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _padded(rows: Tensor, n: int) -> Tensor:
    """rows with zeros up to n of them; a graph that is traced holds this for all lengths alike."""
    if rows.shape[0] == n and not torch.compiler.is_compiling():
        return rows
    return functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, n - rows.shape[0]))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of a contiguous tensor of x's shape."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _checked(format: str | WireFormat | None) -> str | None:
    return None if format is None else str(WireFormat.parse(format))
