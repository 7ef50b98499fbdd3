"""Tensors whose address kernels look up when they run, so that one CUDA graph serves every tensor of a shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Indirect:
    """A contiguous, 16-byte aligned tensor, or values of it from `start` on; `cell` (int64, on the device) holds its
    address. It stands for a tensor wherever nothing but the Triton codec touches values."""

    cell: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def view(self, *_: int) -> Indirect:
        """Flat."""
        return replace(self, shape=(self.numel(),))

    def __getitem__(self, span: slice) -> Indirect:
        start, stop, _ = span.indices(self.numel())
        return replace(self, shape=(stop - start,), start=self.start + start)
