"""What runs a route: one class for each `routing.route.Executor`, all with `run(route, x, out)`.

Input and output are contiguous tensors of the shapes that the route's op wants; executors make the copies that their
kernels need (alignment is a rank's own affair and never changes a route). On GPUs `run` returns when all is enqueued.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashcomm.collectives import pipelined
from flashcomm.collectives.hierarchical import hierarchical
from flashcomm.compat import current_stream_handle
from flashcomm.routing.route import Route
from flashcomm.transports.process_group import ProcessGroupTransport

if TYPE_CHECKING:
    from flashcomm.gpu.launch import KernelCollectives

Launch = Callable[[int, int], None]  # from the address of a message to that of its result
ALGORITHMS = {
    "one_shot": pipelined.one_shot,
    "two_shot": pipelined.two_shot,
    "reduce_scatter": pipelined.reduce_scatter,
    "all_gather": pipelined.all_gather,
    "hierarchical": hierarchical,
}


class Base:
    """An executor. `close` frees what it holds once its calls have ended; `check` raises what kernels reported."""

    def run(self, route: Route, x: Tensor, out: Tensor) -> Launch | None:
        """Run a route from x to out.

        Returns:
            What repeats it for other tensors of this shape and dtype, given their addresses (contiguous, 16-byte
            aligned); None if nothing does.
        """
        raise NotImplementedError

    def check(self) -> None: ...

    def close(self) -> None: ...


class Copy(Base):
    """Nothing travels: a group of one rank."""

    def run(self, route: Route, x: Tensor, out: Tensor) -> None:
        out.copy_(x)


class Backend(Base):
    """torch.distributed's own all-reduce."""

    def __init__(self, transport: ProcessGroupTransport) -> None:
        self.transport = transport

    def run(self, route: Route, x: Tensor, out: Tensor) -> None:
        out.copy_(x)
        self.transport.all_reduce_native(out, "the backend's all-reduce").wait()


class Pipelined(Base):
    """Codec and exchanges chunk by chunk over a process group."""

    def __init__(self, context: pipelined.Context) -> None:
        self.context = context

    def run(self, route: Route, x: Tensor, out: Tensor) -> None:
        context = replace(self.context, fmt=route.format, chunk_bytes=route.chunk_bytes)
        with on_device(x):
            ALGORITHMS[route.algorithm](x.resolve_neg().contiguous(), out, context)

    def close(self) -> None:
        self.context.workspace, self.context.nodes = pipelined.Workspace(self.context.workspace.device), None


class Kernel(Base):
    """One launch, or a few for messages larger than the workspace, over memory that ranks share."""

    def __init__(self, kernels: KernelCollectives, order: StreamOrder) -> None:
        self.kernels, self.order = kernels, order

    def run(self, route: Route, x: Tensor, out: Tensor) -> Launch:
        with on_device(x):
            self.order.enter()
            x = _aligned_copy(x)
            target = torch.empty_like(out) if out.data_ptr() % 16 else out
            row = x.shape[-1] if x.dim() > 1 else min(x.numel(), out.numel())
            launch = self.kernels.plan(route.algorithm, x, row, route.format)
            launch(x.data_ptr(), target.data_ptr())
            if target is not out:
                out.copy_(target)

        def again(source: int, target: int) -> None:
            self.order.enter()
            launch(source, target)

        return again

    def check(self) -> None:
        self.kernels.check()

    def close(self) -> None:
        self.kernels.close()


class StreamOrder:
    """Calls that share a region run in order: each call waits for the last one if that was on another stream."""

    def __init__(self, kernels: KernelCollectives, device: torch.device) -> None:
        self.kernels, self.device = kernels, device
        self._stream: torch.cuda.Stream | None = None

    def enter(self) -> None:
        """Raise CommunicationError if an earlier call timed out; order the current stream behind the last call."""
        self.kernels.check()
        if self.device.type != "cuda":
            return
        if self._stream is None or self._stream.cuda_stream != current_stream_handle(self.device.index):
            current = torch.cuda.current_stream(self.device)
            if self._stream is not None and not torch.cuda.is_current_stream_capturing():
                current.wait_stream(self._stream)
            self._stream = current


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's GPU the current one, to which kernels go."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _aligned_copy(x: Tensor) -> Tensor:
    """x, or a copy of it, contiguous and aligned to 16 bytes."""
    x = x.resolve_neg().contiguous()
    return x.clone() if x.data_ptr() % 16 else x
