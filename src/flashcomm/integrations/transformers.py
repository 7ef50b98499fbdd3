"""Low-bit all-reduce in the tensor parallelism of Hugging Face transformers (>= 5.17), with one line of user code.

    flashcomm.integrations.transformers.enable("int4")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))

`enable` replaces the "rowwise" styles of the tensor-parallel plan by a subclass that differs only in the all-reduce
after a row-parallel Linear. A Llama has two of these per layer. Instead of a format, `enable` accepts a plan
(`flashcomm.plan`) with a format for each layer. It applies to models that this process loads before `disable`.
Training, embeddings and mixtures of experts keep transformers' own all-reduce.
"""

from __future__ import annotations

import enum
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from flashcomm.communicator import Communicator
from flashcomm.compat import process_group_named
from flashcomm.errors import UnavailableError
from flashcomm.integrations import two_batch_overlap
from flashcomm.integrations.planned import PlannedAllReduce
from flashcomm.integrations.transformers_overlap import overlap as overlap  # public here
from flashcomm.integrations.transformers_overlap import tp_group
from flashcomm.plan import Plan
from flashcomm.settings import DEFAULT_FORMAT, Settings
from flashcomm.wire.format import WireFormat

try:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel
except ImportError as why:
    raise UnavailableError(
        f"flashcomm.integrations.transformers needs transformers 5.17 or later ({why}): "
        "pip install 'flashcomm[transformers]', or use backend='flashcomm' (flashcomm.integrations.process_group)"
    ) from why

STYLES = ("rowwise", "rowwise_rep", "rowwise_split_input")
METHODS = ("transform_output_post_forward", "validate_param")  # methods of RowwiseParallel that are overridden


class Mode(enum.Enum):
    """What replaces transformers' all-reduces. All modes but LOW_BIT are for measurements."""

    LOW_BIT = enum.auto()
    BACKEND = enum.auto()  # transformers' own
    ONE_VALUE = enum.auto()  # an all-reduce of one value, which keeps the ranks synchronized
    NOTHING = enum.auto()


@dataclass(frozen=True)
class Message:
    """A message of a row-parallel layer.

    Attributes:
        layer: The layer's module name.
        shape: The tensor's shape.
        dtype: The tensor's dtype.
        group: The process group.
        whole: Number of values of the whole message. In a two-batch overlap it is more than the shape has.
    """

    layer: str
    shape: torch.Size
    dtype: torch.dtype
    group: Any
    whole: int


class RowwiseAllReduce:
    """The all-reduce of all enabled styles. It creates a Communicator for each group at first use."""

    def __init__(self, settings: dict[str, Any], plan: Plan) -> None:
        self.mode = Mode.LOW_BIT
        self.communicators: dict[tuple[Any, str], Communicator] = {}  # by group and settings
        self.seen: list[Message] | None = None  # a list inside `messages`
        self.use(settings, plan)

    def use(self, settings: dict[str, Any], plan: Plan) -> None:
        """Use this plan from now on, with Communicators of these settings."""
        self.settings, self.plan = settings, plan
        self._planned: dict[Any, PlannedAllReduce] = {}

    def __call__(self, partial: Tensor, mesh: Any, layer: str) -> Tensor:
        """Sum a layer's partial sums over the tensor-parallel group of a mesh."""
        group = tp_group(mesh)
        if torch.compiler.is_compiling():
            if self.mode is not Mode.LOW_BIT:
                return partial
            named = layer if self.plan.layers else ""  # names would compile a graph for each layer
            return torch.ops.flashcomm.rowwise_all_reduce(partial, group.group_name, named)  # type: ignore[no-any-return]
        micro_batches = two_batch_overlap.current()
        if micro_batches is None or self.mode is Mode.NOTHING:
            return self.reduce(partial, group, layer)
        whole = micro_batches.whole(partial.numel())
        return micro_batches.reduce(lambda: self.reduce(partial, group, layer, whole))

    def reduce(self, partial: Tensor, group: Any, layer: str, whole: int | None = None) -> Tensor:
        """All-reduce over a group in the current mode. For `whole` see `Communicator.all_reduce`."""
        if self.mode is Mode.LOW_BIT:
            return self.planned(group)(partial, layer, whole=whole)
        if self.mode is not Mode.NOTHING:
            dist.all_reduce(partial.new_zeros(1) if self.mode is Mode.ONE_VALUE else partial, group=group)
        return partial

    def note(self, partial: Tensor, mesh: Any, layer: str) -> None:
        """Append a message to the list of `messages`, if there is one."""
        if self.seen is not None:
            micro_batches = two_batch_overlap.current()
            whole = micro_batches.whole(partial.numel()) if micro_batches else partial.numel()
            self.seen.append(Message(layer, partial.shape, partial.dtype, tp_group(mesh), whole))

    def wire_bytes(self, message: Message) -> int:
        """Return the payload bytes that this rank sends for a message."""
        x = torch.empty(message.shape, dtype=message.dtype, device="meta")
        if self.mode is Mode.BACKEND:  # a ring, as `Route.wire_bytes` assumes
            world_size: int = message.group.size()
            return 2 * (world_size - 1) * x.nbytes // world_size
        route = self.planned(message.group).route(x, message.layer, message.whole)
        return route.wire_bytes * x.numel() // message.whole

    def planned(self, group: Any) -> PlannedAllReduce:
        """Return the group's all-reduce under the current plan. The first call for new settings is collective."""
        if group not in self._planned:
            key = (group, repr(sorted(self.settings.items())))
            if key not in self.communicators:
                self.communicators[key] = Communicator(group, **self.settings)
            self._planned[group] = PlannedAllReduce(self.communicators[key], self.plan)
        return self._planned[group]


