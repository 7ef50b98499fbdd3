"""Low-bit all-reduce for a tensor-parallel group of vLLM. `vllm.py` installs it.

`LowBitCommunicator` precedes vLLM's own device communicator in the class hierarchy. When the group "tp" is created, all
its workers meet, create a `Communicator` and run every kind of call once, before vLLM measures the free memory.
Afterwards these all-reduces run:

    hidden states    (tokens, hidden size) in bf16 or fp16, if low-bit is faster (`Communicator.explain`): low-bit
    all others       other widths and dtypes, single values, small messages: vLLM's own all-reduce, unchanged

In batch-invariant mode the algorithm is fixed, and all hidden states are low-bit. `vllm_sequence.py` does the same for
the reduce-scatters and all-gathers of sequence parallelism, and tells batches that only decode from others.

Every decision depends on shapes, settings and the scheduled batch, which are equal on all ranks.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashcomm import ops
from flashcomm.communicator import Communicator
from flashcomm.compat import default_store, name_of
from flashcomm.errors import PlanError, SettingsError
from flashcomm.integrations.planned import PlannedAllReduce
from flashcomm.integrations.rendezvous import rendezvous
from flashcomm.integrations.vllm_sequence import DTYPES, SequenceParallel, only_decodes
from flashcomm.plan import Plan
from flashcomm.routing.policy import AUTO
from flashcomm.settings import Settings
from flashcomm.wire.format import WireFormat

WORKSPACE_BYTES = (4 << 20, 256 << 20)  # the least and the most; in between, as the largest batch needs
TIMEOUT_S = 600.0  # ranks may be this far apart, for instance while one compiles the model
log = logging.getLogger("flashcomm")


def format_setting() -> str:
    """Return FLASHCOMM_FORMAT, which turns flashcomm on in vLLM; "" if it is not set."""
    return os.environ.get("FLASHCOMM_FORMAT", "").strip()


def batch_invariant() -> bool:
    """Return whether vLLM's batch-invariant mode is on: the bits of a token must not depend on its batch."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))


def why_not(config: Any, plan: Plan | None = None) -> str:
    """Return why vLLM keeps its own all-reduce under this VllmConfig, or "". Equal on all ranks if the plan is."""
    if config is None or config.model_config is None:
        return "there is no model config"
    if getattr(config.parallel_config, "use_ubatching", False):
        return "dual-batch overlap (DBO) is on, but a Communicator works on one stream only"
    if config.model_config.dtype not in DTYPES:
        return f"the model runs in {config.model_config.dtype}; only bfloat16 and float16 can be low-bit"
    if plan is not None and batch_invariant():
        hidden_size = config.model_config.get_hidden_size()
        for fmt in _formats(plan):
            if not fmt.uncompressed and hidden_size % fmt.unit:
                return (
                    f"batch-invariant mode is on, but the hidden size {hidden_size} is no multiple of {fmt.unit}, the "
                    f"group size of {fmt}"
                )
    return ""


def _formats(plan: Plan) -> list[WireFormat]:
    return [plan.format, *([plan.decode] if plan.decode else []), *(part.format for part in plan.layers.values())]


def configure(config: Any) -> None:
    """Adapt a VllmConfig, in the process that creates it.

    Add the plan's digest to it, because vLLM's cache of compiled graphs depends on the plan. Turn off vLLM's fusion of
    all-reduce and RMSNorm, unless the user turned it on.

    Raises:
        FormatError: The format does not exist.
        PlanError: The plan cannot be read.
        SettingsError: A FLASHCOMM_* setting is wrong, or `additional_config` is not a dict.
    """
    plan = Plan.of(format_setting())
    Settings.resolve("cpu", format=str(plan.format))
    if not isinstance(config.additional_config, dict):
        raise SettingsError(
            f"additional_config={config.additional_config!r}: with flashcomm it must be a dict; pass one or none"
        )
    config.additional_config["flashcomm"] = plan.digest
    fusions = getattr(config.compilation_config, "pass_config", None)
    if all(fmt.uncompressed for fmt in _formats(plan)) or why_not(config, plan) or fusions is None:
        return
    if fusions.fuse_allreduce_rms is None:
        fusions.fuse_allreduce_rms = False
    elif fusions.fuse_allreduce_rms:
        log.warning("fuse_allreduce_rms is on: messages that FlashInfer fuses with RMSNorm are not low-bit")


