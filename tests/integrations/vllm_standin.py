"""A stand-in for vLLM: the classes and modules that plugins use, with vLLM's names and signatures (0.26 to 0.33).

`install()` puts it into sys.modules. For plugins it behaves like vLLM: it chooses the platform, runs all-reduces
through an op if the platform requests it, and sums in place on CPUs. test_vllm.py compares its signatures with those of
the real vLLM, if that is installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

_state: dict[str, Any] = {"config": None, "groups": {}, "platform": None, "tp": None, "forward": None}
own_sums: list[tuple[int, ...]] = []  # shapes of the messages of vLLM's own all-reduce
op_registry_oot: dict[str, type] = {}
envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)


class Platform:
    device_type = "cpu"
    additional_env_vars: ClassVar[list[str]] = []

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        pass

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        return False


class CpuPlatform(Platform):
    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator"


class DeviceCommunicatorBase:
    def __init__(
        self,
        cpu_group: Any,
        device: torch.device | None = None,
        device_group: Any = None,
        unique_name: str = "",
        global_ranks: list[int] | None = None,
        global_world_size: int | None = None,
        use_all2all: bool = False,
    ) -> None:
        self.device, self.cpu_group, self.device_group = device or torch.device("cpu"), cpu_group, device_group
        self.unique_name = unique_name
        self.world_size, self.ranks = dist.get_world_size(cpu_group), dist.get_process_group_ranks(cpu_group)
        self.rank_in_group = dist.get_group_rank(cpu_group, dist.get_rank())

    def all_reduce(self, input_: Tensor) -> Tensor:
        own_sums.append(tuple(input_.shape))
        dist.all_reduce(input_, group=self.device_group)
        return input_

    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        assert dim == 0
        own_sums.append(tuple(input_.shape))
        part = input_.new_empty(input_.shape[0] // self.world_size, *input_.shape[1:])
        dist.reduce_scatter_tensor(part, input_.contiguous(), group=self.device_group)
        return part

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        own_sums.append(tuple(input_.shape))
        parts = [torch.empty_like(input_) for _ in range(self.world_size)]
        dist.all_gather(parts, input_, group=self.device_group)
        return torch.cat(parts, dim)

    def all_gatherv(self, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
        if not isinstance(input_, Tensor):
            return [self.all_gatherv(x, dim, sizes) for x in input_]
        own_sums.append(tuple(input_.shape))
        sizes = sizes or [len(input_)] * self.world_size
        parts = [input_.new_empty((n, *input_.shape[1:])) for n in sizes]
        for rank, part in zip(self.ranks, parts, strict=True):
            part.copy_(input_) if part is parts[self.rank_in_group] else None
            dist.broadcast(part, rank, group=self.device_group)
        return torch.cat(parts)

    def reduce_scatterv(self, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
        own_sums.append(tuple(input_.shape))
        total = input_.movedim(0, dim).clone()
        dist.all_reduce(total, group=self.device_group)
        pieces = total.chunk(self.world_size) if sizes is None else total.split(sizes)
        return pieces[self.rank_in_group].movedim(0, dim).contiguous()

    def reduce_scatterv_into_output(
        self, input_: Tensor, output: Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> None:
        output.copy_(self.reduce_scatterv(input_, dim, sizes))

    def destroy(self) -> None:
        pass


class CpuCommunicator(DeviceCommunicatorBase):
    def __init__(
        self,
        cpu_group: Any,
        device: torch.device | None = None,
        device_group: Any = None,
        unique_name: str = "",
        use_all2all: bool = False,
    ) -> None:
        super().__init__(cpu_group, device, device_group, unique_name, use_all2all=use_all2all)


class GroupCoordinator:
    def __init__(self, group: Any, name: str) -> None:
        self.unique_name = f"{name}:0"
        self.world_size = dist.get_world_size(group)
        platform = _state["platform"]
        self.device_communicator = None
        if self.world_size > 1:
            self.device_communicator = resolve(platform.get_device_communicator_cls())(
                cpu_group=group,
                device=torch.device("cpu"),
                device_group=group,
                unique_name=self.unique_name,
                use_all2all=False,
            )
        self.use_custom_op_call = platform.use_custom_op_collectives()
        _state["groups"][self.unique_name] = self

    def all_reduce(self, input_: Tensor) -> Tensor:
        if self.world_size == 1:
            return input_
        if self.use_custom_op_call:
            return torch.ops.vllm.all_reduce(input_, group_name=self.unique_name)
        return self._all_reduce_out_place(input_)

    def _all_reduce_out_place(self, input_: Tensor) -> Tensor:
        assert self.device_communicator is not None
        return self.device_communicator.all_reduce(input_)

    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        assert self.device_communicator is not None
        return self.device_communicator.reduce_scatter(input_, dim)

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        assert self.device_communicator is not None
        return self.device_communicator.all_gather(input_, dim)


class PluggableLayer(torch.nn.Module):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(op_registry_oot.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, _decorated_layer_cls: Any = None, name: str | None = None) -> Any:
        name = name or cls.__name__
        assert name not in op_registry_oot
        op_registry_oot[name] = _decorated_layer_cls
        return _decorated_layer_cls


class RowParallelLinear(PluggableLayer):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        reduce_results: bool = True,
        quant_config: Any = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
    ) -> None:
        super().__init__()
        group = _state["tp"]
        self.tp_size = 1 if disable_tp else group.world_size
        self.tp_rank = 0 if disable_tp else group.device_communicator.rank_in_group
        self.prefix, self.return_bias, self.skip_bias_add = prefix, return_bias, skip_bias_add
        self.input_is_parallel, self.reduce_results = input_is_parallel, reduce_results
        self.weight = torch.nn.Parameter(torch.zeros(output_size, input_size // self.tp_size, dtype=params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(output_size, dtype=params_dtype)) if bias else None
        self.quant_method = SimpleNamespace(
            apply=lambda layer, x, bias: torch.nn.functional.linear(x, layer.weight, bias)
        )

    def forward(self, input_: Tensor) -> Any:
        bias = self.bias if self.tp_rank == 0 and not self.skip_bias_add else None
        mine = input_ if self.input_is_parallel else input_.chunk(self.tp_size, -1)[self.tp_rank].contiguous()
        total = self.quant_method.apply(self, mine, bias)
        if self.reduce_results and self.tp_size > 1:
            total = _state["tp"].all_reduce(total)
        return (total, self.bias if self.skip_bias_add else None) if self.return_bias else total


def resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def start(plugins: dict[str, Callable[[], str | None]]) -> Any:
    """Choose the platform like vLLM: a plugin that raises is ignored, and two that return a platform are an error."""
    active = {}
    for name, plugin in plugins.items():
        try:
            if plugin() is not None:
                active[name] = plugin
        except Exception:
            continue
    if len(active) > 1:
        raise RuntimeError(f"Only one platform plugin can be activated, but got: {list(active)}")
    path = next(iter(active.values()))() if active else "vllm.platforms.cpu.CpuPlatform"
    _state["platform"] = resolve(path or "")()
    return _state["platform"]


def make_config(hidden: int, tokens: int = 512, dtype: torch.dtype = torch.bfloat16, **parallel: Any) -> Any:
    """Return a VllmConfig with the fields that flashcomm reads."""
    model = SimpleNamespace(
        dtype=dtype, get_hidden_size=lambda: hidden, hf_text_config=SimpleNamespace(model_type="llama")
    )
    parallel = {"use_ubatching": False, "pipeline_parallel_size": 1, **parallel}
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(fuse_allreduce_rms=None),
            cudagraph_mode=SimpleNamespace(separate_routine=lambda: True),
        ),
        num_speculative_tokens=0,
        additional_config={},
    )


@contextmanager
def forward_context(metadata: Any, graphs: str = "NONE") -> Iterator[None]:
    """Run a batch with this attention metadata, like the context manager `set_forward_context`."""
    _state["forward"] = SimpleNamespace(attn_metadata=metadata, cudagraph_runtime_mode=SimpleNamespace(name=graphs))
    yield
    _state["forward"] = None


@contextmanager
def current_config(config: Any) -> Iterator[None]:
    _state["config"] = config
    yield
    _state["config"] = None


def make_group(config: Any, group: Any, name: str = "tp") -> GroupCoordinator:
    """Create a group like a worker."""
    with current_config(config):
        made = GroupCoordinator(group, name)
    if name == "tp":
        _state["tp"] = made
    return made


def install(version: str = "0.32.0") -> None:
    """Install this module as `vllm` in this process."""

    def module(name: str, **names: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(names)
        sys.modules[name] = made

    def platform_module(name: str) -> Any:  # its names that are found only when asked for
        if name != "current_platform":
            raise AttributeError(name)
        return _state["platform"]

    def no_gpu() -> None:
        raise RuntimeError("NVML: no driver")  # what vLLM's own plugin may raise

    path = "vllm.distributed.device_communicators"
    for package in ("vllm", "vllm.distributed", path, "vllm.model_executor", "vllm.model_executor.layers"):
        module(package, __path__=[])
    sys.modules["vllm"].envs = envs  # type: ignore[attr-defined]
    numbers = tuple(int(part) for part in version.split("."))
    module("vllm.version", __version__=version, __version_tuple__=numbers)
    plugins = {"cuda": no_gpu, "rocm": lambda: None, "cpu": lambda: "vllm.platforms.cpu.CpuPlatform"}
    module(
        "vllm.platforms",
        builtin_platform_plugins=plugins,
        __path__=[],
        __getattr__=platform_module,
    )
    module("vllm.platforms.cpu", CpuPlatform=CpuPlatform)
    module("vllm.config", get_current_vllm_config_or_none=lambda: _state["config"])
    module(
        "vllm.forward_context",
        get_forward_context=lambda: _state["forward"],
        is_forward_context_available=lambda: _state["forward"] is not None,
    )
    module(f"{path}.base_device_communicator", DeviceCommunicatorBase=DeviceCommunicatorBase)
    module(f"{path}.cpu_communicator", CpuCommunicator=CpuCommunicator)
    module("vllm.distributed.parallel_state", get_tp_group=lambda: _state["tp"], GroupCoordinator=GroupCoordinator)
    module("vllm.model_executor.custom_op", op_registry_oot=op_registry_oot, PluggableLayer=PluggableLayer)
    module("vllm.model_executor.layers.linear", RowParallelLinear=RowParallelLinear)
    if "library" not in _state:
        library = _state["library"] = torch.library.Library("vllm", "DEF")
        library.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
        library.impl("all_reduce", lambda x, name: _state["groups"][name]._all_reduce_out_place(x), "CPU")
        library.impl("all_reduce", lambda x, name: torch.empty_like(x), "Meta")
