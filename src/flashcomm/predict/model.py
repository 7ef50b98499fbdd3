"""The model of time: latency + pipeline + link + codec for an all-reduce, and compute + all-reduces for a first token.

An all-reduce of M message bytes, of which a rank sends w over a link of the data sheet's rate r:

    T = w / r
    time = latency + pipeline * sqrt(T) + link * T + codec * M * work

`link` is how many times the data sheet's time the bytes take. The square root is the cost of pipelining: a message that
travels in n chunks, each with an overhead o, over k stages takes (n + k)(o + T / n), and the best n makes that
k * o + T + 2 * sqrt(k * o * T). `work` is what the codec does relative to a one-shot between two ranks. A model's
compute is matrix products + accesses to memory, or the time that its Python code takes to launch the kernels, if
that is longer. `fit` derives all constants from the measurements in results/; docs/predict.md lists what is assumed.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from flashcomm.errors import InputError
from flashcomm.predict.machines import REFERENCE, Gpu, Link
from flashcomm.routing.policy import ALGORITHMS, wire_bytes
from flashcomm.routing.route import Message
from flashcomm.wire.format import WireFormat

CONSTANTS = Path(__file__).with_name("constants.json")
ASSUMED_HOP_US = 60.0  # of NCCL between two hosts over Ethernet; not measured


class Shape(NamedTuple):
    """What the time of a dense model depends on. `kv_heads` and `head_dim` as in its config.json."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, name: str, config: dict[str, Any]) -> Shape:
        """Read a config in the style of transformers.

        Raises:
            InputError: A size is missing, or the model is a mixture of experts.
        """
        if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise InputError(f"{name} is a mixture of experts, and only dense models can be predicted")
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            sizes = (int(config["intermediate_size"]), int(config["num_hidden_layers"]), heads)
            vocab = int(config["vocab_size"])
        except (KeyError, TypeError, ValueError) as why:
            raise InputError(f"{name} has no usable {why}: a config.json of a dense decoder is needed") from why
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return cls(name, hidden, *sizes, kv_heads, int(config.get("head_dim") or hidden // heads), vocab)

    def check_ranks(self, world_size: int) -> None:
        """Raise InputError if world_size ranks cannot share the model."""
        if world_size < 2 or self.heads % world_size or self.kv_heads % world_size or self.mlp % world_size:
            n = math.gcd(math.gcd(self.heads, self.kv_heads), self.mlp)
            allowed = ", ".join(str(w) for w in range(2, n + 1) if n % w == 0) or "none"
            raise InputError(
                f"{world_size} ranks cannot share {self.name} ({self.heads} heads, {self.kv_heads} KV heads, MLP of "
                f"{self.mlp}): allowed are {allowed}"
            )

    @property
    def layer_weights(self) -> int:
        """Values in the matrices of a decoder layer."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads) + 3 * self.hidden * self.mlp

    def memory_bytes(self, world_size: int, batch: int, tokens: int) -> int:
        """Bytes of bf16 a rank: weights, with both vocabulary tables, and the cache of keys and values."""
        weights = self.layers * self.layer_weights // world_size + 2 * self.vocab * self.hidden
        return 2 * (weights + 2 * batch * tokens * self.layers * self.kv_heads * self.head_dim // world_size)


class Machine(NamedTuple):
    """The ranks of a prediction.

    Attributes:
        gpu: The GPU of every rank.
        link: Between the ranks of a host.
        world_size: All ranks.
        hosts: Number of hosts with equally many ranks.
        host_link: Between hosts, shared by the ranks of a host; needed if there are several.
        shared: Number of ranks that share one link, such as GPUs behind one PCIe switch.
    """

    gpu: Gpu
    link: Link
    world_size: int
    hosts: int = 1
    host_link: Link | None = None
    shared: int = 1


@cache
def constants() -> dict[str, Any]:
    """Return the constants that `fit` derived from results/."""
    loaded: dict[str, Any] = json.loads(CONSTANTS.read_text())
    return loaded


def kind_of(algorithm: str, fmt: WireFormat) -> str:
    """Return the name of the constants of a route."""
    if algorithm == "backend":
        return "backend"
    if fmt.uncompressed:
        return "none, two-shot" if algorithm == "two_shot" else "none"
    if not (fmt.reduce.hadamard or fmt.gather.hadamard):
        return "values"
    return "hadamard, two ranges" if fmt.reduce.clip_ratio(fmt.reduce.group) else "hadamard"


def codec_work(algorithm: str, world_size: int) -> float:
    """Return what a rank encodes and decodes, relative to a one-shot between two ranks."""
    if algorithm == "one_shot":
        return world_size / 2
    return (3 - 1 / world_size) / 2


def sent_bytes(algorithm: str, n_bytes: int, row: int, fmt: WireFormat, world_size: int) -> int:
    """Return the payload bytes that a rank sends for a bf16 message, as routing counts them."""
    row = min(row, n_bytes // 2)
    return wire_bytes(algorithm, Message(n_bytes // 2, row, 2, world_size, "cuda"), fmt)


def all_reduce_us(machine: Machine, algorithm: str, fmt: WireFormat, n_bytes: int, row: int) -> float:
    """Predict an all-reduce.

    Args:
        machine: The ranks.
        algorithm: "backend", "one_shot", "two_shot" or, between hosts, "hierarchical".
        fmt: The wire format.
        n_bytes: Bytes of the bf16 message.
        row: Values in a row.

    Returns:
        Microseconds.
    """
    if algorithm not in ALGORITHMS:
        raise InputError(f"algorithm {algorithm!r}: allowed are {', '.join(ALGORITHMS)}")
    w = machine.world_size
    if machine.hosts > 1:
        return _between_hosts_us(machine, algorithm, fmt, n_bytes, row)
    sent = sent_bytes(algorithm, n_bytes, row, fmt, w)
    return _time_us(machine, machine.link.transport, algorithm, fmt, n_bytes, sent, w)


def _time_us(
    machine: Machine, transport: str, algorithm: str, fmt: WireFormat, n_bytes: int, sent: float, w: int
) -> float:
    found: dict[str, list[float]] = constants()["all_reduce"][transport]
    latency, pipeline, link, codec = found[kind_of(algorithm, fmt)]
    if algorithm == "backend":
        latency *= (1 + math.log2(w)) / 2  # small messages travel along a tree
    elif algorithm == "two_shot" and not fmt.uncompressed:
        latency *= found["none, two-shot"][0] / found["none"][0]  # two hops
    wire_us = sent * machine.shared / machine.link.gbs / 1e3
    codec_us = codec * n_bytes / 1e6 * codec_work(algorithm, w) * REFERENCE.memory_gbs / machine.gpu.memory_gbs
    return latency + pipeline * math.sqrt(wire_us) + link * wire_us + codec_us


def _between_hosts_us(machine: Machine, algorithm: str, fmt: WireFormat, n_bytes: int, row: int) -> float:
    """The host's link carries what its ranks exchange with other hosts; the slower of both links decides."""
    assert machine.host_link is not None
    w, hosts = machine.world_size, machine.hosts
    local = w // hosts
    us_a_byte = 1e-3 / machine.host_link.gbs
    if algorithm == "backend":  # a ring crosses each host's link once
        return ASSUMED_HOP_US * (1 + math.log2(w)) / 2 + us_a_byte * sent_bytes("backend", n_bytes, row, fmt, w)
    codec: float = constants()["all_reduce"]["host_memory"][kind_of(algorithm, fmt)][3]
    memory = REFERENCE.memory_gbs / machine.gpu.memory_gbs
    if algorithm == "hierarchical":
        inner = 0.0
        if local > 1:
            sent = sent_bytes("two_shot", n_bytes, row, fmt, local)
            inner = _time_us(machine, machine.link.transport, "two_shot", fmt, n_bytes, sent, local)
        across = (hosts - 1.0) * sent_bytes("one_shot", n_bytes, row, fmt, 2)  # by all ranks of the host together
        return inner + ASSUMED_HOP_US + us_a_byte * across + codec * n_bytes / 1e6 / local * hosts / 2 * memory
    hops = 1 if algorithm == "one_shot" else 2
    across = sent_bytes(algorithm, n_bytes, row, fmt, w) * local * (w - local) / (w - 1)
    return hops * ASSUMED_HOP_US + us_a_byte * across + codec * n_bytes / 1e6 * codec_work(algorithm, w) * memory


def best(machine: Machine, fmt: WireFormat, n_bytes: int, row: int) -> tuple[str, float]:
    """Return the fastest algorithm of flashcomm for a format, and its microseconds."""
    names = ("one_shot", "two_shot", *(("hierarchical",) if machine.hosts > 1 else ()))
    return min(((a, all_reduce_us(machine, a, fmt, n_bytes, row)) for a in names), key=lambda pair: pair[1])


def compute_s(shape: Shape, gpu: Gpu, world_size: int, batch: int, tokens: int, layers: int | None = None) -> float:
    """Predict the time of a prompt's forward pass without all-reduces, transformers in eager mode, in seconds."""
    c, rows = constants()["compute"], batch * tokens
    layers = layers or shape.layers
    attention = 2 * rows * tokens * shape.heads * shape.head_dim  # causal: half of two products
    products = layers * (2 * rows * shape.layer_weights + attention) / world_size / (gpu.tflops * 1e12)
    accesses = c["accesses"] * layers * rows * shape.hidden * 2 / (gpu.memory_gbs * 1e9)
    return float(max(products / c["efficiency"] + accesses, layers * c["launch_us"] / 1e6))


def first_token_s(compute: float, sums: float, layers: int, overlap: bool) -> float:
    """Predict time to first token from the times of compute and of all all-reduces, in seconds.

    With overlap the longer of the two hides the shorter but for a share; or Python's launches take longer than both.
    """
    c = constants()["compute"]
    if not overlap:
        return compute + sums
    hidden = max(compute, sums) + c["exposed"] * min(compute, sums)
    return float(max(hidden, layers * c["overlap_launch_us"] / 1e6))
