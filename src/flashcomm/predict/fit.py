"""Derives the constants of `model` from results/, and compares the model with every measurement there.

python -m flashcomm.predict.fit results     # writes constants.json
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flashcomm.bench.records import BACKEND, read_csv
from flashcomm.bench.shapes import SHAPES
from flashcomm.predict import model
from flashcomm.predict.machines import REFERENCE, ethernet, gpu_of, link_of
from flashcomm.routing.policy import ALGORITHMS
from flashcomm.wire.format import UNCOMPRESSED, WireFormat

FITTED = {  # the files that each transport's constants come from; all others only check them
    "symmetric": ("h200x2-nvlink.csv",),
    "host_memory": ("h200x2-host-memory.csv",),
    "ethernet": ("allreduce-2ranks-1gbit.csv", "allreduce-2ranks-200mbit.csv"),
}
FIRST_TOKENS = "ttft-h200x2-no-peer-access.csv"
ROW = 4096  # values in a row of bench's messages
_LINKS = {"peer access": "nvlink", "no peer access": "host-memory"}


class Measured(NamedTuple):
    """A measurement that the model can predict, and its prediction, both in microseconds."""

    file: str
    what: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def algorithm_of(row: dict[str, str]) -> str | None:
    """Return the algorithm of a row of bench; None for those of other libraries."""
    path = row["path"]
    if path == "auto" and "takes " in row.get("note", ""):
        path = row["note"].partition("takes ")[2].partition(";")[0].partition(",")[0].split()[0]
    return path if path in ALGORITHMS else None


def format_of(row: dict[str, str], algorithm: str) -> WireFormat:
    """Return the format that a row of bench travelled in: small messages are sent uncompressed."""
    plain = WireFormat.parse(UNCOMPRESSED)
    sent = (
        0
        if algorithm == "hierarchical"
        else model.sent_bytes(algorithm, int(row["size"]), ROW, plain, int(row["world"]))
    )
    return plain if algorithm == BACKEND or int(row["wire_bytes"]) == sent else WireFormat.parse(row["format"])


def machine_of(row: dict[str, str], host_memory: bool) -> model.Machine:
    """Return the machine of a row of bench."""
    world = int(row["world"])
    link = row.get("link", "none")
    local = int(row.get("local_world") or 1)
    if link not in ("none", ""):
        between = ethernet(link)
        return model.Machine(REFERENCE, between, world, world // local, between)
    return model.Machine(REFERENCE, link_of("host-memory" if host_memory else "nvlink", REFERENCE, world), world)


def fit(results: Path) -> dict[str, Any]:
    """Return the constants that make the relative errors of the fitted files' rows least, in squares."""
    found: dict[str, Any] = {"all_reduce": {}, "compute": _fit_compute(results), "rise_pct": _rises(results)}
    for transport, files in FITTED.items():
        samples: dict[str, list[tuple[float, float, float]]] = {}
        for row in (row for name in files for row in read_csv(results / name)):
            if (algorithm := algorithm_of(row)) is None or row["path"] == "auto":
                continue
            fmt, n_bytes = format_of(row, algorithm), int(row["size"])
            machine = machine_of(row, transport == "host_memory")
            sent = model.sent_bytes(algorithm, n_bytes, ROW, fmt, machine.world_size)
            work = n_bytes / 1e6 * model.codec_work(algorithm, machine.world_size)
            sample = (sent / machine.link.gbs / 1e3, work, float(row["time_us"]))
            samples.setdefault(model.kind_of(algorithm, fmt), []).append(sample)
        found["all_reduce"][transport] = {kind: _least_squares(rows) for kind, rows in sorted(samples.items())}
    return found


