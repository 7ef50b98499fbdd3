"""Low-bit all-reduce in Hugging Face transformers (>= 5.17) tensor parallelism, with one line of user code:

    flashcomm.integrations.transformers.enable("int4")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))

`enable` replaces the "rowwise" styles of the tensor-parallel plan by a subclass whose one difference is the all-reduce
after a row-parallel Linear (two a layer in a Llama). In place of a format it takes a plan (`flashcomm.plan`): formats
by layer, and one for decoding. It changes models loaded afterwards, in this process, until `disable`; training,
embeddings and mixture-of-experts sums keep transformers' own path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.communicator import Communicator
from flashcomm.errors import UnavailableError
from flashcomm.plan import Plan
from flashcomm.settings import Settings
from flashcomm.wire.format import WireFormat

try:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel
except ImportError as why:
    raise UnavailableError(
        f"flashcomm.integrations.transformers needs transformers 5.17 or later ({why}): "
        "pip install 'flashcomm[transformers]', or use backend='flashcomm' (flashcomm.integrations.process_group)"
    ) from why

STYLES = ("rowwise", "rowwise_rep", "rowwise_split_input")
SEAM = ("transform_output_post_forward", "validate_param")  # methods of RowwiseParallel that FlashRowwise overrides


class Reducer:
    """The all-reduce of all styles in force: settings, and a Communicator per group and settings, made at first use."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.plan: Plan | None = None
        self.skip = False
        self.communicators: dict[tuple[Any, str], Communicator] = {}

    def __call__(self, partial: Tensor, mesh: Any, layer: str) -> Tensor:
        """Sum the partial results of the layer of that name over the mesh's tensor-parallel group."""
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        if self.skip:
            dist.all_reduce(partial.new_zeros(1), group=group)
            return partial
        key = (group, repr(sorted(self.settings.items())))
        if key not in self.communicators:
            self.communicators[key] = Communicator(group, **self.settings)
        comm = self.communicators[key]
        if self.plan is None:
            return comm.all_reduce(partial)
        fmt = self.plan.format_of(layer, partial)
        if not comm.explain(partial.shape, partial.dtype, fmt).route.coded:
            return comm.all_reduce(partial, format=fmt)
        total = comm.all_reduce(self.plan.send(layer, partial, comm.world), format=fmt)
        return self.plan.receive(layer, total, comm.world, partial.dtype)


class FlashRowwise(RowwiseParallel):  # type: ignore[misc]  # transformers ships no types
    """A row-parallel Linear that ends in a low-bit all-reduce; the bias, if any, is added after it, exactly."""

    def __init__(self, base: Any, reducer: Reducer) -> None:
        super().__init__(
            input_layouts=base.input_layouts, output_layouts=base.output_layouts, use_local_output=base.use_local_output
        )
        self.reducer = reducer

    def validate_param(self, module: Any, param: Any, mesh: Any, parameter_name: str | None = None) -> None:
        """Called by transformers as it shards the model: the one place where it tells a layer's name."""
        super().validate_param(module, param, mesh, parameter_name=parameter_name)
        module._flashcomm_layer = (parameter_name or "").rpartition(".")[0]

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        """Called by transformers with the partial sums of this rank."""
        inference = isinstance(module, torch.nn.Linear) and type(output) is Tensor and not output.requires_grad
        if not inference or not self.output_layouts.is_replicate():
            return super().transform_output_post_forward(module, output, mesh)
        summed = self.reducer(output, mesh, getattr(module, "_flashcomm_layer", ""))
        bias = module._parameters.get("bias")
        return summed if bias is None else summed + getattr(bias, "to_local", lambda: bias)()


def enable(format: str | WireFormat | Plan | None = None, **settings: Any) -> None:
    """Use low-bit all-reduce in models loaded from now on; arguments as for `flashcomm.Communicator`.

    format may be a plan, or the `.json` file of one; so may FLASHCOMM_FORMAT. Call it on every rank, with the same
    arguments, before `from_pretrained`. Called again it changes the settings, also of the models loaded since the first
    call. Raises FormatError, PlanError and SettingsError at once, UnavailableError where transformers does not fit.
    """
    given = os.environ.get("FLASHCOMM_FORMAT") if format is None else format
    plan = Plan.of(given) if given is not None and not isinstance(given, WireFormat) else None
    text = format if plan is None else str(plan.format)
    Settings.resolve("cpu", format=text, **settings)
    gone = [name for name in SEAM if not hasattr(RowwiseParallel, name)]
    gone += [f"style {name!r}" for name in STYLES if name not in ALL_PARALLEL_STYLES]
    if gone:
        raise UnavailableError(
            f"transformers {version('transformers')} has no {', '.join(gone)} in its tensor parallelism, where "
            "flashcomm hooks in: use another version (5.17 on), or backend='flashcomm' "
            "(flashcomm.integrations.process_group)"
        )
    reducer = _reducer() or Reducer()
    reducer.plan, reducer.settings = plan, {"format": text, **settings}
    if plan is not None and (plan.layers or plan.decode):
        reducer.settings["plan"] = plan.digest
    for name in STYLES:
        if not isinstance(ALL_PARALLEL_STYLES[name], FlashRowwise):
            ALL_PARALLEL_STYLES[name] = FlashRowwise(ALL_PARALLEL_STYLES[name], reducer)


def disable() -> None:
    """Give models loaded from now on transformers' own all-reduce again."""
    for name in STYLES:
        if isinstance(ALL_PARALLEL_STYLES[name], FlashRowwise):
            del ALL_PARALLEL_STYLES[name]


@contextmanager
def without_all_reduce(active: bool = True) -> Iterator[None]:
    """Sum one element in place of each all-reduce inside a with block: wrong results, but the time of all else.

    The ranks stay in step, as they are with the real sums.
    """
    reducer = _reducer()
    if reducer is None:
        raise UnavailableError("without_all_reduce: call enable() first")
    reducer.skip = active
    try:
        yield
    finally:
        reducer.skip = False


def communicators() -> list[Communicator]:
    """The Communicators made so far: their `calls` and `transport.n_bytes_sent` tell what went which way."""
    reducer = _reducer()
    return list(reducer.communicators.values()) if reducer else []


def check_plan(model: Any) -> None:
    """Raise PlanError unless the plan in force, if any, is for this (sharded) model; useful right after loading it."""
    reducer = _reducer()
    if reducer is not None and reducer.plan is not None:
        names = [m._flashcomm_layer for m in model.modules() if getattr(m, "_flashcomm_layer", "")]
        if names:  # none in a world of one
            reducer.plan.check(names, model.config)


def _reducer() -> Reducer | None:
    style = ALL_PARALLEL_STYLES[STYLES[0]]
    return style.reducer if isinstance(style, FlashRowwise) else None
