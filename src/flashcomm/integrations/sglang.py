"""Low-bit all-reduce in SGLang, as a plugin that SGLang finds by itself and that does nothing unless asked:

    FLASHCOMM_FORMAT=int8 python -m sglang.launch_server --model-path ... --tp 2

Two hooks of SGLang's own registry. `GroupCoordinator.__init__` gives tensor-parallel groups a `qr_comm`, the place of
AMD's QuickReduce, whose method "qr" works under torch.compile and CUDA graphs; `_resolve_outplace_all_reduce_method`
prefers it where `Communicator.explain` says that the message is coded. A third one reports FlashInfer's fusion of
all-reduce and norm as unavailable, which would take those messages first. Messages that are not coded, other groups
and everything else go SGLang's own way. `python -m flashcomm.integrations.sglang` says whether it would work here.
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
from torch.distributed import distributed_c10d

import flashcomm
from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError, UnavailableError
from flashcomm.integrations.rendezvous import roll_call
from flashcomm.plan import Plan
from flashcomm.routing.route import Executor
from flashcomm.settings import Settings
from flashcomm.wire.torch_codec import DTYPES

READ = ("0.5.16", "0.5.23")  # first and last version whose sources the hooks were written and checked against
GROUPS = ("tp", "attention_tp")  # names of tensor-parallel groups, before the colon
COORDINATOR = "sglang.srt.distributed.parallel_state.GroupCoordinator"
RESOLVE = "_resolve_outplace_all_reduce_method"
FUSION = "sglang.srt.layers.flashinfer_comm_fusion.is_flashinfer_allreduce_unavailable"
OWN_PATH = "SGLang's own all-reduce is used"
log = logging.getLogger("flashcomm")

_hooked: list[Any] = []  # the registries that have our hooks
_quick: weakref.WeakKeyDictionary[Any, QuickReduce] = weakref.WeakKeyDictionary()  # by GroupCoordinator
_told: set[str] = set()
_active = False


class QuickReduce:
    """What SGLang asks a `qr_comm`: whether it takes a tensor, and to reduce it."""

    def __init__(self, group: Any, format: str) -> None:
        self.disabled = False
        self.comm = Communicator(group, format)

    def should_quick_allreduce(self, x: Tensor) -> bool:
        """Whether x is coded: a fact about dtype and shape, equal on every rank."""
        if self.disabled or x.dtype not in DTYPES or x.device.type != self.comm.device.type:
            return False
        route = self.comm.explain(x.shape, x.dtype).route
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return route.low_bit and (route.executor in (Executor.KERNEL, Executor.COPY_ENGINES) or not captured)

    def quick_all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, as a new tensor."""
        return self.comm.all_reduce(x)


def plugin() -> None:
    """The entry point of group `sglang.srt.plugins`: registers the hooks if FLASHCOMM_FORMAT is set and they fit.

    Where SGLang is not a version they were written for, it says so once and leaves everything as it is.
    """
    global _active
    if "FLASHCOMM_FORMAT" not in os.environ:
        return
    if problem := why_not():
        _tell(f"{problem}; {OWN_PATH}")
        return
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    if registry.HookRegistry not in _hooked:
        _hooked.append(registry.HookRegistry)
        for target, hook in ((f"{COORDINATOR}.__init__", _make), (f"{COORDINATOR}.{RESOLVE}", _resolve)):
            registry.HookRegistry.register(target, hook, registry.HookType.AROUND)
        registry.HookRegistry.register(FUSION, _no_fusion, registry.HookType.AROUND)
    _active = True


def disable() -> None:
    """SGLang's own all-reduce again, from the next call on: the hooks that stay let everything pass. On every rank."""
    global _active
    _active = False
    for coordinator, quick in list(_quick.items()):
        quick.disabled = True
        if coordinator.qr_comm is quick:
            coordinator.qr_comm = None
        quick.comm.close()
    _quick.clear()


def communicators() -> list[Communicator]:
    """Those of this worker's tensor-parallel groups: `calls` and `sent` tell what went which way."""
    return [quick.comm for quick in _quick.values()]


