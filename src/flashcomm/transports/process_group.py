"""Bytes over any torch.distributed process group: gloo on CPUs, NCCL on GPUs, across hosts.

Two verbs, both with equal pieces and both asynchronous: `all_to_all` and `all_gather`. They call the group's own
methods rather than `torch.distributed` functions, so that a group which is not registered by name (the inner one of
our c10d backend) serves as well.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
)

from flashcomm.errors import CommunicationError


class Pending:
    """An exchange in flight; `wait()` makes its result usable (on GPUs: by the current stream)."""

    def __init__(self, work: Any, what: str, transport: ProcessGroupTransport) -> None:
        self._work, self._what, self._transport = work, what, transport

    def wait(self) -> None:
        """Raises CommunicationError naming the phase when a peer died or did not answer within the time-out."""
        transport = self._transport
        try:
            if transport.host_waits:
                done = self._work.wait(timedelta(seconds=transport.timeout_s))
            else:  # NCCL: order the current stream behind the exchange; its watchdog keeps the group's time-out
                done = self._work.wait()
        except RuntimeError as why:
            raise CommunicationError(
                f"rank {transport.rank} of {transport.world}: {self._what} failed: a peer died or did not answer "
                f"within {transport.timeout_s:g} s (FLASHCOMM_TIMEOUT_S). Restart the group; the first to fail says "
                f"more. The backend said: {str(why).splitlines()[0]}"
            ) from why
        if done is False:
            raise CommunicationError(f"rank {transport.rank} of {transport.world}: {self._what} did not complete")


class ProcessGroupTransport:
    """The two byte verbs over a c10d group. `n_bytes_sent` counts what this rank sent to others, payload only."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> None:
        self.group, self.device, self.timeout_s = group, device, timeout_s
        self.rank, self.world = group.rank(), group.size()
        self.host_waits = device.type == "cpu"
        self.n_bytes_sent = 0

    def all_to_all(self, out: Tensor, inp: Tensor, what: str) -> Pending:
        """Row j of inp goes to rank j; row i of out comes from rank i. Both uint8 (world, n), contiguous."""
        self.n_bytes_sent += inp.numel() // self.world * (self.world - 1)
        options = AllToAllOptions()
        return Pending(self.group.alltoall_base(out.view(-1), inp.view(-1), [], [], options), what, self)

    def all_gather(self, out: Tensor, inp: Tensor, what: str) -> Pending:
        """inp, uint8 (n,), goes to everybody; row i of out, uint8 (world, n), comes from rank i."""
        self.n_bytes_sent += inp.numel() * (self.world - 1)
        return Pending(self.group._allgather_base(out.view(-1), inp, AllgatherOptions()), what, self)

    def all_reduce_native(self, x: Tensor, what: str) -> Pending:
        """The backend's own sum of x, in place; its algorithm and its order of additions."""
        self.n_bytes_sent += 2 * (self.world - 1) * x.numel() * x.element_size() // self.world
        options = AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]
        return Pending(self.group.allreduce([x], options), what, self)
