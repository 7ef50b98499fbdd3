"""Low-bit all-reduce in vLLM's tensor parallelism, on CUDA and on CPUs. One setting turns it on.

    FLASHCOMM_FORMAT=int4 vllm serve MODEL --tensor-parallel-size 2

vLLM finds two entry points of this package, both named "flashcomm". Both do nothing without that setting:

    platform_plugin   subclasses vLLM's CUDA or CPU platform, to add a parent class to its device communicators
                      (`vllm_group`): sums of hidden states are low-bit, everything else is vLLM's own.
                      With FLASHCOMM_EXPERT_FORMAT the exchanges of experts are, too (`vllm_experts`)
    layer_plugin      if the setting is a plan (`flashcomm.plan`): row-parallel layers pass on their names

Importing this module does not import vLLM. Its functions do, when vLLM calls them. docs/vllm.md is the how-to.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
from typing import Any

import torch
from torch import Tensor

from flashcomm.errors import SettingsError
from flashcomm.integrations import vllm_experts, vllm_group
from flashcomm.plan import Plan
from flashcomm.settings import NAMES

TESTED = ((0, 26), (0, 33))  # the first and last minor release in which the names used here were read
log = logging.getLogger("flashcomm")


def platform_plugin() -> str | None:
    """Return the path of the platform's class, or None to leave vLLM unchanged.

    It is the entry point of group `vllm.platform_plugins`.
    """
    if vllm_experts.format_setting() and not vllm_group.format_setting():
        log.warning("%s has no effect without FLASHCOMM_FORMAT: set it, too, to none if not more", vllm_experts.SETTING)
    if not vllm_group.format_setting() or not _is_tested():
        return None
    if _base_platform() is None:
        _warn("vLLM does not run on CUDA or a CPU here: its own all-reduce is used")
        return None
    return f"{__name__}.FlashPlatform"


def layer_plugin() -> None:
    """Make row-parallel layers follow the plan, if there is one. Warn if vLLM runs without `platform_plugin`.

    It is the entry point of group `vllm.general_plugins`.

    Raises:
        PlanError: The plan cannot be read.
        SettingsError: Another plugin has replaced the class of the layers.
    """
    text = vllm_group.format_setting()
    if not text or not _is_tested():
        return
    from vllm.platforms import current_platform

    if _base_platform() is not None and type(current_platform).__name__ != "FlashPlatform":
        _warn(
            "vLLM chose its platform without flashcomm: vLLM's own all-reduce is used. Set FLASHCOMM_FORMAT before "
            "vLLM starts, with Ray where `ray start` runs"
        )
    if not text.lower().endswith(".json") or not Plan.of(text).layers:
        return
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.linear import RowParallelLinear

    found = op_registry_oot.get("RowParallelLinear")
    if found is None:
        RowParallelLinear.register_oot(_layer_class(RowParallelLinear))
    elif not hasattr(found, "flashcomm_name"):
        raise SettingsError(
            f"{text} has formats by layer, but another vLLM plugin ({found.__module__}) took RowParallelLinear: "
            "choose one of them with VLLM_PLUGINS, or set FLASHCOMM_FORMAT to one format for all layers"
        )


def __getattr__(name: str) -> Any:
    """Create FlashPlatform or FlashDeviceCommunicator, subclasses of vLLM's classes, when vLLM first imports them."""
    if name == "FlashPlatform":
        made = _platform_class()
    elif name == "FlashDeviceCommunicator":
        path = _resolve(_base_platform() or "").get_device_communicator_cls()
        made = type(
            name,
            (vllm_group.LowBitCommunicator, vllm_experts.ExpertCommunicator, _resolve(path)),
            {"__module__": __name__},
        )
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made


