"""A link has the requested rate in each direction, also for short messages, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flashcomm.errors import SettingsError, UnavailableError
from flashcomm.ranks import link

FORK: Any = multiprocessing.get_context("fork")
REASON = link.probe()
needs_link = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Assert that no device in the root namespace and no named namespace is left."""

    def state() -> tuple[set[str], set[str]]:
        return set(os.listdir("/sys/class/net")), set(os.listdir("/run/netns") if os.path.isdir("/run/netns") else ())

    before = state()
    yield
    assert state() == before
    assert multiprocessing.active_children() == []


def in_child(body: Callable[[], object]) -> Any:
    """Run `body` in a forked child, which may change its namespaces, and return its result."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sender.send(body()))
    with link.forking():
        child.start()
    sender.close()
    try:
        assert receiver.poll(30), "the child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


def transfers(rate: int, flows: list[tuple[int, int]], count: int) -> list[float]:
    """Measure the bits per second of each flow (sending rank, receiving rank) of `count` bytes, all at the same time.

    The time is from before the first sender connects until the last byte. So a late process on a busy machine makes a
    flow look slower, never faster.
    """

    def lab() -> list[float]:
        network = link.Network(1 + max(max(flow) for flow in flows), rate)
        receiver, sender = FORK.Pipe(duplex=False)
        ready = FORK.Barrier(2 * len(flows))

        def receive(flow: int) -> None:
            with socket.create_server((link.address(flows[flow][1]), 5000 + flow)) as server:
                ready.wait()
                peer, _ = server.accept()
                got = 0
                while piece := peer.recv(1 << 20):
                    got += len(piece)
                assert got == count
                sender.send(("end", flow, time.monotonic()))

        def send(flow: int) -> None:
            ready.wait()
            sender.send(("begin", flow, time.monotonic()))
            with socket.create_connection((link.address(flows[flow][1]), 5000 + flow)) as peer:
                peer.sendall(bytes(count))

        processes = []
        for flow, (source, target) in enumerate(flows):
            for rank, body in ((target, receive), (source, send)):
                with network.inside(rank):
                    processes.append(FORK.Process(target=body, args=(flow,)))
                    processes[-1].start()
        times = {(what, flow): when for what, flow, when in (receiver.recv() for _ in processes)}
        for process in processes:
            process.join()
        begin = min(times["begin", flow] for flow in range(len(flows)))
        return [count * 8 / (times["end", flow] - begin) for flow in range(len(flows))]

    return list(in_child(lab))


def check_slowest(rate: int, flows: list[tuple[int, int]], count: int, share: float, at_least: float) -> None:
    """Assert that the slowest flow has `at_least` to 1.03 of its `share` of the link's payload rate.

    It must never be faster. It has five tries to be fast enough, because a busy machine may slow down some of them. A
    filter that limits too much slows down all of them.
    """
    speeds = []
    for _ in range(5):
        speeds.append(min(transfers(rate, flows, count)) / (rate * link.PAYLOAD_FRACTION * share))
        assert speeds[-1] <= 1.03
        if speeds[-1] >= at_least:
            return
    pytest.fail(f"only {speeds} of what the link should carry")


@pytest.mark.parametrize(
    ("text", "bits"),
    [("100mbit", 10**8), ("2.5Gbit", 2_500_000_000), ("512 KBIT", 512_000), (" 1kbit", 1000), ("10gbit", 10**10)],
)
def test_parse_rate(text: str, bits: int) -> None:
    assert link.parse_rate(text) == bits


@pytest.mark.parametrize("text", ["100", "mbit", "-1mbit", "1e3mbit", "100mbps", "0.5kbit", "11gbit", "", "1 0mbit"])
def test_parse_rate_says_what_is_allowed(text: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(repr(text)) + ".*kbit, mbit or gbit.*1kbit to 10gbit"):
        link.parse_rate(text)


@pytest.mark.alone
@needs_link
@pytest.mark.parametrize("rate", [10**7, 10**8, 2 * 10**8, 10**9])
def test_goodput_is_the_payload_share_of_the_rate(rate: int) -> None:
    """It is never more, and not much less: two cores with other load reach some 90 % of 1 Gbit/s."""
    check_slowest(rate, [(0, 1)], rate // 8 // 2, share=1, at_least=0.92 if rate < 10**9 else 0.8)


@pytest.mark.alone
@needs_link
def test_short_messages_are_limited_too() -> None:
    """32 KB at 10 Mbit/s take 27 ms. A bucket with a burst of that size would not delay them."""
    (speed,) = transfers(10**7, [(0, 1)], 32 * 1024)
    assert speed < 1.15 * 10**7


@pytest.mark.alone
@needs_link
def test_download_is_limited() -> None:
    """Two ranks that send to a third share its one download limit."""
    check_slowest(10**8, [(0, 2), (1, 2)], 3 * 10**6, share=0.5, at_least=0.8)


@pytest.mark.alone
@needs_link
def test_both_directions_are_independent() -> None:
    """Each direction has its own bucket. With one for both, each would get half. Acknowledgements take some rate."""
    check_slowest(10**8, [(0, 1), (1, 0)], 6 * 10**6, share=1, at_least=0.8)


@needs_link
def test_network_is_sealed_off() -> None:
    """A rank has only its own eth0 and lo, and no route to other networks."""

    def look() -> tuple[list[str], bool]:
        network = link.Network(2, 10**8)
        with network.inside(1):
            names = sorted(name for _, name in socket.if_nameindex())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect(("192.0.2.1", 9))
                except OSError:
                    return names, True
        return names, False

    names, sealed = in_child(look)
    assert sealed
    assert {"eth0", "lo"} <= set(names)
    assert not [n for n in names if n.startswith(("port", "bridge"))]


@needs_link
def test_too_many_ranks() -> None:
    with pytest.raises(SettingsError, match="1 to 253 ranks, not 254"):
        link.Network(254, 10**8)


def test_refusal_is_clear() -> None:
    """In a user namespace without network namespaces, the error has the kernel's reason and what to do."""

    uid = os.getuid()

    def refused() -> str | None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
            return "skip"
        with open("/proc/self/uid_map", "w") as file:
            file.write(f"0 {uid} 1")
        with open("/proc/sys/user/max_net_namespaces", "w") as file:
            file.write("0")
        try:
            link.Network(2, 10**8)
        except UnavailableError as error:
            return str(error)
        return None

    message = in_child(refused)
    if message == "skip":
        pytest.skip("user namespaces are refused here")
    assert message is not None
    for part in ("CLONE_NEWNET): errno 28 ENOSPC", "CLONE_NEWUSER|CLONE_NEWNET)", "Run as root", "drop --link"):
        assert part in message


def test_missing_pyroute2_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyroute2", None)
    reason = link.probe()
    assert reason is not None
    assert "pip install pyroute2 (or flashcomm[link])" in reason


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_without_root() -> None:
    """Run as nobody: a link created through a user namespace has its rate, or there is a clear error."""

    try:
        command = [sys.executable, "-c", "import pyroute2"]
        subprocess.run(command, capture_output=True, check=True, user=65534, group=65534, extra_groups=[], cwd="/")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nobody cannot use this Python installation: {error}")

    def as_nobody() -> float | str:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE, as after an exec: /proc/self is nobody's again
        assert os.getuid() == 65534
        return link.probe() or max(transfers(10**8, [(0, 1)], 10**6)[0] for _ in range(3))

    outcome = in_child(as_nobody)
    if isinstance(outcome, str):
        assert "uid 65534 (unshare(CLONE_NEWNET): errno 1 EPERM" in outcome
        assert "Run as root" in outcome
        pytest.skip(outcome)
    assert 0.7e8 < outcome < 1e8
