"""Tensor-parallel styles for `parallelize_module` with low-bit collectives.

Each replaces one of torch's styles:

    FlashRowwiseParallel      RowwiseParallel      Partial to Replicate: all-reduce; Partial to Shard: reduce-scatter
    FlashColwiseParallel      ColwiseParallel      an input of layout Shard: all-gather
    FlashPrepareModuleInput   PrepareModuleInput   inputs from Shard to Replicate: all-gather

    parallelize_module(mlp, mesh, {"up": ColwiseParallel(), "down": FlashRowwiseParallel(format="int4-had")})

They take the arguments of torch's styles, and `format`. All-reduces take the route of `flashcomm.all_reduce`, so small
messages are not quantized. A reduce-scatter or all-gather is low-bit at any size. Training, embeddings, other dtypes
and layouts sharded along the last dimension keep torch's own collectives. The styles compile with `fullgraph=True`, and
one graph serves inputs of all lengths.

This module uses these private names of torch, tested with 2.11, 2.13 and 2.15: `AsyncCollectiveTensor`, and the methods
`_apply`, `_prepare_output_fn`, `_prepare_input_fn` and `_prepare_input_arg` of the styles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
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
class MeshCollectives:
    """The collectives of one mesh dimension, along any dimension of a tensor. Shards are those of torch.chunk.

    Attributes:
        name: The name of the Communicator, from `ops.op_name`.
        world_size: Ranks of the mesh.
        rank: This rank in the mesh.
    """

    name: str
    world_size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh, format: str | None) -> MeshCollectives:
        """Return the collectives of a one-dimensional mesh in a wire format; None: FLASHCOMM_FORMAT, or the default."""
        group = mesh.get_group()
        return cls(ops.op_name(format, group), group.size(), mesh.get_local_rank())

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum the ranks' partial sums."""
        return ops.all_reduce_by_name(partial, self.name)

    def reduce_scatter(self, partial: Tensor, dim: int) -> Tensor:
        """Return this rank's shard of the sum along dim. The last shards may be smaller, or empty."""
        rows = partial.movedim(dim, 0)
        size = -(-rows.shape[0] // self.world_size)
        shard = ops.reduce_scatter_by_name(_padded(rows, size * self.world_size), self.name, self.world_size)
        mine = max(0, min(size, rows.shape[0] - self.rank * size))
        return shard[:mine].movedim(0, dim).contiguous()

    def all_gather(self, shard: Tensor, dim: int, length: int) -> Tensor:
        """Concatenate all ranks' shards along dim, to a total size of `length`."""
        rows = _padded(shard.movedim(dim, 0), -(-length // self.world_size))
        return ops.all_gather_by_name(rows, self.name, self.world_size)[:length].movedim(0, dim).contiguous()


class FlashRowwiseParallel(RowwiseParallel):
    """RowwiseParallel with a low-bit sum over the ranks. A Linear's bias is added after the sum, unquantized.

    With output_layouts=Replicate() the sum is an all-reduce. With Shard(d), for sequence-parallel blocks, it is a
    reduce-scatter along d.

    Args:
        format: A wire format such as "int4-had". None: FLASHCOMM_FORMAT, or the default.
        **layouts: The arguments of torch's RowwiseParallel.

    Raises:
        FormatError: The format does not exist.
    """

    def __init__(self, *, format: str | WireFormat | None = None, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.format = _text_of(format)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._collectives = MeshCollectives.of(device_mesh, self.format)
        module = super()._apply(module, device_mesh)
        if getattr(module, "bias", None) is not None and type(module).forward is nn.Linear.forward:
            module.__class__ = _bias_after_sum(type(module))  # type: ignore[arg-type]
        return module

    def _prepare_output_fn(  # type: ignore[override]  # a static method in the parent, called alike
        self, output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        if outputs.requires_grad:
            original: Any = RowwiseParallel._prepare_output_fn
            return original(output_layouts, use_local_output, mod, outputs, device_mesh)
        layout, total = output_layouts[0], None
        if _is_sum(outputs) and outputs.dtype in DTYPES:
            if layout.is_replicate():
                total = self._collectives.all_reduce(_local(outputs))
            elif _is_sharded_by_rows(layout, outputs):
                total = self._collectives.reduce_scatter(_local(outputs), layout.dim % outputs.ndim)
        if total is None:
            result = outputs.redistribute(placements=output_layouts)
        else:
            result = DTensor.from_local(
                total, device_mesh, output_layouts, run_check=False, shape=outputs.shape, stride=_strides(outputs)
            )
        if isinstance(mod, _BiasAfterSum):
            result = result + mod.bias
        return _local(result) if use_local_output else result


class FlashColwiseParallel(ColwiseParallel):
    """ColwiseParallel with a low-bit all-gather of an input whose layout is Shard(d).

    If several Linears share an input, use FlashPrepareModuleInput on their parent: it gathers once.

    Args:
        format: As for `FlashRowwiseParallel`.
        **layouts: The arguments of torch's ColwiseParallel.
    """

    def __init__(self, *, format: str | WireFormat | None = None, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.format = _text_of(format)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._collectives = MeshCollectives.of(device_mesh, self.format)
        return super()._apply(module, device_mesh)

    def _prepare_input_fn(  # type: ignore[override]  # a static method in the parent, called alike
        self, input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        given = _gathered(inputs[0], device_mesh, input_layouts[0], self._collectives)
        original: Any = ColwiseParallel._prepare_input_fn
        layouts = input_layouts if given is inputs[0] else desired_input_layouts
        return original(layouts, desired_input_layouts, mod, (given, *inputs[1:]), device_mesh)


class FlashPrepareModuleInput(PrepareModuleInput):
    """PrepareModuleInput with a low-bit all-gather of inputs that go from Shard(d) to Replicate().

    Args:
        format: As for `FlashRowwiseParallel`.
        **layouts: The arguments of torch's PrepareModuleInput.
    """

    def __init__(self, *, format: str | WireFormat | None = None, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.format = _text_of(format)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._collectives = MeshCollectives.of(device_mesh, self.format)
        return super()._apply(module, device_mesh)

    def _prepare_input_arg(
        self, input: Any, mesh: DeviceMesh, input_layout: Placement | None, desired_layout: Placement | None
    ) -> Any:
        if input_layout is None or desired_layout is None or not desired_layout.is_replicate():
            return super()._prepare_input_arg(input, mesh, input_layout, desired_layout)
        given = _gathered(input, mesh, input_layout, self._collectives)
        layout = input_layout if given is input else desired_layout
        return super()._prepare_input_arg(given, mesh, layout, desired_layout)


def _gathered(given: Any, mesh: DeviceMesh, layout: Placement, collectives: MeshCollectives) -> Any:
    """Gather a sharded input, low-bit, into a replicated DTensor. Return any other input unchanged."""
    if not isinstance(given, Tensor) or given.requires_grad or given.dtype not in DTYPES:
        return given
    sharded = given if isinstance(given, DTensor) else DTensor.from_local(given, mesh, (layout,), run_check=False)
    (placed, *others) = sharded.placements
    if others or not _is_sharded_by_rows(placed, sharded):
        return given
    dim = placed.dim % sharded.ndim  # type: ignore[attr-defined]
    whole = collectives.all_gather(_local(sharded), dim, sharded.shape[dim])
    return DTensor.from_local(whole, mesh, (Replicate(),), run_check=False)


class _BiasAfterSum(nn.Linear):
    """An nn.Linear that leaves out its bias at inference, because FlashRowwiseParallel adds it after the sum.

    It is a class because Dynamo (torch 2.11) ignores a `forward` that was set on an instance.
    """

    def forward(self, input: Tensor) -> Tensor:
        training = torch.is_grad_enabled() and any(t.requires_grad for t in (input, self.weight, self.bias))
        return functional.linear(input, self.weight, self.bias if training else None)


@cache
def _bias_after_sum(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `kind`, which must have nn.Linear's forward, that leaves out the bias."""
    return _BiasAfterSum if kind is nn.Linear else type(kind.__name__, (_BiasAfterSum, kind), {})


def _is_sum(x: Any) -> bool:
    """Return whether x is Partial("sum"), and not of a subclass, as embeddings and norms have them.

    Dynamo (torch 2.11) takes `type(placement) is Partial` for false, but compares placements with == as eager torch.
    """
    return len(x.placements) == 1 and bool(x.placements[0] == Partial("sum"))


def _is_sharded_by_rows(layout: Any, x: DTensor) -> bool:
    """Return whether a layout of x is Shard(d), with d not the last dimension, and not of a subclass."""
    return bool(layout.is_shard() and layout == Shard(layout.dim) and layout.dim % x.ndim != x.ndim - 1)


def _local(x: DTensor) -> Tensor:
    local = x.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _padded(rows: Tensor, n: int) -> Tensor:
    """Append zeros up to n rows. Traced graphs always call pad, so that one graph serves all lengths."""
    if rows.shape[0] == n and not torch.compiler.is_compiling():
        return rows
    return functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, n - rows.shape[0]))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of x's shape."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _text_of(format: str | WireFormat | None) -> str | None:
    return None if format is None else str(WireFormat.parse(format))
