"""Simulated tensor parallelism of any degree in one process, to measure the effect of a wire format on a model.

    with TensorParallel(model, world_size=8, plan="int4-had") as ranks:  # any transformers causal LM with a tp_plan
        logits = model(ids).logits  # as 8 ranks would compute them
        print(ranks.bits_per_value)

Row-parallel weights are split along their input and column-parallel weights along their output, according to the
model's own tensor-parallel plan. If there are more ranks than KV heads, several ranks compute the same head, as in
vLLM. Each partial sum is encoded by the real codec, in the order of the real collective. If matrix products use the
same kernels, results have the same bits as with real ranks. All-reduces by the backend are an exception: here they are
summed in rank order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashcomm import reference
from flashcomm.codecs import codec_for
from flashcomm.errors import InputError
from flashcomm.plan import Plan
from flashcomm.routing import policy
from flashcomm.routing.route import Message, Route
from flashcomm.wire.format import UNCOMPRESSED, WireFormat

ROWWISE = ("rowwise", "rowwise_rep", "rowwise_split_input")
COLWISE = ("colwise", "colwise_rep", "colwise_gather_output")

Observer = Callable[[str, list[Tensor], Tensor], None]
Progress = Callable[[str, int, int], None]  # what is running, steps done, all steps


def no_progress(what: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def parallel_layers(model: Any, styles: tuple[str, ...]) -> dict[str, torch.nn.Linear]:
    """Return the Linear layers, by module name, that have one of these styles in the model's tensor-parallel plan."""
    plan = getattr(model, "tp_plan", None) or {}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) in styles:
            found[name] = module
    return found


def row_parallel_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Return the layers that end in an all-reduce. Raises InputError if there are none."""
    found = parallel_layers(model, ROWWISE)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no row-parallel Linear layers in its tensor-parallel plan "
            "(model.tp_plan): nothing to simulate"
        )
    return found


class TensorParallel:
    """A context manager inside which `model` computes as `world_size` ranks would.

    Args:
        model: A transformers model with a tensor-parallel plan.
        world_size: Ranks to simulate.
        plan: A Plan, a format or the path of a `.json` file. The property may be set at any time.
        algorithm: As in `flashcomm.settings`.
        local_world_size: Ranks per node; 0: all ranks are one node.
        min_bytes: As in `flashcomm.settings`. By default every message is quantized.
        observer: Called after each all-reduce with the layer's name, the ranks' partial sums and the result.

    Raises:
        InputError: The inputs of a layer are not divisible by world_size.
        PlanError: The plan does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        world_size: int,
        plan: Plan | WireFormat | str = UNCOMPRESSED,
        *,
        algorithm: str = "auto",
        local_world_size: int = 0,
        min_bytes: int = 0,
        observer: Observer | None = None,
    ) -> None:
        self.model, self.world_size, self.local_world_size = model, world_size, local_world_size
        self.algorithm, self.min_bytes, self.observer = algorithm, min_bytes, observer
        if world_size < 1:
            raise InputError(f"world_size={world_size}: give at least 1 rank")
        if world_size % (local_world_size or 1) or (algorithm == "hierarchical" and not local_world_size):
            raise InputError(
                f"local_world_size={local_world_size}: {world_size} ranks cannot be divided into nodes of that size"
            )
        self.layers = row_parallel_layers(model)
        self._before: dict[torch.nn.Module, Any] = {}
        indivisible = [f"{name} ({m.in_features})" for name, m in self.layers.items() if m.in_features % world_size]
        if indivisible:
            raise InputError(f"{world_size} ranks cannot share the inputs of {', '.join(indivisible[:3])}")
        self.plan = plan
        self._columns = parallel_layers(model, COLWISE)
        self._sent = self._values = 0.0

    @property
    def plan(self) -> Plan:
        return self._plan

    @plan.setter
    def plan(self, given: Plan | WireFormat | str) -> None:
        self._plan = Plan.of(given)
        self._plan.check(list(self.layers), getattr(self.model, "config", None))
        self._sent = self._values = 0.0

    @property
    def bits_per_value(self) -> float:
        """Bits per value on the wire, with scales, since the plan was set. A ring of bf16 has 16."""
        return self._sent * 8 / self._values if self._values else 0.0

    def __enter__(self) -> TensorParallel:
        modules = (*self.layers.values(), *self._columns.values())
        self._before = {module: vars(module).get("forward") for module in modules}
        for name, module in self.layers.items():
            vars(module)["forward"] = self._row_parallel(name, module)
        for name, module in self._columns.items():
            shards = self._shards(name)
            if module.out_features % shards == 0:
                vars(module)["forward"] = self._column_parallel(module, shards)
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        for module, forward in self._before.items():
            vars(module).pop("forward", None)
            if forward is not None:  # set by another wrapper
                vars(module)["forward"] = forward

    def _row_parallel(self, name: str, module: torch.nn.Linear) -> Callable[[Tensor], Tensor]:
        shards = [w.contiguous() for w in module.weight.detach().chunk(self.world_size, 1)]

        def forward(x: Tensor) -> Tensor:
            pieces = x.chunk(self.world_size, -1)
            partials = [linear(piece.contiguous(), shard) for piece, shard in zip(pieces, shards, strict=True)]
            total = self._all_reduce(name, partials)
            if self.observer:
                self.observer(name, partials, total)
            return total if module.bias is None else total + module.bias

        return forward

    def _column_parallel(self, module: torch.nn.Linear, shards: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weights = module.weight.chunk(shards)
            biases = [None] * shards if module.bias is None else module.bias.chunk(shards)
            return torch.cat([linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)

        return forward

    def _shards(self, name: str) -> int:
        """The different parts of a column-parallel layer. Ranks that share a KV head all compute the whole head."""
        kv_heads = getattr(getattr(self.model, "config", None), "num_key_value_heads", None) or self.world_size
        return min(kv_heads, self.world_size) if name.endswith((".k_proj", ".v_proj")) else self.world_size

    def _all_reduce(self, name: str, partials: list[Tensor]) -> Tensor:
        fmt = self._plan.format_of(name, partials[0])
        if not self._route(partials[0], fmt).low_bit:
            return self.reduce(partials, fmt)
        total = self.reduce([self._plan.before_reduce(name, p, self.world_size) for p in partials], fmt)
        return self._plan.after_reduce(name, total, self.world_size, partials[0].dtype)

    def _route(self, x: Tensor, fmt: WireFormat) -> Route:
        return policy.choose(self._message(x, x.element_size()), fmt, self.algorithm, self.min_bytes).route

    def _message(self, x: Tensor, itemsize: int) -> Message:
        row = x.shape[-1] if x.dim() else 1
        return Message(x.numel(), row, itemsize, self.world_size, "cpu", self.local_world_size)

    def reduce(self, tensors: list[Tensor], fmt: WireFormat) -> Tensor:
        """Sum the ranks' tensors by the route that a Communicator with these settings would take."""
        x = tensors[0]
        route = self._route(x, fmt)
        if route.algorithm != "copy":
            self._sent += policy.wire_bytes(route.algorithm, self._message(x, 2), fmt)  # as for bf16
            self._values += 2 * (self.world_size - 1) / self.world_size * x.numel()
        if route.algorithm in ("copy", "backend"):
            total = x.float()
            for tensor in tensors[1:]:
                total = total + tensor.float()
            return total.to(x.dtype)
        return reference.all_reduce(route.algorithm, tensors, fmt, self.local_world_size, codec_for(x.device.type))