def _least_squares(samples: list[tuple[float, float, float]]) -> list[float]:
    """Return [latency, pipeline, link, codec], none of them negative. Uncompressed messages have no codec term."""
    wire, work, time = np.array(samples).T
    columns = np.stack([np.ones_like(wire), np.sqrt(wire), wire, work], axis=1) / time[:, None]
    uncompressed = np.ptp(wire / work) < 1e-9
    best: tuple[float, list[float]] = (np.inf, [])
    usable = range(3 if uncompressed else 4)
    for some in (s for n in usable for s in itertools.combinations(usable, n + 1)):
        values, *_ = np.linalg.lstsq(columns[:, some], np.ones_like(time), rcond=None)
        error = float(((columns[:, some] @ values - 1) ** 2).sum())
        if (values >= 0).all() and error < best[0]:
            best = (error, [float(values[some.index(i)]) if i in some else 0.0 for i in range(4)])
    return [round(value, 4) for value in best[1]]


def _fit_compute(results: Path) -> dict[str, float]:
    """Two constants by least squares from the larger batches; launches from the smallest; overlap by a grid."""
    rows = read_csv(results / FIRST_TOKENS)
    few = min(map(_tokens, rows))
    cases = {(r["model"], r["batch"], r["tokens"]): r for r in rows if _tokens(r) > few}
    terms = []
    for row in cases.values():
        shape = shape_of(row["model"])
        n, layers, time = _tokens(row), int(row["layers"]), float(row["compute_s"])
        attention = 2 * n * int(row["tokens"]) * shape.heads * shape.head_dim
        products = layers * (2 * n * shape.layer_weights + attention) / int(row["world"]) / (REFERENCE.tflops * 1e12)
        terms.append([products / time, layers * n * shape.hidden * 2 / (REFERENCE.memory_gbs * 1e9) / time])
    (inverse, accesses), *_ = np.linalg.lstsq(np.array(terms), np.ones(len(terms)), rcond=None)
    small = [r for r in rows if _tokens(r) == few]
    launch = min(float(r["compute_s"]) / int(r["layers"]) for r in small)
    overlap = min(float(r["ttft_s"]) / int(r["layers"]) for r in small if r["overlap"] == "True")
    exposed = []
    for row in (r for r in rows if r["overlap"] == "True" and _tokens(r) > few):
        plain = next(r for r in rows if r["overlap"] == "False" and _same(r, row))
        compute, sums = float(row["compute_s"]), float(plain["ttft_s"]) - float(plain["compute_s"])
        exposed.append((float(row["ttft_s"]) - max(compute, sums)) / min(compute, sums))
    found = {"efficiency": 1 / inverse, "accesses": accesses, "launch_us": launch * 1e6}
    found |= {"overlap_launch_us": overlap * 1e6, "exposed": float(np.median(exposed))}
    return {name: round(float(value), 4) for name, value in found.items()}


def _tokens(row: dict[str, str]) -> int:
    return int(row["batch"]) * int(row["tokens"])


def _same(a: dict[str, str], b: dict[str, str]) -> bool:
    return all(a[key] == b[key] for key in ("model", "format", "path", "batch", "tokens"))


def _rises(results: Path) -> dict[str, dict[str, float]]:
    """The rise in perplexity of SmolLM2-135M in percent, by ranks and format: two are one-shot, more are two-shot."""
    rows = [r for r in read_csv(results / "accuracy-smollm2.csv") if r["world"] != "2"]
    found: dict[str, dict[str, float]] = {}
    for r in read_csv(results / "accuracy-smollm2-2ranks-auto.csv") + rows:
        if not r["format"].endswith(".json"):
            found.setdefault(r["world"], {})[r["format"]] = float(r["rise_pct"])
    return found


def shape_of(name: str) -> model.Shape:
    """Return one of the shapes that `flashcomm ttft` knows."""
    return model.Shape.of(name, SHAPES[name])


