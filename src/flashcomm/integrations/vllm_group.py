"""What a tensor-parallel group of vLLM gains (`vllm.py` puts it there): all-reduces of hidden states, low-bit.

`FlashGroup` stands before vLLM's own device communicator. As one of the group "tp" is made, all its ranks meet, make a
`Communicator` and run every kind of call once, before vLLM measures how much memory is left. Of the sums that come then

    hidden states    (tokens, hidden size) in bf16 or fp16, where coding pays (`Communicator.explain`): coded
    all else         embeddings of other widths, single values, small messages: vLLM's own all-reduce, untouched

Both are counted. Every decision depends on shapes and settings alone, which are equal on all ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store, _world

import flashcomm
from flashcomm import ops
from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError, PlanError, SettingsError
from flashcomm.integrations.rendezvous import roll_call
from flashcomm.plan import Plan, is_decode
from flashcomm.routing.route import Route
from flashcomm.settings import Settings
from flashcomm.wire.format import WireFormat

HALVES = (torch.bfloat16, torch.float16)
WORKSPACE_BYTES = (4 << 20, 256 << 20)  # at least, at most; between them what the largest batch needs
CALL_S = 600.0  # that ranks may be apart, for instance while one compiles the model; FLASHCOMM_TIMEOUT_S says otherwise
log = logging.getLogger("flashcomm")


def asked() -> str:
    """FLASHCOMM_FORMAT, the one setting that switches all of this on; "" where it is not set."""
    return os.environ.get("FLASHCOMM_FORMAT", "").strip()


def why_not(config: Any) -> str:
    """Why vLLM keeps its own all-reduce under this VllmConfig; "" if it does not. Equal on all ranks."""
    from vllm import envs

    if config is None or config.model_config is None:
        return "there is no model config"
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return "batch-invariant mode is on, and the way of a message depends on its size"
    if getattr(config.parallel_config, "use_ubatching", False):
        return "two batches overlap (DBO), and a Communicator is for one stream"
    if config.model_config.dtype not in HALVES:
        return f"the model runs in {config.model_config.dtype}; bfloat16 and float16 are coded"
    return ""


def prepare(config: Any) -> None:
    """In the process that makes the VllmConfig: refuse wrong settings, name ours in it, leave the sums to us.

    Raises FormatError, PlanError or SettingsError.
    """
    plan = Plan.of(asked())
    Settings.resolve("cpu", format=str(plan.format))
    if not isinstance(config.additional_config, dict):
        raise SettingsError(f"additional_config must be a dict to go with flashcomm, not {config.additional_config!r}")
    config.additional_config["flashcomm"] = plan.digest  # vLLM's cache of compiled graphs depends on it, too
    fusions = getattr(config.compilation_config, "pass_config", None)
    if uncompressed(plan) or why_not(config) or fusions is None:
        return
    if fusions.fuse_allreduce_rms is None:
        fusions.fuse_allreduce_rms = False
    elif fusions.fuse_allreduce_rms:
        log.warning("fuse_allreduce_rms was asked for: messages that FlashInfer fuses with RMSNorm are not coded")


def uncompressed(plan: Plan) -> bool:
    """Whether nothing is compressed under this plan."""
    parts = [plan.format, *([plan.decode] if plan.decode else []), *(part.format for part in plan.layers.values())]
    return all(fmt.uncompressed for fmt in parts)


class FlashGroup:
    """Stands before a subclass of vLLM's DeviceCommunicatorBase; `flash` is None where that keeps all its sums."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flash = _join(self)

    def all_reduce(self, input_: Tensor) -> Tensor:
        """Called behind `torch.ops.vllm.all_reduce`: a new tensor, the input as it was."""
        return self.own_all_reduce(input_) if self.flash is None else self.flash(input_)

    def own_all_reduce(self, x: Tensor) -> Tensor:
        """vLLM's; that for CPUs sums in place."""
        total: Tensor = super().all_reduce(x.clone() if x.device.type == "cpu" else x)  # type: ignore[misc]
        return total

    def destroy(self) -> None:
        if self.flash is not None:
            self.flash.comm.close()
        super().destroy()  # type: ignore[misc]


