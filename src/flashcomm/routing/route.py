"""What routing takes and gives: messages, machines and routes. Plain values, equal on every rank.

A route is the one answer to "how does this message travel?": which algorithm, in which format, over which transport,
run by what, in which chunks. `policy.choose` makes it; nothing downstream decides again.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashcomm.routing.timings import Timings
from flashcomm.wire.format import WireFormat

OPS = ("all_reduce", "all_reduce_add_rms_norm", "reduce_scatter", "all_gather")


class Executor(enum.Enum):
    """What runs a message. A Communicator has one object for each of those that its machine allows."""

    COPY = "copy"  # nothing travels: one rank, or no values
    BACKEND = "backend"  # torch.distributed's own all-reduce
    PIPELINED = "pipelined"  # codec and exchanges, chunk by chunk, over a process group
    KERNEL = "kernel"  # one kernel, over memory that ranks share


@dataclass(frozen=True)
class Message:
    """A call as far as decisions go: sizes in values and bytes, all equal on every rank.

    Attributes:
        numel: Values in this rank's input.
        row: Values in the last dimension, which quantization groups do not cross.
        itemsize: Bytes of a value.
        world_size: Ranks of the group.
        device_type: "cpu" or "cuda".
        local_world_size: Ranks of a node; 0 if not known or if ranks are not ordered by node.
        op: One of `OPS`.
    """

    numel: int
    row: int
    itemsize: int
    world_size: int
    device_type: str
    local_world_size: int = 0
    op: str = "all_reduce"

    @classmethod
    def of(
        cls, op: str, shape: Sequence[int], dtype: torch.dtype, group: tuple[int, str, int], whole: int | None = None
    ) -> Message:
        """The message of an input of that shape.

        Args:
            op: One of `OPS`.
            shape: Of the input on one rank.
            dtype: Of the input.
            group: world_size, device_type and local_world_size.
            whole: Values of the message that the input is some rows of.
        """
        row = shape[-1] if shape else 1
        if op == "reduce_scatter" and len(shape) == 1:  # a row is what one rank gets of it
            row //= group[0]
        return cls(math.prod(shape) if whole is None else whole, row, dtype.itemsize, *group, op)

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world_size if self.local_world_size else 1

    @property
    def n_bytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Machine:
    """What the ranks of a group found that they can do, the same on all of them.

    Attributes:
        transport: Over what low-bit messages go: "process_group", "symmetric", "host_memory" or "cpu_shared".
        timings: Measured times of machines of this kind; None if there are none.
        rejected: Other transports, each with the reason.
        local_world_size: As in `Message`.
        chunk_bytes: Message bytes that the pipelined executor encodes and sends at a time.
    """

    transport: str = "process_group"
    timings: Timings | None = None
    rejected: tuple[tuple[str, str], ...] = ()
    local_world_size: int = 0
    chunk_bytes: int = 4 << 20


@dataclass(frozen=True)
class Route:
    """How a message travels.

    Attributes:
        op: One of `OPS`.
        algorithm: "copy", "backend", "one_shot", "two_shot", "hierarchical", or the op's own name.
        format: The wire format.
        transport: Over what the bytes go.
        executor: What runs it.
        chunk_bytes: Message bytes encoded and sent at a time; 0 for executors that do not cut messages.
        wire_bytes: Payload that one rank sends to others.
        reason: Why this route, for people.
    """

    op: str
    algorithm: str
    format: WireFormat
    transport: str
    executor: Executor
    chunk_bytes: int
    wire_bytes: int
    reason: str

    @property
    def low_bit(self) -> bool:
        """Whether values are quantized on the way."""
        return not self.format.uncompressed

    @property
    def label(self) -> str:
        """What counters call it behind the op: its algorithm, or the executor where an op has only one algorithm."""
        return self.executor.value if self.algorithm == self.op else self.algorithm


@dataclass(frozen=True)
class Rejected:
    """An algorithm or transport that was not taken, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """A route and its alternatives; `str()` of it is what `Communicator.explain` and `flashcomm doctor` print."""

    route: Route
    rejected: tuple[Rejected, ...]

    def __str__(self) -> str:
        route = self.route
        what = route.algorithm + (f" as {route.format}" if route.algorithm not in ("copy", "backend") else "")
        over = "" if route.executor is Executor.COPY else f" over {route.transport}"
        lines = [f"{what}{over}: {route.wire_bytes} bytes a rank; {route.reason}"]
        return "\n".join(lines + [f"  not {other.name}: {other.reason}" for other in self.rejected])
