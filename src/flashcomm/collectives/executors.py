"""The executors: one class for each `routing.route.Executor`, with a method `run(route, x, out)`.

The output is contiguous. Executors copy an input that their kernels cannot read as it is. Alignment may differ between
ranks, so it never changes a route. On GPUs `run` returns when all work is enqueued.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashcomm.collectives import pieces, pipelined
from flashcomm.collectives.hierarchical import hierarchical
from flashcomm.compat import current_stream_handle
from flashcomm.routing.route import Route
from flashcomm.transports.process_group import ProcessGroupTransport

if TYPE_CHECKING:
    from flashcomm.gpu.launch import KernelCollectives

Launch = Callable[[int, int], None]  # arguments: the addresses of a message and of its result
ALGORITHMS = {
    "one_shot": pipelined.one_shot,
    "two_shot": pipelined.two_shot,
    "reduce_scatter": pieces.reduce_scatter,
    "all_gather": pieces.all_gather,
    "all_to_all_single": pieces.all_to_all_single,
    "hierarchical": hierarchical,
}


class Base:
    """An executor. `check` raises errors that kernels reported. `close` frees its memory after its calls have ended."""

    def run(self, route: Route, x: Tensor, out: Tensor) -> Launch | None:
        """Run a route from x to out.

        Returns:
            A function that repeats the call for other tensors of this shape and dtype, which must be contiguous and
            aligned to 16 bytes. None if the executor has no such function.
        """
        raise NotImplementedError

    def prepare(self, route: Route, x: Tensor) -> None:
        """Compile what `run` needs for messages like x."""

    def check(self) -> None: ...

    def close(self) -> None: ...


class Copy(Base):
    """A copy, for a group of one rank: no message is sent."""

    def run(self, route: Route, x: Tensor, out: Tensor) -> None:
        out.copy_(x)


class Backend(Base):
    """torch.distributed's own all-reduce."""

    def __init__(self, transport: ProcessGroupTransport) -> None:
        self.transport = transport

    def run(self, route: Route, x: Tensor, out: Tensor) -> None:
        out.copy_(x)
        self.transport.all_reduce_backend(out, "the backend's all-reduce").wait()


class Pipelined(Base):
    """Codec and exchanges chunk by chunk over a process group."""

    def __init__(self, context: pipelined.Context) -> None:
        self.context = context

    def run(self, route: Route, x: Tensor, out: Tensor) -> None:
        context = replace(self.context, fmt=route.format, chunk_bytes=route.chunk_bytes, split=route.split)
        context.exchange = route.exchange
        with on_device(x):
            ALGORITHMS[route.algorithm](x.resolve_neg().contiguous(), out, context)

    def close(self) -> None:
        self.context.workspace, self.context.nodes = pipelined.Workspace(self.context.workspace.device), None


class Kernel(Base):
    """One launch, or a few for messages larger than the workspace, over memory that ranks share."""

    def __init__(self, kernels: KernelCollectives, order: StreamOrder) -> None:
        self.kernels, self.order = kernels, order

    def prepare(self, route: Route, x: Tensor) -> None:
        with on_device(x):
            self.kernels.plan(route.algorithm, x, x.shape[-1], route.format)

    def run(self, route: Route, x: Tensor, out: Tensor) -> Launch | None:
        if route.split is not None:
            padded = pieces.padded(x, out, route.split, route.op)
            self.run(replace(route, split=None), padded.x, padded.out)
            padded.copy_back(out)
            return None
        with on_device(x):
            self.order.enter()
            x = _aligned_copy(x)
            target = torch.empty_like(out) if out.data_ptr() % 16 else out
            row = x.shape[-1] if x.dim() > 1 else min(x.numel(), out.numel())
            launch = self.kernels.plan(route.algorithm, x, row, route.format)
            launch(x.data_ptr(), target.data_ptr())
            if target is not out:
                out.copy_(target)

        def repeat(source: int, target: int) -> None:
            self.order.enter()
            launch(source, target)

        return repeat

    def check(self) -> None:
        self.kernels.check()

    def close(self) -> None:
        self.kernels.close()


class StreamOrder:
    """Orders calls that share a region: each call waits for the previous one, if that ran on another stream."""

    def __init__(self, kernels: KernelCollectives, device: torch.device) -> None:
        self.kernels, self.device = kernels, device
        self._stream: torch.cuda.Stream | None = None

    def enter(self) -> None:
        """Make the current stream wait for the previous call. Raise CommunicationError if an earlier call timed out."""
        self.kernels.check()
        if self.device.type != "cuda":
            return
        if self._stream is None or self._stream.cuda_stream != current_stream_handle(self.device.index):
            current = torch.cuda.current_stream(self.device)
            if self._stream is not None and not torch.cuda.is_current_stream_capturing():
                current.wait_stream(self._stream)
            self._stream = current


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that makes x's GPU the current device, where kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _aligned_copy(x: Tensor) -> Tensor:
    """Return x if it is contiguous and aligned to 16 bytes, else a copy that is."""
    x = x.resolve_neg().contiguous()
    return x.clone() if x.data_ptr() % 16 else x
