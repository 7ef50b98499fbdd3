"""What the tests share: test bodies that run on every rank, and inputs that reach the corners."""

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
import functools
import importlib
import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch.distributed as dist

from flashcomm import Communicator, WireFormat, reference
from flashcomm.compat import start_sequence_numbers
from flashcomm.ranks import launch
from flashcomm.routing.route import Executor
from flashcomm.wire import torch_codec
from flashcomm.wire.format import StepFormat

T = TypeVar("T")
TIMEOUT_S = float(os.environ.get("RANKS_TIMEOUT_S", 30))  # mutations set less: some make a rank wait in vain


def _patch_triton_once() -> None:
    """Make Triton's interpreter patch `triton.language` once and for good, and not at each call of a jit function.

    Patching takes most of the interpreter's time: a poll of flags takes 1.8 ms with it and 0.7 without. And an
    exception in a test that interrupts a launch could leave half of a patch. Read in Triton 3.6 and 3.7; a release
    without this function is left as it is.
    """
    try:
        from triton.language.core import is_builtin
        from triton.runtime import interpreter

        patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return

    def patch_once(fn: Any) -> Any:
        modules = {v for v in fn.__globals__.values() if inspect.ismodule(v)} & {
            interpreter.tl,
            interpreter.tl.core,
        }
        done = modules and not any(is_builtin(module.load) for module in modules)
        if not done:
            patch(fn)
        return nothing()  # there is nothing to restore

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_triton_once()


def ranks(world_size: int | None = None, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test out of a body that runs on every rank. It fails with the rank that failed first.

    The body's parameters say what a rank is:

        def test_x(group, rank): ...    a thread with a gloo group of its own (`run_ranks`)
        def test_x(ctx): ...            a process, in the default group (`flashcomm.ranks.launch.run`)

    Its other parameters are pytest's: fixtures and parametrized values, the same on every rank. Processes get copies,
    and their tests are functions of a module, not methods.

    Args:
        world_size: None takes the test's parameter `world_size`.
        options: `timeout_s`, and for processes `device`.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(body)
        of_the_rank = {"group", "rank", "ctx"} & signature.parameters.keys()
        assert of_the_rank in ({"ctx"}, {"group", "rank"}), f"{body.__name__} needs (group, rank) or (ctx)"

        @functools.wraps(body)
        def test(*instance: object, **values: Any) -> None:
            __tracebackhide__ = True
            n = values["world_size"] if world_size is None else world_size
            if of_the_rank == {"ctx"}:
                launch.run(_Body(body.__module__, body.__name__), n, (values,), **{"timeout_s": 280} | options)
                return
            results, failed = _on_threads(n, lambda g, r: body(*instance, group=g, rank=r, **values), **options)
            if failed:
                why = results[failed[0]]
                if isinstance(why, pytest.skip.Exception):
                    raise why
                raise AssertionError(f"rank {failed[0]} of {n} failed first: {type(why).__name__}: {why}") from why

        kept = [p for name, p in signature.parameters.items() if name not in of_the_rank]
        test.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]  # what pytest passes
        return test

    return decorate


@dataclass(frozen=True)
class _Body:
    """The body of a test, found by its name in another process."""

    module: str
    name: str

    def __call__(self, ctx: launch.RankContext, values: dict[str, Any]) -> None:
        getattr(importlib.import_module(self.module), self.name).__wrapped__(ctx=ctx, **values)


def run_ranks(
    world_size: int, body: Callable[[dist.ProcessGroup, int], T], timeout_s: float = TIMEOUT_S
) -> list[T | BaseException]:
    """Run body(group, rank) on threads, each with a gloo group of its own; per rank its result or its exception."""
    return _on_threads(world_size, body, timeout_s)[0]


def _on_threads(
    world_size: int, body: Callable[[dist.ProcessGroup, int], Any], timeout_s: float = TIMEOUT_S
) -> tuple[list[Any], list[int]]:
    """The result or exception of each rank, and the ranks that raised, in the order of time."""
    store = dist.HashStore()
    results: list[Any] = [None] * world_size
    failed: list[int] = []

    def thread(rank: int) -> None:
        try:
            results[rank] = body(gloo_group(store, rank, world_size, timeout_s), rank)
        except BaseException as why:  # pytest.fail is no Exception
            results[rank] = why
            failed.append(rank)

    threads = [threading.Thread(target=thread, args=(rank,), daemon=True) for rank in range(world_size)]
    for t in threads:
        t.start()
    deadline = time.monotonic() + 2 * timeout_s
    for rank, t in enumerate(threads):
        t.join(max(0.0, deadline - time.monotonic()))
        assert not t.is_alive(), f"rank {rank} of {world_size} hangs"
    return results, failed