def check(results: Path) -> Iterator[Measured]:
    """Predict every all-reduce and every time to first token in results/ that today's code was measured with.

    Rows of other libraries are left out, and comparisons of older trees: bench's, and those before a change. Times to
    first token on CPUs are predicted from the measured compute time, because the table of machines has GPUs only. So
    are those on GPUs that Python's launches decide.
    """
    for path in sorted(results.glob("*.csv")):
        rows = read_csv(path)
        if not rows or not ("time_us" in rows[0] or "ttft_s" in rows[0]):
            continue
        rows = [r for r in rows if "tree" not in r or ("ttft_s" in r and r["tree"].startswith("after"))]
        for row in rows:
            if "ttft_s" in row:
                yield _first_token(path.name, row)
            elif row.get("op", "all_reduce") == "all_reduce" and (algorithm := algorithm_of(row)):
                fmt, n_bytes = format_of(row, algorithm), int(row["size"])
                machine = machine_of(row, "host" in path.name or "NCCL_P2P_DISABLE=1" in row["command"])
                predict = emulated_us if machine.link.transport == "ethernet" else model.all_reduce_us
                us = predict(machine, algorithm, fmt, n_bytes, ROW)
                yield Measured(path.name, f"{n_bytes} bytes, {fmt}, {algorithm}", float(row["time_us"]), us)


def emulated_us(machine: model.Machine, algorithm: str, fmt: WireFormat, n_bytes: int, row: int) -> float:
    """Predict an all-reduce of CPU ranks over an emulated link, in us. The ranks of all hosts share two cores."""
    w, hosts = machine.world_size, machine.hosts
    local = w // hosts
    found = model.constants()["all_reduce"]["ethernet"]
    latency, pipeline, link, codec = found.get(model.kind_of(algorithm, fmt), found["backend"])
    if algorithm == "backend":
        across = float(model.sent_bytes("backend", n_bytes, row, fmt, w))
    elif algorithm == "hierarchical":
        across = (hosts - 1) * float(model.sent_bytes("one_shot", n_bytes, row, fmt, 2))
    else:
        across = model.sent_bytes(algorithm, n_bytes, row, fmt, w) * local * (w - local) / (w - 1)
    wire_us = across / machine.link.gbs / 1e3
    work = n_bytes / 1e6 * model.codec_work(algorithm, w) * w / 2
    hops = {"two_shot": 2, "hierarchical": 3}.get(algorithm, 1) * w / 2
    return float(latency * hops + pipeline * wire_us**0.5 + link * wire_us + codec * work)


def _first_token(file: str, row: dict[str, str]) -> Measured:
    world, layers = int(row["world"]), int(row.get("layers") or 30)
    batch, tokens = int(row.get("batch") or 1), int(row["tokens"])
    overlap = row.get("overlap") == "True"
    what = f"{row['model']}, {batch} x {tokens}, {row['format']}{', overlap' if overlap else ''}, {row.get('path', '')}"
    measured = float(row["ttft_s"])
    if row.get("device", "cpu") == "cpu":
        gbs = ethernet(row["link"]).gbs
        seconds = float(row["compute_s"]) + float(row["wire_bytes"]) / gbs / 1e9
        return Measured(file, what, measured * 1e6, seconds * 1e6)
    gpu = gpu_of(row["machine"].partition(" x ")[2])
    shape, link = shape_of(row["model"]), link_of(_LINKS[row["link"]], gpu, world)
    machine = model.Machine(gpu, link, world)
    algorithm, fmt = (BACKEND if row["path"] == BACKEND else "one_shot"), WireFormat.parse(row["format"])
    n_bytes = batch * tokens * shape.hidden * 2 // (2 if overlap else 1)
    one = model.all_reduce_us(machine, algorithm, fmt, n_bytes, shape.hidden)
    sums = one * 2 * layers * (2 if overlap else 1) / 1e6
    compute = model.compute_s(shape, gpu, world, batch, tokens, layers)
    if not overlap and compute <= layers * model.constants()["compute"]["launch_us"] / 1e6:
        compute = float(row["compute_s"])  # the time of launches, which depends on the host's CPU
    return Measured(file, what, measured * 1e6, model.first_token_s(compute, sums, layers, overlap) * 1e6)


if __name__ == "__main__":
    model.CONSTANTS.write_text(json.dumps(fit(Path(sys.argv[1])), indent=1) + "\n")
