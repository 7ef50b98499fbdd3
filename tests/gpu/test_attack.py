"""What a hostile or unlucky program does to collectives over memory that ranks share: right results, or an error.

A rank leaves a call by KeyboardInterrupt, is killed or stopped, passes other tensors than its peers, closes the
Communicator in the middle of a call, forks, or calls from two threads. Every call must give the right result or raise
an error, on every rank. No rank may hang or die.

The ranks are processes: on two GPUs over GPU memory and over host memory, else in Triton's interpreter. There all
attacks on all kinds of memory share one run, because starting processes takes longest. Each run prints what it tried,
what came of it, and the wrong, hung and aborted. FLASHCOMM_TEST_THOROUGH=1 tries more without GPUs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import N_GPUS, NCCL, kernels_of, over_cuda, same_bits, tough, wait_at_most

from flashcomm import Communicator, reference
from flashcomm.collectives import executors
from flashcomm.errors import ClosedError, CommunicationError, FlashcommError, InputError
from flashcomm.ranks import processes
from flashcomm.ranks.launch import RankContext, run
from flashcomm.routing.route import Executor
from flashcomm.setup import consistency
from flashcomm.transports import cpu_shared

pytest.importorskip("triton", reason="triton is not installed")

from flashcomm.gpu import launch, tuning
from flashcomm.gpu.host_launch import HostCollectives, HostTuning, shared_bytes

ON_GPUS = N_GPUS >= 2
DEVICE = "cuda" if ON_GPUS else "cpu"
THOROUGH = os.environ.get("FLASHCOMM_TEST_THOROUGH") == "1"
BF16 = torch.bfloat16
# The kinds of memory, each with a protocol: LL words, flags, or waves through host memory.
LL, FLAGS, WAVES = "GPU memory, LL", "GPU memory, flags", "host memory, waves"
WAYS = (LL, FLAGS, WAVES)
HOW = {LL: tuning.LL, FLAGS: tuning.FLAGS, WAVES: HostTuning(512, stage_lag=1, n_workers=1)}
# On GPUs a message of the second kind takes several launches, between which a call can be interrupted.
SMALL, LARGE = ((4, 512), (512, 4096)) if ON_GPUS else ((2, 256), (2, 512))
TIMEOUT_S = 0.5 if ON_GPUS else 0.1  # of a wait for a peer that does not come; the interpreter counts polls
Attack = Callable[[RankContext, str, int], Counter[str]]


def make(way: str, n: int = 0, **more: Any) -> Communicator:
    """Return a Communicator whose messages take this way. Its number n decides the algorithm."""
    settings: dict[str, Any] = {"min_bytes": 0, "workspace_bytes": 4 << 20, "timeout_s": 60, "check": False}
    settings |= {"algorithm": ("one_shot", "two_shot")[n % 2]} | more
    if ON_GPUS:
        comm = over_cuda("int4", transport="host_memory" if way == WAVES else "symmetric", **settings)
        if way != WAVES:  # over host memory the size decides, and large messages take waves
            kernels_of(comm).tuning = lambda *_: HOW[way]  # type: ignore[method-assign]
        return comm
    comm = Communicator(None, "int4", transport="cpu_shared", **settings)
    if way == WAVES:
        region = cpu_shared.create(comm.device, launch.region_bytes(4 << 20), shared_bytes(1 << 20))
        assert comm.group
        region.rendezvous(comm.group, consistency.exchange(comm.transport, region.place, "the test"))
        consistency.exchange(comm.transport, None, "the test")
        kernels = HostCollectives(region, 1 << 20, 60)
        comm._executors[Executor.KERNEL] = executors.Kernel(kernels, executors.StreamOrder(kernels, comm.device))
    kernels_of(comm).tuning = lambda *_: HOW[way]  # type: ignore[method-assign]
    return comm


def messages(ctx: RankContext, way: str, turn: int) -> list[torch.Tensor]:
    """Return the message of every rank. Other turns have other values, so that leftovers of a call are noticed."""
    return [tough(SMALL if way == LL else LARGE, BF16, 100 * turn + rank) for rank in range(ctx.world_size)]


class Turns:
    """Messages of some turns, made once, and what their sums are."""

    def __init__(self, ctx: RankContext, way: str, n_turns: int) -> None:
        self._all = [messages(ctx, way, turn) for turn in range(n_turns)]
        self._want: dict[tuple[str, int], torch.Tensor] = {}
        self.mine = [xs[ctx.rank].to(ctx.device) for xs in self._all]

    def right(self, got: torch.Tensor, comm: Communicator, turn: int = 0) -> bool:
        """Whether a result has the bits of the reference."""
        name = comm.settings.algorithm
        if (name, turn) not in self._want:
            self._want[name, turn] = getattr(reference, name)(self._all[turn], comm.format).to(got.device)
        return same_bits(got, self._want[name, turn])

    def outcome(self, comm: Communicator, turn: int, limit_s: float = 0) -> str:
        """Return what became of a call that a signal interrupts after limit_s seconds (0: never)."""
        before, turn = comm._n_calls, turn % len(self.mine)
        try:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            try:
                got = comm.all_reduce(self.mine[turn])
                comm.synchronize()
                became = "right" if self.right(got, comm, turn) else "wrong"
            except FlashcommError:
                became = "error"
            signal.setitimer(signal.ITIMER_REAL, 0)
            return became
        except KeyboardInterrupt:
            if comm._guard.busy:
                return "interrupted"
            return "not begun" if comm._n_calls == before else "right"  # after the call

    def until_an_error(self, comm: Communicator, limit: int = 1_000_000) -> Counter[str]:
        seen = Counter[str]()
        for turn in range(limit):
            seen[self.outcome(comm, turn)] += 1
            if seen["error"] or seen["interrupted"]:
                break
        return seen


def interrupts(ctx: RankContext, way: str, trials: int) -> Counter[str]:
    """KeyboardInterrupt on one rank at random instants of a call. Then all ranks call again."""
    signal.signal(signal.SIGALRM, _interrupt)
    rng, seen, turns = (
        random.Random(int(os.environ.get("FLASHCOMM_TEST_SEED", "0"))),
        Counter[str](),
        Turns(ctx, way, 4),
    )
    for trial in range(trials):
        victim, part = rng.randrange(ctx.world_size), rng.uniform(0.0, 1.2)
        comm = make(way, trial)
        for _ in range(2):
            begin = time.perf_counter()
            assert turns.outcome(comm, 0) == "right"
            seconds = time.perf_counter() - begin
        wait_at_most(comm, TIMEOUT_S)
        for turn in (1, 2, 3):
            limit_s = max(1e-6, seconds * part) if turn == 1 and ctx.rank == victim else 0
            became = turns.outcome(comm, turn, limit_s)
            seen[became] += 1
            if became in ("not begun", "error"):
                break  # after "not begun" this rank is a call behind the others, through the program
        dist.barrier()
        comm.close()
    return seen


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def stops(ctx: RankContext, way: str, trials: int) -> Counter[str]:
    """SIGSTOP of one rank at a random instant, for longer than the time-out. A new Communicator works afterwards."""
    rng, seen, turns = random.Random(1), Counter[str](), Turns(ctx, way, 3)
    pids = pids_of_all(ctx)
    for trial in range(trials):
        victim = trial % ctx.world_size
        comm = make(way, trial)
        assert turns.outcome(comm, 0) == "right"
        wait_at_most(comm, TIMEOUT_S)
        after_s, met = rng.uniform(0.0, 0.1), threading.Event()
        if ctx.rank == victim:
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        seen += turns.until_an_error(comm)
        if ctx.rank != victim:
            threading.Thread(target=_wake, args=(pids[victim], met)).start()
        dist.barrier()
        met.set()
        comm.close()
    return seen


def _wake(pid: int, awake: threading.Event) -> None:
    """Continue a process again and again: it may be about to stop only now."""
    while not awake.wait(0.2):
        os.kill(pid, signal.SIGCONT)


def pids_of_all(ctx: RankContext) -> list[int]:
    pids: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(pids, os.getpid())
    return pids


def differences(ctx: RankContext, way: str, trials: int) -> Counter[str]:
    """One rank passes another tensor or calls something else. With check=True all ranks get the same error."""
    seen, turns, other = Counter[str](), Turns(ctx, way, 2), ctx.rank == 1
    comm = make(way, check=True)
    x = turns.mine[0]
    calls: list[tuple[str, Callable[[], object]]] = [
        ("shape", lambda: comm.all_reduce(x[: len(x) - other])),
        ("flat", lambda: comm.all_reduce(x.view(-1) if other else x)),
        ("dtype", lambda: comm.all_reduce(x.float() if other else x)),
        ("dtype of the same size", lambda: comm.all_reduce(x.half() if other else x)),
        ("unknown dtype", lambda: comm.all_reduce(x.double() if other else x)),
        ("no tensor", lambda: comm.all_reduce([1.0] if other else x)),  # type: ignore[arg-type]
        ("format", lambda: comm.all_reduce(x, format="int8" if other else "int4")),
        ("no format", lambda: comm.all_reduce(x, format="int99" if other else "int4")),
        ("out", lambda: comm.all_reduce(x, out=torch.empty_like(x)[1:] if other else None)),
        ("overlap", lambda: comm.all_reduce(x.view(-1)[:-64], out=x.view(-1)[64:] if other else None)),
        ("sparse", lambda: comm.all_reduce(x.to_sparse() if other else x)),
        ("another collective", lambda: comm.all_gather(x) if other else comm.all_reduce(x)),
    ]
    for what, call in calls[:trials]:
        try:
            call()
            ctx.emit((f"other tensors, {what}", way, Counter(wrong=1), 0.0))
        except InputError:
            seen["error"] += 1
        seen[turns.outcome(comm, 1)] += 1
    assert seen["right"] == seen["error"], seen
    comm.close()
    return seen


def closes(ctx: RankContext, way: str, trials: int) -> Counter[str]:
    """Another thread closes the Communicator of one rank at a random instant of a call."""
    rng, seen, turns = random.Random(2), Counter[str](), Turns(ctx, way, 3)
    for trial in range(trials):
        comm = make(way, trial)
        assert turns.outcome(comm, 0) == "right"
        wait_at_most(comm, TIMEOUT_S)
        closing = threading.Timer(rng.uniform(0.0, 0.05), comm.close)
        if ctx.rank == trial % ctx.world_size:
            closing.start()
        seen += turns.until_an_error(comm)
        if closing.ident:
            closing.join()
            with pytest.raises(ClosedError):
                comm.all_reduce(turns.mine[0])
        dist.barrier()
        comm.close()
    return seen


def forks(ctx: RankContext, way: str, trials: int) -> Counter[str]:
    """A forked child that uses the Communicator of its parent gets one clear error, and the parent goes on."""
    seen, turns = Counter[str](), Turns(ctx, way, 2)
    comm = make(way)
    x = turns.mine[0]
    for _ in range(2):
        assert turns.outcome(comm, 0) == "right"
    if ctx.rank == 0:
        for trial in range(trials):
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    try:
                        comm.all_reduce(x, out=x) if trial % 2 else comm.all_reduce(x)
                    except CommunicationError as why:
                        code = 0 if "was forked from the one that created the Communicator" in str(why) else 2
                    comm.close()
                os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            seen["error"] += 1
    dist.barrier()
    seen[turns.outcome(comm, 1)] += 1
    comm.close()
    return seen


def two_threads(ctx: RankContext, way: str, trials: int) -> Counter[str]:
    """Two threads of each rank use one Communicator at the same time, with equal messages."""
    seen, turns = Counter[str](), Turns(ctx, way, 1)
    comm = make(way)
    assert turns.outcome(comm, 0) == "right"
    wait_at_most(comm, TIMEOUT_S)

    def body() -> None:
        if ON_GPUS:
            torch.cuda.set_device(ctx.device)
        for _ in range(trials):
            try:
                got = comm.all_reduce(turns.mine[0])
                comm.synchronize()
                seen["right" if turns.right(got, comm) else "wrong"] += 1
            except FlashcommError:
                seen["error"] += 1

    threads = [threading.Thread(target=body) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dist.barrier()
    comm.close()
    return seen


def several(ctx: RankContext, way: str, trials: int) -> Counter[str]:
    """Calls of three Communicators take turns, on GPUs on streams of their own. They close in any order."""
    seen, turns = Counter[str](), Turns(ctx, way, 5)
    comms = [make(way, n) for n in range(3)]
    streams = [torch.cuda.Stream() if ON_GPUS else None for _ in comms]
    for trial in range(trials):
        for comm, stream in zip(comms, streams, strict=True):
            with torch.cuda.stream(stream):  # None: no change
                seen[turns.outcome(comm, trial)] += 1
    dist.barrier()
    for comm in comms if ctx.rank else comms[::-1]:
        comm.close()
        comm.close()
    return seen


def drops(ctx: RankContext, way: str, trials: int) -> Counter[str]:
    """Communicators that are dropped, in turn with such that are closed, leave nothing behind."""
    seen, turns = Counter[str](), Turns(ctx, way, 1)
    regions: list[weakref.ref[Any]] = []
    held: list[dict[str, int]] = []
    for trial in range(trials):
        comm = make(way, trial)
        regions.append(weakref.ref(kernels_of(comm).region))
        if trial < 2 or ON_GPUS or trial % 10 == 0:
            seen[turns.outcome(comm, 0)] += 1
        if trial % 2:
            comm.close()
        del comm
        dist.barrier()
        if trial in (1, trials - 1):
            held.append(what_is_held())
    assert not any(region() for region in regions)
    if ON_GPUS and way != WAVES:  # torch keeps two arrays, 512 bytes each, of every symmetric memory
        held[1]["GPU bytes"] -= 1024 * (trials - 2)
    assert held[0] == held[1], f"after 2 and after {trials}: {held}"
    return seen + Counter(dropped=trials)


def what_is_held() -> dict[str, int]:
    """Return how much this process has of what a Communicator takes."""
    maps = Path("/proc/self/maps").read_text()
    held = {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "maps": maps.count("memfd:flashcomm"),
        "threads": threading.active_count(),
    }
    return held | ({"GPU bytes": torch.cuda.memory_allocated()} if ON_GPUS else {})


def kills(ctx: RankContext, way: str, after_s: float) -> None:
    """SIGKILL of the last rank in the middle of calls. The others raise an error within their time-out."""
    comm, turns = make(way), Turns(ctx, way, 3)
    assert turns.outcome(comm, 0) == "right"
    wait_at_most(comm, TIMEOUT_S if ON_GPUS else 2.0)  # no rank may give up by itself before the kill
    if ctx.rank == ctx.world_size - 1:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    seen = turns.until_an_error(comm)
    begin = time.monotonic()
    with pytest.raises(CommunicationError):
        comm.all_reduce(turns.mine[0])
    assert time.monotonic() - begin < 1
    ctx.emit(("killed", way, seen, 0.0))
    os._exit(0)  # the group has lost a rank


def asynchronous(ctx: RankContext, path: str) -> None:
    """After the first sum async_op=True returns before the peers call, also with other collectives in between."""
    import flashcomm.integrations.process_group  # noqa: F401

    dist.destroy_process_group()
    dist.init_process_group(
        "flashcomm", store=dist.FileStore(path, ctx.world_size), rank=ctx.rank, world_size=ctx.world_size
    )
    group: Any = dist.group.WORLD
    inputs, seen = [tough((700, 1024), BF16, rank) for rank in range(ctx.world_size)], Counter[str]()
    dist.all_reduce(inputs[ctx.rank].to(ctx.device))  # sets up, and so waits for the peers
    for turn in range(20):
        xs = [inputs[ctx.rank].to(ctx.device) * (i + 1) for i in range(3)]
        if ctx.rank == turn % 2:
            works = [dist.all_reduce(x, async_op=True) for x in xs]
            dist.send(torch.ones(2), 1 - ctx.rank)
        else:
            dist.recv(torch.empty(2), 1 - ctx.rank)
            works = [dist.all_reduce(x, async_op=True) for x in xs]
        for i, (work, x) in enumerate(zip(works, xs, strict=True)):
            work.wait()
            comm = group._planned["cuda"].comm
            algorithm = comm.explain(x.shape, x.dtype).route.algorithm
            want = getattr(reference, algorithm)([t * (i + 1) for t in inputs], comm.format)
            seen["right" if same_bits(x.cpu(), want) else "wrong"] += 1
    ctx.emit(("asynchronous", comm.machine.transport, seen, 0.0))


# How much is tried on two GPUs, and without GPUs in scripts/test on one kind of memory, and in scripts/test-thorough.
ATTACKS: dict[str, tuple[Attack, int, int, str, int]] = {
    "interrupted": (interrupts, 100, 2, FLAGS, 2),
    "stopped": (stops, 12, 1, FLAGS, 1),
    "other tensors": (differences, 12, 2, LL, 12),
    "closed in a call": (closes, 30, 1, FLAGS, 1),
    "forked": (forks, 4, 1, LL, 2),
    "two threads": (two_threads, 200, 2, LL, 3),
    "several Communicators": (several, 200, 1, WAVES, 1),
    "dropped": (drops, 200, 14, FLAGS, 14),
}
MORE = 40 if THOROUGH else 1  # times as many as in scripts/test-thorough


def attacked(ctx: RankContext, tried: list[tuple[str, str, int]]) -> None:
    for name, way, trials in tried:
        begin = time.monotonic()
        ctx.emit((name, way, ATTACKS[name][0](ctx, way, trials), time.monotonic() - begin))


@contextlib.contextmanager
def judged(what: str) -> Iterator[list[Any]]:
    """Collect the events of a run, print a line for each attack, and fail if a result was wrong."""
    events: list[Any] = []
    try:
        yield events
    except FlashcommError as why:
        print(
            f"| {what} | hung {int('had not finished' in str(why))}, aborted {int('was killed by' in str(why))} | {why}"
        )
        raise
    finally:
        total: dict[tuple[str, str], Counter[str]] = {}
        for name, way, seen, _ in events:
            total.setdefault((name, way), Counter()).update(seen)
        for (name, way), seen in total.items():
            print(f"| {name} | {way} | {sum(seen.values())} tried: {dict(seen)} | wrong {seen['wrong']}")
    assert total, "nothing was tried"
    assert not any(seen["wrong"] for seen in total.values())
    assert {key for seen in total.values() for key in seen} <= OUTCOMES


OUTCOMES = {"right", "wrong", "error", "interrupted", "not begun", "dropped"}


def attack(tried: list[tuple[str, str, int]]) -> None:
    with judged(str(tried)) as events:
        run(attacked, 2, (tried,), device=DEVICE, timeout_s=3000 if THOROUGH else 280, on_event=events.append)
    print("seconds:", {f"{name}, {way}": round(s, 1) for name, way, _, s in events[::2]})
    if any(name == "interrupted" for name, _, _ in tried):
        assert sum(seen["interrupted"] for _, _, seen, _ in events), "no signal came in the middle of a call"


@pytest.mark.skipif(not ON_GPUS, reason=f"{N_GPUS} CUDA devices, 2 are needed")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTACKS)
def test_right_or_an_error_on_two_gpus(name: str, way: str) -> None:
    attack([(name, way, ATTACKS[name][1])])


@pytest.mark.skipif(ON_GPUS, reason="kernels are not interpreted where there are GPUs")
def test_right_or_an_error_over_one_kind_of_memory() -> None:
    attack([(name, way, trials) for name, (_, _, trials, way, _) in ATTACKS.items()])


@pytest.mark.thorough
@pytest.mark.timeout(3000)
@pytest.mark.skipif(ON_GPUS, reason="kernels are not interpreted where there are GPUs")
@pytest.mark.parametrize("way", WAYS if THOROUGH else [WAVES])
def test_right_or_an_error(way: str) -> None:
    attack([(name, way, trials * MORE) for name, (*_, trials) in ATTACKS.items()])


@pytest.mark.thorough
@pytest.mark.parametrize("way", WAYS if ON_GPUS or THOROUGH else [WAVES])
@pytest.mark.parametrize("after_s", [0.005, 0.05, 0.3] if ON_GPUS else [0.3])
def test_killed(way: str, after_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 60.0)  # time for the survivors' time-outs
    world_size, before = 2 if ON_GPUS else 3, set(os.listdir("/dev/shm"))
    with (
        judged("killed") as events,
        pytest.raises(FlashcommError, match=f"rank {world_size - 1} was killed by SIGKILL"),
    ):
        run(kills, world_size, (way, after_s), device=DEVICE, timeout_s=200, on_event=events.append)
    assert len(events) == world_size - 1
    assert all(seen["error"] == 1 for _, _, seen, _ in events)
    left = {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith(("nccl", "sem.", "cuda"))}
    assert not left  # NCCL of ranks that were killed leaves files


@pytest.mark.skipif(not NCCL, reason="NCCL needs two CUDA devices of which each has one rank")
@pytest.mark.parametrize("peer_access", [True, False])
def test_asynchronous_sums_of_the_c10d_backend(
    peer_access: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`integrations/test_c10d.py` does the same on CPUs."""
    monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")
    monkeypatch.setenv("FLASHCOMM_MIN_BYTES", "64K")
    if not peer_access:
        monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with judged("asynchronous") as events:
        run(asynchronous, 2, (str(tmp_path / "store"),), device="cuda", timeout_s=200, on_event=events.append)
