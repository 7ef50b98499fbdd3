"""`--link RATE`: gives every rank its own network link, whose rate the kernel enforces.

Low-bit collectives are faster on slow networks, and a single machine has none. This module builds one from standard
parts of the Linux kernel: network namespaces, veth pairs, a bridge and token bucket filters.

    rank 0's namespace          switch namespace          rank 1's namespace
    eth0 10.77.0.1 [tbf] ─────── [tbf] port0 ─ bridge ─ port1 [tbf] ─────── [tbf] eth0 10.77.0.2

A queueing discipline limits only outgoing traffic of a device. So each veth pair has two token bucket filters: the one
on eth0 limits the rank's upload, the one on the bridge port its download. The rest is the ordinary TCP stack.

The namespaces have no names: file descriptors and processes hold them. When the processes end, in whatever way, the
kernel frees the namespaces and every device in them. Root may create them directly. Other users first create a user
namespace, if the kernel allows that. This needs a process with a single thread, so a `Network` is built in a newly
forked child, which becomes the switch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import re
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from flashcomm.errors import FlashcommError, SettingsError, UnavailableError

PAYLOAD_FRACTION = 1448 / 1514
"""The share of the link's rate that can be payload. An Ethernet frame of 1514 bytes, as the filter counts it, carries
1448 bytes of a TCP/IPv4 stream with timestamps. The headers are 14 bytes of Ethernet, 20 of IPv4, 32 of TCP."""

INTERFACE = "eth0"
"""The name of each rank's only interface besides the loopback, for GLOO_SOCKET_IFNAME."""

MAX_WORLD = 253
"""The most ranks that a `Network` can connect: the host addresses of the /24, less one to spare."""

_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_MIN_RATE, _MAX_RATE = 10**3, 10 * 10**9  # above 10 Gbit/s the CPU limits a veth, not the filter
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def address(rank: int) -> str:
    """Return the IPv4 address of `rank` on the link. The range exists inside the namespaces only."""
    return f"10.77.0.{rank + 1}"


def parse_rate(text: str) -> int:
    """Parse a rate such as "100mbit", "2.5Gbit" or "512 kbit" into bits per second (1 kbit = 1000 bits).

    Raises:
        SettingsError: It is not a number with one of these units, or not within 1kbit to 10gbit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kbit|mbit|gbit)", text.strip().lower(), re.ASCII)
    return _allowed(round(float(match[1]) * _UNITS[match[2]]) if match else 0, repr(text))


def _allowed(rate: int, asked: str) -> int:
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise SettingsError(
            f"link rate {asked} is not allowed: give a number with kbit, mbit or gbit (bits per second), "
            "from 1kbit to 10gbit, such as 100mbit"
        )
    return rate


def bucket(rate: int) -> dict[str, Any]:
    """Return the arguments of the token bucket filter for `rate` bits per second.

    `burst` bytes may leave at once after a pause. It is 1 ms of the rate, so that the limit applies to short messages,
    too. But it is at least 3200 bytes, for a full frame (1514) and for tokens that arrive while the timer is late.
    `limit` bytes may wait in the queue before it drops packets. It is 50 ms of the rate, and at least 64 KB. Otherwise
    TCP sees losses long before its window is open. TCP segmentation offload stays on: the filter splits packets that
    exceed the burst into frames, and counts the headers of each frame.
    """
    burst = max(3200, rate // 8 // 1000)
    limit = max(64 * 1024, rate // 8 // 20) + burst
    return {"kind": "tbf", "rate": rate // 8, "burst": burst, "limit": limit}  # the rate in bytes per second


class Network:
    """Network namespaces, one for each rank, connected by a switch in the namespace of the calling process.

    Create it only in a process with a single thread, started for this purpose. It moves the process to a new network
    namespace permanently. If the user may not create one, it also moves to a new user namespace, in which the user is
    uid 0.

    Args:
        world_size: Number of namespaces, 1 to `MAX_WORLD`.
        rate: Bits per second of each link.

    Raises:
        UnavailableError: The kernel refuses, or pyroute2 is not installed.
        SettingsError: The rate or the number of ranks is not allowed.
    """

    def __init__(self, world_size: int, rate: int) -> None:
        _allowed(rate, f"{rate} bits per second")
        if not 1 <= world_size <= MAX_WORLD:
            raise SettingsError(f"a link connects 1 to {MAX_WORLD} ranks, not {world_size}: use fewer ranks")
        try:
            from pyroute2 import IPRoute
            from pyroute2.netlink.exceptions import NetlinkError
        except ImportError as error:
            raise UnavailableError(
                f"--link needs pyroute2 ({error}): pip install pyroute2 (or flashcomm[link]), or drop --link"
            ) from error
        _leave_host_network()
        self._switch = _open_namespace()
        self._ranks: list[int] = []
        try:
            with IPRoute() as netlink:
                netlink.link("add", ifname="bridge", kind="bridge")
                bridge = _index(netlink, "bridge")
                netlink.link("set", index=bridge, state="up")
            for rank in range(world_size):
                _unshare(_CLONE_NEWNET)
                self._ranks.append(_open_namespace())
                _enter(self._switch)
                with IPRoute() as netlink:
                    port = f"port{rank}"
                    peer = {"ifname": INTERFACE, "net_ns_fd": self._ranks[rank]}
                    netlink.link("add", ifname=port, kind="veth", peer=peer)
                    netlink.link("set", index=_index(netlink, port), master=bridge)
                    _shape(netlink, port, rate)
                with self.inside(rank), IPRoute() as netlink:
                    netlink.addr("add", index=_index(netlink, INTERFACE), address=address(rank), prefixlen=24)
                    _shape(netlink, INTERFACE, rate)
                    netlink.link("set", index=_index(netlink, "lo"), state="up")  # a rank also connects to itself
        except (NetlinkError, OSError) as error:
            raise UnavailableError(
                f"--link: the kernel refused to build the network ({error}). It needs CAP_NET_ADMIN and the kernel "
                "modules veth, bridge and sch_tbf: load them (modprobe) or drop --link"
            ) from error

    @contextlib.contextmanager
    def inside(self, rank: int) -> Iterator[None]:
        """Move the calling thread to `rank`'s namespace inside a with block. A process started there stays in it."""
        _enter(self._ranks[rank])
        try:
            yield
        finally:
            _enter(self._switch)


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Disable garbage collection in a with block, so that a child forked in it does not collect inherited objects.

    A fork does not copy other threads. If the child frees an object that owns a thread, such as a TCPStore, it crashes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:  # in the caller only: multiprocessing ends the child without leaving `start`
        if enabled:
            gc.enable()


