"""The c10d backend "flashcomm": low-bit all-reduces in any torch.distributed program, without changes to it.

    import flashcomm.integrations.process_group                       # registers the backend
    torch.distributed.init_process_group("flashcomm")                 # FLASHCOMM_FORMAT=int4 python program.py

It can also serve one dimension of a mesh: `init_device_mesh(..., backend_override={"tp": "flashcomm"})`.

SUM all-reduces of one dense bf16, fp16 or fp32 tensor take the route of a Communicator of the same ranks
(`Communicator.explain`): large ones are low-bit. On GPUs that share memory, small ones are uncompressed, in one kernel,
and summed in rank order. All other collectives, and sums whose route is `backend`, go to gloo (CPU tensors) or NCCL
(CUDA tensors), and their results are the same bits as without flashcomm.

all_to_all_single of bf16 or fp16 tensors with at least two dimensions, the last one of at least 64 values, is low-bit,
in the format of the gather step. Ranks may send different numbers of rows, so the size of a message does not matter.
All else, such as indices and router weights in fp32, goes to gloo or NCCL.

Gradients are not quantized: a collective that the autograd engine starts during a backward pass (DDP's buckets,
tensor-parallel layers, DTensor) goes to gloo or NCCL unless FLASHCOMM_GRADIENTS=1. If a program averages gradients
itself, after the backward pass, flashcomm cannot recognize them: use another backend for it.

All-reduces of CPU tensors run on a thread of the group, in the order of the calls. So `async_op=True` returns at once,
as with gloo. Their time-out is FLASHCOMM_TIMEOUT_S if that is set, else the group's. All-reduces of CUDA tensors are
enqueued by the call itself. Only the first one waits for the other ranks, because it sets up.

The integration is a Python subclass of ProcessGroup, not of Backend: torch (2.11 to 2.15) calls the methods of a Python
Backend from Python only, but functional collectives and DTensor call from C++. Such a subclass must pass on *every*
collective in Python. Otherwise torch runs the inherited method while it holds the GIL, and waits for a lock of gloo's
worker thread. That thread needs the GIL to free a tensor before it releases the lock: a deadlock.

One thing differs from gloo: `torch.distributed.get_backend` returns "flashcomm". `torch.distributed.monitored_barrier`
accepts "gloo" only, by name, so importing this module replaces that function by one that accepts our groups, too.

FLASHCOMM_FORMAT may name a plan. A collective does not know its layer, so only the plan's default format and its format
for decoding apply.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    AllreduceOptions,
    AllToAllOptions,
    PrefixStore,
    Store,
)

from flashcomm.communicator import Communicator
from flashcomm.compat import (
    accept_in_monitored_barrier,
    in_backward_pass,
    register,
    start_sequence_numbers,
    unregister,
)
from flashcomm.errors import CommunicationError, FlashcommError, FormatError, PlanError, SettingsError
from flashcomm.integrations.planned import PlannedAllReduce
from flashcomm.plan import Plan
from flashcomm.settings import Settings
from flashcomm.transports.process_group import Lane

NAME = "flashcomm"
log = logging.getLogger("flashcomm")
LEAST_ROW = 64  # values in the last dimension of an all-to-all that is low-bit
GRADIENTS = "FLASHCOMM_GRADIENTS"  # 1: all-reduces in backward passes are low-bit, too
_SUM: Any = dist.ReduceOp.SUM


def _done(timeout: float | None = None) -> None:
    """Return at once: there is nothing to wait for."""


class _LowBit(dist.Work):
    """The Work of a low-bit collective that is running, or has been enqueued."""

    def __init__(
        self, x: Tensor, future: torch.futures.Future[list[Tensor]], finish: Callable[..., object] = _done
    ) -> None:
        super().__init__()
        self._x, self._future, self.finish = x, future, finish

    def run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as why:
            self._future.set_exception(why)  # type: ignore[arg-type]
            raise
        self._future.set_result([self._x])

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for the collective and raise its exception, if any.

        Args:
            timeout: How long to wait at most. 0: as long as it may take.

        Raises:
            CommunicationError: It is not done within `timeout`.
        """
        seconds = timeout.total_seconds()
        try:
            self.finish(timeout=seconds if seconds > 0 else None)
        except FutureTimeout as why:
            raise CommunicationError(
                f"the collective was not done within {seconds:g} s: call wait() again, or with a longer timeout"
            ) from why
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._future.done()

    def is_success(self) -> bool:
        return self._future.done() and self.exception() is None

    def exception(self) -> BaseException | None:
        try:
            self._future.value() if self._future.done() else None
        except BaseException as why:
            return why
        return None

    def result(self) -> list[Tensor]:
        self.wait()
        return [self._x]

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        return self._future


