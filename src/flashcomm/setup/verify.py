"""Verification of results while a program runs, for people who suspect their machine: FLASHCOMM_VERIFY=N.

Every Nth call, each rank gathers the inputs of all ranks and compares its result with `reference`. That takes much more
time and memory than the call. The replays of a CUDA graph are not verified, nor is the backend's own all-reduce, whose
order of additions is its own, nor a gather of different numbers of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcomm import reference
from flashcomm.collectives.executors import Base, Launch
from flashcomm.errors import CommunicationError
from flashcomm.routing.route import Executor, Route
from flashcomm.setup import consistency
from flashcomm.transports.process_group import ProcessGroupTransport

VERIFIED = ("all_reduce", "all_reduce_add_rms_norm", "reduce_scatter", "all_gather")


class Verifier:
    """Counts the calls of a Communicator, and verifies every Nth of them.

    Args:
        transport: The transport among the ranks.
        every: N.
        local_world_size: Ranks of a node, for `hierarchical`.
    """

    def __init__(self, transport: ProcessGroupTransport, every: int, local_world_size: int) -> None:
        self.transport, self.every, self.local_world_size, self.n_calls = transport, every, local_world_size, 0

    def around(self, executors: dict[Executor, Base]) -> dict[Executor, Base]:
        """Return executors that run these and verify their results."""
        return {
            kind: _Verified(executor, self) if kind in (Executor.PIPELINED, Executor.KERNEL) else executor
            for kind, executor in executors.items()
        }

    def is_next(self, x: Tensor) -> bool:
        """Count a call of x. Return whether to verify it; equal on all ranks."""
        self.n_calls += 1
        return self.n_calls % self.every == 0 and not (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def verify(self, route: Route, x: Tensor, out: Tensor) -> None:
        """Compare a result with the reference. Collective.

        Args:
            route: The route of the call.
            x: This rank's input.
            out: The result.

        Raises:
            CommunicationError: On every rank, if the result of any rank is wrong.
        """
        transport, sent = self.transport, self.transport.n_bytes_sent
        mine = x.contiguous().view(-1).view(torch.uint8)
        rows = torch.empty((transport.world_size, mine.numel()), dtype=torch.uint8, device=x.device)
        transport.all_gather(rows, mine, "verifying a result", overlap=False).wait()
        inputs = [row.view(x.dtype).view(x.shape) for row in rows]
        want = self._expected(route, inputs)
        wrong = int(((out != want) & ~(out.isnan() & want.isnan())).sum())
        everyone = consistency.exchange(transport, wrong, "comparing verifications")
        transport.n_bytes_sent = sent  # the counter does not include checks
        if any(everyone):
            ranks = "; ".join(f"rank {r}: {n} of {out.numel()} values" for r, n in enumerate(everyone) if n)
            raise CommunicationError(
                f"FLASHCOMM_VERIFY: call {self.n_calls}, {route.op} by {route.algorithm} as {route.format} over "
                f"{route.transport}, differs from the reference: {ranks}. This machine's {route.transport} cannot be "
                "trusted: set FLASHCOMM_TRANSPORT to another one, and please report it with the output of "
                "`flashcomm doctor`"
            )

    def _expected(self, route: Route, inputs: list[Tensor]) -> Tensor:
        if route.op == "reduce_scatter":
            sizes = None if route.split is None else route.split.sizes
            return reference.reduce_scatter(inputs, route.format, sizes)[self.transport.rank]
        if route.op == "all_gather":
            return reference.all_gather(inputs, route.format)
        return reference.all_reduce(route.algorithm, inputs, route.format, self.local_world_size)


class _Verified(Base):
    """An executor whose results are verified. It offers no function that repeats a call, because that would not be."""

    def __init__(self, executor: Base, verifier: Verifier) -> None:
        self.executor, self.verifier = executor, verifier

    def prepare(self, route: Route, x: Tensor) -> None:
        self.executor.prepare(route, x)

    def run(self, route: Route, x: Tensor, out: Tensor) -> Launch | None:
        inputs_differ = route.op == "all_gather" and route.split is not None  # in size
        if route.op not in VERIFIED or inputs_differ or not self.verifier.is_next(x):
            self.executor.run(route, x, out)
            return None
        given = x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)  # out may be x
        self.executor.run(route, x, out)
        self.verifier.verify(route, given, out)
        return None

    def check(self) -> None:
        self.executor.check()

    def close(self) -> None:
        self.executor.close()