class FlashRowwise(RowwiseParallel):  # type: ignore[misc]  # transformers ships no types
    """The style of a row-parallel Linear with a low-bit all-reduce. The bias is added afterwards, unquantized."""

    def __init__(self, base: Any, all_reduce: RowwiseAllReduce) -> None:
        super().__init__(
            input_layouts=base.input_layouts, output_layouts=base.output_layouts, use_local_output=base.use_local_output
        )
        self.all_reduce = all_reduce

    def validate_param(self, module: Any, param: Any, mesh: Any, parameter_name: str | None = None) -> None:
        """Remember the layer's name. transformers calls this as it shards the model, and passes the name only here."""
        super().validate_param(module, param, mesh, parameter_name=parameter_name)
        module._flashcomm_layer = (parameter_name or "").rpartition(".")[0]

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        """Sum the partial sums of all ranks. transformers calls this with the output of the Linear."""
        inference = isinstance(module, torch.nn.Linear) and type(output) is Tensor and not output.requires_grad
        layer, compiling = getattr(module, "_flashcomm_layer", ""), torch.compiler.is_compiling()
        if inference and not compiling:
            self.all_reduce.note(output, mesh, layer)
        own = self.all_reduce.mode is Mode.BACKEND and (compiling or two_batch_overlap.current() is None)
        if own or not inference or not self.output_layouts.is_replicate():
            return super().transform_output_post_forward(module, output, mesh)
        total = self.all_reduce(output, mesh, layer)
        bias = module._parameters.get("bias")
        return total if bias is None else total + (bias.to_local() if isinstance(bias, DTensor) else bias)


def enable(format: str | WireFormat | Plan | None = None, **settings: Any) -> None:
    """Use low-bit all-reduce in models loaded from now on.

    Call it on every rank with the same arguments, before `from_pretrained`. Another call changes the settings, even for
    the models loaded since the first call.

    Args:
        format: A wire format, a plan, or the path of a plan's `.json` file. None: FLASHCOMM_FORMAT, or the default.
        **settings: Further arguments of `flashcomm.Communicator`.

    Raises:
        FormatError: The format does not exist.
        PlanError: The plan cannot be read.
        SettingsError: A setting is wrong.
        UnavailableError: This version of transformers lacks a name that flashcomm needs.
    """
    plan = Plan.of(os.environ.get("FLASHCOMM_FORMAT", DEFAULT_FORMAT) if format is None else format)
    Settings.resolve("cpu", format=str(plan.format), **settings)
    missing = [name for name in METHODS if not hasattr(RowwiseParallel, name)]
    missing += [f"style {name!r}" for name in STYLES if name not in ALL_PARALLEL_STYLES]
    if missing:
        raise UnavailableError(
            f"transformers {version('transformers')} has no {', '.join(missing)} in its tensor parallelism, which "
            "flashcomm needs: use another version (5.17 or later), or backend='flashcomm' "
            "(flashcomm.integrations.process_group)"
        )
    digest = {"plan": plan.digest} if plan.layers or plan.decode else {}
    settings = {"format": str(plan.format), **settings, **digest}
    all_reduce = _current()
    if all_reduce is None:
        all_reduce = RowwiseAllReduce(settings, plan)
    else:
        all_reduce.use(settings, plan)
    for name in STYLES:
        if not isinstance(ALL_PARALLEL_STYLES[name], FlashRowwise):
            ALL_PARALLEL_STYLES[name] = FlashRowwise(ALL_PARALLEL_STYLES[name], all_reduce)


