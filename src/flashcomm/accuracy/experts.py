"""Simulated expert parallelism of any degree in one process, to measure what a wire format costs a mixture of experts.

    with ExpertParallel(model, world_size=4, plan="int8/int6-had") as ranks:  # combine/dispatch
        logits = model(ids).logits  # as 4 ranks would compute them, each with a quarter of the experts

The experts of every layer get hidden states as a dispatch delivers them, in the format of the gather step. Routers see
the states before that. Each rank computes its own experts, and a combine adds the ranks' results, in the format of the
reduce step. Everything else in the model is exact: attention and shared experts are not divided.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from flashcomm import reference
from flashcomm.codecs import codec_for
from flashcomm.errors import InputError
from flashcomm.plan import Plan
from flashcomm.wire.format import UNCOMPRESSED, Layout, WireFormat


def expert_layers(model: Any) -> dict[str, Any]:
    """Return the modules, by name, that hold the experts of a layer. Raises InputError if there are none.

    They are called with (tokens, hidden) states, and for each token the indices and the weights of its experts.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name.endswith("experts") and isinstance(getattr(module, "num_experts", None), int)
    }
    if not found:
        raise InputError(f"{type(model).__name__} has no mixture of experts that can be simulated")
    return found


class ExpertParallel:
    """A context manager inside which the experts of `model` compute as `world_size` ranks would.

    Args:
        model: A transformers model whose layers have `experts` modules.
        world_size: Ranks to simulate. Each has as many consecutive experts.
        plan: A Plan, a format or the path of a `.json` file. Only its default format is used. The property may be set
            at any time.

    Raises:
        InputError: The model has no experts, or their number is not divisible by world_size.
    """

    def __init__(self, model: Any, world_size: int, plan: Plan | WireFormat | str = UNCOMPRESSED) -> None:
        self.model, self.world_size, self.layers = model, world_size, expert_layers(model)
        for name, module in self.layers.items():
            if world_size < 1 or module.num_experts % world_size:
                raise InputError(f"{world_size} ranks cannot share the {module.num_experts} experts of {name}")
        self.plan = plan
        self._before: dict[Any, Any] = {}

    @property
    def plan(self) -> Plan:
        return self._plan

    @plan.setter
    def plan(self, given: Plan | WireFormat | str) -> None:
        self._plan = Plan.of(given)
        self._sent = self._values = 0

    @property
    def bits_per_value(self) -> float:
        """Bits per value on the wire, with scales, of both exchanges since the plan was set."""
        return self._sent * 8 / self._values if self._values else 0.0

    def __enter__(self) -> ExpertParallel:
        self._before = {module: vars(module).get("forward") for module in self.layers.values()}
        for module in self.layers.values():
            vars(module)["forward"] = self._experts(module, module.forward)
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        for module, forward in self._before.items():
            vars(module).pop("forward", None)
            if forward is not None:  # set by another wrapper
                vars(module)["forward"] = forward

    def _experts(self, module: Any, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        n_local = module.num_experts // self.world_size

        def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            fmt, codec = self._plan.format, codec_for(x.device.type)
            if self.world_size == 1:
                return own(x, index, weights)
            for step in (fmt.reduce, fmt.gather):
                self._sent += Layout(step, x.shape[-1], 2).nbytes(0, x.numel())  # as for bf16
                self._values += x.numel()
            dispatched = reference.quantized_sum([x], fmt.gather, codec).to(x.dtype).view(x.shape)
            rank = index // n_local
            partials = [own(dispatched, index, torch.where(rank == r, weights, 0.0)) for r in range(self.world_size)]
            return reference.quantized_sum(partials, fmt.reduce, codec).to(x.dtype).view(x.shape)

        return forward