class Reducer:
    """The sums of one group: which of them are ours, and what became of them.

    name: vLLM's, of the group: the same in every run, as graphs that name it are cached. hidden: values in a row of
    hidden states. own: vLLM's all-reduce. check: called once with the names of the layers that serve, when the model
    is there; it raises PlanError if the plan is not for them.
    """

    def __init__(
        self,
        name: str,
        comm: Communicator,
        plan: Plan,
        hidden: int,
        own: Callable[[Tensor], Tensor],
        check: Callable[[list[str]], None],
    ) -> None:
        self.name, self.comm, self.plan, self.hidden, self.own = name, comm, plan, hidden, own
        self.layers: list[str] = []
        self.ways: dict[str, list[int]] = {}  # calls, bytes of messages, bytes that this rank sent
        self._check: Callable[[list[str]], None] | None = check
        self._routes: dict[Any, Route] = {}

    def __call__(self, x: Tensor, layer: str = "") -> Tensor:
        """The sum of x over the group, a new tensor; layer: of which row-parallel layer, where that is known."""
        if self._check is not None:
            self._check(self.layers)
            self._check = None
        if x.dim() != 2 or x.shape[-1] != self.hidden or x.dtype not in HALVES:
            self._count("vllm, no hidden states", x, 0)
            return self.own(x)
        fmt = self._format(x, layer)
        route = self._route(x.shape[0], x.dtype, fmt)
        if not route.low_bit:
            self._count("vllm, not worth coding", x, 0)
            return self.own(x)
        self._count(f"{route.format} {route.algorithm}", x, route.wire_bytes)
        if not layer:
            return self.comm.all_reduce(x, format=fmt)
        total = self.comm.all_reduce(self.plan.before_reduce(layer, x, self.comm.world_size), format=fmt)
        return self.plan.after_reduce(layer, total, self.comm.world_size, x.dtype)

    def serve(self, layer: str) -> str:
        """The name under which `torch.ops.flashcomm.all_reduce` sums what this layer gives."""
        name = f"vllm/{self.name}/{layer}"
        ops.override(name, lambda x: self(x, layer))
        self.layers.append(layer)
        return name

    def warm_up(self, max_tokens: int, dtype: torch.dtype) -> None:
        """Run every kind of call that batches of up to max_tokens can bring, so that none is compiled later."""
        formats = {str(fmt): fmt for fmt in (self.plan.format, *(p.format for p in self.plan.layers.values()))}
        sizes = sorted({min(1 << i, max_tokens) for i in range(max_tokens.bit_length() + 1)})
        plans = [(n, fmt) for fmt in formats.values() for n in sizes]
        plans += [(1, self.plan.decode)] if self.plan.decode is not None else []
        done = set()
        for n, fmt in plans:
            route = self._route(n, dtype, fmt)
            if route.low_bit and (route.algorithm, str(fmt)) not in done:
                done.add((route.algorithm, str(fmt)))
                self.comm.all_reduce(torch.zeros(n, self.hidden, dtype=dtype, device=self.comm.device), format=fmt)
        self.comm.synchronize()

    def report(self) -> dict[str, Any]:
        """Counts by way: calls, bytes of messages, bytes this rank sent for them (not known of vLLM's own)."""
        ways = {
            way: dict(zip(("calls", "message_bytes", "sent_bytes"), n, strict=True)) for way, n in self.ways.items()
        }
        return {"rank": self.comm.rank, "world": self.comm.world_size, "format": str(self.plan.format), "ways": ways}

    def _format(self, x: Tensor, layer: str) -> WireFormat:
        if layer:
            return self.plan.format_of(layer, x)
        return self.plan.decode if self.plan.decode is not None and is_decode(x) else self.plan.format

    def _route(self, tokens: int, dtype: torch.dtype, fmt: WireFormat) -> Route:
        key = (tokens, dtype, fmt)
        if key not in self._routes:
            self._routes[key] = self.comm.explain((tokens, self.hidden), dtype, fmt).route
        return self._routes[key]

    def _count(self, way: str, x: Tensor, sent: int) -> None:
        counts = self.ways.setdefault(way, [0, 0, 0])
        for i, more in enumerate((1, x.numel() * x.element_size(), sent)):
            counts[i] += more
        if self.comm.settings.debug == "info":
            who, n = f"vLLM, rank {self.comm.rank}", sum(n for n, _, _ in self.ways.values())
            if counts[0] == 1:
                log.warning("%s: first sum that goes %s: %s %s", who, way, tuple(x.shape), x.dtype)
            if n >= 100 and str(n).strip("0") == "1":
                log.warning("%s, after %d sums: %s", who, n, self.report()["ways"])


