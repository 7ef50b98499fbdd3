"""The choice of a message's route: a pure function of values that are equal on every rank.

Nothing here uses a tensor, a group or a clock, so all ranks make the same choice. The algorithms of an all-reduce:

    backend       torch.distributed's own, uncompressed
    one_shot      every rank sends its whole message to every other: one hop, one rounding
    two_shot      reduce-scatter, then all-gather: two hops, two roundings, the fewest bytes
    hierarchical  two_shot within nodes, with one exchange across nodes in between: three roundings, fewer bytes
                  between nodes; only on request
    copy          for one rank, or no values

`choose` takes the fastest algorithm that is available. It compares times measured on machines of this kind. Without
such times it uses rules of thumb. The settings `algorithm` and `min_bytes` win over both.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from flashcomm.routing.route import Choice, Executor, Machine, Message, Rejected, Route
from flashcomm.routing.timings import BACKEND, Timings
from flashcomm.wire.format import UNCOMPRESSED, Layout, WireFormat, bounds
from flashcomm.wire.split import Split

AUTO = "auto"
CANDIDATES = ("backend", "one_shot", "two_shot")  # `auto` chooses among these
ALGORITHMS = (*CANDIDATES, "hierarchical")
ONE_SHOT_BYTES = 64 << 10  # up to this many wire bytes per rank, one hop is faster than fewer bytes in two hops
SMALL_BYTES = 256 << 10  # up to this many message bytes, our kernel is faster than the backend even uncompressed
MOST_PADDING = 2  # times the rows: the most that a kernel may have to work on if pieces are padded to the largest
MARGIN = 0.97  # of the backend's measured time: only a route that takes less is better than the backend
MIN_BYTES = {  # without settings and timings: the smallest message that is quantized, by transport or device
    "symmetric": 64 << 10,
    "host_memory": 8 << 10,
    "cpu_shared": 0,
    "cpu": 64 << 10,
    "cuda": 1 << 20,
}
_NO_MACHINE = Machine()
_PLAIN = WireFormat.parse(UNCOMPRESSED)


def wire_bytes(algorithm: str, message: Message, fmt: WireFormat) -> int:
    """Return the payload bytes that the busiest rank sends. For `backend` a ring is assumed.

    Padding of chunks and tiles, the 128 bytes of the consistency check, flags, and TCP or PCIe headers are not counted.
    """
    w = message.world_size
    if algorithm == "backend":
        return 2 * (w - 1) * message.n_bytes // w
    if algorithm == "two_shot":
        return (w - 1) * sum(_shard_bytes(message, fmt, w))
    if algorithm == "hierarchical":
        local = w // message.nodes
        within, across = sum(_shard_bytes(message, fmt, local)), _shard_bytes(message, fmt, local)[0]
        return (local - 1) * within + (message.nodes - 1) * across
    if algorithm == "all_to_all_single" and fmt.gather.uncompressed:  # without padding
        split = message.split or Split((1,) * w)
        return message.n_bytes * (split.rows - min(split.sizes)) // max(1, split.rows)
    if message.split is not None and algorithm != "all_gather":
        values = message.numel // max(1, message.split.rows)  # of a row along dimension 0
        sizes = [values * rows for rows in message.split.sizes]
        step = fmt.reduce if algorithm == "reduce_scatter" else fmt.gather
        layouts = [Layout(step, message.row if message.row > 1 else max(1, n), message.itemsize) for n in sizes]
        pieces = [layout.nbytes(0, n) for layout, n in zip(layouts, sizes, strict=True)]
        return sum(pieces) - min(pieces)
    if message.numel == 0:
        return 0
    step = fmt.gather if algorithm in ("all_gather", "all_to_all_single") else fmt.reduce
    numel = message.numel // w if algorithm in ("reduce_scatter", "all_to_all_single") else message.numel
    return (w - 1) * Layout(step, message.row, message.itemsize).nbytes(0, numel)


def _shard_bytes(message: Message, fmt: WireFormat, n_shards: int) -> tuple[int, int]:
    """Return the bytes of the largest of n_shards shards in the formats of the reduce step and the gather step."""
    spans = list(pairwise(bounds(0, message.numel, message.row, fmt.unit, n_shards)))
    layouts = [Layout(step, message.row, message.itemsize) for step in (fmt.reduce, fmt.gather)]
    reduce, gather = (max(layout.nbytes(*span) for span in spans) for layout in layouts)
    return reduce, gather


def nodes_pay(world_size: int, local_world_size: int) -> bool:
    """Return whether `hierarchical` sends fewer bytes between nodes than two-shot.

    With N nodes of L ranks it sends (N-1)/L of the message per rank, and two-shot 2(N-1)/N.
    """
    return local_world_size > 1 and 1 < world_size // local_world_size < 2 * local_world_size


@lru_cache(maxsize=4096)
def choose(
    message: Message,
    fmt: WireFormat,
    algorithm: str = AUTO,
    min_bytes: int | str = AUTO,
    machine: Machine = _NO_MACHINE,
) -> Choice:
    """Choose the route of a message.

    Args:
        message: The op, sizes and group of a call.
        fmt: The requested wire format.
        algorithm: "auto" or one of `ALGORITHMS`. An explicit algorithm is taken whenever there is more than one rank.
            But `hierarchical` falls back: to `backend` below `min_bytes`, and to `two_shot` if it would save no bytes.
        min_bytes: The smallest message, in bytes, that is quantized. "auto": by timings or rules of thumb.
        machine: The transport and timings that the ranks found.

    Returns:
        The route, and why the alternatives were rejected.
    """
    w, op = message.world_size, message.op
    if w == 1 or (message.numel == 0 and op != "all_to_all_single"):
        why = "one rank" if w == 1 else "no values"
        return _choice(message, fmt, machine, "copy", f"{why}: nothing to send")
    if op == "all_to_all_single":
        return _all_to_all(message, fmt, machine)
    if message.row % fmt.unit and machine.transport != "process_group":
        # Rows that end in a short group are rare, and the kernels do not support them.
        tails = (machine.transport, f"rows of {message.row} values are not a multiple of {fmt.unit}")
        machine = replace(machine, transport="process_group", timings=None, rejected=(*machine.rejected, tails))
    if message.split is not None and machine.transport != "process_group":
        machine, padded = _padded(message, message.split, machine)
        return _choice(message, fmt, machine, op, f"the only algorithm of this collective{padded}")
    if op in ("reduce_scatter", "all_gather"):
        return _choice(message, fmt, machine, op, "the only algorithm of this collective")
    if algorithm != AUTO:
        return _explicit(message, fmt, machine, algorithm, min_bytes)
    uncompressed = why_not_quantized(message, fmt, min_bytes)
    if machine.timings is not None:
        return _measured(message, fmt, machine, machine.timings, uncompressed, min_bytes != AUTO)
    if not uncompressed and min_bytes == AUTO:
        uncompressed = why_not_quantized(message, fmt, _least(message, machine))
    if uncompressed and machine.transport == "host_memory":  # faster than the backend, even uncompressed
        return _by_bytes(message, _PLAIN, machine, f"{uncompressed}; ")
    if uncompressed and machine.transport != "process_group" and message.n_bytes <= SMALL_BYTES:
        why = f"{uncompressed}; one kernel, uncompressed"
        return _choice(message, _PLAIN, machine, "one_shot", why, backend="more launches", two_shot="two hops")
    if uncompressed:
        return _choice(message, fmt, machine, "backend", uncompressed, one_shot=uncompressed, two_shot=uncompressed)
    return _by_bytes(message, fmt, machine, "")


def why_not_quantized(message: Message, fmt: WireFormat, min_bytes: int | str) -> str:
    """Return why a message should not be quantized on any machine; "" if it may be."""
    if fmt.uncompressed:
        return f"format {fmt} does not compress"
    if isinstance(min_bytes, int) and message.n_bytes < min_bytes:
        return f"{message.n_bytes} message bytes are fewer than min_bytes={min_bytes}: quantizing would not be faster"
    fewest, backend = (
        min(wire_bytes(a, message, fmt) for a in ("one_shot", "two_shot")),
        wire_bytes("backend", message, fmt),
    )
    if fewest >= backend:
        return f"{fmt} would send {fewest} bytes a rank for rows of {message.row}, and uncompressed sends {backend}"
    return ""


def _padded(message: Message, split: Split, machine: Machine) -> tuple[Machine, str]:
    """Return where pieces of different sizes go, and why: kernels take equal ones, padded to the largest."""
    rows = f"pieces of {min(split.sizes)} to {split.largest} rows"
    if message.world_size * split.largest <= MOST_PADDING * split.rows:
        return machine, f"; {rows}, padded to the largest"
    why = f"{rows}: padded to the largest, they would be more than {MOST_PADDING} times the rows"
    rejected = (*machine.rejected, (machine.transport, why))
    return replace(machine, transport="process_group", timings=None, rejected=rejected), ""


def _all_to_all(message: Message, fmt: WireFormat, machine: Machine) -> Choice:
    """Choose by rows and dtype, which are equal on all ranks. Sizes are equal only if no split sizes were given."""
    why, n = "", 64 * message.row  # values of some rows: padding counts little
    if not message.quantizable:
        why = "values of this dtype are not quantized"
    elif Layout(fmt.gather, max(1, message.row), message.itemsize).nbytes(0, n) >= n * message.itemsize:
        why = f"{fmt.gather} would not send fewer bytes for rows of {message.row} values"
    fmt = _PLAIN if why else fmt
    no_kernel = ""
    if message.split is not None or not message.quantizable:
        no_kernel = "its kernel takes equal pieces, without split sizes, of bf16, fp16 or fp32"
    elif message.row % fmt.unit:
        no_kernel = f"rows of {message.row} values are not a multiple of {fmt.unit}"
    if no_kernel and machine.transport != "process_group":
        rejected = (*machine.rejected, (machine.transport, no_kernel))
        machine = replace(machine, transport="process_group", timings=None, rejected=rejected)
    if message.numel == 0 and machine.transport != "process_group":
        return _choice(message, fmt, machine, "copy", "no values: nothing to send")
    return _choice(message, fmt, machine, message.op, why or "the only algorithm of this collective")


def _explicit(message: Message, fmt: WireFormat, machine: Machine, algorithm: str, min_bytes: int | str) -> Choice:
    why = f"algorithm={algorithm} was requested"
    if algorithm == "hierarchical":
        least = min_bytes if isinstance(min_bytes, int) else _least(message, machine)
        if message.n_bytes < least:
            why = f"{message.n_bytes} message bytes are fewer than min_bytes={least}"
            return _choice(message, fmt, machine, "backend", why, hierarchical=why)
        if not nodes_pay(message.world_size, message.local_world_size):
            why += f", and {message.nodes} nodes of {message.world_size // message.nodes} ranks save no bytes by it"
            algorithm = "two_shot"
    return _choice(message, fmt, machine, algorithm, why, **dict.fromkeys(CANDIDATES, why))


def _by_bytes(message: Message, fmt: WireFormat, machine: Machine, because: str) -> Choice:
    """Choose one-shot if it sends no more bytes than two-shot, or so few that latency dominates; else two-shot."""
    one, two, backend = (wire_bytes(name, message, fmt) for name in ("one_shot", "two_shot", "backend"))
    saved = f"would send {backend} bytes a rank"
    if one <= two or one <= ONE_SHOT_BYTES:
        why = "one hop and one rounding, " + ("no more bytes than two-shot" if one <= two else "few bytes")
        hops = f"would send {two} bytes a rank in two hops"
        return _choice(message, fmt, machine, "one_shot", because + why, backend=saved, two_shot=hops)
    more = f"would send {one} bytes a rank"
    return _choice(message, fmt, machine, "two_shot", f"{because}fewest bytes", backend=saved, one_shot=more)


def _least(message: Message, machine: Machine) -> int:
    return MIN_BYTES.get(machine.transport, MIN_BYTES.get(message.device_type, 0))


def _measured(
    message: Message, fmt: WireFormat, machine: Machine, timings: Timings, uncompressed: str, forced: bool
) -> Choice:
    """Choose the fastest route by the timings.

    Args:
        message: As in `choose`.
        fmt: As in `choose`.
        machine: As in `choose`.
        timings: Those of the machine.
        uncompressed: Why the message should not be quantized, or "".
        forced: Whether to consider quantized routes only, unless `uncompressed` gives a reason.
    """
    size = message.numel * 2  # timings are of bfloat16
    times: dict[tuple[str, WireFormat], float] = {}
    if uncompressed or not forced:
        times["backend", fmt] = timings.time(BACKEND, size)
    for algorithm in ("one_shot", "two_shot"):
        for candidate in (_PLAIN,) if uncompressed else (fmt,) if forced else (fmt, _PLAIN):
            key = timings.nearest(candidate, algorithm)
            if key and WireFormat.parse(key.split()[0]).uncompressed == candidate.uncompressed:
                times[algorithm, candidate] = timings.time(key, size)
    if not times:  # no quantized route was measured, but min_bytes requires one
        times["one_shot", fmt] = math.inf
    (best, best_fmt), us = min(times.items(), key=lambda item: item[1] * (MARGIN if item[0][0] == "backend" else 1))
    others = {}
    for name in CANDIDATES:
        tried = min((t for (a, _), t in times.items() if a == name), default=None)
        others[name] = uncompressed or "not measured" if tried is None else f"{tried:.1f} us"
    fastest = "the fastest measured" if us == min(times.values()) else f"less than {1 - MARGIN:.0%} over the fastest"
    why = f"{us:.1f} us for {size >> 10} KiB, {fastest} ({timings.source})"
    return _choice(message, best_fmt, machine, best, f"{uncompressed}; {why}" if uncompressed else why, **others)


def _choice(message: Message, fmt: WireFormat, machine: Machine, algorithm: str, reason: str, **others: str) -> Choice:
    """Return the route of a chosen algorithm, with the reasons against the others."""
    fmt = _PLAIN if algorithm in ("copy", "backend") else fmt
    n_bytes = 0 if algorithm == "copy" else wire_bytes(algorithm, message, fmt)
    transport, executor, chunk_bytes = _placed(message, fmt, machine, algorithm, n_bytes)
    if algorithm in ("one_shot", "two_shot") and nodes_pay(message.world_size, message.local_world_size):
        across = (message.nodes - 1) * _shard_bytes(message, fmt, message.local_world_size)[0]
        flat = (message.world_size - message.local_world_size) * sum(_shard_bytes(message, fmt, message.world_size))
        others["hierarchical"] = (
            f"a third rounding, so only on request; {across} bytes a rank to other nodes, two_shot {flat}"
        )
    rejected = [Rejected(name, why) for name, why in others.items() if name != algorithm]
    rejected += [Rejected(name, why) for name, why in machine.rejected]
    route = Route(message.op, algorithm, fmt, transport, executor, chunk_bytes, n_bytes, reason, message.split)
    return Choice(route, tuple(rejected))


def _placed(
    message: Message, fmt: WireFormat, machine: Machine, algorithm: str, n_bytes: int
) -> tuple[str, Executor, int]:
    """Return transport, executor and chunk size of an algorithm. `hierarchical` has no kernel, only exchanges."""
    if algorithm == "copy":
        return "process_group", Executor.COPY, 0
    if algorithm == "backend":
        return "process_group", Executor.BACKEND, 0
    if machine.transport == "process_group" or algorithm == "hierarchical":
        return "process_group", Executor.PIPELINED, machine.chunk_bytes
    return machine.transport, Executor.KERNEL, 0
