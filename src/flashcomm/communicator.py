"""A process group, a wire format and what its ranks can do together: the object that runs low-bit collectives.

    with flashcomm.Communicator(group, "int4") as comm:       # collective: ranks compare their settings
        y = comm.all_reduce(x)                                # a new tensor of x's shape and dtype
        print(comm.explain(x.shape, x.dtype))                 # which route, and why not the others

A call is validated, routed (`routing.policy`), run (`collectives.executors`) and counted. Results are those of
`flashcomm.reference`, the same bits on every rank, except for the backend's own sums.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.collectives.add_rms_norm import add_rms_norm
from flashcomm.collectives.executors import Base, Launch
from flashcomm.collectives.recent import RecentCalls
from flashcomm.errors import ClosedError, FlashcommError, FormatError, InputError, SettingsError
from flashcomm.routing import policy
from flashcomm.routing.route import Choice, Executor, Machine, Message
from flashcomm.settings import Arguments, Settings
from flashcomm.setup import call_guard, consistency, discovery
from flashcomm.transports.process_group import ProcessGroupTransport
from flashcomm.wire.format import WireFormat

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger("flashcomm")


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
        format: str | WireFormat | None = None,
        *,
        device: str | None = None,
        plan: str = "",
        **settings: Unpack[Arguments],
    ) -> None:
        if group is None:
            if not dist.is_initialized():
                raise SettingsError("no process group: call torch.distributed.init_process_group first, or pass group=")
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):  # also GroupMember.NON_GROUP_MEMBER
            raise SettingsError("group= must be a process group that this rank is a member of: only members take part")
        self.group = group
        try:
            self.device = consistency.group_device(group, device)
            mine: Settings | FlashcommError = Settings.resolve(self.device.type, format=format, **settings)
            mine = replace(mine, plan=plan) if isinstance(mine, Settings) else mine
        except Exception as why:  # of this rank alone, perhaps: raised below, once every rank knows of it
            self.device = consistency.group_device(group, None)
            mine = why if isinstance(why, FlashcommError) else SettingsError(f"{type(why).__name__}: {why}")
        timeout_s = mine.timeout_s if isinstance(mine, Settings) else 60.0
        state = call_guard.state_of(group)
        self._guard = call_guard.CallGuard(state.lock if self.device.type == "cpu" else threading.Lock(), timeout_s)
        self.transport = ProcessGroupTransport(group, self.device, timeout_s)
        try:
            with self._guard.call("making a Communicator"):
                self.settings = consistency.check_settings(self.transport, state.n_made, mine)
                state.n_made = self.transport.tags.communicator + 1
                self.machine, self._executors = self._connect()
        except BaseException:
            self.transport.close()
            raise
        self.format = self.settings.format
        self.calls: Counter[str] = Counter()  # by `Route.name`; replays of CUDA graphs are not seen
        self.sent: Counter[str] = Counter()  # payload bytes to other ranks, by `Route.name`
        self._recent = RecentCalls(self.device)
        self._n_calls = 0
        self._closed = False
        if self.settings.debug == "info":
            _show_info()

    def _connect(self) -> tuple[Machine, dict[Executor, Base]]:
        """`discovery.connect`, so that an exception on one rank is an error on all of them."""
        try:
            found = discovery.connect(self.group, self.transport, self.settings)
            consistency.tell(self.transport, None, "finishing the Communicator")  # no rank may miss a failure
            return found
        except FlashcommError:  # on all ranks, or nobody can be told
            raise
        except Exception as why:
            consistency.tell_failure(self.transport, why)
            raise

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def world_size(self) -> int:
        return self.transport.world_size

    @property
    def world(self) -> int:
        warnings.warn("Communicator.world is now world_size", DeprecationWarning, stacklevel=2)
        return self.world_size

    @property
    def closed(self) -> bool:
        return self._closed

    def all_reduce(
        self,
        x: Tensor,
        out: Tensor | None = None,
        *,
        format: str | WireFormat | None = None,
        whole: int | None = None,
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
                self.calls[name] += 1
                self.sent[name] += n_bytes
                self._n_calls += 1
                return result
        return self._collective("all_reduce", x, out, format, whole)

    def reduce_scatter(self, x: Tensor, out: Tensor | None = None, *, format: str | WireFormat | None = None) -> Tensor:
        """This rank's shard, along dimension 0, of the sum of x over all ranks; quantized once, as `format.reduce`.

        Args:
            x: Shape (world_size * n, ...), else as in `all_reduce`.
            out: Shape (n, ...), else as in `all_reduce`; must not overlap x.
            format: As in `all_reduce`.

        Raises:
            InputError: As `all_reduce`, and where the number of ranks does not divide dimension 0.
        """
        return self._collective("reduce_scatter", x, out, format)

    def all_gather(self, x: Tensor, out: Tensor | None = None, *, format: str | WireFormat | None = None) -> Tensor:
        """Every rank's x, one after the other along dimension 0, quantized as `format.gather`, the own one included.

        Args:
            x: Shape (n, ...), else as in `all_reduce`.
            out: Shape (world_size * n, ...), else as in `all_reduce`; must not overlap x.
            format: As in `all_reduce`.
        """
        return self._collective("all_gather", x, out, format)

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, format: str | WireFormat | None = None
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
        with self._guard.call("all_reduce_add_rms_norm"):
            problem = consistency.problem_beside(x, residual, weight, eps, self.device, self.world_size)
            fmt = self._validate("all_reduce_add_rms_norm", x, format, problem, eps)
            total = torch.empty_like(x, memory_format=torch.contiguous_format)
            self._run("all_reduce_add_rms_norm", self._message("all_reduce", x.shape, x.dtype), fmt, x, total)
            return add_rms_norm(total, residual, weight, eps)

    def explain(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        format: str | WireFormat | None = None,
        *,
        op: str = "all_reduce",
        whole: int | None = None,
    ) -> Choice:
        """Which route a call of this rank's input shape and dtype takes, its bytes, and why not the alternatives.

        Args:
            shape: Of the input on one rank.
            dtype: Of the input.
            format: As in `all_reduce`.
            op: "all_reduce", "reduce_scatter" or "all_gather".
            whole: As in `all_reduce`.
        """
        message = self._message(op, tuple(shape), dtype, whole)
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
        self._guard.wait_idle()
        if not self._closed:
            for executor in self._executors.values():
                executor.close()
        self._closed = True
        self._executors.clear()
        self._recent.clear()
        self.transport.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"Communicator(rank {self.rank} of {self.world_size}, {self.format}, {self.device.type}{state})"

    def _collective(
        self,
        op: str,
        x: Tensor,
        out: Tensor | None,
        format: str | WireFormat | None,
        whole: int | None = None,
    ) -> Tensor:
        with self._guard.call(op):
            problem = consistency.problem_with(op, x, self.device, self.world_size, out, whole)
            fmt = self._validate(op, x, format, problem, whole)
            if out is None:
                shape = consistency.result_shape(op, tuple(x.shape), self.world_size)
                out = torch.empty(shape, dtype=x.dtype, device=x.device)
            name, n_bytes, again = self._run(op, self._message(op, x.shape, x.dtype, whole), fmt, x, out)
            if again and op == "all_reduce" and x.is_cuda and self.settings.debug == "off" and not self.settings.check:
                self._recent.keep(x, format, whole, name, n_bytes, again)
            return out

    def _validate(
        self,
        op: str,
        x: Tensor,
        format: str | WireFormat | None,
        problem: consistency.Problem,
        also_equal: object,
    ) -> WireFormat:
        """The format of a call. Raises if this rank's input is wrong or, with check=True, any rank's or ranks differ.

        also_equal: What else must be equal on all ranks.
        """
        if self._closed:
            raise ClosedError(f"{op} on a closed Communicator: make a new one")
        fmt, unknown = self.format, None
        try:
            fmt = self.format if format is None else WireFormat.parse(format)
        except FormatError as why:
            unknown = why  # raised below, once every rank knows of it
            problem = problem or consistency.Problem.FORMAT
        if self.settings.check and self.world_size > 1:
            number, same = self._n_calls + 1, (self.settings, fmt, also_equal)
            consistency.check_call(self.transport, op, x, problem, number, same)
        elif problem == consistency.Problem.FORMAT and unknown:
            raise unknown
        elif problem:
            raise InputError(f"{op}: {problem.text(x, self.device, self.world_size)}")
        self._n_calls += 1
        self.transport.tags.begin(self._n_calls)
        return fmt

    def _message(self, op: str, shape: Sequence[int], dtype: torch.dtype, whole: int | None = None) -> Message:
        group = self.world_size, self.device.type, self.machine.local_world_size
        return Message.of(op, shape, dtype, group, whole)

    def _run(
        self, op: str, message: Message, fmt: WireFormat, x: Tensor, out: Tensor
    ) -> tuple[str, int, Launch | None]:
        """Route, run and count. Returns the route's name, bytes sent, and what repeats the call, if anything does."""
        route = policy.choose(message, fmt, self.settings.algorithm, self.settings.min_bytes, self.machine).route
        name = f"{op}/{route.label}"
        if x.numel() == 0:
            return name, 0, None
        again = self._executors[route.executor].run(route, x, out)
        n_bytes = route.wire_bytes * x.numel() // message.numel
        self._count(name, x, n_bytes)
        return name, n_bytes, again

    def _count(self, name: str, x: Tensor, n_bytes: int) -> None:
        """Count a call; with debug="info" log the first, and the sums so far at the 10th, 100th, ..."""
        self.calls[name] += 1
        self.sent[name] += n_bytes
        n = self.calls[name]
        if self.settings.debug == "info" and n == 1:
            what = f"shape {tuple(x.shape)} {x.dtype}, {n_bytes} bytes sent"
            log.info("%r: first %s goes %s, %s", self, *name.split("/"), what)
        elif self.settings.debug == "info" and str(n).strip("0") == "1":
            log.info("%r: %d calls of %s, %d bytes sent", self, n, name, self.sent[name])


def _show_info() -> None:
    """Let debug="info" be seen where the program has not set up logging."""
    log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
