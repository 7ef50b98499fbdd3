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
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from flashcomm.communicator import Communicator
from flashcomm.errors import UnavailableError
from flashcomm.integrations.interleave import current as running
from flashcomm.integrations.transformers_overlap import overlap as overlap  # a part of this seam
from flashcomm.plan import Plan
from flashcomm.routing import policy
from flashcomm.routing import route as routing
from flashcomm.settings import Settings
from flashcomm.wire.format import UNCOMPRESSED, WireFormat

try:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel
except ImportError as why:
    raise UnavailableError(
        f"flashcomm.integrations.transformers needs transformers 5.17 or later ({why}): "
        "pip install 'flashcomm[transformers]', or use backend='flashcomm' (flashcomm.integrations.process_group)"
    ) from why

STYLES = ("rowwise", "rowwise_rep", "rowwise_split_input")
SEAM = ("transform_output_post_forward", "validate_param")  # methods of RowwiseParallel that FlashRowwise overrides


@dataclass(frozen=True)
class Message:
    """What a row-parallel layer gave to be summed; whole: the values of the message that it is some rows of."""

    layer: str
    shape: torch.Size
    dtype: torch.dtype
    group: Any
    whole: int


class Reducer:
    """The all-reduce of all styles in force: settings, and a Communicator per group and settings, made at first use.

    mode: "coded"; "native": transformers' own all-reduce; "none": partial sums are left as they are; "one": so, too,
    but ranks keep step by summing one value.
    """

    def __init__(self) -> None:
        self.mode = "coded"
        self.plan: Plan | None = None
        self.by_layer = False  # whether the plan has layers of its own
        self.communicators: dict[tuple[Any, str], Communicator] = {}
        self.seen: list[Message] | None = None  # where somebody wants to know
        self.use({"format": None}, None)

    def use(self, settings: dict[str, Any], plan: Plan | None) -> None:
        self.settings, self.plan = settings, plan
        self.by_layer = plan is not None and bool(plan.layers or plan.decode)
        self._in_force: dict[Any, Communicator] = {}

    def __call__(self, partial: Tensor, mesh: Any, layer: str) -> Tensor:
        """Sum the partial results of the layer of that name over the mesh's tensor-parallel group."""
        group = _group(mesh)
        if torch.compiler.is_compiling():
            if self.mode != "coded":
                return partial
            named = layer if self.by_layer else ""  # a name would make every layer a graph of its own
            return torch.ops.flashcomm.rowwise_sum(partial, group.group_name, named)  # type: ignore[no-any-return]
        halves = running()
        if halves is None:
            return self.sum(partial, group, layer)
        if self.mode == "none":
            return partial
        whole = halves.whole(partial.numel())
        return halves.sum(lambda: self.sum(partial, group, layer, whole))

    def sum(self, partial: Tensor, group: Any, layer: str, whole: int | None = None) -> Tensor:
        """Sum over a group's ranks; whole: see `Communicator.all_reduce`."""
        if self.mode != "coded":
            if self.mode != "none":
                dist.all_reduce(partial.new_zeros(1) if self.mode == "one" else partial, group=group)
            return partial
        comm = self.communicator(group)
        if self.plan is None or not self.by_layer:
            return comm.all_reduce(partial, whole=whole)
        fmt = self.plan.format_of(layer, partial)
        shape = partial.shape if whole is None else (whole // partial.shape[-1], partial.shape[-1])
        if not comm.explain(shape, partial.dtype, fmt).route.low_bit:
            return comm.all_reduce(partial, format=fmt, whole=whole)
        total = comm.all_reduce(self.plan.before_reduce(layer, partial, comm.world_size), format=fmt, whole=whole)
        return self.plan.after_reduce(layer, total, comm.world_size, partial.dtype)

    def note(self, partial: Tensor, mesh: Any, layer: str) -> None:
        """Remember a message, if somebody wants to know."""
        if self.seen is not None:
            halves = running()
            whole = halves.whole(partial.numel()) if halves else partial.numel()
            self.seen.append(Message(layer, partial.shape, partial.dtype, _group(mesh), whole))

    def wire_bytes(self, message: Message) -> int:
        """Payload bytes that a rank sends for a message under the settings in force."""
        group, shape = message.group, message.shape
        like = torch.empty(shape, dtype=message.dtype, device="meta")
        call = routing.Message(like.numel(), shape[-1], like.element_size(), group.size(), "cpu")
        if self.mode == "native":
            return policy.wire_bytes("backend", call, WireFormat.parse(UNCOMPRESSED))
        comm = self.communicator(group)
        fmt = self.plan.format_of(message.layer, like) if self.plan else comm.format
        route = comm.explain((message.whole // shape[-1], shape[-1]), message.dtype, fmt).route
        copied, call = route.algorithm == "copy", replace(call, local_world_size=comm.machine.local_world_size)
        return 0 if copied else policy.wire_bytes(route.algorithm, call, route.format)

    def communicator(self, group: Any) -> Communicator:
        """The group's Communicator of the settings in force; making one is collective."""
        if group not in self._in_force:
            key = (group, repr(sorted(self.settings.items())))
            if key not in self.communicators:
                self.communicators[key] = Communicator(group, **self.settings)
            self._in_force[group] = self.communicators[key]
        return self._in_force[group]


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
        if inference and not torch.compiler.is_compiling():
            self.reducer.note(output, mesh, getattr(module, "_flashcomm_layer", ""))
        own = self.reducer.mode == "native" and (torch.compiler.is_compiling() or running() is None)
        if own or not inference or not self.output_layouts.is_replicate():
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
    named = {"plan": plan.digest} if plan is not None and (plan.layers or plan.decode) else {}
    reducer.use({"format": text, **settings, **named}, plan)
    for name in STYLES:
        if not isinstance(ALL_PARALLEL_STYLES[name], FlashRowwise):
            ALL_PARALLEL_STYLES[name] = FlashRowwise(ALL_PARALLEL_STYLES[name], reducer)


def disable() -> None:
    """Give models loaded from now on transformers' own all-reduce again."""
    for name in STYLES:
        if isinstance(ALL_PARALLEL_STYLES[name], FlashRowwise):
            del ALL_PARALLEL_STYLES[name]


@contextmanager
def without_all_reduce(active: bool = True, *, in_step: bool = True) -> Iterator[None]:
    """No all-reduces inside a with block: wrong results, but the time of all else.

    in_step: ranks sum one element in place of each, and so stay in step as they do with the real sums.
    """
    with _mode(("one" if in_step else "none") if active else "coded"):
        yield


@contextmanager
def native_all_reduce(active: bool = True) -> Iterator[None]:
    """Inside a with block what is had without flashcomm: transformers' own all-reduce."""
    with _mode("native" if active else "coded"):
        yield


@contextmanager
def _mode(mode: str) -> Iterator[None]:
    reducer = _reducer()
    if reducer is None:
        raise UnavailableError("call flashcomm.integrations.transformers.enable() first")
    before, reducer.mode = reducer.mode, mode
    try:
        yield
    finally:
        reducer.mode = before


@contextmanager
def messages() -> Iterator[list[Message]]:
    """A list that fills with the messages of the forward passes inside a with block; `wire_bytes` prices them."""
    reducer = _reducer()
    if reducer is None:
        raise UnavailableError("call flashcomm.integrations.transformers.enable() first")
    reducer.seen = []
    try:
        yield reducer.seen
    finally:
        reducer.seen = None


def wire_bytes(message: Message) -> int:
    """Payload bytes that this rank sends for the message with the settings in force."""
    reducer = _reducer()
    assert reducer is not None
    return reducer.wire_bytes(message)


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


def _group(mesh: Any) -> Any:
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def _reducer() -> Reducer | None:
    style = ALL_PARALLEL_STYLES[STYLES[0]]
    return style.reducer if isinstance(style, FlashRowwise) else None


_library = torch.library.Library("flashcomm", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rowwise_sum(Tensor partial, str group, str layer) -> Tensor")  # type: ignore[no-untyped-call]


def _rowwise_sum(partial: Tensor, group: str, layer: str) -> Tensor:
    """What compiled models call: one graph serves all formats, because what is in force is looked up as it runs."""
    reducer = _reducer()
    if reducer is None:
        raise UnavailableError(
            "a model compiled under flashcomm runs after disable(): call enable(), or compile it anew"
        )
    return reducer.sum(partial, _resolve_process_group(group), layer)  # type: ignore[arg-type]


_library.impl("rowwise_sum", _rowwise_sum, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("flashcomm::rowwise_sum", lib=_library)  # type: ignore[untyped-decorator]
def _fake(partial: Tensor, group: str, layer: str) -> Tensor:
    return torch.empty_like(partial, memory_format=torch.contiguous_format)