def fixed_route(world_size: int) -> dict[str, Any]:
    """Return the settings of a Communicator that chooses the same algorithm for every message.

    With two ranks, one-shot sends as many bytes as two-shot and rounds once. FLASHCOMM_ALGORITHM sets another.
    """
    if os.environ.get("FLASHCOMM_ALGORITHM", AUTO) != AUTO:
        return {"min_bytes": 0}
    return {"min_bytes": 0, "algorithm": "one_shot" if world_size == 2 else "two_shot"}


class LowBitCommunicator:
    """A mixin that precedes vLLM's DeviceCommunicatorBase among the parents of a class.

    Attributes:
        flashcomm: The group's low-bit all-reduce; None if vLLM's own is used.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flashcomm = _create(self)

    def all_reduce(self, input_: Tensor) -> Tensor:
        """Return the sum as a new tensor and leave the input unchanged. `torch.ops.vllm.all_reduce` calls this."""
        return self.own_all_reduce(input_) if self.flashcomm is None else self.flashcomm(input_)

    def own_all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum by vLLM's own all-reduce as a new tensor. On CPUs vLLM sums in place, so x is copied."""
        total: Tensor = super().all_reduce(x.clone() if x.device.type == "cpu" else x)  # type: ignore[misc]
        return total

    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        """Return this rank's part of the sum. `torch.ops.vllm.reduce_scatter` calls this."""
        part = None if self.flashcomm is None else self.flashcomm.sequence.reduce_scatter(input_, dim)
        return self._own("reduce_scatter", input_, dim) if part is None else part

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """Return the concatenation of all ranks' tensors. `torch.ops.vllm.all_gather` calls this."""
        whole = None if self.flashcomm is None else self.flashcomm.sequence.all_gather(input_, dim)
        return self._own("all_gather", input_, dim) if whole is None else whole

    def custom_reduce_scatter(self, input_: Tensor) -> Tensor | None:
        """Return None if flashcomm is used. vLLM's models then call `reduce_scatter`, which may use this kernel."""
        own = getattr(super(), "custom_reduce_scatter", None)
        return None if own is None or self.flashcomm is not None else own(input_)

    def custom_all_gather(self, input_: Tensor) -> Tensor | None:
        """Return None if flashcomm is used. vLLM's models then call `all_gather`, which may use this kernel."""
        own = getattr(super(), "custom_all_gather", None)
        return None if own is None or self.flashcomm is not None else own(input_)

    def _own(self, op: str, x: Tensor, dim: int) -> Tensor:
        """Run vLLM's own collective, on dimension 0 by its custom kernel if it has one that takes x."""
        custom = getattr(super(), f"custom_{op}", None)
        if custom is not None and self.flashcomm is not None and dim == 0 and x.dim() == 2:
            result: Tensor | None = custom(x)
            if result is not None:
                return result
        own: Tensor = getattr(super(), op)(x, dim)
        return own

    def destroy(self) -> None:
        """Close the Communicator. vLLM calls this when it exits."""
        if self.flashcomm is not None:
            self.flashcomm.planned.comm.close()
        super().destroy()  # type: ignore[misc]


