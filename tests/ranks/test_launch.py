"""`run` returns the result of rank 0, fails when any rank fails, and never leaves a process behind.

As a script, `test_launch.py CASE [LINK ...]`, this file is the caller that the tests send signals to. A rank takes
seconds to import torch. So a caller that survives continues with its next run, and `processes` is tested with forked
children, which import nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm.errors import CommunicationError, FlashcommError, InputError, SettingsError
from flashcomm.ranks import link as links
from flashcomm.ranks import processes
from flashcomm.ranks.launch import RankContext, run
from flashcomm.ranks.processes import Emit

TOKEN = "FLASHCOMM_TEST_TOKEN"
SOON_S = 30  # limit for actions that take two seconds on a quiet machine, and ENDLESS_S if they fail
ENDLESS_S = 600
SIGINT, SIGTERM, SIGKILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL

pytestmark = pytest.mark.alone  # it depends on the times of processes

no_link = functools.cache(links.probe)


def skip_if_it_cannot_be_had(link: str | None) -> None:
    if link and (reason := no_link()):
        pytest.skip(reason)


# -------------------------------------------------------------------------------------------------------- the targets


def total(ctx: RankContext, factor: int) -> dict[str, Any]:
    print("printed by a rank")
    os.write(1, b"written by a rank\n")
    tensor = torch.full((4,), float(ctx.rank + 1))
    dist.all_reduce(tensor)
    ctx.emit(("rank", ctx.rank))
    if ctx.rank:
        return {"of rank": ctx.rank, "unpicklable": lambda: None}
    return {
        "sum": tensor[3].item() * factor,
        "world": ctx.world_size,
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "device": str(ctx.device),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "master": os.environ["MASTER_ADDR"],
        "ignores Ctrl-C": SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    }


def networks(ctx: RankContext) -> list[int] | None:
    """Return the network namespace of every rank."""
    namespaces: list[int] = [0] * ctx.world_size
    dist.all_gather_object(namespaces, os.stat("/proc/self/ns/net").st_ino)
    return namespaces


def fail(ctx: RankContext, how: str) -> None:
    """Rank 1 fails and rank 0 waits for it."""
    if how == "same":
        raise SettingsError("group size 7 is not allowed")
    if ctx.rank == 1:
        ctx.emit(time.time())
        if how == "ours":
            raise InputError("a tensor of dtype int64")
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), SIGKILL)
    if how == "kill":
        dist.all_reduce(torch.ones(1))  # fails, too, with "connection closed", which the caller must not see
    if how == "exit":
        signal.signal(SIGTERM, signal.SIG_IGN)  # only SIGKILL helps
    time.sleep(ENDLESS_S)


def wait_forever(ctx: RankContext) -> None:
    ctx.emit(os.getpid())
    time.sleep(ENDLESS_S)


def child(emit: Emit, how: str) -> object:
    """Run in a forked child. It inherits the handlers of the watching process, so only SIGKILL ends it early."""
    if how == "fails":
        raise KeyError("first line\nsecond line")
    if how == "leaves":
        sys.exit(4)
    if how == "fails inside":
        with processes.children(0.1) as children:
            children.start("fork", "inner", child, "fails")
            return children.watch(emit, SOON_S)
    if how == "waits":
        time.sleep(ENDLESS_S)
    for number in range(3):
        emit((how, number))
    return how.upper()


# ---------------------------------------------------------------------------------------------- the caller as a script


def caller(case: str, *more: str) -> None:
    events: list[Any] = []
    if case == "results":
        results = [run(total, 2, (10,), link=link or None, on_event=events.append) for link in more]
        print(json.dumps({"results": results, "events": events}))
    elif case == "torchrun":
        result = run(total, int(more[0]), (10,), on_event=events.append)
        print(json.dumps({"result": result, "events": events}))
    elif case == "wait":
        for link in more:
            with contextlib.suppress(KeyboardInterrupt):
                wait(link or None)
            print("interrupted", flush=True)
            sys.stdin.readline()  # the next run starts when the test has seen that nothing of this one is left


def wait(link: str | None) -> None:
    started: list[object] = []

    def on_event(event: object) -> None:
        started.append(event)
        if len(started) == 2:
            print("ready", flush=True)

    print("starting", flush=True)
    run(wait_forever, 2, link=link, on_event=on_event)


class Caller(subprocess.Popen[str]):
    token = ""


@contextlib.contextmanager
def script(*args: str, **more: Any) -> Iterator[Caller]:
    """Run the caller in its own process group. Assert at the end that none of its processes are left."""
    token = str(uuid.uuid4())
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), TOKEN: token, **more.pop("env", {})}
    process = Caller(
        [sys.executable, __file__, *args],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(SIGINT, signal.SIG_DFL),  # a background job would ignore it
        **more,
    )
    process.token = token
    try:
        yield process
        process.wait(SOON_S)
        assert_gone(token)
    finally:
        for pid in holders(token):
            os.kill(pid, SIGKILL)
        process.communicate()


def holders(token: str) -> list[int]:
    """Return every process with the token in its environment. Descendants keep it, even if orphaned."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TOKEN}={token}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def assert_gone(token: str, but: int | None = None) -> None:
    """Assert that soon no process has the token, except for `but` and multiprocessing's own two servers."""
    deadline = time.monotonic() + SOON_S
    while True:
        left = {}
        for pid in set(holders(token)) - {but}:
            with contextlib.suppress(OSError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                name = Path(f"/proc/{pid}/cmdline").read_text()
                if parent != but or not ("resource_tracker" in name or "forkserver" in name):
                    left[pid] = name
        if not left:
            return
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def until(process: Caller, line: str) -> list[str]:
    """Read the caller's stdout up to `line`. Return the lines before it."""
    assert process.stdout is not None
    before = []
    for text in process.stdout:
        if text.strip() == line:
            return before
        before.append(text.strip())
    raise EOFError(f"the caller ended before it printed {line!r}")


def children() -> set[int]:
    """Return the children of this process, except for multiprocessing's resource tracker."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = {int(pid) for task in tasks for pid in task.read_text().split()}
    return {pid for pid in pids if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Assert that no process, no device in the root namespace and no named namespace is left."""

    def state() -> tuple[object, ...]:
        named = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
        return children(), set(os.listdir("/sys/class/net")), set(named)

    forkserver.set_forkserver_preload(processes.PRELOADED)
    forkserver.ensure_running()  # it stays until this process ends
    before = state()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert state() == before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def outcome() -> tuple[dict[str, Any], str]:
    """Return the output of a caller about a run without a link and, if possible, with one; and its stderr."""
    with script("results", "", *([] if no_link() else ["1gbit"])) as process:
        stdout, stderr = process.communicate(timeout=120)
    return json.loads(stdout), stderr


@pytest.mark.parametrize("link", [None, "1gbit"])
def test_result_and_events(outcome: tuple[dict[str, Any], str], link: str | None) -> None:
    skip_if_it_cannot_be_had(link)
    place = 1 if link else 0
    result = outcome[0]["results"][place]
    assert sorted(outcome[0]["events"][2 * place :][:2]) == [["rank", 0], ["rank", 1]]
    assert result["sum"] == 30
    assert result["world"] == 2
    assert (result["backend"], result["device"]) == ("gloo", "cpu")
    assert result["threads"] == max(1, (os.cpu_count() or 1) // 2)
    assert result["ignores Ctrl-C"]
    assert result["master"] == ("10.77.0.1" if link else "127.0.0.1")
    assert ("eth0" in result["interfaces"] and "port0" not in result["interfaces"]) or not link


def test_stdout_belongs_to_the_caller(outcome: tuple[dict[str, Any], str]) -> None:
    """Only the JSON was on stdout. Otherwise `outcome` would have failed."""
    printed, stderr = outcome
    assert len(printed["events"]) == 2 * len(printed["results"])
    for noise in ("printed by a rank", "written by a rank"):
        assert stderr.count(noise) == 2 * len(printed["results"])
        stderr = stderr.replace(noise, "")
    assert stderr.strip() == ""  # no warning, from gloo or others


@pytest.mark.parametrize(
    ("how", "link", "error", "message"),
    [
        ("exit", None, FlashcommError, "rank 1 exited early with status 3"),
        ("same", None, SettingsError, "group size 7 is not allowed"),
        ("ours", "1gbit", InputError, "rank 1: a tensor of dtype int64"),
        ("kill", "1gbit", FlashcommError, "rank 1 was killed by SIGKILL"),
    ],
)
def test_failure_of_a_rank(how: str, link: str | None, error: type[Exception], message: str) -> None:
    skip_if_it_cannot_be_had(link)
    failed_at: list[Any] = []
    with pytest.raises(FlashcommError) as caught:
        run(fail, 2, (how,), link=link, on_event=failed_at.append)
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert how == "same" or time.time() - failed_at[0] < SOON_S
    if how not in ("kill", "exit"):
        assert f"{error.__name__}: " in str(caught.value.__cause__)
        assert str(caught.value.__cause__).count("Traceback") == 1
        assert "in fail" in str(caught.value.__cause__)


@contextlib.contextmanager
def forked(*bodies: str) -> Iterator[processes.Children]:
    with processes.children(0.1) as family:
        for how in bodies:
            with links.forking():
                family.start("fork", f"the one that {how}", child, how)
        yield family


def test_children_are_heard_to_the_end() -> None:
    events: list[Any] = []
    with forked("sings", "talks") as family:
        assert family.watch(events.append, SOON_S) == ["SINGS", "TALKS"]
    assert [number for how, number in events if how == "talks"] == [0, 1, 2]
    assert len(events) == 6


@pytest.mark.parametrize(
    ("bodies", "message"),
    [
        (["waits", "fails"], "the one that fails: KeyError: 'first line\\nsecond line'"),
        (["leaves", "waits", "talks"], "the one that leaves: SystemExit: 4"),
        (["waits", "fails inside"], "the one that fails inside: KeyError: 'first line\\nsecond line'"),
        (["fails"], "KeyError: 'first line\\nsecond line'"),
    ],
)
def test_failure_of_a_child(bodies: list[str], message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(FlashcommError) as caught, forked(*bodies) as family:
        family.watch(lambda event: None, ENDLESS_S)
    assert type(caught.value) is FlashcommError
    assert str(caught.value) == message
    assert "in child" in str(caught.value.__cause__)
    assert str(caught.value.__cause__).count("Traceback") == 1
    assert time.monotonic() - begin < SOON_S


def test_error_in_on_event_ends_the_run() -> None:
    def broken(event: object) -> None:
        raise LookupError(event)

    begin = time.monotonic()
    with pytest.raises(LookupError, match="talks"), forked("waits", "talks") as family:
        family.watch(broken, ENDLESS_S)
    assert time.monotonic() - begin < SOON_S


def test_timeout() -> None:
    with pytest.raises(CommunicationError, match=r"^rank 0, rank 1 had not finished after 2 s"):
        run(wait_forever, 2, timeout_s=2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"world_size": 0}, "world_size=0"),
        ({"world_size": 2, "device": "tpu"}, "device='tpu'"),
        ({"world_size": 2, "link": "fast"}, "link rate 'fast'"),
        ({"world_size": 2, "link": "1gbit", "device": "cuda"}, "nccl would bypass it"),
    ],
)
def test_requests_that_are_not_allowed(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(total, args=(1,), **asked)


@pytest.mark.parametrize(
    ("link", "steps", "status"),
    [
        (None, [("starting", SIGINT), ("ready", SIGINT), ("ready", SIGTERM)], 143),
        (None, [("ready", SIGKILL)], -9),
        (None, [("starting", SIGKILL)], -9),
        ("1gbit", [("ready", SIGINT), ("ready", SIGKILL)], -9),
    ],
    ids=lambda value: " ".join(f"{m}-{n.name}" for m, n in value) if isinstance(value, list) else None,
)
def test_signals_end_everything(link: str | None, steps: list[tuple[str, signal.Signals]], status: int) -> None:
    """Ctrl-C ends a run, and the caller starts the next one. Ranks that are still starting end as well."""
    skip_if_it_cannot_be_had(link)
    with script("wait", *[link or ""] * len(steps)) as process:
        for moment, number in steps:
            until(process, moment)
            if moment == "starting":
                time.sleep(0.4)  # the ranks have started, but not imported torch
            sent = time.monotonic()
            (os.killpg if number == SIGINT else os.kill)(process.pid, number)  # Ctrl-C reaches the whole group
            if number == SIGINT:
                assert "ready" not in until(process, "interrupted")
                assert_gone(process.token, but=process.pid)
                assert process.poll() is None
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        rest, stderr = process.communicate(timeout=SOON_S)
        assert time.monotonic() - sent < SOON_S
    assert process.returncode == status
    assert rest == ""
    assert stderr == ""


def test_joins_torchrun() -> None:
    """Two callers with the environment that torchrun gives to its workers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (
        script("torchrun", "2", env={**common, "RANK": "0"}) as rank0,
        script("torchrun", "2", env={**common, "RANK": "1"}) as rank1,
    ):
        (out0, err0), (out1, _) = rank0.communicate(timeout=60), rank1.communicate(timeout=60)
    assert (rank0.returncode, rank1.returncode) == (0, 0)
    # Output that bypasses sys.stdout reaches the caller's stdout here, because both are one process.
    first, second = (json.loads(out.replace("written by a rank\n", "")) for out in (out0, out1))
    assert first["result"]["sum"] == 30
    assert first["events"] == [["rank", 0]]
    assert second == {"result": None, "events": []}
    assert "printed by a rank" in err0


def test_ranks_of_a_node_have_a_link_together() -> None:
    skip_if_it_cannot_be_had("1gbit")
    a, b, c, d = run(networks, 4, link="1gbit", local_world_size=2)  # type: ignore[misc]
    assert (a == b, b == c, c == d) == (True, False, True)
    with pytest.raises(SettingsError, match="local_world_size=3: 4 ranks cannot be divided into nodes of that size"):
        run(networks, 4, link="1gbit", local_world_size=3)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="world_size=3 was requested under a torchrun of 2 ranks: use world_size=2"):
        run(total, 3, (1,))


def test_link_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="without torchrun"):
        run(total, 1, (1,), link=10**6)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_link_without_root() -> None:
    """Run as nobody: the ranks run in a user namespace and die with a killed caller, or there is a clear error."""
    nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    try:
        subprocess.run([sys.executable, "-c", "import torch, pyroute2"], capture_output=True, check=True, **nobody)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nobody cannot use this Python installation: {error}")
    with script("wait", "100mbit", env={"PYTHONDONTWRITEBYTECODE": "1"}, **nobody) as process:
        with contextlib.suppress(EOFError):
            until(process, "ready")
            process.kill()
        _, stderr = process.communicate(timeout=60)
    if "UnavailableError" in stderr:
        assert "CLONE_NEWUSER" in stderr
        assert "Run as root" in stderr
        pytest.skip(stderr.splitlines()[-1])
    assert (process.returncode, stderr) == (-9, "")


if __name__ == "__main__":
    caller(*sys.argv[1:])
