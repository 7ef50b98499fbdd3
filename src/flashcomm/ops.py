"""Functional collectives: `flashcomm.all_reduce` and others for users, `torch.ops.flashcomm.*` for compiled graphs.

All of them run on a Communicator, created at the first call with a group and format. That first call is collective and
compares settings. The ops name the Communicator by one string, "group" or "format@group": the c10d name of a registered
process group and the wire format. Without a format, FLASHCOMM_FORMAT or the default applies.

    torch.ops.flashcomm.all_reduce(Tensor x, str group) -> Tensor
    torch.ops.flashcomm.reduce_scatter(Tensor x, str group, int world_size) -> Tensor  (world_size * n, ...) to (n, ...)
    torch.ops.flashcomm.all_gather(Tensor x, str group, int world_size) -> Tensor      (n, ...) to (world_size * n, ...)
    torch.ops.flashcomm.reduce_scatter_v(Tensor x, str group, SymInt[] sizes, int rank) -> Tensor
    torch.ops.flashcomm.all_gather_v(Tensor x, str group, SymInt[] sizes) -> Tensor
    torch.ops.flashcomm.all_to_all_single(Tensor x, SymInt[]? output_split_sizes, SymInt[]? input_split_sizes,
        str group) -> Tensor
    torch.ops.flashcomm.all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group)
        -> (Tensor, Tensor)

All are functional: they return new contiguous tensors and leave x unchanged. `world_size` is the size of the group:
tracing needs it for the result's shape, because it has no group to ask. `sizes` are the rows of each rank's piece, and
`rank` is this rank. An engine's integration can `override` names of its own, for all-reduces that depend on more than
the group, such as the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.communicator import Communicator
from flashcomm.compat import process_group_named
from flashcomm.errors import SettingsError
from flashcomm.wire.format import WireFormat

_communicators: dict[tuple[str, str | None], Communicator] = {}
_overrides: dict[str, Callable[[Tensor], Tensor]] = {}


def all_reduce(x: Tensor, format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum x over the ranks of a group, into a new tensor; see `Communicator.all_reduce`.

    Works under `torch.compile(fullgraph=True, dynamic=True)`.

    Args:
        x: bf16, fp16 or fp32, any shape and strides.
        format: A wire format such as "int4". None: FLASHCOMM_FORMAT, or the default.
        group: The process group. None: the default group.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        FlashcommError: As `Communicator` and `Communicator.all_reduce` raise it.
    """
    return all_reduce_by_name(x, op_name(format, group))