def why_not() -> str:
    """Why the hooks do not fit the SGLang that is installed here, or ""."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return "sglang is not installed here: pip install sglang"
    if not _numbers(READ[0]) <= _numbers(found) <= _numbers(READ[1]):
        return f"sglang {found} is outside of {READ[0]} to {READ[1]}, which flashcomm was checked against: install one"
    missing = [name for name in (f"{COORDINATOR}.__init__", f"{COORDINATOR}.{RESOLVE}", FUSION) if not _has(name)]
    missing += [] if _has("sglang.srt.plugins.hook_registry.HookType.AROUND") else ["HookType.AROUND"]
    if missing:
        return f"sglang {found} has no {', '.join(missing)}, which flashcomm hooks into: use another version"
    coordinator = pkgutil.resolve_name(COORDINATOR)
    called = getattr(coordinator, "_all_reduce_out_place", None)
    if "quick_all_reduce" not in getattr(getattr(called, "__code__", None), "co_names", ()):
        return f"sglang {found} does not call qr_comm.quick_all_reduce, which flashcomm fills: use another version"
    if "input_" not in inspect.signature(getattr(coordinator, RESOLVE)).parameters:
        return f"{RESOLVE} of sglang {found} takes no input_, which flashcomm looks at: use another version"
    return ""


def _make(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Around GroupCoordinator.__init__, which every rank calls in the same order."""
    original(self, *args, **kwargs)
    if not _active or self.world_size < 2 or self.unique_name.split(":")[0] not in GROUPS:
        return
    if os.environ.get("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "0").lower() in ("1", "true", "yes", "y"):
        _tell(f"deterministic inference wants results that do not depend on the batch; {OWN_PATH}")
        return
    if self.qr_comm is not None:
        _tell(f"{type(self.qr_comm).__name__} already has the place of qr_comm (QuickReduce, or a plugin); {OWN_PATH}")
        return
    if kwargs.get("recovered_rank") or kwargs.get("rank_offset"):
        raise UnavailableError("workers cannot join or recover with flashcomm: start again without FLASHCOMM_FORMAT")
    advice = (
        "install flashcomm in the environment of every worker, set the same FLASHCOMM_FORMAT there (and name flashcomm "
        "in SGLANG_PLUGINS where that is set), or unset FLASHCOMM_FORMAT everywhere"
    )
    format, timeout_s, problem = "", 60.0, ""
    try:
        format, timeout_s = _format(), Settings.resolve("cpu", format="bf16").timeout_s
    except FlashcommError as why:
        problem = f"FLASHCOMM_FORMAT={os.environ['FLASHCOMM_FORMAT']}: {why}"
    store = distributed_c10d._get_default_store()
    ours = f"flashcomm {flashcomm.__version__}"
    roll_call(store, self.unique_name, self.rank, self.ranks, timeout_s, advice, problem, ours)
    self.qr_comm = _quick[self] = QuickReduce(self.device_group, format)


def _resolve(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the choice of a method: "qr" for what is coded, else what SGLang chooses."""
    quick = _quick.get(self) if _active else None
    if quick is not None and self.qr_comm is not quick:
        _tell(f"{type(self.qr_comm).__name__} took the place of flashcomm's qr_comm: choose one; {OWN_PATH}")
    elif quick is not None and quick.should_quick_allreduce(kwargs["input_"] if "input_" in kwargs else args[0]):
        return "qr"
    return original(self, *args, **kwargs)


def _no_fusion(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the question whether FlashInfer's fusion is unavailable: yes, in workers whose all-reduce is ours."""
    return True if len(_quick) else original(*args, **kwargs)


def _format() -> str:
    """The format of FLASHCOMM_FORMAT; of a plan the one for layers not named. Raises FormatError, PlanError."""
    plan = Plan.of(os.environ["FLASHCOMM_FORMAT"])
    if plan.layers or plan.decode:
        _tell(f"SGLang's all-reduce knows no layers: {plan.format} for all of them, the rest of the plan is ignored")
    return str(plan.format)


def _tell(text: str) -> None:
    """One warning, once in a process."""
    if text not in _told:
        _told.add(text)
        log.warning("flashcomm in SGLang: %s", text)


def _has(path: str) -> bool:
    """Whether there is something at a dotted path of modules and attributes."""
    try:
        return pkgutil.resolve_name(path) is not None
    except (ImportError, AttributeError):
        return False


def _numbers(text: str) -> tuple[int, ...]:
    """0.5.15.post1 as (0, 5, 15)."""
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def main() -> int:
    """Print whether the plugin would work here; the exit status says it too."""
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
