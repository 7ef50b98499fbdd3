"""The Communicator: low-bit collectives over one process group.

    with flashcomm.Communicator(group, "int4") as comm:       # collective: ranks compare their settings
        y = comm.all_reduce(x)                                # a new tensor of x's shape and dtype
        print(comm.explain(x.shape, x.dtype))                 # which route, and why not the others

A call is validated, routed, run and counted. Every rank gets the bits of `flashcomm.reference`, except by the backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Union

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.collectives.add_rms_norm import add_rms_norm
from flashcomm.collectives.recent import RecentCalls
from flashcomm.counts import Counts
from flashcomm.errors import ClosedError, InputError
from flashcomm.routing import policy
from flashcomm.routing.route import Choice, Message
from flashcomm.settings import Arguments
from flashcomm.setup import consistency, startup
from flashcomm.setup.call import Call, Problem, exchange_of
from flashcomm.wire.format import WireFormat
from flashcomm.wire.split import Split

if TYPE_CHECKING:
    from typing_extensions import Unpack

Format = Union[str, WireFormat, None]  # noqa: UP007  # evaluated at run time, on Python 3.10 too


class Communicator:
    """Low-bit collectives over one process group. The constructor is collective: every rank of the group must call it.

    Use one Communicator from one thread and, on GPUs, on one stream at a time.

    Args:
        group: A torch.distributed process group. None: the default group.
        format: A wire format or its text: "int4", "int4-g32", "int4/int8", "none".
        device: "cpu" or "cuda", where the tensors will be. None: "cuda" if the group's backend is NCCL, else "cpu".
            Without NCCL, GPU tensors travel through GPU or host memory if possible, else, slowly, through the CPU.
        plan: The `Plan.digest` of the plan that the caller follows. Ranks only compare it.
        **settings: Fields of `flashcomm.settings.Settings`. FLASHCOMM_* variables set the same.

    Raises:
        FormatError, SettingsError: On every rank, if any rank's settings are wrong or differ from the others'.
        CommunicationError: A rank did not call it within the time-out.
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
        self._recent, self._n_calls, self.closed = RecentCalls(self.device, self._guard), 0, False
        self.rank, self.world_size = self.transport.rank, self.transport.world_size
        self._counts = Counts(repr(self), self.settings.debug == "info")
        self.calls, self.sent = self._counts.calls, self._counts.sent

    @property
    def world(self) -> int:
        """Deprecated: use `world_size`."""
        warnings.warn("Communicator.world is now world_size", DeprecationWarning, stacklevel=2)
        return self.world_size

    def all_reduce(
        self, x: Tensor, out: Tensor | None = None, *, format: Format = None, whole: int | None = None
    ) -> Tensor:
        """Sum x over all ranks. Every rank gets the same bits.

        Args:
            x: bf16, fp16 or fp32, any shape and strides; not modified. No quantization group spans two rows (last dim).
            out: The result: contiguous, of x's shape, dtype and device; may be x. None: a new tensor.
            format: The wire format of this call, equal on all ranks. None: that of the Communicator.
            whole: If x is only some rows of a message: the number of values of that message, equal on all ranks. The
                route is chosen for its size, so these rows get the same bits as in one call with all rows.

        Raises:
            InputError: Arguments are wrong or differ between ranks: on all ranks with check=True (default on CPUs).
            ClosedError: The Communicator was closed.
            CommunicationError: A peer died or did not answer within the time-out.
        """
        if out is None and (recent := self._recent.repeat(x, format, whole)):
            result, name, n_bytes = recent
            self._counts.add(name, n_bytes, x)
            self._n_calls += 1
            return result
        return self._collective(Call("all_reduce", x, out, format, whole))

    def reduce_scatter(
        self, x: Tensor, out: Tensor | None = None, *, format: Format = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """Sum x over all ranks and return this rank's shard along dimension 0. Quantizes once, as `format.reduce`.

        Args:
            x: (world_size * n, ...), else as in `all_reduce`.
            out: (n, ...), else as in `all_reduce`; must not overlap x.
            format: As in `all_reduce`.
            sizes: Rows of each rank's shard, equal on all ranks; may be 0. x is then (sum(sizes), ...), and the result
                (sizes[rank], ...). None: equal shards.

        Raises:
            InputError: As in `all_reduce`, or dimension 0 is not divisible by world_size, or not sum(sizes).
        """
        return self._collective(Call("reduce_scatter", x, out, format, split=Split.of(sizes)))

    def all_gather(
        self, x: Tensor, out: Tensor | None = None, *, format: Format = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """Concatenate every rank's x along dimension 0. All are quantized as `format.gather`, this rank's own, too.

        Args:
            x: (n, ...), else as in `all_reduce`.
            out: (world_size * n, ...), else as in `all_reduce`; must not overlap x.
            format: As in `all_reduce`.
            sizes: Rows of each rank's x, equal on all ranks; may be 0. x is then (sizes[rank], ...), and the result
                (sum(sizes), ...). None: all ranks have n.

        Raises:
            InputError: As in `all_reduce`, or this rank's rows are not sizes[rank].
        """
        return self._collective(Call("all_gather", x, out, format, split=Split.of(sizes)))

    def all_to_all_single(
        self,
        x: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        *,
        out: Tensor | None = None,
        format: Format = None,
    ) -> Tensor:
        """Send piece j of x along dimension 0 to rank j. Piece i of the result comes from rank i.

        Values are quantized once, as `format.gather`, but for the piece that stays on its rank. They are sent as they
        are if that would save no bytes (vectors, short rows), and if they are integers, bool, float64 or 8-bit floats.
        Over GPU or host memory equal pieces without sizes are fastest: then all ranks give sizes, or none does.

        Args:
            x: (rows, ...). Ranks may have different numbers of rows; everything else is equal.
            output_split_sizes: Rows that come from each rank; may be 0. None: equal pieces.
            input_split_sizes: Rows that each rank gets; may be 0. None: equal pieces.
            out: (sum(output_split_sizes), ...), else as in `all_reduce`; must not overlap x.
            format: As in `all_reduce`.

        Raises:
            InputError: As in `all_reduce`, or a rank expects other rows than its peer sends.
        """
        exchange = exchange_of(x, out, output_split_sizes, input_split_sizes, self.world_size)
        return self._collective(Call("all_to_all_single", x, out, format, exchange=exchange))

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, format: Format = None
    ) -> tuple[Tensor, Tensor]:
        """Return (rms_norm(residual + all_reduce(x)), residual + all_reduce(x)), both new, as `reference.add_rms_norm`.

        Args:
            x: (..., hidden), bf16, fp16 or fp32.
            residual: Of x's shape, dtype and device.
            weight: (hidden,), of x's dtype and device. Results are equal on all ranks if residual and weight are.
            eps: Added to the mean square.
            format: As in `all_reduce`.
        """
        eps = float(eps) if isinstance(eps, int) else eps  # ranks compare its text
        total = self._collective(Call("all_reduce_add_rms_norm", x, None, format, norm=(residual, weight, eps)))
        return add_rms_norm(total, residual, weight, eps)

    def explain(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        format: Format = None,
        *,
        op: str = "all_reduce",
        whole: int | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Choice:
        """Return the route of a call with its reason and bytes, and why the alternatives were rejected.

        Args:
            shape: The shape of one rank's input.
            dtype: The dtype of the input.
            format: As in `all_reduce`.
            op: "all_reduce", "all_reduce_add_rms_norm", "reduce_scatter", "all_gather" or "all_to_all_single".
            whole: As in `all_reduce`.
            sizes: As in `reduce_scatter` and `all_gather`; for an all-to-all the input_split_sizes.
        """
        split = Split.of(sizes)
        if split is not None and not split.fits(self.world_size, 0):
            raise InputError(f"explain: {Problem.SIZES.advice(self.transport)}")
        fmt = self.format if format is None else WireFormat.parse(format)
        group = (self.world_size, self.device.type, self.machine.local_world_size)
        message = Message.of(op, shape, dtype, group, whole, split)
        return policy.choose(message, fmt, self.settings.algorithm, self.settings.min_bytes, self.machine)

    def synchronize(self) -> None:
        """Block the host until this rank's calls so far are done. On GPUs calls return before that.

        Raises:
            CommunicationError: A peer did not take part in one of them. Without `synchronize` the next call raises it.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for executor in list(self._executors.values()):  # another thread may close this Communicator
            executor.check()

    def close(self) -> None:
        """Free buffers and threads. Not collective. Waits for this rank's calls, also in other threads.

        Later calls raise ClosedError. CUDA graphs that captured calls must not be replayed. Closing again is allowed. A
        Communicator that is dropped without `close` frees the same.
        """
        with self._guard.closing() as idle:
            self.closed = True
            self._recent.clear()
            if idle:  # otherwise this runs within a call, which still needs them, or in a forked process
                for executor in self._executors.values():
                    executor.close()
                self._executors.clear()
            self.transport.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"Communicator(rank {self.rank} of {self.world_size}, {self.format}, {self.device.type}{state})"

    def _collective(self, call: Call) -> Tensor:
        """Validate, route, run and count a call."""
        op, x, whole = call.op, call.x, call.whole
        with self._guard.call(op):
            if self.closed:
                raise ClosedError(f"{op} on a closed Communicator: create a new one")
            fmt = consistency.agree(self.transport, self.settings, call, self._n_calls + 1, self.machine.transport)
            self._n_calls += 1
            self.transport.tags.begin(self._n_calls)
            consistency.check_exchange(self.transport, self.settings, call.exchange)
            out = call.result(self.transport)
            if x.numel() == out.numel() == 0 and not call.exchange:
                return out
            route = self.explain(x.shape, x.dtype, fmt, op=op, whole=whole, sizes=call.sizes).route
            launch = self._executors[route.executor].run(replace(route, exchange=call.exchange), x, out)
            name, n_bytes = f"{op}/{route.label}", route.wire_bytes * x.numel() // whole if whole else route.wire_bytes
            self._counts.add(name, n_bytes, x)
            if launch and op == "all_reduce" and x.is_cuda and self.settings.debug == "off" and not self.settings.check:
                self._recent.keep(x, call.format, whole, name, n_bytes, launch)
            return out
