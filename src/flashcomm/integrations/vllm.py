"""Low-bit all-reduce in vLLM's tensor parallelism, on CUDA and on CPUs, switched on by one setting:

    FLASHCOMM_FORMAT=int4 vllm serve MODEL --tensor-parallel-size 2

vLLM finds two entry points of this package, both named "flashcomm", and both do nothing without that setting:

    platform_plugin   its CUDA or CPU platform, with one more parent for the device communicators (`vllm_group`):
                      all-reduces of hidden states in the tensor-parallel group are coded, all else is vLLM's own
    layer_plugin      only if the setting is a plan (`flashcomm.plan`): row-parallel layers say which one they are

vLLM is imported when it calls us, and never before. docs/vllm.md is the how-to.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
from typing import Any

import torch
from torch import Tensor

from flashcomm.errors import SettingsError
from flashcomm.integrations import vllm_group
from flashcomm.plan import Plan
from flashcomm.settings import NAMES

TESTED = ((0, 26), (0, 32))  # the first and the last minor release of vLLM that this was made for
log = logging.getLogger("flashcomm")


def platform_plugin() -> str | None:
    """For vLLM's entry points `vllm.platform_plugins`: the name of the platform's class, or None to stay out."""
    if not vllm_group.asked() or not _tested():
        return None
    if _base_platform() is None:
        _warn("vLLM runs neither on CUDA nor on a CPU here: its own all-reduce is used")
        return None
    return f"{__name__}.FlashPlatform"


def layer_plugin() -> None:
    """For vLLM's entry points `vllm.general_plugins`: have row-parallel layers ask the plan, where there is one.

    Raises PlanError for a plan that cannot be read, SettingsError where another plugin took the layers' class.
    """
    text = vllm_group.asked()
    if not text.lower().endswith(".json") or not _tested() or not Plan.of(text).layers:
        return
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.linear import RowParallelLinear

    found = op_registry_oot.get("RowParallelLinear")
    if found is None:
        RowParallelLinear.register_oot(_layer_class(RowParallelLinear))
    elif not hasattr(found, "flashcomm_name"):
        raise SettingsError(
            f"{text} has formats by layer, and another vLLM plugin ({found.__module__}) took RowParallelLinear: name "
            "the plugins to load in VLLM_PLUGINS, or give FLASHCOMM_FORMAT one format for all layers"
        )


def __getattr__(name: str) -> Any:
    """The classes that depend on vLLM's, made when vLLM first asks for them by name."""
    if name == "FlashPlatform":
        made = _platform_class()
    elif name == "FlashDeviceCommunicator":
        path = _resolve(_base_platform() or "").get_device_communicator_cls()
        made = type(name, (vllm_group.FlashGroup, _resolve(path)), {"__module__": __name__})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made


def _platform_class() -> Any:
    base: Any = _resolve(_base_platform() or "")

    class FlashPlatform(base):  # type: ignore[misc]  # a class found at run time
        """vLLM's own platform of this machine, with our device communicators."""

        additional_env_vars = (  # what vLLM takes along to the workers it starts on other machines
            *getattr(base, "additional_env_vars", ()),
            *(f"FLASHCOMM_{name}" for name in NAMES),
        )

        @classmethod
        def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
            super().apply_config_platform_defaults(vllm_config)
            vllm_group.prepare(vllm_config)

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            return f"{__name__}.FlashDeviceCommunicator"

        @classmethod
        def use_custom_op_collectives(cls) -> bool:
            return True  # on CPUs too: all_reduce then runs, and decides, behind an op that Dynamo does not look into

    FlashPlatform.__module__ = __name__
    return FlashPlatform


def _layer_class(base: Any) -> Any:
    class FlashRowParallelLinear(base):  # type: ignore[misc]  # a class found at run time
        """A row-parallel Linear whose sum names the layer, so that the plan's format for it can be found."""

        flashcomm_name = ""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.reduce_results and self.tp_size > 1 and self.input_is_parallel:
                self.flashcomm_name = _flash().serve(self.prefix) if _flash() is not None else ""

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
    """`worker_extension_cls="flashcomm.integrations.vllm.Report"` gives workers a method for `LLM.collective_rpc`."""

    def flashcomm_report(self) -> dict[str, Any]:
        """This worker's all-reduces by way: calls, bytes of messages, bytes sent; {} where flashcomm is not in use.

        Of a CUDA graph the calls are counted that captured it, not those of its replays.
        """
        return _flash().report() if _flash() is not None else {}


def _flash() -> Any:
    """The Reducer of this process' tensor-parallel group, or None."""
    from vllm.distributed.parallel_state import get_tp_group

    return getattr(get_tp_group().device_communicator, "flash", None)


def _base_platform() -> str | None:
    """The name of the platform's class that vLLM would take without us."""
    from vllm.platforms import builtin_platform_plugins

    for name in ("cuda", "cpu"):
        try:
            found: str | None = builtin_platform_plugins[name]()
        except Exception:  # vLLM takes that for a no, too
            found = None
        if found is not None:
            return found
    return None


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _tested() -> bool:
    """Whether vLLM's version is one we know; warns where it is not."""
    from vllm.version import __version__, __version_tuple__

    if TESTED[0] <= tuple(__version_tuple__[:2]) <= TESTED[1]:
        return True
    known = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
    _warn(f"vLLM {__version__} is not one of those it was tested with ({known}): vLLM's own all-reduce is used")
    return False


def _warn(text: str) -> None:
    """Say it once: in the process that the user started, at the first of vLLM's questions."""
    if multiprocessing.parent_process() is None and text not in _warned:
        _warned.add(text)
        log.warning("FLASHCOMM_FORMAT is set, but %s", text)


_warned: set[str] = set()
