"""A process group, a wire format and a workspace: the object that runs low-bit collectives.

    with flashcomm.Communicator(group, "int4") as comm:       # collective: ranks compare their settings
        y = comm.all_reduce(x)                                # a new tensor of x's shape and dtype
        print(comm.explain(x.shape, x.dtype))                 # which way, and why not the others

Results are those of `flashcomm.reference`, the same bits on every rank (`native` excepted: the backend's own sum).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.codecs import codec_for
from flashcomm.collectives import pipelined
from flashcomm.collectives.add_rms_norm import add_rms_norm
from flashcomm.collectives.hierarchical import hierarchical
from flashcomm.errors import ClosedError, FlashcommError, FormatError, InputError, SettingsError
from flashcomm.routing import policy
from flashcomm.settings import Settings
from flashcomm.setup import consistency, discovery
from flashcomm.transports.process_group import ProcessGroupTransport
from flashcomm.wire.format import Layout, WireFormat

if TYPE_CHECKING:
    from flashcomm.collectives.graph_cache import Replayed

MAX_KEPT = 4096  # shapes whose launches a Communicator remembers

log = logging.getLogger("flashcomm")


class Communicator:
    """Low-bit collectives over one process group. Making one is collective: every rank of the group must.

    group: a torch.distributed process group; None is the default group. device: "cpu" or "cuda", where the tensors
    will be; None is CUDA where the group's backend is NCCL, else the CPU. GPU tensors over a group without NCCL go
    through peers' or host memory where that can be had, and else, slowly, by way of the CPU.
    format: a wire format or its text ("int4", "int4-g32", "int4/int8", "bf16"). The other arguments are those of
    `flashcomm.settings`, which also come from FLASHCOMM_* variables. plan: the `Plan.digest` of the plan that the
    caller follows; it is only compared. Use one Communicator from one thread and, on GPUs, one stream at a time.

    Raises FormatError or SettingsError, on every rank, when any rank's settings are wrong or differ from the others';
    CommunicationError when a rank does not come within the time-out.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        format: str | WireFormat | None = None,
        *,
        device: str | None = None,
        algorithm: str | None = None,
        min_bytes: int | str | None = None,
        transport: str | None = None,
        workspace_bytes: int | str | None = None,
        chunk_bytes: int | str | None = None,
        timeout_s: float | None = None,
        check: bool | None = None,
        debug: str | None = None,
        local_world_size: int | None = None,
        plan: str = "",
    ) -> None:
        if group is None:
            if not dist.is_initialized():
                raise SettingsError("no process group: call torch.distributed.init_process_group first, or pass group=")
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):  # also GroupMember.NON_GROUP_MEMBER
            raise SettingsError(
                "this rank is not a member of the group (or group= is no process group): it must not take part"
            )
        self.group = group
        try:
            self.device = consistency.group_device(group, device)
            given: dict[str, Any] = {"format": format, "algorithm": algorithm, "min_bytes": min_bytes}
            given |= {"transport": transport, "workspace_bytes": workspace_bytes, "chunk_bytes": chunk_bytes}
            given |= {"timeout_s": timeout_s, "check": check, "debug": debug, "local_world_size": local_world_size}
            mine: Settings | FlashcommError = replace(Settings.resolve(self.device.type, **given), plan=plan)
        except FlashcommError as why:
            self.device = consistency.group_device(group, None)
            mine = why  # raised below, once every rank knows of it
        probe_timeout = mine.timeout_s if isinstance(mine, Settings) else 60.0
        self.transport = ProcessGroupTransport(group, self.device, probe_timeout)
        self.settings = consistency.agree_on_settings(self.transport, mine)
        self.format = self.settings.format
        self.calls: Counter[str] = Counter()  # by way ("all_reduce/two_shot"); graph replays are not seen
        self.sent: Counter[str] = Counter()  # payload bytes to other ranks, by way
        self._context = pipelined.Context(
            self.format,
            codec_for(self.device.type),
            self.transport,
            pipelined.Workspace(self.device),
            self.settings.chunk_bytes,
        )
        found = discovery.connect(group, self.transport, self.settings)
        self.machine, self._fused, self._staged = found.machine, found.fused, found.staged
        self._context.nodes = found.nodes
        self._replayed: Replayed | None = None
        if self._staged is not None:
            from flashcomm.collectives.graph_cache import Replayed

            self._replayed = Replayed(self.device)
        self._launches: dict[Any, Any] = {}  # of this Communicator's messages so far, by shape, dtype and format
        self._stream: torch.cuda.Stream | None = None
        self._n_calls = 0
        self._closed = False

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def world_size(self) -> int:
        return self.transport.world_size

    def all_reduce(
        self,
        x: Tensor,
        out: Tensor | None = None,
        *,
        format: str | WireFormat | None = None,
        whole: int | None = None,
    ) -> Tensor:
        """The sum of x over all ranks, x's shape and dtype, the same bits on every rank.

        x: bf16, fp16 or fp32, any shape and strides, not modified; the last dimension is the row that quantization
        groups do not cross. out: where to put the result (contiguous, x's shape and dtype; may be x); None makes one.
        format: another wire format for this call, equal on all ranks; plans (`flashcomm.plan`) use it layer by layer.
        whole: of how many values the message is that x is some rows of, equal on all ranks: the way is chosen for that
        message, so that rows come out as they would with the others beside them.
        Cost: see `explain`. Raises InputError, ClosedError or CommunicationError.
        """
        quick = self._quick(x, out, format, whole)
        if quick is not None:
            return quick
        fmt, unknown = self.format, None
        try:
            fmt = self.format if format is None else WireFormat.parse(format)
        except FormatError as why:
            unknown = why  # raised below, once every rank knows of it
        problem = consistency.problem_with("all_reduce", x, self.device, self.world_size, out)
        call = self._enter("all_reduce", x, problem, fmt, unknown, whole)
        result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        if x.numel() == 0:
            return result
        like = call if whole is None else replace(call, numel=whole)
        route = policy.choose(like, fmt, self.settings.algorithm, self.settings.min_bytes, self.machine).route
        sent = route.wire_bytes * call.numel // like.numel
        self._count(f"all_reduce/{route.algorithm}", x, sent)
        self._reduce(route, x, result, call.row, ((format, whole), sent))
        return result

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, format: str | WireFormat | None = None
    ) -> tuple[Tensor, Tensor]:
        """(normed, new residual): `reference.add_rms_norm` of `all_reduce(x)`, as layers have it. Both are new.

        x, residual: (..., hidden), bf16, fp16 or fp32, of one dtype; residual and weight (hidden,) are to be equal on
        all ranks, and then results are.
        Raises as `all_reduce`.
        """
        fmt, unknown = self.format, None
        try:
            fmt = self.format if format is None else WireFormat.parse(format)
        except FormatError as why:
            unknown = why
        eps = float(eps) if isinstance(eps, int) else eps  # ranks compare its text
        problem = consistency.problem_beside(x, residual, weight, eps, self.device, self.world_size)
        call = self._enter("all_reduce_add_rms_norm", x, problem, fmt, unknown, eps)
        route = policy.choose(call, fmt, self.settings.algorithm, self.settings.min_bytes, self.machine).route
        self._count(f"all_reduce_add_rms_norm/{route.algorithm}", x, route.wire_bytes)
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            self._reduce(route, x, total, call.row, None)
        return add_rms_norm(total, residual, weight, eps)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's slice, along dimension 0, of the sum of x over all ranks; coded once, as `format.reduce`.

        x: shape (world * n, ...); returns (n, ...). Raises as `all_reduce`; InputError where world does not divide.
        """
        self._enter("reduce_scatter", x)
        out = torch.empty((x.shape[0] // self.world_size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        return self._exchange("reduce_scatter", x, out)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, one after the other along dimension 0, coded as `format.gather`, the own one included.

        x: shape (n, ...); returns (world * n, ...). Raises as `all_reduce`.
        """
        self._enter("all_gather", x)
        out = torch.empty((x.shape[0] * self.world_size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        return self._exchange("all_gather", x, out)

    def explain(
        self, shape: Sequence[int], dtype: torch.dtype, format: str | WireFormat | None = None
    ) -> policy.Choice:
        """Which way an all-reduce of this shape and dtype goes, how many bytes a rank sends, why not the other ways."""
        call = self._call(tuple(shape), dtype)
        fmt = self.format if format is None else WireFormat.parse(format)
        return policy.choose(call, fmt, self.settings.algorithm, self.settings.min_bytes, self.machine)

    def synchronize(self) -> None:
        """Wait, on the host, for this rank's calls so far. Raises CommunicationError if a peer did not come to one.

        On GPUs calls return before they are done; without this a dead peer shows in the next call.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._fused is not None:
            self._fused.check()

    def close(self) -> None:
        """Free the workspace. Not collective; on GPUs it waits for this rank's calls.

        A call afterwards raises ClosedError; a graph that holds calls must not be replayed. Closing again is fine.
        """
        if self._staged is not None and self._replayed is not None and not self._closed:
            self._staged.close()
            self._replayed.close()
        if self._fused is not None and not self._closed:
            self._fused.close()
        self._closed, self._fused, self._staged, self._replayed = True, None, None, None
        self._launches.clear()
        self.transport.close()
        self._context.workspace, self._context.nodes = pipelined.Workspace(self.device), None

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"Communicator(rank {self.rank} of {self.world_size}, {self.format}, {self.device.type}{state})"

    def _exchange(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """Run reduce_scatter or all_gather of x into out."""
        if x.numel() == 0:
            return out
        if self.world_size == 1:
            self._count(f"{name}/copy", x, 0)
            return out.copy_(x)
        row = x.shape[-1] if x.dim() > 1 else min(x.numel(), out.numel())
        step = self.format.reduce if name == "reduce_scatter" else self.format.gather
        sent = (self.world_size - 1) * Layout(step, row, x.element_size()).nbytes(0, min(x.numel(), out.numel()))
        small = self._staged is None or x.nbytes <= policy.MAPPED_BYTES
        if self._fused is not None and small and row % self.format.unit == 0:
            self._count(f"{name}/fused", x, sent)
            self._run_fused(name, x, out, row, self.format, None)
            return out
        self._count(f"{name}/composed", x, sent)
        self._run_composed(name, x, out, self.format)
        return out

    def _reduce(
        self, route: policy.Route, x: Tensor, out: Tensor, row: int, keep: tuple[tuple[Any, int | None], int] | None
    ) -> None:
        """All-reduce x into out by a route; keep: as of `_run_fused`."""
        way, fmt = route.algorithm, WireFormat.parse(route.fmt)
        if way in ("copy", "native"):
            out.copy_(x)
            if way == "native":
                self.transport.all_reduce_native(out, "native all-reduce").wait()
        elif route.transport in policy.FUSED and row % fmt.unit == 0:
            self._run_fused(way, x, out, row, fmt, keep)
        else:
            self._run_composed(way, x, out, fmt)

    def _quick(self, x: Any, out: Any, format: Any, whole: int | None) -> Tensor | None:
        """The result of a message like an earlier one, with as little as possible done on the host; None: not so."""
        if out is not None or not self._launches or type(x) not in consistency.PLAIN:
            return None
        if format is not None and not isinstance(format, (str, WireFormat)):
            return None
        kept, device = self._launches.get((x.shape, x.dtype, format, whole)), self.device.index
        if kept is None or self._closed or x.get_device() != device or not x.is_contiguous() or x.is_neg():
            return None
        source = x.data_ptr()
        if source & 15 or self.settings.check or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if torch._C._cuda_getDevice() != device:  # kernels go to the current device
            return None
        launch, key, n_bytes = kept
        result = torch.empty_like(x)
        self._order()
        launch(source, result.data_ptr())
        self.calls[key] += 1
        self.sent[key] += n_bytes
        self._n_calls += 1
        return result

    def _run_composed(self, name: str, x: Tensor, out: Tensor, fmt: WireFormat) -> None:
        """Codec and exchange chunk by chunk, through host memory where it is shared, else over the process group."""
        context = replace(self._context, fmt=fmt)
        if self._staged is not None:
            chunk = min(policy.STAGED_CHUNK_BYTES, max(policy.STAGED_CHUNK_BYTES // 8, x.nbytes // 4))
            context = replace(context, transport=self._staged, chunk_bytes=chunk)
        with self._on_device():
            if self._fused is not None:
                self._order()
            run = hierarchical if name == "hierarchical" else getattr(pipelined, name)
            if self._replayed is not None:
                self._replayed.run(run, x.resolve_neg().contiguous(), out, context)
            else:
                run(x.contiguous(), out, context)

    def _run_fused(
        self,
        name: str,
        x: Tensor,
        out: Tensor,
        row: int,
        fmt: WireFormat,
        keep: tuple[tuple[Any, int | None], int] | None,
    ) -> None:
        """One launch, or a few for messages larger than the workspace, over copies of what is not aligned.

        keep: of an all-reduce, what was given besides the tensor and the bytes sent, for `_quick`.
        """
        assert self._fused is not None
        with self._on_device():
            self._order()
            given, x = x, _plain(x)
            target = torch.empty_like(out) if out.data_ptr() % 16 else out
            launch = self._fused.plan(name, x, row, fmt)
            launch(x.data_ptr(), target.data_ptr())
            if target is not out:
                out.copy_(target)
        if keep is not None and self.device.type == "cuda" and self.settings.debug == "off":
            if len(self._launches) >= MAX_KEPT:
                self._launches.clear()
            (format, whole), n_bytes = keep
            self._launches[given.shape, given.dtype, format, whole] = (launch, f"all_reduce/{name}", n_bytes)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _order(self) -> None:
        """Raise what kernels reported; put this call behind the last one if that was on another stream."""
        assert self._fused is not None
        self._fused.check()
        if self.device.type != "cuda":
            return
        if self._stream is None or self._stream.cuda_stream != torch._C._cuda_getCurrentRawStream(self.device.index):
            current = torch.cuda.current_stream(self.device)
            if self._stream is not None and not torch.cuda.is_current_stream_capturing():
                current.wait_stream(self._stream)
            self._stream = current

    def _enter(
        self,
        name: str,
        x: Tensor,
        problem: consistency.Problem | None = None,
        fmt: WireFormat | None = None,
        unknown: FormatError | None = None,
        more: object = None,
    ) -> policy.Call:
        """Raise if there is a problem with this rank's input and, where settings say so, unless all ranks make the same
        call. more: what else must be equal on all ranks."""
        if self._closed:
            raise ClosedError(f"{name} on a closed Communicator: make a new one")
        if problem is None:
            problem = consistency.problem_with(name, x, self.device, self.world_size)
        if unknown and not problem:
            problem = consistency.Problem.FORMAT
        if self.settings.check and self.world_size > 1:
            consistency.agree_on_call(self.transport, name, x, problem, self._n_calls + 1, (self.settings, fmt, more))
        elif problem == consistency.Problem.FORMAT and unknown:
            raise unknown
        elif problem:
            raise InputError(f"{name}: {problem.text(x, self.device, self.world_size)}")
        self._n_calls += 1
        return self._call(tuple(x.shape), x.dtype)

    def _call(self, shape: tuple[int, ...], dtype: torch.dtype) -> policy.Call:
        row = shape[-1] if shape else 1
        return policy.Call(
            math.prod(shape), row, dtype.itemsize, self.world_size, self.device.type, self.machine.local_world_size
        )

    def _count(self, way: str, x: Tensor, n_bytes: int) -> None:
        """Count a call; with debug="info" tell of the first, and of the 10th, 100th, ... the sums so far."""
        self.calls[way] += 1
        self.sent[way] += n_bytes
        n = self.calls[way]
        if self.settings.debug == "info" and n == 1:
            name, _, path = way.partition("/")
            log.warning(
                "%r: first %s goes %s, shape %s %s, %d bytes sent", self, name, path, tuple(x.shape), x.dtype, n_bytes
            )
        elif self.settings.debug == "info" and str(n).strip("0") == "1":
            log.warning("%r: %d calls of %s, %d bytes sent", self, n, way, self.sent[way])


def _plain(x: Tensor) -> Tensor:
    """x, or a copy of it, contiguous and aligned to 16 bytes, as kernels over peers' memory take it."""
    x = x.resolve_neg().contiguous()
    return x.clone() if x.data_ptr() % 16 else x
