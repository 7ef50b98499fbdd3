"""GPUs and links by name, with the rates that their data sheets give."""

from __future__ import annotations

import re
from typing import NamedTuple

from flashcomm.errors import InputError

ETHERNET_PAYLOAD = 1448 / 1514
"""The share of an Ethernet link's rate that can be payload, as in `ranks.link`."""


class Gpu(NamedTuple):
    """A GPU. All rates are those of the data sheet.

    Attributes:
        tflops: Dense bf16 matrix products with float32 sums, in 10^12 operations a second.
        memory_gbs: GB/s of its memory.
        pcie_gbs: GB/s each way of its PCIe slot with 16 lanes, after line coding.
        peer_gbs: GB/s each way to all peers together over NVLink or xGMI; 0: it has none.
        memory_gb: GB of memory.
        source: Where the figures are from.
        per_peer: Whether `peer_gbs` is split into equal parts, one a peer, of which there are 7.
    """

    tflops: float
    memory_gbs: float
    pcie_gbs: float
    peer_gbs: float
    memory_gb: int
    source: str
    per_peer: bool = False


PCIE4, PCIE5 = 31.5, 63.0  # GB/s each way: 16 lanes x 16 or 32 GT/s x 128/130 / 8
GPUS = {
    "h200": Gpu(989, 4800, PCIE5, 450, 141, "NVIDIA H200 data sheet"),
    "h100": Gpu(989, 3350, PCIE5, 450, 80, "NVIDIA H100 SXM data sheet"),
    "b200": Gpu(2250, 8000, PCIE5, 900, 180, "NVIDIA DGX B200 data sheet"),
    "a100": Gpu(312, 2039, PCIE4, 300, 80, "NVIDIA A100 80GB SXM data sheet"),
    "l40s": Gpu(362, 864, PCIE4, 0, 48, "NVIDIA L40S data sheet"),
    "l40": Gpu(181, 864, PCIE4, 0, 48, "NVIDIA L40 data sheet"),
    "l4": Gpu(121, 300, PCIE4, 0, 24, "NVIDIA L4 data sheet, with 16 lanes"),
    "a10": Gpu(125, 600, PCIE4, 0, 24, "NVIDIA A10 data sheet"),
    "rtx-5090": Gpu(209.5, 1792, PCIE5, 0, 32, "NVIDIA RTX Blackwell architecture paper"),
    "rtx-4090": Gpu(165.2, 1008, PCIE4, 0, 24, "NVIDIA Ada architecture paper"),
    "rtx-3090": Gpu(71, 936, PCIE4, 0, 24, "NVIDIA Ampere GA102 architecture paper"),
    "rtx-pro-6000": Gpu(503.8, 1792, PCIE5, 0, 96, "NVIDIA RTX Blackwell PRO architecture paper"),
    "mi300x": Gpu(1307, 5300, PCIE5, 448, 192, "AMD Instinct MI300X data sheet", per_peer=True),
}
REFERENCE = GPUS["h200"]  # the GPU that the constants were measured on


class Link(NamedTuple):
    """What carries messages between the ranks of a host, or between hosts.

    Attributes:
        name: "nvlink", "host-memory" or the rate of an Ethernet link.
        transport: Whose constants apply: "symmetric", "host_memory" or "ethernet".
        gbs: GB/s each way of a rank or, between hosts, of a host; after frame headers.
    """

    name: str
    transport: str
    gbs: float


def gpu_of(name: str, tflops: float | None = None, memory_gbs: float | None = None) -> Gpu:
    """Return a GPU by name, with the rates that are given instead of those of the table.

    Raises:
        InputError: There is no such GPU, and the given rates do not describe one.
    """
    key = re.sub(r"^(nvidia|amd|geforce)\s+", "", name.lower()).replace(" ", "-")
    found = GPUS.get(key) or next((GPUS[k] for k in sorted(GPUS, key=len, reverse=True) if k in key), None)
    if found is None and (tflops is None or memory_gbs is None):
        raise InputError(
            f"--gpu {name} is not known; known are {', '.join(GPUS)}. For another one give --tflops (dense bf16) and "
            "--memory-gbs as well"
        )
    found = found or Gpu(0, 0, PCIE4, 0, 0, "given")
    return found._replace(tflops=tflops or found.tflops, memory_gbs=memory_gbs or found.memory_gbs)


def link_of(name: str, gpu: Gpu, world_size: int, link_gbs: float | None = None) -> Link:
    """Return the link of the ranks of a host: "nvlink", or "host-memory" (no peer access).

    Args:
        name: The name. "auto" is NVLink or xGMI where the GPU has it, else host memory.
        gpu: The GPU.
        world_size: Ranks of a host that exchange over the link.
        link_gbs: GB/s each way that the link has by its data sheet, instead of the GPU's.

    Raises:
        InputError: There is no such link, or the GPU does not have it.
    """
    if name == "auto":
        name = "nvlink" if gpu.peer_gbs else "host-memory"
    if name == "nvlink":
        if not gpu.peer_gbs and link_gbs is None:
            raise InputError("--link nvlink: this GPU has none; use --link host-memory, or give --link-gbs")
        share = (world_size - 1) / 7 if gpu.per_peer else 1.0
        return Link(name, "symmetric", link_gbs or gpu.peer_gbs * share)
    if name == "host-memory":
        return Link(name, "host_memory", link_gbs or gpu.pcie_gbs)
    raise InputError(f"--link {name}: use nvlink, host-memory or auto. For Ethernet give --hosts and --host-link")


def ethernet(name: str) -> Link:
    """Return the Ethernet link of a rate such as "25gbit".

    Raises:
        InputError: It is no rate.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(mbit|gbit)", name)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"--host-link {name}: give the rate of a host's Ethernet, such as 25gbit or 100mbit")
    rate = float(match[1]) * (1e6 if match[2] == "mbit" else 1e9)
    return Link(name, "ethernet", rate * ETHERNET_PAYLOAD / 8 / 1e9)
