"""Which way a message goes: a pure function of values that are equal on every rank.

Nothing here touches a tensor, a group or a clock, so every rank decides alike. The ways:

    native     the backend's own all-reduce, not compressed
    one_shot   everybody sends all to everybody: one hop, one rounding
    two_shot   reduce-scatter and all-gather: two hops, two roundings, the fewest bytes
    copy       a world of one, or no values
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from flashcomm.wire.format import Layout, WireFormat, bounds

ALGORITHMS = ("native", "one_shot", "two_shot")
ONE_SHOT_BYTES = 64 << 10  # wire bytes a rank sends below which one hop beats less volume


@dataclass(frozen=True)
class Call:
    """What a call is, as far as decisions go: sizes in values and bytes, all equal on every rank."""

    numel: int
    row: int
    itemsize: int
    world: int
    device_type: str

    @property
    def n_bytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Route:
    """The way a call goes; `wire_bytes` is the payload one rank sends to others."""

    algorithm: str
    wire_bytes: int
    reason: str

    @property
    def coded(self) -> bool:
        return self.algorithm in ("one_shot", "two_shot")


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
        lines = [f"{self.route.algorithm}: {self.route.wire_bytes} bytes a rank; {self.route.reason}"]
        return "\n".join(lines + [f"  not {r.algorithm}: {r.reason}" for r in self.rejected])


def wire_bytes(algorithm: str, call: Call, fmt: WireFormat) -> int:
    """Payload bytes a rank sends for an all-reduce, the largest over ranks; a ring is assumed for `native`.

    Not counted: the padding of chunks to 16 bytes a section (below 0.1 % at the default chunk sizes), the check's
    128 bytes a peer, and what TCP or PCIe add around it.
    """
    w = call.world
    if algorithm == "native":
        return 2 * (w - 1) * call.n_bytes // w
    reduce = Layout(fmt.reduce, call.row, call.itemsize)
    if algorithm == "one_shot":
        return (w - 1) * reduce.nbytes(0, call.numel)
    gather = Layout(fmt.gather, call.row, call.itemsize)
    ends = bounds(0, call.numel, call.row, fmt.unit, w)
    spans = list(pairwise(ends))
    return (w - 1) * (max(reduce.nbytes(*s) for s in spans) + max(gather.nbytes(*s) for s in spans))


@lru_cache(maxsize=4096)
def choose(call: Call, fmt: WireFormat, algorithm: str, min_bytes: int) -> Choice:
    """The route of an all-reduce, and why the other ways were passed over.

    An explicit `algorithm` wins over everything but a world of one. `auto` leaves to the backend what would gain
    nothing (the bf16 format, messages below `min_bytes`, rows so short that scales outweigh codes); otherwise one-shot
    where it sends no more bytes than two-shot (two ranks) or so few that latency rules, else two-shot.
    """
    if call.world == 1 or call.numel == 0:
        why = "a world of one" if call.world == 1 else "no values"
        return _choice(call, fmt, "copy", f"{why}: nothing travels, nothing is coded", {})
    if algorithm != "auto":
        asked = f"algorithm={algorithm} was asked for"
        return _choice(call, fmt, algorithm, asked, dict.fromkeys(ALGORITHMS, asked))
    one, two, native = (wire_bytes(name, call, fmt) for name in ("one_shot", "two_shot", "native"))
    if fmt.lossless:
        why = "format bf16 does not compress"
    elif call.n_bytes < min_bytes:
        why = f"{call.n_bytes} message bytes are fewer than min_bytes={min_bytes}: coding would not pay"
    elif min(one, two) >= native:
        why = f"{fmt} would send {min(one, two)} bytes a rank for rows of {call.row}, no compression {native}"
    else:
        why = ""
    if why:
        return _choice(call, fmt, "native", why, {"one_shot": why, "two_shot": why})
    saved = {"native": f"would send {native} bytes a rank"}
    if one <= two or one <= ONE_SHOT_BYTES:
        why = "one hop and one rounding, " + ("no more bytes than two-shot" if one <= two else "few bytes")
        return _choice(call, fmt, "one_shot", why, saved | {"two_shot": f"would send {two} bytes a rank in two hops"})
    return _choice(call, fmt, "two_shot", "fewest bytes", saved | {"one_shot": f"would send {one} bytes a rank"})


def _choice(call: Call, fmt: WireFormat, algorithm: str, reason: str, others: dict[str, str]) -> Choice:
    route = Route(algorithm, 0 if algorithm == "copy" else wire_bytes(algorithm, call, fmt), reason)
    return Choice(route, tuple(Rejected(name, why) for name, why in others.items() if name != algorithm))