def disable() -> None:
    """Use transformers' own all-reduce again in models loaded from now on."""
    for name in STYLES:
        if isinstance(ALL_PARALLEL_STYLES[name], FlashRowwise):
            del ALL_PARALLEL_STYLES[name]


def check_plan(model: Any) -> None:
    """Check that the current plan is for this model. Call it after `from_pretrained`.

    Raises:
        PlanError: The plan was made for another model, or names layers that this model does not have.
    """
    all_reduce = _current()
    names = [m._flashcomm_layer for m in model.modules() if getattr(m, "_flashcomm_layer", "")]
    if all_reduce is not None and names:  # with one rank there are none
        all_reduce.plan.check(names, model.config)


def communicators() -> list[Communicator]:
    """Return the Communicators created so far, whose `calls` and `sent` count calls and bytes by route."""
    all_reduce = _current()
    return list(all_reduce.communicators.values()) if all_reduce else []


@contextmanager
def without_all_reduce(active: bool = True, *, in_step: bool = True) -> Iterator[None]:
    """Skip all-reduces inside a with block, to time everything else. Results are wrong.

    Args:
        active: Whether to skip them. False changes nothing.
        in_step: Whether to all-reduce one value instead of each message, which keeps the ranks synchronized.
    """
    with _mode(Mode.LOW_BIT if not active else Mode.ONE_VALUE if in_step else Mode.NOTHING):
        yield


@contextmanager
def backend_all_reduce(active: bool = True) -> Iterator[None]:
    """Use transformers' own all-reduce inside a with block, as without flashcomm. active=False changes nothing."""
    with _mode(Mode.BACKEND if active else Mode.LOW_BIT):
        yield


def native_all_reduce(active: bool = True) -> AbstractContextManager[None]:
    """Deprecated name of `backend_all_reduce`."""
    warnings.warn("native_all_reduce is now backend_all_reduce: use that name", DeprecationWarning, stacklevel=2)
    return backend_all_reduce(active)


@contextmanager
def messages() -> Iterator[list[Message]]:
    """Record the messages of the forward passes inside a with block in the list it yields; see `wire_bytes`."""
    all_reduce = _required()
    all_reduce.seen = []
    try:
        yield all_reduce.seen
    finally:
        all_reduce.seen = None


def wire_bytes(message: Message) -> int:
    """Return the payload bytes that this rank sends for a message under the current settings."""
    return _required().wire_bytes(message)


@contextmanager
def _mode(mode: Mode) -> Iterator[None]:
    all_reduce = _required()
    before, all_reduce.mode = all_reduce.mode, mode
    try:
        yield
    finally:
        all_reduce.mode = before


def _current() -> RowwiseAllReduce | None:
    style = ALL_PARALLEL_STYLES[STYLES[0]]
    return style.all_reduce if isinstance(style, FlashRowwise) else None


def _required() -> RowwiseAllReduce:
    if (all_reduce := _current()) is None:
        raise UnavailableError("flashcomm is not enabled in transformers: call enable(), and compile models after that")
    return all_reduce


_library = torch.library.Library("flashcomm", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rowwise_all_reduce(Tensor partial, str group, str layer) -> Tensor")  # type: ignore[no-untyped-call]


def _rowwise_all_reduce(partial: Tensor, group: str, layer: str) -> Tensor:
    """Run the op of compiled models. It looks up the plan at run time, so that one graph serves all formats."""
    return _required().reduce(partial, process_group_named(group), layer)


_library.impl("rowwise_all_reduce", _rowwise_all_reduce, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("flashcomm::rowwise_all_reduce", lib=_library)  # type: ignore[untyped-decorator]
def _fake(partial: Tensor, group: str, layer: str) -> Tensor:
    return torch.empty_like(partial, memory_format=torch.contiguous_format)
