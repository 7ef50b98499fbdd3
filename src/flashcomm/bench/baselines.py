"""The baselines: the backend's own all-reduce, and those of other projects.

    backend          torch.distributed.all_reduce in place: NCCL or gloo itself
    symm one-shot    torch.ops.symm_mem.one_shot_all_reduce: every rank reads all messages from its peers' memory
    symm two-shot    torch.ops.symm_mem.two_shot_all_reduce_: the same in two steps, in place
    vllm custom      vLLM's CustomAllreduce, if vllm is installed
    flashinfer fp8   flashinfer.comm.quantized_all_reduce, if flashinfer is installed: low-bit

Each is timed at the interface that favors it. If it needs inputs in certain memory, they are there already, and the
copy is not timed (`note` says what the time includes). None of them uses NVLink multicast: it is turned off in torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.bench.records import BACKEND
from flashcomm.ranks.launch import RankContext
from flashcomm.setup import consistency
from flashcomm.transports.process_group import ProcessGroupTransport
from flashcomm.wire.format import UNCOMPRESSED

SMALL = 2.0**-8  # inputs are timed at this scale, so that repeated sums in place stay finite
NAMES = (BACKEND, "symm one-shot", "symm two-shot", "vllm custom", "flashinfer fp8")


class Implementation:
    """An all-reduce to measure. `load` inputs once for each size, then `refill` and `run` any number of times."""

    path = ""
    format = UNCOMPRESSED  # or the format of a low-bit one
    transport = ""
    note = "new output"  # what the time includes
    in_place = False
    same_bits = False  # whether every rank must get the same bits, which is verified

    inputs: Sequence[Tensor] = ()

    def load(self, inputs: Sequence[Tensor]) -> None:
        """Take this rank's inputs: contiguous, of one shape and dtype."""
        self.inputs = inputs

    def refill(self, scale: float = 1.0) -> None:
        """Reset every buffer to `scale` times the loaded input, if there are buffers that are reduced in place."""

    def run(self, i: int) -> Tensor:
        """Reduce input i. If this is in place, the next run of i starts from the sum."""
        raise NotImplementedError

    def capture(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which to capture a CUDA graph of runs."""
        return contextlib.nullcontext()

    def refuses(self, x: Tensor, world_size: int) -> str | None:
        """Return why it cannot reduce messages like x, or None. Equal on all ranks."""
        return None

    def wire_bytes(self, n_bytes: int, world_size: int) -> int | None:
        """Return the payload bytes that a rank sends, or peers read from it, for a message; None if unknown."""
        return 2 * (world_size - 1) * n_bytes // world_size

    def expected(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return the exact bits of the sum of all ranks' tensors; None if they are not defined."""
        return None


def max_sums_in_place(dtype: torch.dtype, world_size: int) -> int:
    """Return how often inputs below 32, scaled by SMALL, can be summed in place before values overflow."""
    return max(1, int(math.log(torch.finfo(dtype).max / (32 * SMALL)) / math.log(world_size)))


class Backend(Implementation):
    path = BACKEND
    note = "in place"
    in_place = True
    same_bits = True

    def load(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.buffers = [torch.empty_like(x) for x in inputs]

    def refill(self, scale: float = 1.0) -> None:
        for buffer, x in zip(self.buffers, self.inputs, strict=True):
            torch.mul(x, scale, out=buffer)

    def run(self, i: int) -> Tensor:
        dist.all_reduce(self.buffers[i])
        return self.buffers[i]


class SymmOneShot(Backend):
    """`pool` (flat, symmetric memory) is shared with the two-shot. Each refills it before it runs."""

    path = "symm one-shot"
    transport = "symmetric"
    note = "input lies in symmetric memory, no copy timed; new output"
    in_place = False
    same_bits = False  # ranks add in different orders

    def __init__(self, pool: Tensor) -> None:
        self.pool, self.group_name = pool, dist.group.WORLD.group_name  # type: ignore[union-attr]

    def load(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        step = padded(inputs[0].numel())
        self.buffers = [self.pool[i * step :][: x.numel()].view(x.shape) for i, x in enumerate(inputs)]

    def run(self, i: int) -> Tensor:
        out: Tensor = torch.ops.symm_mem.one_shot_all_reduce(self.buffers[i], "sum", self.group_name)
        return out

    def refuses(self, x: Tensor, world_size: int) -> str | None:
        return "takes multiples of 4 bytes" if x.nbytes % 4 else None

    def wire_bytes(self, n_bytes: int, world_size: int) -> int:
        return (world_size - 1) * n_bytes


class SymmTwoShot(SymmOneShot):
    path = "symm two-shot"
    note = "in place in symmetric memory, no copy timed"
    in_place = True

    def run(self, i: int) -> Tensor:
        out: Tensor = torch.ops.symm_mem.two_shot_all_reduce_(self.buffers[i], "sum", self.group_name)
        return out

    def wire_bytes(self, n_bytes: int, world_size: int) -> int:
        return 2 * (world_size - 1) * n_bytes // world_size


class VllmCustom(Implementation):
    """vLLM's own choice of kernel by size, for messages up to `most_bytes`. vLLM itself uses it up to 8 MiB."""

    path = "vllm custom"
    transport = "ipc"
    note = "new output; eager: with its copy into a registered buffer, graph: without"

    def __init__(self, ctx: RankContext, most_bytes: int) -> None:
        os.environ.setdefault("VLLM_SKIP_P2P_CHECK", "1")  # the check needs vLLM's own process groups
        module = importlib.import_module("vllm.distributed.device_communicators.custom_all_reduce")
        gloo = dist.new_group(backend="gloo")
        self.comm: Any = module.CustomAllreduce(group=gloo, device=ctx.device, max_size=most_bytes + 16)
        getattr(self.comm, "finalize_p2p", lambda: None)()  # newer versions begin in two steps
        if self.comm.disabled:
            raise RuntimeError("vLLM disables it on these GPUs or for this world size")

    def run(self, i: int) -> Tensor:
        out: Tensor = self.comm.custom_all_reduce(self.inputs[i])
        return out

    def capture(self) -> contextlib.AbstractContextManager[object]:
        context: contextlib.AbstractContextManager[object] = self.comm.capture()
        return context

    def refuses(self, x: Tensor, world_size: int) -> str | None:
        return None if self.comm.should_custom_ar(x) else "takes multiples of 16 bytes"

    def wire_bytes(self, n_bytes: int, world_size: int) -> None:
        return None


class FlashinferFp8(Implementation):
    """FP8 (e4m3) with a float32 scale for every 256 values. It compiles again for every size."""

    path = "flashinfer fp8"
    format = "fp8"
    transport = "symmetric"

    def __init__(self, ctx: RankContext, most_bytes: int) -> None:
        self.all_reduce = importlib.import_module("flashinfer.comm").quantized_all_reduce
        largest = torch.ones(max(4096, most_bytes // 16 * 8), dtype=torch.bfloat16, device=ctx.device)
        self.all_reduce(largest, dist.group.WORLD)  # allocates symmetric memory for the largest message

    def run(self, i: int) -> Tensor:
        out: Tensor = self.all_reduce(self.inputs[i], dist.group.WORLD)
        return out

    def refuses(self, x: Tensor, world_size: int) -> str | None:
        return "takes multiples of 8 values, from 4096 on" if x.numel() % 8 or x.numel() < 4096 else None

    def wire_bytes(self, n_bytes: int, world_size: int) -> int:
        return 2 * (world_size - 1) * (n_bytes // 2 + n_bytes // 512 * 4) // world_size


def padded(numel: int) -> int:
    """Return numel rounded up to multiples of 8, so that inputs in the pool are aligned to at least 16 bytes."""
    return -(-numel // 8) * 8


def available(
    ctx: RankContext, dtype: torch.dtype, most_bytes: int, pool_numel: int
) -> tuple[list[Implementation], dict[str, str]]:
    """Find the baselines that can run on every rank. Collective.

    Args:
        ctx: This rank.
        dtype: The dtype of the messages.
        most_bytes: Bytes of the largest message.
        pool_numel: Values of symmetric memory to allocate, for all inputs of a size together.

    Returns:
        The implementations, the backend first, and by name why others cannot run.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here uses it
    found: list[Implementation] = [Backend()]
    missing: dict[str, str] = {}

    def symm() -> list[Implementation]:
        pool = _symmetric(ctx, pool_numel, dtype)
        return [SymmOneShot(pool), SymmTwoShot(pool)]

    candidates: list[tuple[tuple[str, ...], Callable[[], str | None], Callable[[], list[Implementation]]]] = [
        (NAMES[1:3], lambda: _no_symm(ctx, dtype), symm),
        (NAMES[3:4], lambda: _no_vllm(ctx), lambda: [VllmCustom(ctx, most_bytes)]),
        (NAMES[4:5], lambda: _no_flashinfer(ctx, dtype), lambda: [FlashinferFp8(ctx, most_bytes)]),
    ]
    for names, problem, make in candidates:
        why = first_reason(problem())
        if why is None:
            made: list[Implementation] = []
            try:
                made = make()
            except Exception as error:  # from another project: leave the baseline out, and report why
                why = first_line(error)
            why = first_reason(why)
            found += made if why is None else []
        if why is not None:
            missing |= dict.fromkeys(names, why)
    return found, missing


def first_reason(mine: str | None) -> str | None:
    """Return the reason of the first rank that has one, on all ranks; None if no rank has one. Collective."""
    group: Any = dist.group.WORLD
    transport = ProcessGroupTransport(group, consistency.group_device(group, None), timeout_s=600)
    reasons: list[str | None] = consistency.exchange(transport, mine, "comparing why a baseline cannot run")
    return next((why for why in reasons if why is not None), None)


def first_line(error: Exception) -> str:
    """Return the type and first line of an error, because those of CUDA are very long."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _no_peer_access(ctx: RankContext) -> str | None:
    if ctx.device.type != "cuda":
        return "for CUDA tensors only"
    if os.environ.get("LOCAL_WORLD_SIZE", str(ctx.world_size)) != str(ctx.world_size):
        return "ranks are on several hosts"
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return "NCCL_P2P_DISABLE is set: this run has no peer access"
    others = [i for i in range(ctx.world_size) if i != ctx.device.index]
    if not all(torch.cuda.can_device_access_peer(ctx.device, i) for i in others):
        return "a GPU has no access to the memory of another"
    return None


def _no_symm(ctx: RankContext, dtype: torch.dtype) -> str | None:
    if why := _no_peer_access(ctx):
        return why
    return None if dtype in (torch.bfloat16, torch.float32) else "for bf16 and fp32 only"


def _no_vllm(ctx: RankContext) -> str | None:
    return _no_peer_access(ctx) or _not_installed("vllm")


def _no_flashinfer(ctx: RankContext, dtype: torch.dtype) -> str | None:
    if why := _no_peer_access(ctx) or _not_installed("flashinfer"):
        return why
    if dtype != torch.bfloat16:
        return "for bf16 only"
    if ctx.world_size & (ctx.world_size - 1) or ctx.world_size > 16:
        return "for 2, 4, 8 or 16 ranks only"
    return None if torch.cuda.get_device_capability(ctx.device) >= (9, 0) else "for compute capability 9.0 and up only"


def _not_installed(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _symmetric(ctx: RankContext, numel: int, dtype: torch.dtype) -> Tensor:
    """Allocate flat symmetric memory for the group.

    It has at least 32 MB: smaller tensors may lie inside a block of torch's pool, and torch's all-reduces would then
    use addresses relative to the block.
    """
    module = importlib.import_module("torch.distributed._symmetric_memory")
    pool: Tensor = module.empty(max(numel, (32 << 20) // dtype.itemsize), dtype=dtype, device=ctx.device)
    handle = module.rendezvous(pool, dist.group.WORLD)
    if getattr(handle, "offset", 0):
        raise RuntimeError("the memory lies inside a block of torch's pool")
    return pool
