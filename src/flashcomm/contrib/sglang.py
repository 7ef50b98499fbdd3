"""Low-bit all-reduce in SGLang, as a plugin that SGLang finds by itself. One setting turns it on.

Nobody has run this in SGLang itself yet. It was written from SGLang's sources and tested against a stand-in.

    FLASHCOMM_FORMAT=int8 python -m sglang.launch_server --model-path ... --tp 2

The plugin registers three hooks with SGLang's own registry:

    GroupCoordinator.__init__                gives tensor-parallel groups a `qr_comm`, the attribute for AMD's
                                             QuickReduce; its method "qr" works under torch.compile and in CUDA graphs
    _resolve_outplace_all_reduce_method      selects "qr" for low-bit messages (`Communicator.explain`)
    is_flashinfer_allreduce_unavailable      turns off FlashInfer's fusion of all-reduce and norm, which would
                                             otherwise reduce those messages

All other messages and groups keep SGLang's own all-reduce. `python -m flashcomm.contrib.sglang` checks whether the
hooks fit the installed SGLang.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import pkgutil
import re
import weakref
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from flashcomm.communicator import Communicator
from flashcomm.compat import default_store
from flashcomm.errors import FlashcommError, SettingsError, UnavailableError
from flashcomm.integrations.planned import PlannedAllReduce
from flashcomm.integrations.rendezvous import rendezvous
from flashcomm.plan import Plan
from flashcomm.routing.route import Executor

# The first and last version of SGLang in which the names below, which are hooked or called, were read.
READ = ("0.5.16", "0.5.23")
GROUPS = ("tp", "attention_tp")  # tensor-parallel groups: unique names up to the colon
COORDINATOR = "sglang.srt.distributed.parallel_state.GroupCoordinator"
RESOLVE = "_resolve_outplace_all_reduce_method"
REDUCE = "_all_reduce_out_place"  # calls qr_comm.quick_all_reduce
FUSION = "sglang.srt.layers.flashinfer_comm_fusion.is_flashinfer_allreduce_unavailable"
OWN_ROUTE = "SGLang's own all-reduce is used"
log = logging.getLogger("flashcomm")

_hooked: list[Any] = []  # registries in which the hooks are registered
_quick: weakref.WeakKeyDictionary[Any, QuickReduce] = weakref.WeakKeyDictionary()  # by GroupCoordinator
_warned: set[str] = set()
_active = False


class QuickReduce:
    """A `qr_comm` for SGLang. It decides which tensors are low-bit, and reduces them.

    Args:
        group: The process group.
        format: The wire format.
    """

    def __init__(self, group: Any, format: str) -> None:
        self.disabled = False
        self.planned = PlannedAllReduce(Communicator(group, format))

    def should_quick_allreduce(self, x: Tensor) -> bool:
        """Return whether x is low-bit. It depends on shape, dtype and graph capture only, equal on all ranks."""
        if self.disabled or not self.planned.is_low_bit(x):
            return False
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return not captured or self.planned.route(x).executor is Executor.KERNEL

    def quick_all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks, as a new tensor."""
        return self.planned(x)


def plugin() -> None:
    """Register the hooks if FLASHCOMM_FORMAT is set. It is the entry point of group `sglang.srt.plugins`.

    If the hooks do not fit this version of SGLang, log one warning and change nothing.
    """
    global _active
    if "FLASHCOMM_FORMAT" not in os.environ:
        return
    if problem := why_not():
        _warn(f"{problem}; {OWN_ROUTE}")
        return
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    if registry.HookRegistry not in _hooked:
        _hooked.append(registry.HookRegistry)
        for target, hook in ((f"{COORDINATOR}.__init__", _wrap_init), (f"{COORDINATOR}.{RESOLVE}", _wrap_resolve)):
            registry.HookRegistry.register(target, hook, registry.HookType.AROUND)
        registry.HookRegistry.register(FUSION, _wrap_fusion_unavailable, registry.HookType.AROUND)
    _active = True


def disable() -> None:
    """Use SGLang's own all-reduce again from the next call on. Call this on every rank.

    The hooks stay registered, but have no effect.
    """
    global _active
    _active = False
    for coordinator, quick in list(_quick.items()):
        quick.disabled = True
        if coordinator.qr_comm is quick:
            coordinator.qr_comm = None
        quick.planned.comm.close()
    _quick.clear()


def communicators() -> list[Communicator]:
    """Return the Communicators of this worker's tensor-parallel groups. `calls` and `sent` count calls and bytes."""
    return [quick.planned.comm for quick in _quick.values()]


