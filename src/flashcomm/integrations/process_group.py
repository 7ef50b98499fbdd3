"""`backend="flashcomm"`: any torch.distributed program, unchanged, with low-bit sums.

    import flashcomm.integrations.process_group                       # registers the backend
    torch.distributed.init_process_group("flashcomm")                 # FLASHCOMM_FORMAT=int4 python program.py

or for one dimension of a mesh: `init_device_mesh(..., backend_override={"tp": "flashcomm"})`. Under it lie gloo for CPU
tensors and NCCL for CUDA tensors; they carry everything that is not a SUM all-reduce of one dense bf16, fp16 or fp32
tensor of at least FLASHCOMM_MIN_BYTES, bit for bit as without us. Such a sum is lossy wherever the program asks for it:
gradients and losses included. It is meant for inference. A coded sum is done when the call returns, also with
`async_op=True`; its time-out is the group's unless FLASHCOMM_TIMEOUT_S says otherwise.

The seam is a Python subclass of ProcessGroup, because torch (2.11 to 2.13) calls a Python Backend's methods from
Python only, and functional collectives and DTensor come from C++. Such a subclass must pass on *every* collective in
Python: where it does not, torch runs the inherited method with the GIL held, and gloo's worker thread, which needs the
GIL to let go of a tensor while it holds the lock that the method wants, deadlocks with it.

FLASHCOMM_FORMAT may name a plan. A collective knows no layer, so that what holds is the plan's format for layers not
named, and its format for decoding.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import AllreduceOptions, PrefixStore, Store

from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError, FormatError, PlanError, SettingsError
from flashcomm.plan import Plan, is_decode
from flashcomm.routing.policy import MIN_BYTES
from flashcomm.settings import Settings
from flashcomm.wire.format import WireFormat
from flashcomm.wire.torch_codec import DTYPES

NAME = "flashcomm"
log = logging.getLogger("flashcomm")
_SUM: Any = dist.ReduceOp.SUM


class FlashProcessGroup(dist.ProcessGroup):
    """A process group whose large floating-point sums are low-bit; all else goes to gloo and NCCL."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the constructor meant for Python subclasses
        self._inner = dist.ProcessGroup(store, rank, size)  # the same backends, without our all-reduce
        for device, kind, backend in _backends(store, rank, size, timeout):
            for group in (self, self._inner):
                group._register_backend(torch.device(device), kind, backend)
        self._settings, self._plan = _agreed_settings(store, rank, size, timeout)
        if self._plan is not None and self._plan.layers and rank == 0:
            log.warning(
                "backend 'flashcomm' sees no layers: %s for all sums, the plan's layers are ignored", self._plan.format
            )
        self._communicators: dict[str, Communicator] = {}

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        """Called for every all-reduce on this group; the result is written in place, as torch.distributed wants it."""
        options = opts if isinstance(opts, AllreduceOptions) else AllreduceOptions()
        if opts is not None and options is not opts:
            options.reduceOp = opts
        many = tensors if isinstance(tensors, (list, tuple)) else [tensors]
        if len(many) != 1 or options.reduceOp != _SUM or not self._takes(many[0]):
            return self._inner.allreduce(list(many), options)
        (x,) = many
        dense = x.is_contiguous()
        result = self._communicator(x.device.type).all_reduce(
            x.detach(), out=x.detach() if dense else None, format=self._format(x)
        )
        if not dense:
            x.detach().copy_(result)
        done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        done.set_result([x])
        return _create_work_from_future(done)  # type: ignore[no-any-return]

    def _format(self, x: Tensor) -> WireFormat | None:
        decodes = self._plan is not None and self._plan.decode is not None and is_decode(x)
        return self._plan.decode if self._plan is not None and decodes else None

    def _takes(self, x: Tensor) -> bool:
        """Whether this sum is ours: a fact about dtype and size, equal on every rank."""
        if x.dtype not in DTYPES or x.layout != torch.strided or x.device.type not in self._settings or x.dim() > 8:
            return False
        settings = self._settings[x.device.type]
        least = MIN_BYTES[x.device.type] if isinstance(settings.min_bytes, str) else settings.min_bytes
        return not (self._format(x) or settings.format).uncompressed and x.numel() * x.element_size() >= least

    def _communicator(self, device_type: str) -> Communicator:
        if device_type not in self._communicators:
            timeout_s = self._settings[device_type].timeout_s
            fmt = self._settings[device_type].format
            self._communicators[device_type] = Communicator(self._inner, fmt, device=device_type, timeout_s=timeout_s)
        return self._communicators[device_type]

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        return NAME


def _agreed_settings(store: Store, rank: int, size: int, timeout: timedelta) -> tuple[dict[str, Settings], Plan | None]:
    """Settings by device and the plan, if any, from the environment, after comparing over the store.

    They are equal on all ranks, or the same error is raised on all. Here and not at the first sum, because they decide
    which sums are ours.
    """
    given: dict[str, Any] = {} if "FLASHCOMM_TIMEOUT_S" in os.environ else {"timeout_s": timeout.total_seconds()}
    settings, plan, error = {}, None, ""
    try:
        if "FLASHCOMM_FORMAT" in os.environ:
            plan = Plan.of(os.environ["FLASHCOMM_FORMAT"])
            given["format"] = plan.format
        settings = {device: Settings.resolve(device, **given) for device in ("cpu", "cuda")}
    except FlashcommError as why:
        error = f"{type(why).__name__} rank {rank}: {why}"
    store.set(f"flashcomm/{rank}", error or f"ok {settings} plan {plan.digest if plan else 'none'}")
    everybody = [store.get(f"flashcomm/{r}").decode() for r in range(size)]
    wrong = [text for text in everybody if not text.startswith("ok ")]
    if wrong:
        kind, _, text = wrong[0].partition(" ")
        raise {"FormatError": FormatError, "PlanError": PlanError}.get(kind, SettingsError)(text)
    if len(set(everybody)) > 1:
        told = "\n".join(f"  rank {r}: {text[3:]}" for r, text in enumerate(everybody))
        raise SettingsError(f"FLASHCOMM_* settings differ between ranks; give all of them the same:\n{told}")
    return settings, plan


def _pass_on(name: str) -> Any:
    def method(self: FlashProcessGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._inner, name)(*args, **kwargs)

    method.__name__ = name
    return method


PASSED_ON = (
    *("broadcast", "reduce", "allreduce_coalesced", "gather", "scatter", "send", "recv", "recv_anysource"),
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    *("all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all", "all_to_all_single", "barrier", "monitored_barrier"),
)
for _name in PASSED_ON:
    if hasattr(dist.ProcessGroup, _name):
        setattr(FlashProcessGroup, _name, _pass_on(_name))


def _backends(store: Store, rank: int, size: int, timeout: timedelta) -> list[tuple[str, Any, Any]]:
    kinds = dist.ProcessGroup.BackendType
    gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, timeout)
    gloo._set_sequence_number_for_group()
    found: list[tuple[str, Any, Any]] = [("cpu", kinds.GLOO, gloo)]
    if dist.is_nccl_available() and torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
        nccl._set_sequence_number_for_group()
        found.append(("cuda", kinds.NCCL, nccl))
    return found


dist.Backend.register_backend(NAME, FlashProcessGroup, devices=["cpu", "cuda"])
