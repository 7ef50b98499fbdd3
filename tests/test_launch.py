"""`run` brings back what rank 0 returns, fails when any rank fails, and never leaves a process behind.

Run as a script this file is the caller that the tests send signals to: `test_launch.py CASE [LINK]`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm.cli import link as links
from flashcomm.cli.launch import RankContext, run
from flashcomm.errors import CommunicationError, FlashcommError, InputError, SettingsError

TOKEN = "FLASHCOMM_TEST_TOKEN"
REASON = links.probe()
needs_link = pytest.mark.skipif(REASON is not None, reason=str(REASON))
with_and_without_link = pytest.mark.parametrize(
    "link", [pytest.param(None, id="local"), pytest.param("1gbit", marks=needs_link, id="link")]
)


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
        "world": ctx.world,
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "device": str(ctx.device),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "master": os.environ["MASTER_ADDR"],
    }


def fail(ctx: RankContext, how: str) -> None:
    """Rank 1 fails and rank 0 waits for it."""
    if how == "same":
        raise SettingsError("group size 7 is not allowed")
    if ctx.rank == 1:
        ctx.emit(time.time())
        if how == "ours":
            raise InputError("a tensor of dtype int64")
        if how == "unexpected":
            raise KeyError("first line\nsecond line")
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    if how == "kill":
        dist.all_reduce(torch.ones(1))  # fails as well, with "connection closed": not what the caller should read
    if how == "exit":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only SIGKILL helps
    time.sleep(60)


def wait_forever(ctx: RankContext) -> None:
    ctx.emit(os.getpid())
    time.sleep(60)


# ---------------------------------------------------------------------------------------------- the caller as a script


def caller(case: str, link: str | None = None) -> None:
    started: list[object] = []

    def on_event(event: object) -> None:
        started.append(event)
        if len(started) == 2:
            print("ready", flush=True)

    if case == "json":
        print(json.dumps(run(total, 2, (10,), link=link)))
    elif case == "torchrun":
        events: list[object] = []
        result = run(total, int(sys.argv[2]), (10,), on_event=events.append)
        print(json.dumps({"result": result, "events": events}))
    else:
        print("starting", flush=True)
        try:
            run(wait_forever, 2, link=link, on_event=on_event)
        except KeyboardInterrupt:
            print("interrupted")


@contextlib.contextmanager
def script(*args: str | None, patience_s: float = 3, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """The caller in a process group of its own; at the end nothing of it may be left, which is asserted."""
    token = str(uuid.uuid4())
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), TOKEN: token, **more.pop("env", {})}
    process = subprocess.Popen(
        [sys.executable, __file__, *(arg for arg in args if arg)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )
    try:
        yield process
        process.wait(20)
        assert_gone(token, within_s=patience_s)
    finally:
        for pid in holders(token):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def holders(token: str) -> list[int]:
    """Every process that has the token in its environment: descendants keep it, even when orphaned."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TOKEN}={token}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def assert_gone(token: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while left := holders(token):
        names = [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        assert time.monotonic() < deadline, f"left behind: {names}"
        time.sleep(0.05)


def until(process: subprocess.Popen[str], line: str, or_end: bool = False) -> bool:
    """Read the caller's stdout up to `line`; False if it ends before, where that may be."""
    assert process.stdout is not None
    found = any(text.strip() == line for text in process.stdout)
    assert found or or_end, f"the caller ended before it said {line!r}"
    return found


def children() -> set[int]:
    """Children of this process, except for the one tracker that multiprocessing keeps for its life."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = {int(pid) for task in tasks for pid in task.read_text().split()}
    return {pid for pid in pids if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process, no device in the root namespace, no named namespace that was not there before."""

    def state() -> tuple[object, ...]:
        named = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
        return children(), set(os.listdir("/sys/class/net")), set(named)

    before = state()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert state() == before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


# ---------------------------------------------------------------------------------------------------------- the tests


@with_and_without_link
def test_result_and_events(link: str | None) -> None:
    events: list[Any] = []
    result: Any = run(total, 2, (10,), link=link, on_event=events.append)
    assert sorted(events) == [("rank", 0), ("rank", 1)]
    assert result["sum"] == 30
    assert result["world"] == 2
    assert (result["backend"], result["device"]) == ("gloo", "cpu")
    assert result["threads"] == max(1, (os.cpu_count() or 1) // 2)
    assert result["master"] == ("10.77.0.1" if link else "127.0.0.1")
    assert ("eth0" in result["interfaces"] and "port0" not in result["interfaces"]) or not link


@pytest.mark.parametrize(
    ("how", "link", "error", "message"),
    [
        ("unexpected", None, FlashcommError, "rank 1: KeyError: 'first line\\nsecond line'"),
        ("exit", None, FlashcommError, "rank 1 exited early with status 3"),
        ("same", None, SettingsError, "group size 7 is not allowed"),
        pytest.param("ours", "1gbit", InputError, "rank 1: a tensor of dtype int64", marks=needs_link),
        pytest.param("kill", "1gbit", FlashcommError, "rank 1 was killed by SIGKILL", marks=needs_link),
    ],
)
def test_failure_of_a_rank(how: str, link: str | None, error: type[Exception], message: str) -> None:
    failed_at: list[Any] = []
    with pytest.raises(FlashcommError) as caught:
        run(fail, 2, (how,), link=link, on_event=failed_at.append)
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert how == "same" or time.time() - failed_at[0] < 3.5
    if how not in ("kill", "exit"):
        assert f"{'KeyError' if how == 'unexpected' else error.__name__}: " in str(caught.value.__cause__)
        assert str(caught.value.__cause__).count("Traceback") == 1
        assert "in fail" in str(caught.value.__cause__)


def test_timeout() -> None:
    with pytest.raises(CommunicationError, match=r"^rank 0, rank 1 had not finished after 2 s"):
        run(wait_forever, 2, timeout_s=2)


def test_error_in_on_event_ends_the_run() -> None:
    def broken(event: object) -> None:
        raise LookupError(event)

    begin = time.monotonic()
    with pytest.raises(LookupError):
        run(wait_forever, 2, on_event=broken)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"world": 0}, "world=0"),
        ({"world": 2, "device": "tpu"}, "device='tpu'"),
        ({"world": 2, "link": "fast"}, "link rate 'fast'"),
        ({"world": 2, "link": "1gbit", "device": "cuda"}, "nccl would bypass it"),
    ],
)
def test_requests_that_are_not_allowed(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(total, args=(1,), **asked)


def test_stdout_belongs_to_the_caller() -> None:
    with script("json") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert json.loads(stdout)["sum"] == 30
    for noise in ("printed by a rank", "written by a rank"):
        assert stderr.count(noise) == 2
        stderr = stderr.replace(noise, "")
    assert stderr.strip() == ""  # no warning, of gloo or of anyone else


@pytest.mark.parametrize(
    ("number", "link", "status"),
    [
        (signal.SIGINT, None, 0),
        (signal.SIGTERM, None, 143),
        (signal.SIGKILL, None, -9),
        pytest.param(signal.SIGINT, "1gbit", 0, marks=needs_link),
        pytest.param(signal.SIGKILL, "1gbit", -9, marks=needs_link),
    ],
)
def test_signals_end_everything(number: signal.Signals, link: str | None, status: int) -> None:
    with script("wait", link) as process:
        until(process, "ready")
        sent = time.monotonic()
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # Ctrl-C reaches the whole group
        stdout, stderr = process.communicate(timeout=20)
        assert time.monotonic() - sent < 3
    assert process.returncode == status
    assert ("interrupted" in stdout) == (number == signal.SIGINT)
    assert stderr == ""


def test_ctrl_c_while_the_ranks_start() -> None:
    with script("wait") as process:
        until(process, "starting")
        time.sleep(0.4)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert "Traceback" not in stderr
    assert process.returncode == 0
    assert "interrupted" in stdout
    assert "ready" not in stdout


def test_caller_killed_while_the_ranks_start() -> None:
    """They find out as soon as they have booted, which takes a few seconds of imports."""
    with script("wait", patience_s=15) as process:
        until(process, "starting")
        time.sleep(0.4)
        process.kill()


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
    # What goes past sys.stdout reaches the caller's own stdout here: there is one process for both.
    first, second = (json.loads(out.replace("written by a rank\n", "")) for out in (out0, out1))
    assert first["result"]["sum"] == 30
    assert first["events"] == [["rank", 0]]
    assert second == {"result": None, "events": []}
    assert "printed by a rank" in err0


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="world=3 was asked for under a torchrun of 2 ranks: ask for 2"):
        run(total, 3, (1,))


def test_link_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="without torchrun"):
        run(total, 1, (1,), link=10**6)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_link_without_root() -> None:
    """As nobody: the ranks live in a user namespace, and die with a caller that is killed; or the clear error."""
    nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    try:
        subprocess.run([sys.executable, "-c", "import torch, pyroute2"], capture_output=True, check=True, **nobody)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nobody cannot use this Python installation: {error}")
    with script("wait", "100mbit", env={"PYTHONDONTWRITEBYTECODE": "1"}, **nobody) as process:
        if until(process, "ready", or_end=True):
            process.kill()
        _, stderr = process.communicate(timeout=60)
    if "UnavailableError" in stderr:
        assert "CLONE_NEWUSER" in stderr
        assert "Run as root" in stderr
        pytest.skip(stderr.splitlines()[-1])
    assert (process.returncode, stderr) == (-9, "")


if __name__ == "__main__":
    caller(*sys.argv[1:])