class TensorParallelAllReduce:
    """The all-reduce of one tensor-parallel group: low-bit for hidden states if that is faster, else vLLM's own.

    Args:
        name: vLLM's name of the group. It must be the same in every run, because cached graphs contain it.
        planned: The group's all-reduce under a plan.
        hidden_size: The hidden size of the model, in values.
        own: vLLM's own all-reduce.
        check: Called once, with the names of registered layers, after the model was built. It raises PlanError if the
            plan is for another model.
        config: The VllmConfig; a plan with a format for decoding needs it.
        batch_invariant: Whether vLLM's batch-invariant mode is on.
    """

    def __init__(
        self,
        name: str,
        planned: PlannedAllReduce,
        hidden_size: int,
        own: Callable[[Tensor], Tensor],
        check: Callable[[list[str]], None],
        config: Any = None,
        batch_invariant: bool = False,
    ) -> None:
        self.name, self.planned, self.hidden_size = name, planned, hidden_size
        self.layers: list[str] = []
        self.own_calls: Counter[str] = Counter()  # of vLLM's own all-reduce, by reason
        self.sequence = SequenceParallel(self, batch_invariant)
        self._own, self._config = own, config
        self._check: Callable[[list[str]], None] | None = check

    def __call__(self, x: Tensor, layer: str = "") -> Tensor:
        """Return the sum of x over the group as a new tensor.

        Args:
            x: This rank's tensor.
            layer: The name of the row-parallel layer; "" if it is not known.
        """
        if self._check is not None:
            self._check(self.layers)
            self._check = None
        reason = "too small to pay"
        if x.dim() != 2 or x.shape[-1] != self.hidden_size or x.dtype not in DTYPES:
            reason = "not hidden states"
        elif self.planned.is_low_bit(batch := self.phased(x), layer):
            return self.planned(batch, layer).view(x.shape)
        self.own_calls[reason] += 1
        if self.own_calls[reason] == 1 and self.planned.comm.settings.debug == "info":
            log.info("vLLM's own all-reduce: first message %s: %s %s", reason, tuple(x.shape), x.dtype)
        return self._own(x)

    def phased(self, x: Tensor) -> Tensor:
        """Return hidden states (tokens, hidden) in the shape by which a plan knows the phase.

        If all requests of the batch decode, that is (tokens, 1, hidden); see `plan.is_decode`.
        """
        if self.planned.plan.decode is None:
            return x
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return x.unsqueeze(1) if only_decodes(self._config, captured) else x

    def register(self, layer: str) -> str:
        """Register a layer. Return the name by which `torch.ops.flashcomm.all_reduce` reduces its output."""
        name = f"vllm/{self.name}/{layer}"
        ops.override(name, lambda x: self(x, layer))
        self.layers.append(layer)
        return name

    def warm_up(self, max_tokens: int, dtype: torch.dtype) -> None:
        """Run every kind of call that batches of up to max_tokens need, so that nothing is compiled later."""
        comm, plan = self.planned.comm, self.planned.plan
        sizes = sorted({min(1 << i, max_tokens) for i in range(max_tokens.bit_length() + 1)})
        done = set()
        for n, fmt in ((n, fmt) for fmt in _formats(plan) for n in sizes):
            route = comm.explain((n, self.hidden_size), dtype, fmt).route
            if route.low_bit and (route.algorithm, fmt) not in done:
                done.add((route.algorithm, fmt))
                comm.all_reduce(torch.zeros(n, self.hidden_size, dtype=dtype, device=comm.device), format=fmt)
        self.sequence.warm_up(max_tokens, dtype)
        comm.synchronize()
        comm.calls.clear()
        comm.sent.clear()

    def report(self) -> dict[str, Any]:
        """Return the group's all-reduces so far; see `vllm.Report`."""
        comm = self.planned.comm
        return {
            "rank": comm.rank,
            "world_size": comm.world_size,
            "format": str(self.planned.plan.format),
            "low_bit": {name: {"calls": n, "sent_bytes": comm.sent[name]} for name, n in comm.calls.items()},
            "own": dict(self.own_calls),
        }


