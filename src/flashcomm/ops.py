"""`flashcomm.all_reduce` for people, `torch.ops.flashcomm.all_reduce` for compiled graphs and engines; both also with
what follows in a layer, as `all_reduce_add_rms_norm`.

They run a Communicator out of a table, made at the first call with its group and format (that call is collective and
compares settings). The op names it by one string, "group" or "format@group": the c10d name of a registered process
group and the wire format, without which FLASHCOMM_FORMAT or the default decides.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from flashcomm.communicator import Communicator
from flashcomm.errors import SettingsError
from flashcomm.wire.format import WireFormat

_table: dict[tuple[str, str | None], Communicator] = {}


def all_reduce(x: Tensor, format: str | WireFormat | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of x over the ranks of group (None: the default group), as a new tensor; see `Communicator.all_reduce`.

    format: a wire format such as "int4"; None leaves it to FLASHCOMM_FORMAT or the default. Works under
    `torch.compile(fullgraph=True, dynamic=True)`. Raises as `Communicator` and `Communicator.all_reduce` do.
    """
    if torch.compiler.is_compiling():
        return torch.ops.flashcomm.all_reduce(x, op_name(format, group))  # type: ignore[no-any-return]
    return _kept(op_name(format, group), x).all_reduce(x)


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
    """The second argument of `torch.ops.flashcomm.all_reduce` for this format and group."""
    if group is None:
        if not dist.is_initialized():
            raise SettingsError("no process group: call torch.distributed.init_process_group first, or pass group=")
        group = dist.group.WORLD
    assert group is not None
    if format is None:
        return group.group_name
    text = format if isinstance(format, str) else str(format)  # parsed when it is run: Dynamo traces this function
    return f"{text}@{group.group_name}"


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


def _run(x: Tensor, group: str) -> Tensor:
    return _kept(group, x).all_reduce(x)


_library.impl("all_reduce", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("flashcomm::all_reduce", lib=_library)  # type: ignore[untyped-decorator]
def _fake(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