def _join(made: Any) -> Reducer | None:
    """The Reducer of a device communicator just made, or None where vLLM keeps its sums. Collective over the group.

    Raises FlashcommError, on all ranks that came, if one did not come or has other settings.
    """
    from vllm.config import get_current_vllm_config_or_none

    if made.unique_name.split(":")[0] != "tp" or made.world_size == 1:
        return None
    config = get_current_vllm_config_or_none()
    reason = why_not(config)
    if not reason and made.cpu_group not in _world.pg_map:
        reason = "the group is not one of torch.distributed's"
    if reason:
        if made.rank_in_group == 0:
            log.warning("vLLM's own all-reduce is used: %s", reason)
        return None
    plan = _own_part(made, config)
    hidden, tokens = config.model_config.get_hidden_size(), config.scheduler_config.max_num_batched_tokens
    given: dict[str, Any] = {"plan": plan.digest if plan.layers or plan.decode else ""}
    if "FLASHCOMM_TIMEOUT_S" not in os.environ:
        given["timeout_s"] = CALL_S
    if "FLASHCOMM_WORKSPACE_BYTES" not in os.environ:
        least, most = WORKSPACE_BYTES
        given["workspace_bytes"] = max(least, min(most, 2 * 2 * tokens * hidden))  # of two bytes, for every other call

    def check(layers: list[str]) -> None:
        if plan.layers and not layers:
            raise PlanError("the plan has formats by layer and no layer asks for them: does VLLM_PLUGINS leave us out?")
        if config.parallel_config.pipeline_parallel_size == 1:  # else this rank sees a part of them
            plan.check(layers, config.model_config.hf_text_config)

    comm = Communicator(made.device_group, plan.format, device=made.device.type, **given)
    flash = Reducer(made.unique_name, comm, plan, hidden, made.own_all_reduce, check)
    flash.warm_up(tokens, config.model_config.dtype)
    return flash


def _own_part(made: Any, config: Any) -> Plan:
    """This worker's plan, once every worker of the group is known to have the same. Raises UnavailableError on all."""
    plan, timeout_s, problem, settings = None, 60.0, "", ""
    try:
        timeout_s = Settings.resolve("cpu", format="bf16").timeout_s
        plan = Plan.of(asked())
        front = config.additional_config.get("flashcomm")
        if front != plan.digest:
            raise SettingsError(
                f"this worker's FLASHCOMM_FORMAT={asked()!r} is not what vLLM's front end has "
                f"({'another one' if front else 'none, or no flashcomm'}): set and install it for both"
            )
        settings = f"flashcomm {flashcomm.__version__}, plan {plan.digest}"
    except FlashcommError as why:
        problem = str(why)
    advice = "all workers need the package, FLASHCOMM_FORMAT and the same VLLM_* variables, on every machine"
    me, store = made.ranks[made.rank_in_group], _get_default_store()
    roll_call(store, made.unique_name, me, made.ranks, timeout_s, advice, problem, settings)
    assert plan is not None
    return plan
