"""The input and output of routing: messages, machines and routes. They are plain values, equal on every rank.

A route says how a message travels: algorithm, format, transport, executor and chunk size. `policy.choose` alone decides
it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashcomm.routing.timings import Timings
from flashcomm.wire.format import WireFormat
from flashcomm.wire.split import Exchange, Split

OPS = ("all_reduce", "all_reduce_add_rms_norm", "reduce_scatter", "all_gather", "all_to_all_single")


class Executor(enum.Enum):
    """The code that runs a route. A Communicator has one object for each executor that its machine allows."""

    COPY = "copy"  # one rank, or no values: nothing is sent
    BACKEND = "backend"  # torch.distributed's own all-reduce
    PIPELINED = "pipelined"  # codec and exchanges, chunk by chunk, over a process group
    KERNEL = "kernel"  # one kernel, over memory that ranks share


@dataclass(frozen=True)
class Message:
    """The properties of a call that routing depends on, all equal on every rank.

    Attributes:
        numel: Values in this rank's input; of the largest one if ranks gather different numbers of rows.
        row: Values in the last dimension, which quantization groups do not cross.
        itemsize: Bytes of a value.
        world_size: Ranks of the group.
        device_type: "cpu" or "cuda".
        local_world_size: Ranks of a node; 0 if not known or if ranks are not ordered by node.
        op: One of `OPS`.
        split: Rows of each rank's piece in reduce_scatter and all_gather, or that this rank sends in an all-to-all.
            None: equal pieces. In an all-to-all with a split neither numel nor split need be equal on all ranks.
        quantizable: Whether the dtype can be quantized.
    """

    numel: int
    row: int
    itemsize: int
    world_size: int
    device_type: str
    local_world_size: int = 0
    op: str = "all_reduce"
    split: Split | None = None
    quantizable: bool = True

    @classmethod
    def of(
        cls,
        op: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        group: tuple[int, str, int],
        whole: int | None = None,
        split: Split | None = None,
    ) -> Message:
        """Return the message of an input of this shape.

        Args:
            op: One of `OPS`.
            shape: The shape of one rank's input.
            dtype: The dtype of the input.
            group: world_size, device_type and local_world_size.
            whole: If the input is only some rows of a message: the number of values of that message.
            split: Rows of each rank's piece. Equal pieces are the same as None, except in an all-to-all.
        """
        row = shape[-1] if shape else 1
        if split is not None and split.is_even and op != "all_to_all_single":
            split = None
        if split is not None or op == "all_to_all_single":
            row = row if len(shape) > 1 else 1  # the pieces of a vector are rows of different lengths
            rows = split.largest if split is not None and op == "all_gather" else shape[0]
            quantizable = dtype in (torch.bfloat16, torch.float16, torch.float32)
            return cls(rows * math.prod(shape[1:]), row, dtype.itemsize, *group, op, split, quantizable)
        if op == "reduce_scatter" and len(shape) == 1:  # its row is one rank's shard
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
    """The transport, timings and nodes that the ranks of a group found, equal on all of them.

    Attributes:
        transport: The transport of low-bit messages: "process_group", "symmetric", "host_memory" or "cpu_shared".
        timings: Measured times of machines of this kind; None if there are none.
        rejected: Other transports, each with the reason against it.
        local_world_size: As in `Message`.
        chunk_bytes: Message bytes per chunk of the pipelined executor.
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
        transport: The transport that carries the bytes.
        executor: The executor that runs it.
        chunk_bytes: Message bytes per chunk; 0 for executors that do not cut messages.
        wire_bytes: Payload bytes that one rank sends to others; the busiest one if they differ.
        reason: Why this route was chosen, as text.
        split: As in `Message`.
        exchange: For an all-to-all, the rows that this rank sends and receives. `explain` leaves it out.
    """

    op: str
    algorithm: str
    format: WireFormat
    transport: str
    executor: Executor
    chunk_bytes: int
    wire_bytes: int
    reason: str
    split: Split | None = None
    exchange: Exchange | None = None

    @property
    def low_bit(self) -> bool:
        """Whether values are quantized."""
        return not self.format.uncompressed

    @property
    def label(self) -> str:
        """Its name in counters, after the op: the algorithm, or the executor if the op has only one algorithm."""
        return self.executor.value if self.algorithm == self.op else self.algorithm


@dataclass(frozen=True)
class Rejected:
    """An algorithm or transport that was not chosen, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """A route and the rejected alternatives. `str()` gives the text that `flashcomm doctor` prints."""

    route: Route
    rejected: tuple[Rejected, ...]

    def __str__(self) -> str:
        route = self.route
        what = route.algorithm + (f" as {route.format}" if route.algorithm not in ("copy", "backend") else "")
        over = "" if route.executor is Executor.COPY else f" over {route.transport}"
        lines = [f"{what}{over}: {route.wire_bytes} bytes a rank; {route.reason}"]
        return "\n".join(lines + [f"  not {other.name}: {other.reason}" for other in self.rejected])
