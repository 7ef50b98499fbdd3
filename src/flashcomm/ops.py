"""`flashcomm.all_reduce`, its two halves, and the sum with what follows it in a layer (`all_reduce_add_rms_norm`) for
people, `torch.ops.flashcomm.*` for compiled graphs and engines.

All run a Communicator out of a table, made at the first call with its group and format (that call is collective and
compares settings). The ops name it by one string, "group" or "format@group": the c10d name of a registered process
group and the wire format, without which FLASHCOMM_FORMAT or the default decides.

    torch.ops.flashcomm.all_reduce(Tensor x, str group) -> Tensor                  x's shape
    torch.ops.flashcomm.reduce_scatter(Tensor x, str group, int world) -> Tensor   (world * n, ...) to (n, ...)
    torch.ops.flashcomm.all_gather(Tensor x, str group, int world) -> Tensor       (n, ...) to (world * n, ...)
    torch.ops.flashcomm.all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group)
        -> (Tensor, Tensor)                                                        x's shape, both

An engine's seam can `serve` names of its own, for sums of which it knows more than the group.

All are functional: new contiguous tensors, x untouched. `world` is the size of the group, from which the shape of the
result follows while a graph is traced, without a group at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from flashcomm.communicator import Communicator
from flashcomm.errors import SettingsError
from flashcomm.wire.format import WireFormat

_table: dict[tuple[str, str | None], Communicator] = {}
_served: dict[str, Callable[[Tensor], Tensor]] = {}


def all_reduce(x: Tensor, format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of x over the ranks of group (None: the default group), as a new tensor; see `Communicator.all_reduce`.

    format: a wire format such as "int4"; None leaves it to FLASHCOMM_FORMAT or the default. Works under
    `torch.compile(fullgraph=True, dynamic=True)`. Raises as `Communicator` and `Communicator.all_reduce` do.
    """
    return call("all_reduce", x, op_name(format, group), 0)


