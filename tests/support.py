"""What the tests share: ranks as threads over real gloo, and inputs that reach the corners."""

from __future__ import annotations

import os

import torch

N_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NCCL = N_GPUS >= 2
if N_GPUS and os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1":
    N_GPUS, NCCL = 4, False  # ranks that can have a GPU, be it the same: then without NCCL
if not N_GPUS:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton; ranks inherit it

import datetime
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from flashcomm import Communicator
from flashcomm.wire import torch_codec

T = TypeVar("T")


def run_ranks(
    world_size: int, body: Callable[[dist.ProcessGroup, int], T], timeout_s: float = 30
) -> list[T | BaseException]:
    """body(group, rank) on `world` threads, each with a gloo group of its own; per rank its result or its exception."""
    store = dist.HashStore()
    results: list[Any] = [None] * world_size

    def thread(rank: int) -> None:
        try:
            results[rank] = body(gloo_group(store, rank, world_size, timeout_s), rank)
        except BaseException as why:  # pytest.fail is no Exception
            results[rank] = why

    threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(world_size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout_s + 30)
        assert not t.is_alive(), "a rank hangs"
    return results


def gloo_group(store: dist.Store, rank: int, world_size: int, timeout_s: float = 30) -> dist.ProcessGroup:
    """A process group over gloo that is not registered with torch.distributed, so that threads can have one each."""
    backend = dist.ProcessGroupGloo(store, rank, world_size, datetime.timedelta(seconds=timeout_s))
    backend._set_sequence_number_for_group()
    group = dist.ProcessGroup(store, rank, world_size)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


def raise_first(results: list[T | BaseException]) -> list[T]:
    """The results, or the first rank's exception."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits; any NaN equals any NaN, -0.0 differs from 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    bits_a, bits_b = a.contiguous().view(integer), b.contiguous().view(integer)
    return bool(((bits_a == bits_b) | (a.isnan() & b.isnan())).all())


def tough(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values of very different size from row to row, with outliers, constant rows, zeros and -0.0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if x.dim() > 1:
        x = x * torch.exp(3 * torch.randn((*shape[:-1], 1), generator=generator))
    flat = x.view(-1)
    if flat.numel() > 40:
        flat[7] *= 60
        flat[11:14] = 0.0
        flat[14] = -0.0
        flat[20:36] = 1.7
    return x.to(dtype)


def over_cuda(fmt: str, **settings: Any) -> Communicator:
    """A Communicator of all ranks for GPU tensors, also where they share a GPU and so have no NCCL."""
    return Communicator(None, fmt, device="cuda", **settings)


DTYPES = torch_codec.DTYPES