class FlashProcessGroup(dist.ProcessGroup):
    """A process group with low-bit all-reduces and all-to-alls. All else goes to gloo and NCCL."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the constructor meant for Python subclasses
        self.backend_group = dist.ProcessGroup(store, rank, size)  # the same backends, without our all-reduce
        for device, kind, backend in _backends(store, rank, size, timeout):
            for group in (self, self.backend_group):
                group._register_backend(torch.device(device), kind, backend)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)  # torch 2.15 asks it for the group's name
        self._settings, self._plan = _agreed_settings(store, rank, size, timeout)
        register(self.backend_group, _agreed_name(store, rank), store)
        if self._plan is not None and self._plan.layers and rank == 0:
            log.warning(
                "backend 'flashcomm' does not know layers: format %s applies to all, the plan's layers are ignored",
                self._plan.format,
            )
        self._gradients = os.environ.get(GRADIENTS) == "1"
        self._planned: dict[str, PlannedAllReduce] = {}
        self._lane = Lane()
        if size > 1 and not self._settings["cpu"].format.uncompressed:
            self._planned_on("cpu")  # now, when all ranks are here: the first sum may be asynchronous

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        """Sum one tensor in place. torch.distributed calls this for every all-reduce of the group.

        Args:
            tensors: The tensor, or a list of it. Lists of several tensors go to gloo or NCCL.
            opts: AllreduceOptions, or a ReduceOp.
            timeout: Ignored.

        Returns:
            The Work of the all-reduce.
        """
        options = opts if isinstance(opts, AllreduceOptions) else AllreduceOptions()
        if opts is not None and options is not opts:
            options.reduceOp = opts
        many = tensors if isinstance(tensors, (list, tuple)) else [tensors]
        if len(many) != 1 or options.reduceOp != _SUM or not self._is_ours(many[0]):
            return self.backend_group.allreduce(list(many), options)
        (x,) = many
        work = self._start(x, lambda: self._sum(x))
        if x.device.type == "cpu" and not options.asyncOp:
            work.wait()
        return work

    def alltoall_base(  # type: ignore[override]  # torch's two overloads are one method here
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        opts: Any = None,
        timeout: timedelta | None = None,
    ) -> dist.Work:
        """Exchange pieces along dimension 0. torch.distributed calls this for every all_to_all_single of the group.

        Args:
            output: What comes from all ranks.
            input: What this rank sends.
            output_split_sizes: Rows from each rank. None or []: equal pieces.
            input_split_sizes: Rows for each rank. None or []: equal pieces.
            opts: AllToAllOptions.
            timeout: Ignored.

        Returns:
            The Work of the exchange. Waiting for it is up to the caller.
        """
        if not self._exchanges(output, input):
            own = getattr(self.backend_group, "all_to_all_single", None) or self.backend_group.alltoall_base
            options = AllToAllOptions() if opts is None else opts
            passed_on: dist.Work = own(
                output, input, list(output_split_sizes or []), list(input_split_sizes or []), options
            )
            return passed_on
        splits = output_split_sizes or None, input_split_sizes or None

        def exchange() -> None:
            planned = self._planned_on(input.device.type)
            x, out, fmt = input.detach(), output.detach(), planned.plan.format
            if out.is_contiguous() and not out.is_neg() and not out.is_inference():
                planned.comm.all_to_all_single(x, *splits, out=out, format=fmt)
            else:
                dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
                out.copy_(planned.comm.all_to_all_single(x, *splits, out=dense, format=fmt))

        return self._start(output, exchange)

    all_to_all_single = alltoall_base  # type: ignore[assignment]  # its name since torch 2.13

    def _start(self, result: Tensor, job: Callable[[], None]) -> _LowBit:
        """Run a job, on CPUs on the thread of the group, and return its Work."""
        work = _LowBit(result, torch.futures.Future())
        if result.device.type != "cpu":
            work.run(job)
        else:
            work.finish = self._lane.start(lambda: work.run(job))
        return work

    def _exchanges(self, output: Tensor, input: Tensor) -> bool:
        """Whether an all-to-all is low-bit. It depends on nothing that may differ between ranks, such as sizes."""
        same = (output.dtype, output.device, output.shape[1:]) == (input.dtype, input.device, input.shape[1:])
        hidden = input.dtype in (torch.bfloat16, torch.float16) and input.dim() > 1 and input.shape[-1] >= LEAST_ROW
        if not same or not hidden or self.size() == 1 or (in_backward_pass() and not self._gradients):
            return False
        device = input.device.type
        return device in self._settings and not self._settings[device].format.gather.uncompressed

    def _sum(self, x: Tensor) -> None:
        """The low-bit sum of x over the ranks, in place."""
        planned, x = self._planned_on(x.device.type), x.detach()
        if x.is_contiguous() and not x.is_neg() and (torch.is_inference_mode_enabled() or not x.is_inference()):
            planned(x, out=x)
        else:
            x.copy_(planned(x))

    def _is_ours(self, x: Tensor) -> bool:
        """Whether a Communicator of the same ranks would not leave this sum to gloo or NCCL; equal on every rank."""
        if in_backward_pass() and not self._gradients:
            return False  # the autograd engine is in a backward pass on this thread
        device = x.device.type
        if device not in self._settings or (device == "cpu" and self._settings[device].format.uncompressed):
            return False
        return self._planned_on(device).is_ours(x)

    def _planned_on(self, device: str) -> PlannedAllReduce:
        if device not in self._planned:
            settings = self._settings[device]
            comm = Communicator(self.backend_group, settings.format, device=device, timeout_s=settings.timeout_s)
            self._planned[device] = PlannedAllReduce(comm, self._plan)
        return self._planned[device]

    def shutdown(self) -> None:
        """Close the Communicators, and end gloo and NCCL. `torch.distributed.destroy_process_group` calls this."""
        for planned in self._planned.values():
            planned.comm.close()
        unregister(self.backend_group)
        super().shutdown()

    def _get_sequence_number_for_group(self) -> int:
        gloo: Any = self.backend_group._get_backend(torch.device("cpu"))
        return int(gloo._get_sequence_number_for_group())

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        """Return the name of the backend."""
        return NAME


def _agreed_settings(store: Store, rank: int, size: int, timeout: timedelta) -> tuple[dict[str, Settings], Plan | None]:
    """Read settings and plan from the environment and compare them with all ranks, over the store.

    This must happen before the first all-reduce, because settings decide which all-reduces are low-bit.

    Returns:
        The settings for each device type, and the plan, if FLASHCOMM_FORMAT is set.

    Raises:
        FormatError, PlanError, SettingsError: On all ranks, if settings are wrong on any rank or differ between ranks.
    """
    given: dict[str, Any] = {} if "FLASHCOMM_TIMEOUT_S" in os.environ else {"timeout_s": timeout.total_seconds()}
    settings, plan, error = {}, None, ""
    try:
        if "FLASHCOMM_FORMAT" in os.environ:
            plan = Plan.of(os.environ["FLASHCOMM_FORMAT"])
            given["format"] = plan.format
        settings = {device: Settings.resolve(device, **given) for device in ("cpu", "cuda")}
    except Exception as why:  # perhaps only on this rank: sent to all below
        error = f"{type(why).__name__} rank {rank}: {why if isinstance(why, FlashcommError) else repr(why)}"
    store.set(f"flashcomm/{rank}", error or f"ok {settings} plan {plan.digest if plan else 'none'}")
    texts = [store.get(f"flashcomm/{r}").decode() for r in range(size)]
    wrong = [text for text in texts if not text.startswith("ok ")]
    if wrong:
        kind, _, text = wrong[0].partition(" ")
        raise {"FormatError": FormatError, "PlanError": PlanError}.get(kind, SettingsError)(text)
    if len(set(texts)) > 1:
        lines = "\n".join(f"  rank {r}: {text[3:]}" for r, text in enumerate(texts))
        raise SettingsError(f"FLASHCOMM_* settings differ between ranks; use the same on all ranks:\n{lines}")
    return settings, plan


def _agreed_name(store: Store, rank: int) -> str:
    """Return a name for the inner group that rank 0 chooses, and that no other group has."""
    if rank == 0:
        store.set("flashcomm/name", f"flashcomm/{uuid.uuid4()}")
    return store.get("flashcomm/name").decode()


def _pass_on(name: str) -> Any:
    def method(self: FlashProcessGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.backend_group, name)(*args, **kwargs)

    method.__name__ = name
    return method


PASSED_ON = (
    *("broadcast", "reduce", "allreduce_coalesced", "gather", "scatter", "send", "recv", "recv_anysource"),
    *("gather_single", "gather_into_tensor"),
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    *("all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("alltoall", "all_to_all", "barrier", "monitored_barrier"),
)
for _name in PASSED_ON:
    if hasattr(dist.ProcessGroup, _name):
        setattr(FlashProcessGroup, _name, _pass_on(_name))


def _backends(store: Store, rank: int, size: int, timeout: timedelta) -> list[tuple[str, Any, Any]]:
    kinds = dist.ProcessGroup.BackendType
    gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, timeout)
    start_sequence_numbers(gloo)
    found: list[tuple[str, Any, Any]] = [("cpu", kinds.GLOO, gloo)]
    if dist.is_nccl_available() and torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
        start_sequence_numbers(nccl)
        found.append(("cuda", kinds.NCCL, nccl))
    return found


accept_in_monitored_barrier(FlashProcessGroup)
dist.Backend.register_backend(NAME, FlashProcessGroup, devices=["cpu", "cuda"])
