"""Start the ranks of a command, watch over them, and bring back what rank 0 returns.

A collective is a promise between processes: when one of them dies, the others wait, often for half an hour. So the
process that started the ranks does nothing but watch. Each rank has a pipe to it, with three kinds of message:

    event    an object for the caller's `on_event`, while the run goes on
    result   the rank is done
    error    the rank raised: class, message and traceback, as plain strings, so that they always fit the pipe

A pipe that closes before its result is a rank that died. The first error or death ends the run: the other ranks have
a second to report theirs (they often have the same), then they are terminated and, if need be, killed.

No process outlives the run. Ranks ignore Ctrl-C, which a terminal sends to the whole group: the watching process
notes it and stops them. And should that process itself be killed, the kernel kills its children (PR_SET_PDEATHSIG).

With a `link`, a process in between builds the network and watches over the ranks; the caller's process then watches
over that one, with the same loop. Under torchrun the ranks exist already, and `run` joins in.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from flashcomm import errors
from flashcomm.cli import link as links
from flashcomm.errors import CommunicationError, FlashcommError, SettingsError, UnavailableError

_GRACE_S = 1.0  # for the other ranks to report after the first failure, and for a terminated process to go
_POLL_S = 0.2  # how late a signal may be noticed
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
_libc = ctypes.CDLL(None)

Emit = Callable[[object], None]


@dataclass(frozen=True)
class RankContext:
    """What a target knows of its place: `emit(obj)` hands a picklable object to the caller's `on_event`."""

    rank: int
    world: int
    device: torch.device
    emit: Emit


