"""A process group, a wire format and what its ranks can do together: the object that runs low-bit collectives.

    with flashcomm.Communicator(group, "int4") as comm:       # collective: ranks compare their settings
        y = comm.all_reduce(x)                                # a new tensor of x's shape and dtype
        print(comm.explain(x.shape, x.dtype))                 # which route, and why not the others

A call is validated, routed (`routing.policy`), run (`collectives.executors`) and counted. Results are those of
`flashcomm.reference`, the same bits on every rank, except for the backend's own sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.collectives.add_rms_norm import add_rms_norm
from flashcomm.collectives.recent import RecentCalls
from flashcomm.counts import Counts
from flashcomm.errors import ClosedError, FormatError, InputError
from flashcomm.routing import policy
from flashcomm.routing.route import Choice, Message
from flashcomm.settings import Arguments
from flashcomm.setup import consistency, startup
from flashcomm.wire.format import WireFormat

if TYPE_CHECKING:
    from typing_extensions import Unpack

Format = Union[str, WireFormat, None]  # noqa: UP007  # evaluated at run time, on Python 3.10 too


class Communicator:
    """Low-bit collectives over one process group. Creating one is collective: every rank of the group must.

    Use one Communicator from one thread and, on GPUs, one stream at a time.

    Args:
        group: A torch.distributed process group; None is the default group.
        format: A wire format or its text: "int4", "int4-g32", "int4/int8", "none".
        device: "cpu" or "cuda", where the tensors will be. None is CUDA if the group's backend is NCCL, else the CPU.
            GPU tensors over a group without NCCL go through GPU or host memory if that can be had, else, slowly,
            through the CPU.
        plan: The `Plan.digest` of the plan that the caller follows. It is only compared between ranks.
        **settings: The arguments of `flashcomm.settings.Settings`, which FLASHCOMM_* variables set, too.

    Raises:
        FormatError, SettingsError: On every rank, if any rank's settings are wrong or differ from the others'.
        CommunicationError: A rank does not come within the time-out.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        format: Format = None,
        *,
        device: str | None = None,
        plan: str = "",
        **settings: Unpack[Arguments],
    ) -> None:
        started = startup.start(group, device, plan, {"format": format, **settings})
        self.group, self.device, self.transport = started.group, started.device, started.transport
        self.settings, self.machine, self.format = started.settings, started.machine, started.settings.format
        self._guard, self._executors = started.guard, started.executors
        self._recent = RecentCalls(self.device)
        self._n_calls, self.closed = 0, False
        self.rank, self.world_size = self.transport.rank, self.transport.world_size
        self._counts = Counts(repr(self), self.settings.debug == "info")
        self.calls, self.sent = self._counts.calls, self._counts.sent

    @property
    def world(self) -> int:
        warnings.warn("Communicator.world is now world_size", DeprecationWarning, stacklevel=2)
        return self.world_size

    def all_reduce(
        self, x: Tensor, out: Tensor | None = None, *, format: Format = None, whole: int | None = None
    ) -> Tensor:
        """The sum of x over all ranks: the same bits on every rank.

        Args:
            x: bf16, fp16 or fp32, any shape and strides; not modified. The last dimension is the row that quantization
                groups do not cross.
            out: Where to put the result: contiguous, like x in shape, dtype and device; may be x. None makes a tensor.
            format: Another wire format for this call, equal on all ranks.
            whole: Values of the message that x is some rows of, equal on all ranks. The route is chosen for that
                message, so that rows come out as they would with the others beside them.

        Raises:
            InputError: On all ranks, if any rank's arguments are wrong or differ (on GPUs only with check=True).
            ClosedError: The Communicator was closed.
            CommunicationError: A peer died or did not come within the time-out.
        """
        if out is None and not self._guard.busy:
            self._guard.busy = True  # stays so if an exception leaves it halfway
            recent = self._recent.repeat(x, format, whole)
            self._guard.busy = False
            if recent:
                result, name, n_bytes = recent
                self._counts.add(name, n_bytes, x)
                self._n_calls += 1
                return result
        return self._collective("all_reduce", x, out, format, whole)

    def reduce_scatter(self, x: Tensor, out: Tensor | None = None, *, format: Format = None) -> Tensor:
        """This rank's shard, along dimension 0, of the sum of x over all ranks; quantized once, as `format.reduce`.

        Args:
            x: Shape (world_size * n, ...), else as in `all_reduce`.
            out: Shape (n, ...), else as in `all_reduce`; must not overlap x.
            format: As in `all_reduce`.

        Raises:
            InputError: As `all_reduce`, and where the number of ranks does not divide dimension 0.
        """
        return self._collective("reduce_scatter", x, out, format)

    def all_gather(self, x: Tensor, out: Tensor | None = None, *, format: Format = None) -> Tensor:
        """Every rank's x, one after the other along dimension 0, quantized as `format.gather`, the own one included.

        Args:
            x: Shape (n, ...), else as in `all_reduce`.
            out: Shape (world_size * n, ...), else as in `all_reduce`; must not overlap x.
            format: As in `all_reduce`.
        """
        return self._collective("all_gather", x, out, format)

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, format: Format = None
    ) -> tuple[Tensor, Tensor]:
        """`reference.add_rms_norm` of `all_reduce(x)`, as layers have it: (normed, new residual), both new.

        Args:
            x: (..., hidden), bf16, fp16 or fp32.
            residual: Like x.
            weight: (hidden,), like x in dtype and device. Results are equal on all ranks if residual and weight are.
            eps: Added to the mean square.
            format: As in `all_reduce`.
        """
        eps = float(eps) if isinstance(eps, int) else eps  # ranks compare its text
        problem = consistency.problem_beside(x, residual, weight, eps, self.device, self.world_size)
        total = self._collective("all_reduce_add_rms_norm", x, None, format, eps, problem)
        return add_rms_norm(total, residual, weight, eps)

    def explain(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        format: Format = None,
        *,
        op: str = "all_reduce",
        whole: int | None = None,
    ) -> Choice:
        """Which route a call of this rank's input shape and dtype takes, its bytes, and why not the alternatives.

        Args:
            shape: Of the input on one rank.
            dtype: Of the input.
            format: As in `all_reduce`.
            op: "all_reduce", "all_reduce_add_rms_norm", "reduce_scatter" or "all_gather".
            whole: As in `all_reduce`.
        """
        group = self.world_size, self.device.type, self.machine.local_world_size
        message = Message.of(op, shape, dtype, group, whole)
        fmt = self.format if format is None else WireFormat.parse(format)
        return policy.choose(message, fmt, self.settings.algorithm, self.settings.min_bytes, self.machine)

    def synchronize(self) -> None:
        """Wait, on the host, for this rank's calls so far. On GPUs calls return before they are done.

        Raises:
            CommunicationError: A peer did not come to one of them. Without this the next call raises it.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for executor in self._executors.values():
            executor.check()

    def close(self) -> None:
        """Free buffers and threads. Not collective; on GPUs it waits for this rank's calls. Closing again is fine.

        A call afterwards raises ClosedError; a CUDA graph that holds calls must not be replayed. A call that runs in
        another thread ends first.
        """
        with self._guard.closing():
            if not self.closed:
                for executor in self._executors.values():
                    executor.close()
            self.closed = True
            self._executors.clear()
            self._recent.clear()
            self.transport.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"Communicator(rank {self.rank} of {self.world_size}, {self.format}, {self.device.type}{state})"

    def _collective(
        self,
        op: str,
        x: Tensor,
        out: Tensor | None,
        format: Format,
        same: Any = None,
        problem: consistency.Problem | None = None,
    ) -> Tensor:
        """Validate, route, run, count. same: What else must be equal on all ranks: `whole`, or eps."""
        whole = same if op == "all_reduce" else None
        with self._guard.call(op):
            if problem is None:
                problem = consistency.problem_with(op, x, self.device, self.world_size, out, whole)
            fmt = self._validate(op, x, format, problem, same)
            if out is None:
                shape = consistency.result_shape(op, tuple(x.shape), self.world_size)
                out = torch.empty(shape, dtype=x.dtype, device=x.device)
            if x.numel() == 0:
                return out
            route = self.explain(x.shape, x.dtype, fmt, op=op, whole=whole).route
            again = self._executors[route.executor].run(route, x, out)
            name, n_bytes = f"{op}/{route.label}", route.wire_bytes * x.numel() // (whole or x.numel())
            self._counts.add(name, n_bytes, x)
            if again and op == "all_reduce" and x.is_cuda and self.settings.debug == "off" and not self.settings.check:
                self._recent.keep(x, format, whole, name, n_bytes, again)
            return out

    def _validate(self, op: str, x: Tensor, format: Format, problem: consistency.Problem, same: object) -> WireFormat:
        """The format of a call. Raises if this rank's input is wrong and, with check=True, if ranks differ."""
        if self.closed:
            raise ClosedError(f"{op} on a closed Communicator: make a new one")
        fmt, unknown = self.format, None
        try:
            fmt = self.format if format is None else WireFormat.parse(format)
        except FormatError as why:
            unknown = why  # raised below, once every rank knows of it
            problem = problem or consistency.Problem.FORMAT
        if self.settings.check and self.world_size > 1:
            consistency.check_call(self.transport, op, x, problem, self._n_calls + 1, (self.settings, fmt, same))
        elif problem == consistency.Problem.FORMAT and unknown:
            raise unknown
        elif problem:
            raise InputError(f"{op}: {problem.text(x, self.device, self.world_size)}")
        self._n_calls += 1
        self.transport.tags.begin(self._n_calls)
        return fmt