def reduce_scatter(x: Tensor, format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's slice, along dimension 0, of the sum of x (world * n, ...); see `Communicator.reduce_scatter`.

    Coded whatever its size, as the format's first step. Compiles and raises as `all_reduce` does.
    """
    return call("reduce_scatter", x, op_name(format, group), _size(group))


def all_gather(x: Tensor, format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's x (n, ...), one after the other along dimension 0; see `Communicator.all_gather`.

    Coded whatever its size, as the format's second step. Compiles and raises as `all_reduce` does.
    """
    return call("all_gather", x, op_name(format, group), _size(group))


def call(kind: str, x: Tensor, name: str, world_size: int) -> Tensor:
    """The collective `kind` of x in the Communicator of that `op_name`: plainly, or as an op where x is being traced.

    For seams, which make the name once. world: of the group; not used by "all_reduce".
    """
    if torch.compiler.is_compiling():
        op = getattr(torch.ops.flashcomm, kind)
        return op(x, name) if kind == "all_reduce" else op(x, name, world_size)  # type: ignore[no-any-return]
    return getattr(_kept(name, x), kind)(x)  # type: ignore[no-any-return]


def communicators() -> list[Communicator]:
    """The open Communicators of this module's table: `calls` and `sent` say what they did."""
    return [kept for kept in _table.values() if not kept.closed]


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size() if group is None else group.size()


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    format: str | WireFormat | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS norm of `all_reduce(x, format, group)` + residual, and that sum, the new residual: two new tensors.

    x, residual: (..., hidden); weight: (hidden,); see `Communicator.all_reduce_add_rms_norm`. Compiles and raises as
    `all_reduce` does.
    """
    if torch.compiler.is_compiling():
        op = torch.ops.flashcomm.all_reduce_add_rms_norm
        return op(x, residual, weight, eps, op_name(format, group))  # type: ignore[no-any-return]
    return _kept(op_name(format, group), x).all_reduce_add_rms_norm(x, residual, weight, eps)


def op_name(format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> str:
    """The second argument of the ops for this format and group."""
    if group is None:
        if not dist.is_initialized():
            raise SettingsError("no process group: call torch.distributed.init_process_group first, or pass group=")
        group = dist.group.WORLD
    assert group is not None
    if format is None:
        return group.group_name
    text = format if isinstance(format, str) else str(format)  # parsed when it is run: Dynamo traces this function
    return f"{text}@{group.group_name}"


def serve(name: str, reduce: Callable[[Tensor], Tensor]) -> None:
    """Make `torch.ops.flashcomm.all_reduce(x, name)` return reduce(x), in place of whatever was served by that name.

    reduce: returns a new contiguous tensor of x's shape and dtype, and leaves x as it is.
    """
    _served[name] = reduce


def _kept(name: str, x: Tensor) -> Communicator:
    """The Communicator of that name for x's device, made now if there is none for the group as it is now."""
    text, at, group_name = name.rpartition("@")
    try:
        group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    except RuntimeError as why:
        raise SettingsError(f"no process group named {group_name!r}: use flashcomm.ops.op_name(format, group)") from why
    where = x.device.type if isinstance(x, Tensor) and x.device.type in ("cpu", "cuda") else None
    kept = _table.get((name, where))
    if kept is None or kept.group is not group or kept.closed:  # a group made anew may carry an old name
        _forget_destroyed_groups()
        kept = _table[name, where] = Communicator(group, text if at else None, device=where)
    return kept


def _forget_destroyed_groups() -> None:
    """Let go of Communicators whose group is no longer registered under its name."""
    for key, kept in list(_table.items()):
        try:
            alive = _resolve_process_group(key[0].rpartition("@")[2]) is kept.group  # type: ignore[arg-type]
        except RuntimeError:
            alive = False
        if not alive:
            kept.close()
            del _table[key]


_library = torch.library.Library("flashcomm", "DEF")  # type: ignore[no-untyped-call]
_library.define("all_reduce(Tensor x, str group) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("reduce_scatter(Tensor x, str group, int world) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("all_gather(Tensor x, str group, int world) -> Tensor")  # type: ignore[no-untyped-call]


def _run_all_reduce(x: Tensor, group: str) -> Tensor:
    served = _served.get(group)
    return _kept(group, x).all_reduce(x) if served is None else served(x)


def _run_reduce_scatter(x: Tensor, group: str, world_size: int) -> Tensor:
    return _of_size(_kept(group, x), group, world_size).reduce_scatter(x)


def _run_all_gather(x: Tensor, group: str, world_size: int) -> Tensor:
    return _of_size(_kept(group, x), group, world_size).all_gather(x)


def _of_size(comm: Communicator, group: str, world_size: int) -> Communicator:
    if comm.world_size != world_size:  # the result would not have the shape that the graph was traced with
        raise SettingsError(
            f"world_size={world_size} was given for group {group!r}, which has {comm.world_size} ranks: give that"
        )
    return comm


for _kind, _run in (
    ("all_reduce", _run_all_reduce),
    ("reduce_scatter", _run_reduce_scatter),
    ("all_gather", _run_all_gather),
):
    _library.impl(_kind, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("flashcomm::all_reduce", lib=_library)  # type: ignore[untyped-decorator]
def _fake_all_reduce(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("flashcomm::reduce_scatter", lib=_library)  # type: ignore[untyped-decorator]
def _fake_reduce_scatter(x: Tensor, group: str, world_size: int) -> Tensor:
    return x.new_empty((x.shape[0] // world_size, *x.shape[1:]))


@torch.library.register_fake("flashcomm::all_gather", lib=_library)  # type: ignore[untyped-decorator]
def _fake_all_gather(x: Tensor, group: str, world_size: int) -> Tensor:
    return x.new_empty((x.shape[0] * world_size, *x.shape[1:]))


_library.define(  # type: ignore[no-untyped-call]
    "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group) -> (Tensor, Tensor)"
)


def _run_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return _kept(group, x).all_reduce_add_rms_norm(x, residual, weight, eps)


_library.impl("all_reduce_add_rms_norm", _run_norm, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("flashcomm::all_reduce_add_rms_norm", lib=_library)  # type: ignore[untyped-decorator]
def _fake_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )
