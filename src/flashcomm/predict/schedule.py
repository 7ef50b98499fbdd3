"""A simulation of the transfers of an all-reduce over links that ranks share, to confirm the formulas of `model`.

Every transfer needs several links at once: out of its rank, perhaps through a switch or a host's network card, into
the other rank. Transfers that are under way share each link fairly (max-min). A transfer of the second step starts when
its rank has received all of the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Transfer:
    """Bytes from one rank to another.

    Attributes:
        source: The rank that sends.
        target: The rank that receives.
        n_bytes: How many bytes.
        step: Its step. Step n of a rank starts when the rank has received everything of step n - 1.
    """

    source: int
    target: int
    n_bytes: float
    step: int = 0


@dataclass(frozen=True)
class Network:
    """The links of some hosts. Rates are in bytes a second.

    Attributes:
        rank_rate: Of each rank's own link, each way.
        local: Number of ranks of a host.
        host_rate: Of each host's link to the others, each way; None: there is one host.
        shared: Number of neighboring ranks that share one link of `rank_rate`.
    """

    rank_rate: float
    local: int
    host_rate: float | None = None
    shared: int = 1

    def links(self, transfer: Transfer) -> list[tuple[str, int]]:
        """Return the links that a transfer needs."""
        a, b = transfer.source, transfer.target
        if a // self.local != b // self.local:
            return [("out of host", a // self.local), ("into host", b // self.local)]
        return [("out", a // self.shared), ("in", b // self.shared)]

    def rate(self, link: tuple[str, int]) -> float:
        """Return the bytes a second of a link."""
        if "host" in link[0]:
            assert self.host_rate is not None
            return self.host_rate
        return self.rank_rate


def one_shot(world_size: int, n_bytes: float) -> list[Transfer]:
    """Return the transfers of a one-shot all-reduce of encoded messages of n_bytes."""
    return [Transfer(a, b, n_bytes) for a in range(world_size) for b in range(world_size) if a != b]


def two_shot(world_size: int, n_bytes: float) -> list[Transfer]:
    """Return the transfers of a two-shot all-reduce: shards to their owners, and the sums back."""
    pairs = [(a, b) for a in range(world_size) for b in range(world_size) if a != b]
    return [Transfer(a, b, n_bytes / world_size, step) for step in (0, 1) for a, b in pairs]


def ring(world_size: int, n_bytes: float) -> list[Transfer]:
    """Return the transfers of a ring: 2 (W - 1) steps of a shard to the next rank."""
    steps = range(2 * (world_size - 1))
    return [Transfer(a, (a + 1) % world_size, n_bytes / world_size, s) for s in steps for a in range(world_size)]


def hierarchical(world_size: int, local: int, n_bytes: float) -> list[Transfer]:
    """Return the transfers of a two-shot within hosts, with an exchange between equal ranks of hosts in between."""
    hosts = [range(h * local, (h + 1) * local) for h in range(world_size // local)]
    inside = [(a, b) for ranks in hosts for a in ranks for b in ranks if a != b]
    across = [(a, b) for a in range(world_size) for b in range(a % local, world_size, local) if a != b]
    first = [Transfer(a, b, n_bytes / local, 0) for a, b in inside]
    return [*first, *(Transfer(a, b, n_bytes / local, 1) for a, b in across), *(_later(t, 2) for t in first)]


def _later(transfer: Transfer, step: int) -> Transfer:
    return Transfer(transfer.source, transfer.target, transfer.n_bytes, step)


def simulate(transfers: Iterable[Transfer], network: Network) -> float:
    """Return the seconds until all transfers are done."""
    left = {t: t.n_bytes for t in transfers}
    now = 0.0
    while left:
        waits = {(t.target, t.step) for t in left}
        active = [t for t in left if all((t.source, step) not in waits for step in range(t.step))]
        rates = _fair(active, network)
        until = min(left[t] / rates[t] for t in active)
        now += until
        for t in active:
            left[t] -= rates[t] * until
            if left[t] <= 1e-9 * t.n_bytes:
                del left[t]
    return now


def _fair(active: list[Transfer], network: Network) -> Mapping[Transfer, float]:
    """Return max-min fair rates: again and again the tightest link divides what it has left among its transfers."""
    users: dict[tuple[str, int], set[Transfer]] = {}
    for t in active:
        for link in network.links(t):
            users.setdefault(link, set()).add(t)
    free = {link: network.rate(link) for link in users}
    rates: dict[Transfer, float] = {}
    while len(rates) < len(active):
        link = min((link for link in users if users[link]), key=lambda link: free[link] / len(users[link]))
        share = free[link] / len(users[link])
        for t in list(users[link]):
            rates[t] = share
            for other in network.links(t):
                users[other].discard(t)
                free[other] -= share
    return rates