def why_not() -> str:
    """Return why the hooks do not fit the installed SGLang, or ""."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return "sglang is not installed here: pip install sglang"
    if not _numbers(READ[0]) <= _numbers(found) <= _numbers(READ[1]):
        return f"sglang {found} is not supported: install a version from {READ[0]} to {READ[1]}"
    missing = [name for name in (f"{COORDINATOR}.__init__", f"{COORDINATOR}.{RESOLVE}", FUSION) if not _has(name)]
    missing += [] if _has("sglang.srt.plugins.hook_registry.HookType.AROUND") else ["HookType.AROUND"]
    if missing:
        return f"sglang {found} has no {', '.join(missing)}, which flashcomm hooks into: use another version"
    coordinator = pkgutil.resolve_name(COORDINATOR)
    called = getattr(coordinator, REDUCE, None)
    if "quick_all_reduce" not in getattr(getattr(called, "__code__", None), "co_names", ()):
        return f"sglang {found} does not call qr_comm.quick_all_reduce, which flashcomm sets: use another version"
    if "input_" not in inspect.signature(getattr(coordinator, RESOLVE)).parameters:
        return f"{RESOLVE} of sglang {found} has no parameter input_, which flashcomm reads: use another version"
    return ""


def _wrap_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap GroupCoordinator.__init__. Every rank creates its groups in the same order."""
    original(self, *args, **kwargs)
    if not _active or self.world_size < 2 or self.unique_name.split(":")[0] not in GROUPS:
        return
    if os.environ.get("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "0").lower() in ("1", "true", "yes", "y"):
        _warn(f"deterministic inference is on, but the route of a message depends on its size; {OWN_ROUTE}")
        return
    if self.qr_comm is not None:
        _warn(f"{type(self.qr_comm).__name__} is already set as qr_comm (by QuickReduce, or a plugin); {OWN_ROUTE}")
        return
    if kwargs.get("recovered_rank") or kwargs.get("rank_offset"):
        raise UnavailableError("workers cannot join or recover with flashcomm: unset FLASHCOMM_FORMAT and restart")

    def check_worker() -> str:
        try:
            _format()
        except FlashcommError as why:
            raise SettingsError(f"FLASHCOMM_FORMAT={os.environ['FLASHCOMM_FORMAT']}: {why}") from why
        return ""

    advice = (
        "install flashcomm in the environment of every worker, set the same FLASHCOMM_FORMAT there (and name flashcomm "
        "in SGLANG_PLUGINS where that is set), or unset FLASHCOMM_FORMAT everywhere"
    )
    rendezvous(default_store(), self.unique_name, self.rank, self.ranks, check_worker, advice)
    self.qr_comm = _quick[self] = QuickReduce(self.device_group, _format())


def _wrap_resolve(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap the choice of a method: return "qr" for low-bit messages, else SGLang's own choice."""
    quick = _quick.get(self) if _active else None
    if quick is not None and self.qr_comm is not quick:
        _warn(f"{type(self.qr_comm).__name__} replaced flashcomm's qr_comm: use only one of them; {OWN_ROUTE}")
    elif quick is not None and quick.should_quick_allreduce(kwargs["input_"] if "input_" in kwargs else args[0]):
        return "qr"
    return original(self, *args, **kwargs)


def _wrap_fusion_unavailable(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap is_flashinfer_allreduce_unavailable: return True in workers with low-bit all-reduces."""
    return True if len(_quick) else original(*args, **kwargs)


def _format() -> str:
    """Return the format in FLASHCOMM_FORMAT; for a plan, its default one. Raises FormatError or PlanError."""
    plan = Plan.of(os.environ["FLASHCOMM_FORMAT"])
    if plan.layers or plan.decode:
        _warn(
            f"SGLang's all-reduce does not know layers: {plan.format} applies to all, the rest of the plan is ignored"
        )
    return str(plan.format)


def _warn(text: str) -> None:
    """Log a warning, once per process."""
    if text not in _warned:
        _warned.add(text)
        log.warning("flashcomm in SGLang: %s", text)


def _has(path: str) -> bool:
    """Return whether a dotted path of modules and attributes names an object."""
    try:
        return pkgutil.resolve_name(path) is not None
    except (ImportError, AttributeError):
        return False


def _numbers(text: str) -> tuple[int, ...]:
    """Return (0, 5, 15) for "0.5.15.post1"."""
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def main() -> int:
    """Print whether the plugin would work here. Return the exit status, 0 if it would."""
    problem = why_not()
    print(problem or f"sglang {version('sglang')}: the hooks fit")
    asked = os.environ.get("FLASHCOMM_FORMAT")
    try:
        print("FLASHCOMM_FORMAT is not set: the plugin does nothing" if asked is None else f"format {_format()}")
    except FlashcommError as why:
        problem = str(why)
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    raise SystemExit(main())
