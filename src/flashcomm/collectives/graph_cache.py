"""Composed collectives that the host launches as one CUDA graph: for staged transports, with many launches a chunk.

A chunk takes some ten launches and copies, which cost the host more time than the GPU. So the second call of a
shape is captured, with kernels that look up where the message and the result lie, and from then on a call stores two
addresses and replays. The first call of a shape, and calls inside a graph that the user captures, run as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcomm.collectives import pipelined
from flashcomm.compat import current_stream_handle
from flashcomm.errors import InputError
from flashcomm.gpu.codec import point
from flashcomm.gpu.indirect import Indirect

Collective = Callable[..., None]  # (x, out, context)
MAX_GRAPHS = 64  # of the shapes used last


class Replayed:
    """Runs collectives made of exchanges (`composed`, `hierarchical`) on one device, on one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        self._cells = torch.empty(4, dtype=torch.int64, device=device)  # two, each 16-byte aligned
        self._kept: OrderedDict[Any, tuple[Any, list[Tensor]] | None] = OrderedDict()  # graphs, the buffers they use
        self._compiled: set[Any] = set()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        compiled = point.warmup(self._cells, 0, 0, grid=(1,))
        self._start, self._index = compiled[(1, 1, 1)], device.index

    def run(self, collective: Collective, x: Tensor, out: Tensor, context: pipelined.Context) -> None:
        """The collective of x into out, both contiguous. Raises InputError where a user's capture lacks kernels."""
        plain = x.dim() == 0 or bool(x.shape[-1] * x.element_size() % 16)  # of the shape, so that all ranks go one way
        capturing, kind = torch.cuda.is_current_stream_capturing(), (collective, x.dtype, context.fmt, plain)
        # Where every rank has a shard, all compile all there is; of less only this very shape is known to be there.
        called = kind if x.numel() >= 2 * context.world_size * context.fmt.unit else (*kind, x.shape)
        if capturing and not {kind, called} & self._compiled:
            raise InputError(
                "a graph is being captured and the kernels for this dtype and format are not there yet: make one such "
                "call before capturing"
            )
        self._compiled.add(called)
        if plain:
            collective(x, out, context)
            return
        # Alignment is a rank's own affair: it takes a copy, and not another way, whose slots would not be the peers'.
        x = x.clone() if x.data_ptr() % 16 else x
        target = torch.empty_like(out) if out.data_ptr() % 16 else out
        stream = current_stream_handle(self._index)
        self._start(self._cells.data_ptr(), x.data_ptr(), target.data_ptr(), stream=stream)
        key = (collective, x.shape, out.shape, x.dtype, context.fmt)
        known, kept = key in self._kept, self._kept.get(key)
        if not known or capturing:
            self._launch(collective, x, target, context)
            self._kept.setdefault(key, None)
        else:
            if kept is None:
                kept = self._kept[key] = self._captured(collective, x, target, context)
            kept[0].replay()
        if target is not out:
            out.copy_(target)
        self._kept.move_to_end(key)
        if len(self._kept) > MAX_GRAPHS:
            self._kept.popitem(last=False)

    def close(self) -> None:
        """Let go of the graphs; what was launched must have ended."""
        self._kept.clear()

    def _launch(self, collective: Collective, x: Tensor, out: Tensor, context: pipelined.Context) -> None:
        cells = [Indirect(self._cells[2 * i : 2 * i + 1], tuple(t.shape), t.dtype) for i, t in enumerate((x, out))]
        collective(*cells, context)

    def _captured(
        self, collective: Collective, x: Tensor, out: Tensor, context: pipelined.Context
    ) -> tuple[Any, list[Tensor]]:
        """A graph of the call; not torch.cuda.graph, which would wait for the device and collect garbage."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._launch(collective, x, out, context)
            finally:
                graph.capture_end()
        return graph, context.workspace.buffers()