def _platform_class() -> Any:
    base: Any = _resolve(_base_platform() or "")

    class FlashPlatform(base):  # type: ignore[misc]  # a class found at run time
        """vLLM's own platform of this machine, with flashcomm's device communicators."""

        additional_env_vars = (  # vLLM passes these to workers on other machines
            *getattr(base, "additional_env_vars", ()),
            *(f"FLASHCOMM_{name}" for name in NAMES),
            vllm_experts.SETTING,
        )

        @classmethod
        def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
            super().apply_config_platform_defaults(vllm_config)
            vllm_group.configure(vllm_config)

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            return f"{__name__}.FlashDeviceCommunicator"

        @classmethod
        def use_custom_op_collectives(cls) -> bool:
            return True  # also on CPUs: all_reduce then runs inside an op that Dynamo does not trace

    FlashPlatform.__module__ = __name__
    return FlashPlatform


def _layer_class(base: Any) -> Any:
    class FlashRowParallelLinear(base):  # type: ignore[misc]  # a class found at run time
        """A row-parallel Linear that passes its name to the all-reduce, so that the plan's format for it applies."""

        flashcomm_name = ""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.reduce_results and self.tp_size > 1 and self.input_is_parallel:
                all_reduce = _tp_all_reduce()
                self.flashcomm_name = "" if all_reduce is None else all_reduce.register(self.prefix)

        def forward(self, input_: Tensor) -> Any:
            if not self.flashcomm_name:
                return super().forward(input_)
            bias = self.bias if self.tp_rank == 0 and not self.skip_bias_add else None
            partial = self.quant_method.apply(self, input_, bias)
            total = torch.ops.flashcomm.all_reduce(partial, self.flashcomm_name)
            if not self.return_bias:
                return total
            return total, self.bias if self.skip_bias_add else None

    return FlashRowParallelLinear


class Report:
    """A worker extension that reports the collectives of each worker.

    Example::

        llm = LLM(..., worker_extension_cls="flashcomm.integrations.vllm.Report")
        llm.collective_rpc("flashcomm_report")
    """

    def flashcomm_report(self) -> dict[str, Any]:
        """Return this worker's tensor-parallel collectives since start-up; {} if it uses vLLM's own.

        Calls that a CUDA graph captured are counted once. Its replays are not counted.

        Returns:
            rank: The rank in the tensor-parallel group.
            world_size: Ranks of that group.
            format: The wire format; for a plan, its default one.
            low_bit: For each route, such as "all_reduce/two_shot": calls, and sent_bytes to other ranks.
            own: The calls of vLLM's own all-reduce, by reason; of its reduce-scatter and all-gather after their names.
        """
        all_reduce = _tp_all_reduce()
        return {} if all_reduce is None else all_reduce.report()


def _tp_all_reduce() -> vllm_group.TensorParallelAllReduce | None:
    """Return the low-bit all-reduce of this process's tensor-parallel group, or None."""
    from vllm.distributed.parallel_state import get_tp_group

    return getattr(get_tp_group().device_communicator, "flashcomm", None)


def _base_platform() -> str | None:
    """Return the path of the platform class that vLLM would use without flashcomm."""
    from vllm.platforms import builtin_platform_plugins

    for name in ("cuda", "cpu"):
        try:
            found: str | None = builtin_platform_plugins[name]()
        except Exception:  # vLLM treats an exception as None, too
            found = None
        if found is not None:
            return found
    return None


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _is_tested() -> bool:
    """Return whether vLLM's version is in the range `TESTED`. Warn if it is not."""
    from vllm.version import __version__, __version_tuple__

    if TESTED[0] <= tuple(__version_tuple__[:2]) <= TESTED[1]:
        return True
    known = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
    _warn(f"vLLM {__version__} is not one of those it was tested with ({known}): vLLM's own all-reduce is used")
    return False


def _warn(text: str) -> None:
    """Log a warning, once, and only in the process that the user started."""
    if multiprocessing.parent_process() is None and text not in _warned:
        _warned.add(text)
        log.warning("FLASHCOMM_FORMAT is set, but %s", text)


_warned: set[str] = set()