def run(
    target: Callable[..., object],
    world: int,
    args: Sequence[object] = (),
    *,
    device: str = "cpu",
    link: int | str | None = None,
    on_event: Emit | None = None,
    timeout_s: float = 600,
) -> object:
    """Run `target(ctx, *args)` on `world` ranks and return what rank 0's returns.

    `target` is a module-level function; the default process group (gloo for device "cpu", nccl for "cuda") is ready
    when it is called. `link` is a rate in bits per second, or a text for `link.parse_rate`: every rank then has a
    network link of that rate to itself. `on_event` is called in this process with what any rank emits, in order.
    What ranks print goes to stderr. A run takes at most `timeout_s` seconds, starting the ranks included.

    Under torchrun `target` runs in this process; `on_event` is called and the result returned on rank 0 only (None
    elsewhere), and `timeout_s` holds for each collective.

    Raises SettingsError or UnavailableError for a request that cannot be met; the flashcomm error that a rank
    raised, with "rank N: " before its message unless all ranks raised the same; FlashcommError when a rank raised
    something else or died; CommunicationError past `timeout_s`. `__cause__` has the rank's traceback.
    """
    if world < 1 or device not in ("cpu", "cuda"):
        raise SettingsError(f"world={world}, device={device!r}: world is 1 or more, device is 'cpu' or 'cuda'")
    rate = links.parse_rate(link) if isinstance(link, str) else link
    if rate is not None and device == "cuda":
        raise SettingsError("a link limits TCP between CPU ranks, and nccl would bypass it: drop link or device='cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("device='cuda' was asked for and torch finds no CUDA device: use device='cpu'")
    on_event = on_event or (lambda event: None)
    job = _Job(target, tuple(args), world, device, timeout_s)
    if all(name in os.environ for name in _TORCHRUN):
        return _join(job, rate, on_event)
    if device == "cuda" and world > torch.cuda.device_count():
        raise SettingsError(f"world={world} needs a GPU for each rank and {torch.cuda.device_count()} can be seen")
    if rate is None:
        return _run_ranks(job, on_event)
    with _deferred_signals() as check, _children(3 * _GRACE_S) as children:  # it has children to stop itself
        # Forked, because a fork has one thread whatever torch has started here: see link.py.
        with links.forking():
            children.append(_start("fork", "the link's switch process", _switch_body, job, rate))
        return _watch(children, on_event, timeout_s + 15, check)[0]  # it keeps the time; 15 s to build and to stop


@dataclass(frozen=True)
class _Job:
    target: Callable[..., object]
    args: tuple[object, ...]
    world: int
    device: str
    timeout_s: float


@dataclass(frozen=True)
class _Child:
    name: str
    process: Any  # multiprocessing's process classes share no public base with a pid
    pipe: connection.Connection


@dataclass(frozen=True)
class _Failure:
    """How a child failed: the name of the error class to raise, its message, the traceback as text."""

    error: str
    message: str
    trace: str
    died: bool = False


class RankTraceback(Exception):  # noqa: N818  (it is text to show, nobody catches it)
    """The `__cause__` of an error that a rank raised: its text is the traceback over there."""


def _run_ranks(job: _Job, on_event: Emit, network: links.Network | None = None) -> object:
    """Start the ranks, in their namespaces if there is a network, and watch them to the end."""
    with contextlib.ExitStack() as stack:
        check = stack.enter_context(_deferred_signals())
        if network is None:
            # The port is chosen by the kernel and never let go, so no other run can take it; and the store, which
            # trusts whoever connects, listens on the loopback only.
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            store = TCPStore(  # noqa: F841  (serves as long as it is referenced)
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        else:  # rank 0 hosts the store, and in its namespace every port is free
            common = {"MASTER_ADDR": links.address(0), "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": links.INTERFACE}
        common |= {"WORLD_SIZE": str(job.world), "LOCAL_WORLD_SIZE": str(job.world)}
        children = stack.enter_context(_children())
        for rank in range(job.world):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            hosts_store = network is not None and rank == 0
            with network.inside(rank) if network else contextlib.nullcontext():
                children.append(_start("spawn", f"rank {rank}", _rank_body, job, env, hosts_store))
        return _watch(children, on_event, job.timeout_s, check)[0]


def _join(job: _Job, rate: int | None, on_event: Emit) -> object:
    """Be the rank that torchrun says this process is."""
    size, rank, stdout = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), sys.stdout
    if job.world != size:
        raise SettingsError(f"world={job.world} was asked for under a torchrun of {size} ranks: ask for {size}")
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
    """Call the target inside a process group, as the rank that the environment names; the result if that is 0."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda, where = job.device == "cuda", torch.device("cpu")
    if cuda:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(where)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    group: dict[str, Any] = {"backend": "nccl", "device_id": where} if cuda else {"backend": "gloo"}
    timeout = timedelta(seconds=job.timeout_s)
    dist.init_process_group(**group, store=store, rank=rank, world_size=world, timeout=timeout)
    result = job.target(RankContext(rank, world, where, emit), *job.args)
    if dist.is_initialized():
        dist.barrier()  # nobody leaves, and takes a connection or the store along, while another rank needs it
        dist.destroy_process_group()
    return result if rank == 0 else None


# ---------------------------------------------------------------------------------------------- inside the children


def _child_main(parent: int, pipe: connection.Connection, body: Callable[..., object], *args: object) -> None:
    """First code of every child: tie its life to the parent's, keep stdout clean, report how `body` ended."""
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # the parent died before the line above
    os.dup2(2, 1)
    try:
        pipe.send(("result", body(lambda event: pipe.send(("event", event)), *args)))
    except BaseException as error:  # SystemExit too: whatever ended the body is the caller's to see
        name = next((c.__name__ for c in type(error).__mro__ if vars(errors).get(c.__name__) is c), None)
        first_line = (str(error).splitlines() or [""])[0]
        message = str(error) if name else f"{type(error).__name__}: {first_line}"
        trace = "".join(traceback.format_exception(error))
        if isinstance(error.__cause__, RankTraceback):
            trace = str(error.__cause__)  # handed on by the switch process: the rank's own traceback is the one
        pipe.send(("error", _Failure(name or "FlashcommError", message, trace)))


def _rank_body(emit: Emit, job: _Job, env: dict[str, str], hosts_store: bool) -> object:
    os.environ.update(env)
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = TCPStore(host, port, job.world, hosts_store, timedelta(seconds=job.timeout_s))
    return _run_target(job, emit, store)


def _switch_body(emit: Emit, job: _Job, rate: int) -> object:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the forked copies of the caller's handlers end here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else the ranks warn that these addresses have no names
    return _run_ranks(job, emit, links.Network(job.world, rate))


# ----------------------------------------------------------------------------------------- in the watching process


def _start(method: str, name: str, body: Callable[..., object], *args: object) -> _Child:
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child_main, args=(os.getpid(), sender, body, *args), name=name)
    # A child inherits the signal mask, so one started while SIGINT is blocked never sees Ctrl-C. The tracker that
    # multiprocessing starts with its first child unblocks it: start that one before.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sender.close()  # the child's copy is the only one now: the pipe closes when the child dies
    return _Child(name, process, receiver)