def admitted(device_comm: Any, describe: Callable[[], str]) -> Any:
    """Meet the other workers of a new group. Return the VllmConfig; None if vLLM keeps its own collectives. Collective.

    Args:
        device_comm: The device communicator of the group.
        describe: Returns the settings that must be equal on all workers, as text. It may raise FlashcommError.

    Raises:
        FlashcommError: On all workers that called this, if one did not, or has other settings.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    reason = why_not(config)
    if not reason and name_of(device_comm.cpu_group) is None:
        reason = "the group is not one of torch.distributed's"
    if reason:
        keep_own(device_comm, reason)
        return None

    def check_worker() -> str:
        digest, front_end = Plan.of(format_setting()).digest, config.additional_config.get("flashcomm")
        if front_end != digest:
            raise SettingsError(
                f"this worker's FLASHCOMM_FORMAT={format_setting()!r} differs from that of vLLM's front end, which has "
                f"{'another one' if front_end else 'none, or no flashcomm'}: set and install it for both"
            )
        return f", plan {digest}{describe()}" + (", batch-invariant" if batch_invariant() else "")

    advice = "all workers need the package, FLASHCOMM_* settings and the same VLLM_* variables, on every machine"
    rank = device_comm.ranks[device_comm.rank_in_group]
    rendezvous(default_store(), device_comm.unique_name, rank, device_comm.ranks, check_worker, advice)
    return config


def keep_own(device_comm: Any, reason: str) -> None:
    """Log, on one rank, why a group keeps vLLM's own collectives."""
    if device_comm.rank_in_group == 0:
        log.warning("vLLM's own collectives are used in group %s: %s", device_comm.unique_name, reason)


def settings_for(config: Any, hidden_size: int, n_batches: int = 1) -> dict[str, Any]:
    """Return settings of the Communicator of a group whose messages are at most n_batches of the largest batch."""
    settings: dict[str, Any] = {}
    if "FLASHCOMM_TIMEOUT_S" not in os.environ:
        settings["timeout_s"] = TIMEOUT_S
    if "FLASHCOMM_WORKSPACE_BYTES" not in os.environ:
        least, most = WORKSPACE_BYTES
        needed = 2 * 2 * config.scheduler_config.max_num_batched_tokens * hidden_size  # 2 bytes, 2 epochs
        settings["workspace_bytes"] = max(least, min(most, n_batches * needed))
    return settings


def _create(device_comm: Any) -> TensorParallelAllReduce | None:
    """Create the all-reduce of a new device communicator; None if vLLM keeps its own. Collective over the group.

    Raises:
        FlashcommError: On all workers that called this, if one did not, or has other settings.
    """
    if device_comm.unique_name.split(":")[0] != "tp" or device_comm.world_size == 1:
        return None
    config = admitted(device_comm, lambda: "")
    if config is None:
        return None
    plan = Plan.of(format_setting())
    if reason := why_not(config, plan):  # only now, when the plan is known to be equal on all ranks
        keep_own(device_comm, reason)
        return None
    hidden_size, max_tokens = config.model_config.get_hidden_size(), config.scheduler_config.max_num_batched_tokens
    settings = settings_for(config, hidden_size) | {"plan": plan.digest if plan.layers or plan.decode else ""}
    if batch_invariant():
        settings |= fixed_route(device_comm.world_size)
        if plan.decode is not None and device_comm.rank_in_group == 0:
            log.warning("batch-invariant mode is on: the plan's decode format is ignored")
        plan = replace(plan, decode=None)

    def check_layers(layers: list[str]) -> None:
        if plan.layers and not layers:
            raise PlanError(
                "the plan has formats by layer, but no layer of vLLM uses them: add flashcomm to VLLM_PLUGINS"
            )
        if config.parallel_config.pipeline_parallel_size == 1:  # else this rank has only some of the layers
            plan.check(layers, config.model_config.hf_text_config)

    planned = PlannedAllReduce(
        Communicator(device_comm.device_group, plan.format, device=device_comm.device.type, **settings), plan
    )
    name, own = device_comm.unique_name, device_comm.own_all_reduce
    all_reduce = TensorParallelAllReduce(
        name, planned, hidden_size, own, check_layers, config=config, batch_invariant=batch_invariant()
    )
    all_reduce.warm_up(max_tokens, config.model_config.dtype)
    return all_reduce
