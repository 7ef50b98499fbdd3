"""Which way a message goes: pure functions of values that are equal on every rank.

Nothing here touches a tensor, a group or a clock, so every rank decides alike. A way is an algorithm over a transport:

    native     the backend's own all-reduce, not compressed
    one_shot   everybody sends all to everybody: one hop, one rounding
    two_shot   reduce-scatter and all-gather: two hops, two roundings, the fewest bytes
    hierarchical  the same within nodes, one hop across them: three roundings, fewer bytes between nodes; only if asked
    copy       a world of one, or no values

`admit` says whether a way can be taken at all, `choose` takes the fastest of those that can: by the times measured for
machines of this kind, and by rules of thumb where there are none. `algorithm` and `min_bytes` win over both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from flashcomm.wire.format import UNCOMPRESSED, Layout, WireFormat, bounds

CHOSEN = ("native", "one_shot", "two_shot")  # what `auto` chooses from
ALGORITHMS = (*CHOSEN, "hierarchical")
FUSED = ("symmetric", "mapped", "shared")  # transports over which one kernel does it all
MAPPED_BYTES = 288 << 10  # wire bytes a rank sends up to which `host` means kernels on mapped memory, not copies
STAGED_CHUNK_BYTES = 8 << 20  # of a message, at most, that goes through host memory at a time
ONE_SHOT_BYTES = 64 << 10  # wire bytes a rank sends below which one hop beats less volume
MIN_BYTES = {
    "cpu": 64 << 10,
    "symmetric": 64 << 10,
    "host": 8 << 10,
    "shared": 0,
    "cuda": 1 << 20,
}  # of a coded message, unmeasured


@dataclass(frozen=True)
class Call:
    """What a call is, as far as decisions go: sizes in values and bytes, all equal on every rank."""

    numel: int
    row: int
    itemsize: int
    world_size: int
    device_type: str
    local_world_size: int = 0  # ranks of a node; 0: as many as there are, or not known

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world_size if self.local_world_size else 1

    @property
    def n_bytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True, eq=False)
class Table:
    """Measured times of all-reduces of bfloat16, in us, for `sizes` in bytes, by way: "native", "int4 one_shot"."""

    source: str  # machine, date: what `explain` shows
    sizes: tuple[int, ...]
    us: dict[str, tuple[float, ...]]

    def time(self, way: str, n_bytes: int) -> float:
        """Straight lines between logarithms of the sizes measured; beyond them in proportion, or as the smallest."""
        times = self.us[way]
        if n_bytes <= self.sizes[0]:
            return times[0]
        if n_bytes >= self.sizes[-1]:
            return times[-1] * n_bytes / self.sizes[-1]
        for i, (low, high) in enumerate(pairwise(self.sizes)):
            if n_bytes <= high:
                part = math.log(n_bytes / low) / math.log(high / low)
                return math.exp((1 - part) * math.log(times[i]) + part * math.log(times[i + 1]))
        raise AssertionError

    def coded(self, fmt: WireFormat, algorithm: str) -> str | None:
        """The measured way that is nearest to a format: by transform first, then by bits."""
        step = fmt.reduce if algorithm == "one_shot" else fmt

        def distance(way: str) -> float:
            other = WireFormat.parse(way.split()[0])
            bits = abs((other.reduce.bits if algorithm == "one_shot" else other.bits) - step.bits)
            return bits + 8 * (other.uncompressed != fmt.uncompressed) + (other.reduce.hadamard != fmt.reduce.hadamard)

        ways = [way for way in self.us if way.endswith(f" {algorithm}")]
        return min(ways, key=distance, default=None)


@dataclass(frozen=True)
class Machine:
    """What the ranks of a group found that they can do, all alike: the transport of coded messages, and its times.

    rejected: other transports, each with the reason. local_world: as in `Call`.
    """

    transport: str = "process_group"
    table: Table | None = None
    rejected: tuple[tuple[str, str], ...] = ()
    local_world_size: int = 0


@dataclass(frozen=True)
class Route:
    """The way a call goes; `wire_bytes` is the payload one rank sends to others."""

    algorithm: str
    wire_bytes: int
    reason: str
    transport: str = "process_group"
    fmt: str = UNCOMPRESSED

    @property
    def coded(self) -> bool:
        return self.algorithm not in ("native", "copy") and self.fmt != UNCOMPRESSED


@dataclass(frozen=True)
class Rejected:
    """A way not taken, and why."""

    algorithm: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """What `choose` found; `str()` of it is what `Communicator.explain` and `flashcomm doctor` print."""

    route: Route
    rejected: tuple[Rejected, ...]

    def __str__(self) -> str:
        route = self.route
        way = route.algorithm if route.algorithm in ("native", "copy") else f"{route.algorithm} as {route.fmt}"
        over = "" if route.algorithm == "copy" else f" over {route.transport}"
        lines = [f"{way}{over}: {route.wire_bytes} bytes a rank; {route.reason}"]
        return "\n".join(lines + [f"  not {r.algorithm}: {r.reason}" for r in self.rejected])


def wire_bytes(algorithm: str, call: Call, fmt: WireFormat) -> int:
    """Payload bytes a rank sends for an all-reduce, the largest over ranks; a ring is assumed for `native`.

    Not counted: the padding of chunks and tiles, the check's 128 bytes a peer, flags, and what TCP or PCIe add.
    """
    w = call.world_size
    if algorithm == "native":
        return 2 * (w - 1) * call.n_bytes // w
    if algorithm == "one_shot":
        return (w - 1) * Layout(fmt.reduce, call.row, call.itemsize).nbytes(0, call.numel)
    if algorithm == "two_shot":
        return (w - 1) * sum(_shard(call, fmt, w))
    local = w // call.nodes
    return (local - 1) * sum(_shard(call, fmt, local)) + (call.nodes - 1) * _shard(call, fmt, local)[0]


def _shard(call: Call, fmt: WireFormat, shards: int) -> tuple[int, int]:
    """Bytes of the largest of so many shards, as the reduce step and the gather step send it."""
    spans = list(pairwise(bounds(0, call.numel, call.row, fmt.unit, shards)))
    layouts = [Layout(step, call.row, call.itemsize) for step in (fmt.reduce, fmt.gather)]
    down, up = (max(layout.nbytes(*span) for span in spans) for layout in layouts)
    return down, up


def worth_nodes(world_size: int, local_world_size: int) -> bool:
    """Whether less crosses between N nodes of L ranks than in two-shot: (N-1)/L of the message against 2(N-1)/N."""
    return local_world_size > 1 and 1 < world_size // local_world_size < 2 * local_world_size


def admit(call: Call, fmt: WireFormat, min_bytes: int | None) -> str:
    """Why a message should not be coded whatever the machine, or ""."""
    if fmt.uncompressed:
        return f"format {UNCOMPRESSED} does not compress"
    if min_bytes is not None and call.n_bytes < min_bytes:
        return f"{call.n_bytes} message bytes are fewer than min_bytes={min_bytes}: coding would not pay"
    fewest, native = min(wire_bytes(a, call, fmt) for a in ("one_shot", "two_shot")), wire_bytes("native", call, fmt)
    if fewest >= native:
        return f"{fmt} would send {fewest} bytes a rank for rows of {call.row}, no compression {native}"
    return ""


@lru_cache(maxsize=4096)
def choose(call: Call, fmt: WireFormat, algorithm: str, min_bytes: int | None, machine: Machine = Machine()) -> Choice:
    """The route of an all-reduce, and why the other ways were passed over.

    An explicit `algorithm` wins over everything but a world of one, `hierarchical` only from `min_bytes` on and where
    there are nodes that gain by it. Otherwise `min_bytes` (None: not set) decides whether to code, and the table which
    way is fastest; without one, what is too small or gains nothing goes uncoded, the rest one-shot where that sends no
    more bytes than two-shot or so few that latency rules.
    """
    if call.world_size == 1 or call.numel == 0:
        why = "a world of one" if call.world_size == 1 else "no values"
        return _choice(call, fmt, machine, "copy", f"{why}: nothing travels, nothing is coded", {})
    if algorithm != "auto":
        asked = f"algorithm={algorithm} was asked for"
        if algorithm == "hierarchical":
            least = _least(call, machine) if min_bytes is None else min_bytes
            if call.n_bytes < least:
                small = f"{call.n_bytes} message bytes are fewer than min_bytes={least}"
                return _choice(call, fmt, machine, "native", small, {"hierarchical": small})
            if not worth_nodes(call.world_size, call.local_world_size):
                asked += f", and {call.nodes} nodes of {call.world_size // call.nodes} ranks gain nothing by it"
                algorithm = "two_shot"
        return _choice(call, fmt, machine, algorithm, asked, dict.fromkeys(CHOSEN, asked))
    uncoded = admit(call, fmt, min_bytes)
    if machine.table is not None:
        return _measured(call, fmt, machine, machine.table, uncoded, min_bytes is not None)
    if not uncoded and min_bytes is None:
        uncoded = admit(call, fmt, _least(call, machine))
    uncompressed, because = WireFormat.parse(UNCOMPRESSED), ""
    if uncoded and machine.transport == "host":
        fmt, because, uncoded = uncompressed, f"{uncoded}; ", ""
    if uncoded and machine.transport in FUSED:
        why = f"{uncoded}; one kernel over peers' memory, not compressed"
        if call.n_bytes <= 256 << 10:
            return _choice(
                call, uncompressed, machine, "one_shot", why, {"native": "more launches", "two_shot": "two hops"}
            )
    if uncoded:
        return _choice(call, fmt, machine, "native", uncoded, {"one_shot": uncoded, "two_shot": uncoded})
    one, two, native = (wire_bytes(name, call, fmt) for name in ("one_shot", "two_shot", "native"))
    saved = {"native": f"would send {native} bytes a rank"}
    if one <= two or one <= ONE_SHOT_BYTES:
        why = because + "one hop and one rounding, " + ("no more bytes than two-shot" if one <= two else "few bytes")
        others = saved | {"two_shot": f"would send {two} bytes a rank in two hops"}
        return _choice(call, fmt, machine, "one_shot", why, others)
    return _choice(
        call, fmt, machine, "two_shot", f"{because}fewest bytes", saved | {"one_shot": f"would send {one} bytes a rank"}
    )


def _least(call: Call, machine: Machine) -> int:
    """Below how many bytes messages are not coded where nothing was set or measured."""
    return MIN_BYTES.get(machine.transport, MIN_BYTES.get(call.device_type, 0))


def _measured(call: Call, fmt: WireFormat, machine: Machine, table: Table, uncoded: str, forced: bool) -> Choice:
    """The fastest way by the table; forced: the coded ones only, unless `uncoded` says why not."""
    uncompressed = WireFormat.parse(UNCOMPRESSED)
    size = call.numel * 2  # tables are of bfloat16
    times: dict[tuple[str, WireFormat], float] = {}
    if uncoded or not forced:
        times["native", fmt] = table.time("native", size)
    for algorithm in ("one_shot", "two_shot"):
        for way_of in (uncompressed,) if uncoded else (fmt,) if forced else (fmt, uncompressed):
            if (way := table.coded(way_of, algorithm)) and (
                WireFormat.parse(way.split()[0]).uncompressed == way_of.uncompressed
            ):
                times[algorithm, way_of] = table.time(way, size)
    if not times:  # a table without coded ways, and min_bytes wants one
        times["one_shot", fmt] = math.inf
    (best, best_fmt), us = min(times.items(), key=lambda item: item[1])
    others = {}
    for name in CHOSEN:
        tried = min((t for (a, _), t in times.items() if a == name), default=None)
        others[name] = uncoded or "not measured" if tried is None else f"{tried:.1f} us"
    why = f"{us:.1f} us for {size >> 10} KiB, fastest of those measured ({table.source})"
    return _choice(call, best_fmt, machine, best, f"{uncoded}; {why}" if uncoded else why, others)


def _choice(
    call: Call, fmt: WireFormat, machine: Machine, algorithm: str, reason: str, others: dict[str, str]
) -> Choice:
    n_bytes = 0 if algorithm == "copy" else wire_bytes(algorithm, call, fmt)
    coded = algorithm not in ("native", "copy")
    transport, name = (machine.transport, str(fmt)) if coded else ("process_group", UNCOMPRESSED)
    if algorithm == "hierarchical":  # composed of exchanges: one kernel over everybody's memory has no use for nodes
        transport = "host" if transport == "host" else "process_group"
    elif transport == "host" and n_bytes <= MAPPED_BYTES:
        transport = "mapped"
    if algorithm != "hierarchical" and coded and worth_nodes(call.world_size, call.local_world_size):
        crossing = (call.nodes - 1) * _shard(call, fmt, call.local_world_size)[0]
        flat = (call.world_size - call.local_world_size) * sum(_shard(call, fmt, call.world_size))
        more = f"a third rounding, so only if asked for: {crossing} bytes a rank to other nodes, two_shot {flat}"
        others = others | {"hierarchical": more}
    rejected = [Rejected(name, why) for name, why in others.items() if name != algorithm]
    rejected += [Rejected(name, why) for name, why in machine.rejected]
    return Choice(Route(algorithm, n_bytes, reason, transport, name), tuple(rejected))
