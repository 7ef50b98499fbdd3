"""Functional collectives: `flashcomm.all_reduce` and its kin for people, `torch.ops.flashcomm.*` for compiled graphs.

All run a Communicator that is made at the first call with its group and format; that call is collective and compares
settings. The ops name it by one string, "group" or "format@group": the c10d name of a registered process group and the
wire format, without which FLASHCOMM_FORMAT or the default decides.

    torch.ops.flashcomm.all_reduce(Tensor x, str group) -> Tensor
    torch.ops.flashcomm.reduce_scatter(Tensor x, str group, int world_size) -> Tensor  (world_size * n, ...) to (n, ...)
    torch.ops.flashcomm.all_gather(Tensor x, str group, int world_size) -> Tensor      (n, ...) to (world_size * n, ...)
    torch.ops.flashcomm.all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group)
        -> (Tensor, Tensor)

All are functional: new contiguous tensors, x untouched. `world_size` is the size of the group, from which the result's
shape follows while a graph is traced, without a group at hand. An engine's integration can `override` names of its own
for sums of which it knows more than the group.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """The sum of x over the ranks of a group, as a new tensor; see `Communicator.all_reduce`.

    Works under `torch.compile(fullgraph=True, dynamic=True)`.

    Args:
        x: bf16, fp16 or fp32.
        format: A wire format such as "int4". None leaves it to FLASHCOMM_FORMAT or the default.
        group: None is the default group.

    Raises:
        FlashcommError: As `Communicator` and `Communicator.all_reduce`.
    """
    return all_reduce_by_name(x, op_name(format, group))


def reduce_scatter(x: Tensor, format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's shard, along dimension 0, of the sum of x; see `Communicator.reduce_scatter`.

    Args:
        x: (world_size * n, ...). It is quantized whatever its size, as the format's reduce step.
        format: As in `all_reduce`.
        group: As in `all_reduce`.
    """
    return reduce_scatter_by_name(x, op_name(format, group), _size(group))


def all_gather(x: Tensor, format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's x, one after the other along dimension 0; see `Communicator.all_gather`.

    Args:
        x: (n, ...). It is quantized whatever its size, as the format's gather step.
        format: As in `all_reduce`.
        group: As in `all_reduce`.
    """
    return all_gather_by_name(x, op_name(format, group), _size(group))


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    format: str | WireFormat | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The RMS norm of `all_reduce(x)` + residual, and that sum; see `Communicator.all_reduce_add_rms_norm`.

    Args:
        x: (..., hidden).
        residual: Like x.
        weight: (hidden,).
        eps: Added to the mean square.
        format: As in `all_reduce`.
        group: As in `all_reduce`.
    """
    name = op_name(format, group)
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.all_reduce_add_rms_norm(x, residual, weight, eps, name)  # type: ignore[no-any-return]
    return _communicator_for(name, x).all_reduce_add_rms_norm(x, residual, weight, eps)


def all_reduce_by_name(x: Tensor, name: str) -> Tensor:
    """`all_reduce` in the Communicator of an `op_name`, which integrations make once; an op where x is traced."""
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.all_reduce(x, name)  # type: ignore[no-any-return]
    return _communicator_for(name, x).all_reduce(x)


def reduce_scatter_by_name(x: Tensor, name: str, world_size: int) -> Tensor:
    """`reduce_scatter` as `all_reduce_by_name` does it."""
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.reduce_scatter(x, name, world_size)  # type: ignore[no-any-return]
    return _communicator_for(name, x).reduce_scatter(x)


def all_gather_by_name(x: Tensor, name: str, world_size: int) -> Tensor:
    """`all_gather` as `all_reduce_by_name` does it."""
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.all_gather(x, name, world_size)  # type: ignore[no-any-return]
    return _communicator_for(name, x).all_gather(x)


def communicators() -> list[Communicator]:
    """The open Communicators behind these functions: `calls` and `sent` say what they did."""
    return [comm for comm in _communicators.values() if not comm.closed]


def op_name(format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> str:
    """The string by which the ops know a format and a group."""
    if group is None:
        if not dist.is_initialized():
            raise SettingsError("no process group: call torch.distributed.init_process_group first, or pass group=")
        group = dist.group.WORLD
    assert group is not None
    if format is None:
        return group.group_name
    text = format if isinstance(format, str) else str(format)  # parsed when it is run: Dynamo traces this function
    return f"{text}@{group.group_name}"


def override(name: str, reduce: Callable[[Tensor], Tensor]) -> None:
    """Make `torch.ops.flashcomm.all_reduce(x, name)` return reduce(x), in place of any earlier override of that name.

    Args:
        name: Any string; only the op looks it up.
        reduce: Returns a new contiguous tensor of x's shape and dtype, and leaves x as it is.
    """
    _overrides[name] = reduce


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size() if group is None else group.size()


def _communicator_for(name: str, x: Tensor) -> Communicator:
    """The Communicator of that name for x's device, made now if there is none for the group as it is now."""
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


def _run_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return _communicator_for(group, x).all_reduce_add_rms_norm(x, residual, weight, eps)


def _of_size(comm: Communicator, group: str, world_size: int) -> Communicator:
    if comm.world_size != world_size:  # the result would not have the shape that the graph was traced with
        ranks = comm.world_size
        raise SettingsError(
            f"world_size={world_size} was given for group {group!r}, which has {ranks} ranks: give that"
        )
    return comm


def _fake_all_reduce(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_reduce_scatter(x: Tensor, group: str, world_size: int) -> Tensor:
    return x.new_empty((x.shape[0] // world_size, *x.shape[1:]))


def _fake_all_gather(x: Tensor, group: str, world_size: int) -> Tensor:
    return x.new_empty((x.shape[0] * world_size, *x.shape[1:]))


def _fake_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return _fake_all_reduce(x, group), _fake_all_reduce(x, group)


_library = torch.library.Library("flashcomm", "DEF")  # type: ignore[no-untyped-call]
for _signature, _run, _fake in (
    ("all_reduce(Tensor x, str group) -> Tensor", _run_all_reduce, _fake_all_reduce),
    ("reduce_scatter(Tensor x, str group, int world_size) -> Tensor", _run_reduce_scatter, _fake_reduce_scatter),
    ("all_gather(Tensor x, str group, int world_size) -> Tensor", _run_all_gather, _fake_all_gather),
    (
        "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group) -> (Tensor, Tensor)",
        _run_add_rms_norm,
        _fake_add_rms_norm,
    ),
):
    _name = _library.define(_signature)  # type: ignore[no-untyped-call]
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"flashcomm::{_name}", _fake, lib=_library)