def reduce_scatter(
    x: Tensor,
    format: str | WireFormat | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Sum x over the ranks and return this rank's shard along dimension 0; see `Communicator.reduce_scatter`.

    Args:
        x: (world_size * n, ...). Messages of any size are quantized, in the format of the reduce step.
        format: As in `all_reduce`.
        group: As in `all_reduce`.
        sizes: Rows of each rank's shard, equal on all ranks. None: equal shards.

    Returns:
        A contiguous tensor (n, ...), or (sizes[rank], ...).
    """
    if sizes is not None:
        name = op_name(format, group)
        if torch.compiler.is_compiling():
            return torch.ops.flashcomm.reduce_scatter_v(x, name, sizes, _rank(group))  # type: ignore[no-any-return]
        return _communicator_for(name, x).reduce_scatter(x, sizes=sizes)
    return reduce_scatter_by_name(x, op_name(format, group), _size(group))


def all_gather(
    x: Tensor,
    format: str | WireFormat | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Concatenate every rank's x along dimension 0; see `Communicator.all_gather`.

    Args:
        x: (n, ...). Messages of any size are quantized, in the format of the gather step.
        format: As in `all_reduce`.
        group: As in `all_reduce`.
        sizes: Rows of each rank's x, equal on all ranks. None: all ranks have n.

    Returns:
        A contiguous tensor (world_size * n, ...), or (sum(sizes), ...).
    """
    if sizes is not None:
        name = op_name(format, group)
        if torch.compiler.is_compiling():
            return torch.ops.flashcomm.all_gather_v(x, name, sizes)  # type: ignore[no-any-return]
        return _communicator_for(name, x).all_gather(x, sizes=sizes)
    return all_gather_by_name(x, op_name(format, group), _size(group))


def all_to_all_single(
    x: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    format: str | WireFormat | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Send piece j of x to rank j, and concatenate what comes from all ranks; see `Communicator.all_to_all_single`.

    Args:
        x: (rows, ...).
        output_split_sizes: Rows that come from each rank. None: equal pieces.
        input_split_sizes: Rows that each rank gets. None: equal pieces.
        format: As in `all_reduce`. Pieces of any size are quantized, in the format of the gather step.
        group: As in `all_reduce`.

    Returns:
        A contiguous tensor (sum(output_split_sizes), ...).
    """
    name = op_name(format, group)
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.all_to_all_single(x, output_split_sizes, input_split_sizes, name)  # type: ignore[no-any-return]
    return _communicator_for(name, x).all_to_all_single(x, output_split_sizes, input_split_sizes)


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    format: str | WireFormat | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """All-reduce x, add the residual, normalize; see `Communicator.all_reduce_add_rms_norm`.

    Args:
        x: (..., hidden), bf16, fp16 or fp32.
        residual: Of x's shape, dtype and device.
        weight: (hidden,), of x's dtype and device.
        eps: Added to the mean square.
        format: As in `all_reduce`.
        group: As in `all_reduce`.

    Returns:
        (normed, new residual), two new tensors like x.
    """
    name = op_name(format, group)
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.all_reduce_add_rms_norm(x, residual, weight, eps, name)  # type: ignore[no-any-return]
    return _communicator_for(name, x).all_reduce_add_rms_norm(x, residual, weight, eps)


def all_reduce_by_name(x: Tensor, name: str) -> Tensor:
    """`all_reduce` on the Communicator of an `op_name`. Under torch.compile it becomes an op of the graph."""
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.all_reduce(x, name)  # type: ignore[no-any-return]
    return _communicator_for(name, x).all_reduce(x)


def reduce_scatter_by_name(x: Tensor, name: str, world_size: int) -> Tensor:
    """`reduce_scatter` on the Communicator of an `op_name`; see `all_reduce_by_name`."""
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.reduce_scatter(x, name, world_size)  # type: ignore[no-any-return]
    return _communicator_for(name, x).reduce_scatter(x)


def all_gather_by_name(x: Tensor, name: str, world_size: int) -> Tensor:
    """`all_gather` on the Communicator of an `op_name`; see `all_reduce_by_name`."""
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.all_gather(x, name, world_size)  # type: ignore[no-any-return]
    return _communicator_for(name, x).all_gather(x)


def communicators() -> list[Communicator]:
    """Return the open Communicators behind these functions, whose `calls` and `sent` count calls and bytes."""
    return [comm for comm in _communicators.values() if not comm.closed]


def op_name(format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> str:
    """Return the string that names a format and a group in `torch.ops.flashcomm.*`.

    Args:
        format: As in `all_reduce`.
        group: As in `all_reduce`.

    Raises:
        SettingsError: There is no default group.
    """
    if group is None:
        if not dist.is_initialized():
            raise SettingsError("no process group: call torch.distributed.init_process_group first, or pass group=")
        group = dist.group.WORLD
    assert group is not None
    if format is None:
        return group.group_name
    text = format if isinstance(format, str) else str(format)  # parsed at run time, because Dynamo traces this function
    return f"{text}@{group.group_name}"


def override(name: str, reduce: Callable[[Tensor], Tensor]) -> None:
    """Make `torch.ops.flashcomm.all_reduce(x, name)` return reduce(x). A later override of a name replaces this one.

    Args:
        name: Any string. Only the op uses it.
        reduce: Returns a new contiguous tensor of x's shape and dtype, and leaves x as it is.
    """
    _overrides[name] = reduce


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size() if group is None else group.size()


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank() if group is None else group.rank()


def _communicator_for(name: str, x: Tensor) -> Communicator:
    """Return the Communicator of an `op_name` for x's device. Create it if the current group has none."""
    text, at, group_name = name.rpartition("@")
    try:
        group = process_group_named(group_name)
    except RuntimeError as why:
        raise SettingsError(f"no process group named {group_name!r}: use flashcomm.ops.op_name(format, group)") from why
    device = x.device.type if isinstance(x, Tensor) and x.device.type in ("cpu", "cuda") else None
    comm = _communicators.get((name, device))
    if comm is None or comm.group is not group or comm.closed:  # a new group may carry an old name
        _forget_destroyed_groups()
        comm = _communicators[name, device] = Communicator(group, text if at else None, device=device)
    return comm


def _forget_destroyed_groups() -> None:
    """Close Communicators whose group is no longer registered under its name."""
    for key, comm in list(_communicators.items()):
        try:
            alive = process_group_named(key[0].rpartition("@")[2]) is comm.group
        except RuntimeError:
            alive = False
        if not alive:
            comm.close()
            del _communicators[key]


def _run_all_reduce(x: Tensor, group: str) -> Tensor:
    override = _overrides.get(group)
    return _communicator_for(group, x).all_reduce(x) if override is None else override(x)


def _run_reduce_scatter(x: Tensor, group: str, world_size: int) -> Tensor:
    return _of_size(_communicator_for(group, x), group, world_size).reduce_scatter(x)


def _run_all_gather(x: Tensor, group: str, world_size: int) -> Tensor:
    return _of_size(_communicator_for(group, x), group, world_size).all_gather(x)


def _run_reduce_scatter_v(x: Tensor, group: str, sizes: Sequence[int], rank: int) -> Tensor:
    comm = _communicator_for(group, x)
    if comm.rank != rank:  # the result would not have the shape that the graph was traced with
        raise SettingsError(f"rank={rank} was given for group {group!r}, where this is rank {comm.rank}: pass that")
    return comm.reduce_scatter(x, sizes=sizes)


def _run_all_gather_v(x: Tensor, group: str, sizes: Sequence[int]) -> Tensor:
    return _communicator_for(group, x).all_gather(x, sizes=sizes)


def _run_all_to_all_single(
    x: Tensor, output_split_sizes: Sequence[int] | None, input_split_sizes: Sequence[int] | None, group: str
) -> Tensor:
    return _communicator_for(group, x).all_to_all_single(x, output_split_sizes, input_split_sizes)


def _run_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return _communicator_for(group, x).all_reduce_add_rms_norm(x, residual, weight, eps)


def _of_size(comm: Communicator, group: str, world_size: int) -> Communicator:
    if comm.world_size != world_size:  # the result would not have the shape that the graph was traced with
        ranks = comm.world_size
        raise SettingsError(
            f"world_size={world_size} was given for group {group!r}, which has {ranks} ranks: pass world_size={ranks}"
        )
    return comm


def _fake_all_reduce(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_reduce_scatter(x: Tensor, group: str, world_size: int) -> Tensor:
    return x.new_empty((x.shape[0] // world_size, *x.shape[1:]))


def _fake_all_gather(x: Tensor, group: str, world_size: int) -> Tensor:
    return x.new_empty((x.shape[0] * world_size, *x.shape[1:]))


def _fake_reduce_scatter_v(x: Tensor, group: str, sizes: Sequence[int], rank: int) -> Tensor:
    return x.new_empty((sizes[rank], *x.shape[1:]))


def _fake_all_gather_v(x: Tensor, group: str, sizes: Sequence[int]) -> Tensor:
    return x.new_empty((sum(sizes), *x.shape[1:]))


def _fake_all_to_all_single(
    x: Tensor, output_split_sizes: Sequence[int] | None, input_split_sizes: Sequence[int] | None, group: str
) -> Tensor:
    return x.new_empty((x.shape[0] if output_split_sizes is None else sum(output_split_sizes), *x.shape[1:]))


def _fake_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return _fake_all_reduce(x, group), _fake_all_reduce(x, group)


_library = torch.library.Library("flashcomm", "DEF")  # type: ignore[no-untyped-call]
for _signature, _run, _fake in (
    ("all_reduce(Tensor x, str group) -> Tensor", _run_all_reduce, _fake_all_reduce),
    ("reduce_scatter(Tensor x, str group, int world_size) -> Tensor", _run_reduce_scatter, _fake_reduce_scatter),
    ("all_gather(Tensor x, str group, int world_size) -> Tensor", _run_all_gather, _fake_all_gather),
    (
        "reduce_scatter_v(Tensor x, str group, SymInt[] sizes, int rank) -> Tensor",
        _run_reduce_scatter_v,
        _fake_reduce_scatter_v,
    ),
    ("all_gather_v(Tensor x, str group, SymInt[] sizes) -> Tensor", _run_all_gather_v, _fake_all_gather_v),
    (
        "all_to_all_single(Tensor x, SymInt[]? output_split_sizes, SymInt[]? input_split_sizes, str group) -> Tensor",
        _run_all_to_all_single,
        _fake_all_to_all_single,
    ),
    (
        "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group) -> (Tensor, Tensor)",
        _run_add_rms_norm,
        _fake_add_rms_norm,
    ),
):
    _name = _library.define(_signature)  # type: ignore[no-untyped-call]
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"flashcomm::{_name}", _fake, lib=_library)
