"""The fast path for repeated all-reduces on GPUs: it does as little work on the host as possible."""

from __future__ import annotations

from threading import Lock, get_ident
from typing import Any, Protocol

import torch
from torch import Tensor

from flashcomm.collectives.executors import Launch
from flashcomm.compat import current_gpu
from flashcomm.wire.format import WireFormat

MAX_KINDS = 4096  # the most kinds of calls that are remembered
PLAIN = (Tensor, torch.nn.Parameter)  # types with memory of their own; other subclasses may only wrap tensors


class Guard(Protocol):
    """What the fast path uses of `setup.call_guard.CallGuard`."""

    busy: bool
    owner: int
    lock: Lock


class RecentCalls:
    """The launches of earlier all-reduces on a GPU, by shape, dtype and format."""

    def __init__(self, device: torch.device, guard: Guard) -> None:
        self._device, self._guard = device, guard
        self._kept: dict[Any, tuple[str, int, Launch]] = {}

    def keep(self, x: Tensor, format: Any, whole: int | None, name: str, n_bytes: int, launch: Launch) -> None:
        """Remember the launch of a call, with its name and the bytes it sent."""
        if len(self._kept) >= MAX_KINDS:
            self._kept.clear()
        self._kept[x.shape, x.dtype, format, whole] = name, n_bytes, launch

    def repeat(self, x: Any, format: Any, whole: int | None) -> tuple[Tensor, str, int] | None:
        """Run a call like an earlier one. Return its result, name and bytes; None if it needs the normal path."""
        guard = self._guard
        if not self._kept or guard.busy or not guard.lock.acquire(False):
            return None
        guard.owner, guard.busy = get_ident(), True
        try:
            result = self._repeat(x, format, whole)
            guard.busy = False  # stays True if an exception interrupts the call
            return result
        finally:
            guard.owner = 0
            guard.lock.release()

    def _repeat(self, x: Any, format: Any, whole: int | None) -> tuple[Tensor, str, int] | None:
        if type(x) not in PLAIN or not (format is None or isinstance(format, (str, WireFormat))):
            return None
        kept, device = self._kept.get((x.shape, x.dtype, format, whole)), self._device.index
        if kept is None or x.get_device() != device or not x.is_contiguous() or x.is_neg():
            return None
        source = x.data_ptr()
        if source & 15 or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if current_gpu() != device:  # kernels go to the current device
            return None
        name, n_bytes, launch = kept
        result = torch.empty_like(x)
        launch(source, result.data_ptr())
        return result, name, n_bytes

    def clear(self) -> None:
        self._kept.clear()