def gloo_group(store: dist.Store, rank: int, world_size: int, timeout_s: float = TIMEOUT_S) -> dist.ProcessGroup:
    """A process group over gloo that is not registered with torch.distributed, so that threads can have one each."""
    backend = dist.ProcessGroupGloo(store, rank, world_size, datetime.timedelta(seconds=timeout_s))
    start_sequence_numbers(backend)
    group = dist.ProcessGroup(store, rank, world_size)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


def raise_first(results: list[T | BaseException]) -> list[T]:
    """The results, or the first rank's exception."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


def all_reduce_everywhere(
    world_size: int, fmt: str, algorithm: str, tensors: list[list[torch.Tensor]], **settings: object
) -> list[list[torch.Tensor]]:
    """Per rank its results for each list of per-rank tensors, all through one Communicator."""

    def body(group: object, rank: int) -> list[torch.Tensor]:
        with Communicator(group, fmt, algorithm=algorithm, **settings) as comm:  # type: ignore[arg-type]
            return [comm.all_reduce(per_rank[rank]) for per_rank in tensors]

    return raise_first(run_ranks(world_size, body))


def errors_of(results: list[Any], kind: type[BaseException]) -> set[str]:
    """The messages of all ranks, each of which must have raised exactly `kind`."""
    assert all(type(r) is kind for r in results), results
    return {str(r) for r in results}


def exact_in_int4(n_rows: int, row: int) -> torch.Tensor:
    """0 to 15, again and again: 4 bits represent these values exactly, and so the sum of any number of ranks."""
    return (torch.arange(row) % 16).float().expand(n_rows, row).contiguous()


def expected(algorithm: str, messages: list[torch.Tensor], fmt: WireFormat, rank: int) -> torch.Tensor:
    """A rank's result of a function of `reference`, some of which return those of all ranks."""
    found = getattr(reference, algorithm)(messages, fmt)
    return found[rank] if isinstance(found, list) else found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits; any NaN equals any NaN, -0.0 differs from 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    bits_a, bits_b = a.contiguous().view(integer), b.contiguous().view(integer)
    return bool(((bits_a == bits_b) | (a.isnan() & b.isnan())).all())


def massive(dtype: torch.dtype, world_size: int) -> list[torch.Tensor]:
    """Return a message of shape (4, 256) per rank, as a large model has them: one channel and one row stand out.

    Their partial sums are 300,000, of alternating sign, and add up to 75,000. In fp16 partial sums are 60,000 at most.
    """
    generator = torch.Generator().manual_seed(world_size)
    messages = [torch.randn(4, 256, generator=generator) for _ in range(world_size)]
    large, total = (300_000.0, 75_000.0) if dtype != torch.float16 else (60_000.0, 75_000.0)
    for rank, message in enumerate(messages):
        message[0, ::16] = large if rank % 2 == 0 else -large
        message[1:, 5] = 40_000.0 / world_size
    if world_size % 2:
        messages[-1][0, ::16] = 0.0
    left = total  # so that the sum is `total`, in steps that the dtype can hold
    for message in messages[1::2]:
        step = min(left, 2 * large)
        message[0, ::16] += step
        left -= step
    assert left == 0
    return [message.to(dtype) for message in messages]


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


def halfway(step: StepFormat, n_groups: int, seed: int = 0) -> torch.Tensor:
    """Groups whose extremes are halfway between two codes: the largest value is rounded to a code above the last one.

    All values are multiples of 1/32 of the scale, so that many squares of errors are equal. They are to be quantized as
    they are.
    """
    generator = torch.Generator().manual_seed(seed)
    low = 0.5 - torch.randint(1, step.levels // 2 + 1, (n_groups, 1), generator=generator) * 2
    x = torch.randint(0, 32 * step.levels + 1, (n_groups, step.group), generator=generator) / 32
    x[:, 0], x[:, 1] = 0, step.levels
    return (low + x) * torch.randint(16, 32, (n_groups, 1), generator=generator)


def over_cuda(fmt: str, **settings: Any) -> Communicator:
    """A Communicator of all ranks for GPU tensors, also where they share a GPU and so have no NCCL."""
    return Communicator(None, fmt, device="cuda", **settings)


# A short time-out over shared memory. The interpreter counts polls, and takes some ten times as long.
SHORT_S = 2.0 if N_GPUS >= 2 else 0.2


def kernels_of(comm: Communicator) -> Any:
    """The `KernelCollectives` of a Communicator over shared memory."""
    return comm._executors[Executor.KERNEL].kernels  # type: ignore[attr-defined]


def wait_at_most(comm: Communicator, seconds: float) -> None:
    """From now on calls over shared memory wait only this long for a peer. Collective, after the first call.

    A short time-out from the beginning would fail by chance: ranks that compile kernels may be seconds apart.
    """
    comm.synchronize()
    dist.barrier()
    kernels_of(comm).timeout_s = seconds
    comm._recent.clear()  # what it keeps has the old limit


DTYPES = torch_codec.DTYPES