def probe() -> str | None:
    """Return why links cannot be emulated on this machine, in one line; None if they can. Leaves nothing behind."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_probe_child, args=(sender,))
    with forking():
        child.start()
    sender.close()
    try:
        reason = receiver.recv() if receiver.poll(30) else "--link: building a network took more than 30 s"
    except EOFError:
        child.join()
        reason = f"--link: the process that tried it ended with status {child.exitcode}"
    finally:
        child.kill()
        child.join()
        receiver.close()
    return None if reason is None else str(reason)


def _probe_child(sender: Connection) -> None:
    try:
        Network(world_size=2, rate=10**8)
        sender.send(None)
    except FlashcommError as error:
        sender.send(str(error))


def _leave_host_network() -> None:
    """Move this process to a new, empty network namespace, through a user namespace if necessary."""
    uid, gid = os.getuid(), os.getgid()  # inside the new user namespace they read 65534 until mapped
    try:
        return _unshare(_CLONE_NEWNET)
    except OSError as error:
        refused = f"unshare(CLONE_NEWNET): {_name(error)}"
    try:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        # An unprivileged process may only map its own ids, and its gid only after it has disabled setgroups.
        for file, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{file}", "wb", buffering=0) as stream:
                stream.write(line.encode())
    except OSError as error:
        refused += f"; unshare(CLONE_NEWUSER|CLONE_NEWNET) with id maps: {_name(error)}"
        raise UnavailableError(
            f"--link needs network namespaces, and the kernel refused uid {uid} ({refused}). Run as root (in a "
            "container: with CAP_SYS_ADMIN), or enable unprivileged user namespaces (sysctl "
            "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0 and a "
            "user.max_user_namespaces above 0), or drop --link"
        ) from error


def _name(error: OSError) -> str:
    return f"errno {error.errno} {errno.errorcode.get(error.errno or 0, '?')}, {error.strerror}"


def _shape(netlink: Any, device: str, rate: int) -> None:
    """Limit the outgoing traffic of `device` to `rate` bits per second, and only then bring it up."""
    index = _index(netlink, device)
    netlink.tc("add", index=index, handle=0x10000, **bucket(rate))
    netlink.link("set", index=index, state="up")


def _index(netlink: Any, device: str) -> int:
    return int(netlink.link_lookup(ifname=device)[0])


def _open_namespace() -> int:
    """Open this thread's network namespace. The file descriptor keeps it alive, and is an argument of `_enter`."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags))  # os.unshare and os.setns exist from Python 3.12 on


def _enter(namespace: int) -> None:
    _check(_libc.setns(namespace, _CLONE_NEWNET))


def _check(status: int) -> None:
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
