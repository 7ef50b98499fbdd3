"""`run`: calls a function on every rank and returns the result of rank 0.

A rank is a process in a process group. `processes` watches the ranks, receives their events and errors, and ends all of
them with the run. There are three ways to start ranks:

    alone        new processes, connected over the loopback interface
    `link`       the same, each in its own network namespace: a process in between builds the network (see `link.py`)
                 and watches the ranks, and the caller's process watches that one, with the same loop
    torchrun     torchrun has started the ranks, and this process is one of them
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from flashcomm import compat
from flashcomm.errors import SettingsError, UnavailableError
from flashcomm.ranks import link as links
from flashcomm.ranks import processes
from flashcomm.ranks.processes import Emit

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
_SHARES_GPUS = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"  # torch's variable for it


@dataclass(frozen=True)
class RankContext:
    """The context of a rank.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: Number of ranks.
        device: The device of this rank's tensors.
        emit: Passes a picklable object to `on_event` in the process that called `run`.
    """

    rank: int
    world_size: int
    device: torch.device
    emit: Emit


def run(
    target: Callable[..., object],
    world_size: int,
    args: Sequence[object] = (),
    *,
    device: str = "cpu",
    link: int | str | None = None,
    local_world_size: int = 1,
    on_event: Emit | None = None,
    timeout_s: float = 600,
) -> object:
    """Run `target(ctx, *args)` on every rank and return the result of rank 0.

    Under torchrun `target` runs in this process. Then only rank 0 calls `on_event` and returns the result, the others
    return None, and `timeout_s` is the time-out of each collective.

    Args:
        target: A module-level function. The default process group exists when it is called: nccl for "cuda", gloo for
            "cpu" and for ranks that share GPUs. Its output to stdout goes to stderr.
        world_size: Number of ranks.
        args: Further arguments of `target`, picklable.
        device: "cpu" or "cuda".
        link: The rate of an emulated network link for each rank, in bits per second or as text such as "100mbit".
        local_world_size: Number of consecutive ranks that share one link, like the ranks of a host.
        on_event: Called in this process with the objects that ranks emit, in order.
        timeout_s: Seconds that the run may take, including the start of the ranks.

    Returns:
        The result of rank 0.

    Raises:
        SettingsError, UnavailableError: The arguments are wrong, or this machine does not support them.
        CommunicationError: The run takes longer than `timeout_s`.
        FlashcommError: A rank raised an exception, or died. "rank N: " precedes the message, unless all ranks raised
            the same. `__cause__` has the rank's traceback.
    """
    if world_size < 1 or device not in ("cpu", "cuda"):
        raise SettingsError(
            f"world_size={world_size}, device={device!r}: give at least 1 rank and device 'cpu' or 'cuda'"
        )
    rate = links.parse_rate(link) if isinstance(link, str) else link
    if rate is not None and device == "cuda":
        raise SettingsError("a link limits TCP between CPU ranks, and nccl would bypass it: drop link or device='cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device='cuda' was requested, but torch finds no CUDA device: use device='cpu'")
    on_event = on_event or (lambda event: None)
    job = _Job(target, tuple(args), world_size, device, timeout_s, local_world_size)
    if world_size % local_world_size:
        raise SettingsError(
            f"local_world_size={local_world_size}: {world_size} ranks cannot be divided into nodes of that size"
        )
    if all(name in os.environ for name in _TORCHRUN):
        return _join(job, rate, on_event)
    if device == "cuda" and world_size > torch.cuda.device_count() and not shares_gpus():
        raise SettingsError(
            f"world_size={world_size} needs a GPU for each rank, and there are {torch.cuda.device_count()}: use fewer "
            f"ranks, or, to test results but not speed, let ranks share GPUs with {_SHARES_GPUS}=1"
        )
    if rate is None:
        return _run_ranks(job, on_event)
    with processes.children(3 * processes.GRACE_S) as children:  # the child has to stop its own children
        # Forked, because a forked process has a single thread, which link.py needs.
        with links.forking():
            children.start("fork", "the link's switch process", _switch_body, job, rate)
        return children.watch(on_event, timeout_s + 15)[0]  # the child has its own time-out; 15 s to start and stop it


def shares_gpus() -> bool:
    """Return whether several ranks may share a GPU. NCCL does not support that, so their group uses gloo."""
    return os.environ.get(_SHARES_GPUS) == "1"


@dataclass(frozen=True)
class _Job:
    target: Callable[..., object]
    args: tuple[object, ...]
    world_size: int
    device: str
    timeout_s: float
    local_world_size: int


def _switch_body(emit: Emit, job: _Job, rate: int) -> object:
    """Build the network and watch the ranks in it. This is the process between the caller and the ranks."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # replaces the caller's handlers, which a fork inherits
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise ranks warn that these addresses have no names
    return _run_ranks(job, emit, links.Network(job.world_size // job.local_world_size, rate))


def _run_ranks(job: _Job, on_event: Emit, network: links.Network | None = None) -> object:
    """Start the ranks, in their namespaces if there is a network, and watch them."""
    with processes.children() as children:
        if network is None:
            # The kernel chooses the port, and it stays open, so that no other run can take it. The store accepts any
            # connection, so it listens on the loopback interface only.
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            store = TCPStore(  # noqa: F841  (it serves as long as it is referenced)
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        else:  # rank 0 hosts the store; in its namespace every port is free
            common = {"MASTER_ADDR": links.address(0), "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": links.INTERFACE}
        common |= {"WORLD_SIZE": str(job.world_size), "LOCAL_WORLD_SIZE": str(job.world_size)}
        if job.device == "cpu":
            common["CUDA_VISIBLE_DEVICES"] = ""  # transformers would otherwise give every rank a GPU
        # Ranks of a network are started inside of it; and CUDA is kept away from forks.
        method = "forkserver" if network is None and job.device == "cpu" else "spawn"
        for rank in range(job.world_size):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            hosts_store = network is not None and rank == 0
            with network.inside(rank // job.local_world_size) if network else contextlib.nullcontext():
                children.start(method, f"rank {rank}", _rank_body, job, env, hosts_store)
        return children.watch(on_event, job.timeout_s)[0]


def _rank_body(emit: Emit, job: _Job, env: dict[str, str], hosts_store: bool) -> object:
    """Run a rank that `_run_ranks` started."""
    os.environ.update(env)
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = TCPStore(host, port, job.world_size, hosts_store, timedelta(seconds=job.timeout_s))
    return _run_target(job, emit, store)


def _join(job: _Job, rate: int | None, on_event: Emit) -> object:
    """Run this process as a rank of torchrun."""
    size, rank, stdout = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), sys.stdout
    if job.world_size != size:
        raise SettingsError(
            f"world_size={job.world_size} was requested under a torchrun of {size} ranks: use world_size={size}"
        )
    if rate is not None:
        raise SettingsError("a link needs ranks that flashcomm starts itself: drop link, or run without torchrun")
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def emit(event: object) -> None:
        if rank == 0:
            with contextlib.redirect_stdout(stdout):
                on_event(event)

    with contextlib.redirect_stdout(sys.stderr):
        return _run_target(job, emit, store=None)


def _run_target(job: _Job, emit: Emit, store: TCPStore | None) -> object:
    """Call the target in a process group, as the rank in the environment. Return its result on rank 0, else None."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda, where = job.device == "cuda", torch.device("cpu")
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", rank))
        where = torch.device("cuda", local % torch.cuda.device_count() if shares_gpus() else local)
        torch.cuda.set_device(where)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    nccl = cuda and not shares_gpus()
    group: dict[str, Any] = {"backend": "nccl", "device_id": where} if nccl else {"backend": "gloo"}
    timeout = timedelta(seconds=job.timeout_s)
    dist.init_process_group(**group, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if not nccl:
        compat.let_senders_finish()  # with and without a Communicator, so that benchmarks compare like with like
        dist.barrier()  # gloo: a target that destroys the group at once must not cut off a rank that still connects
    result = job.target(RankContext(rank, world_size, where, emit), *job.args)
    if dist.is_initialized():
        dist.barrier()  # so that no rank closes connections or the store while another needs them
        dist.destroy_process_group()
    return result if rank == 0 else None