def _watch(children: list[_Child], on_event: Emit, timeout_s: float, check: Callable[[], None]) -> list[object]:
    """Pass on events until every child has reported; their results, or the error that tells most."""
    deadline = time.monotonic() + timeout_s
    results: dict[str, object] = {}
    failures: dict[str, _Failure] = {}
    while open_pipes := {c.pipe: c for c in children if c.name not in results and c.name not in failures}:
        check()
        left = deadline - time.monotonic()
        if left <= 0:
            break
        for pipe in connection.wait(list(open_pipes), min(left, _POLL_S)):
            child = open_pipes[pipe]  # type: ignore[index]
            try:
                kind, value = child.pipe.recv()
            except (EOFError, OSError):
                kind, value = "error", _death(child)
            if kind == "event":
                on_event(value)
            elif kind == "result":
                results[child.name] = value
            else:
                failures[child.name] = value
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        raise _error(failures, len(children))
    if open_pipes:
        late = ", ".join(child.name for child in open_pipes.values())
        raise CommunicationError(f"{late} had not finished after {timeout_s:g} s: all ranks were stopped")
    for child in children:
        child.process.join(3 * _GRACE_S)  # it has only its exit left to do
    return [results[child.name] for child in children]


def _death(child: _Child) -> _Failure:
    child.process.join(_GRACE_S)
    code = child.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited early with status {code}"
    return _Failure("FlashcommError", f"{child.name} {how}", "", died=True)


def _error(failures: dict[str, _Failure], count: int) -> FlashcommError:
    """The failure to show: a death before what other ranks raised because of it, otherwise the first."""
    name, failure = next(((n, f) for n, f in failures.items() if f.died), next(iter(failures.items())))
    everywhere = len(failures) == count and len({f.message for f in failures.values()}) == 1
    message = failure.message if everywhere or failure.died else f"{name}: {failure.message}"
    error: FlashcommError = getattr(errors, failure.error)(message)
    error.__cause__ = RankTraceback(failure.trace) if failure.trace else None
    return error


@contextlib.contextmanager
def _children(patience_s: float = _GRACE_S) -> Iterator[list[_Child]]:
    """A list to add started children to; however the block is left, they are gone afterwards."""
    children: list[_Child] = []
    try:
        yield children
    finally:
        for stop in ("terminate", "kill"):
            for child in children:
                getattr(child.process, stop)()
            deadline = time.monotonic() + patience_s
            for child in children:
                child.process.join(max(0.0, deadline - time.monotonic()))
        for child in children:
            child.process.join()
            child.pipe.close()


@contextlib.contextmanager
def _deferred_signals() -> Iterator[Callable[[], None]]:
    """Note SIGINT and SIGTERM instead of acting on them; the function it gives raises what was noted.

    So they are acted on in the watching loop, and never halfway through starting or stopping a child. Handlers that
    the caller has installed are left alone. SIGTERM becomes SystemExit(143), which is how a shell reports it.
    """
    noted: list[int] = []
    saved: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                saved[number] = signal.signal(number, lambda received, frame: noted.append(received))

    def check() -> None:
        if noted:
            raise KeyboardInterrupt if noted[0] == signal.SIGINT else SystemExit(128 + noted[0])

    try:
        yield check
    finally:
        for changed, handler in saved.items():
            signal.signal(changed, handler)
    check()  # one that came after the loop's last look
