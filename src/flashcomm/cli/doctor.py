"""`flashcomm doctor`: shows this machine, its versions, and the route of messages of each size with the reason."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

import flashcomm
from flashcomm import Communicator
from flashcomm.accuracy.recommend import evidence
from flashcomm.bench.records import cpu_name
from flashcomm.cli import options
from flashcomm.cli.console import console, print_json, print_table, run_ranks
from flashcomm.errors import FlashcommError
from flashcomm.predict.report import sentence
from flashcomm.ranks import link
from flashcomm.ranks.launch import RankContext
from flashcomm.routing import policy, timings
from flashcomm.routing.route import Machine, Message
from flashcomm.settings import DEFAULT_FORMAT, Settings
from flashcomm.setup import discovery
from flashcomm.wire.format import WireFormat

SIZES = tuple(1 << k for k in range(12, 28, 3))
PACKAGES = ("torch", "numpy", "llvmlite", "transformers", "triton", "pyroute2", "vllm", "sglang")


def doctor(
    world_size: options.World = 2,
    format: Annotated[str | None, typer.Option("--format", "-f", help="Wire format.")] = None,
    row: options.RowLength = 4096,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    json: options.Json = False,
) -> None:
    """Show machine, links and versions, the route of each message size, and why the others were rejected."""
    where = options.device_of(device, world_size)
    settings = Settings.resolve(where, format=format)
    found = examine(world_size, row, options.dtype_of(dtype).itemsize, settings, where)
    if json:
        print_json(found)
        return
    for section in ("machine", "versions", "paths", "settings", "accuracy"):
        console.print(f"[bold]{section}[/bold]")
        for key, value in found[section].items():
            console.print(f"  {key:16} {value}", markup=False)
    rows = [c | {"not": "\n".join(f"{k}: {v}" for k, v in c["not"].items())} for c in found["choices"]]
    title = f"all-reduce of {dtype} rows of {row} as {settings.format}, {world_size} ranks on {where}"
    columns = {"size": "bytes", "path": "path", "wire_bytes": "wire bytes", "why": "why", "not": "why not"}
    print_table(title, columns, rows)
    console.print(f"predicted: {found['predicted']}", markup=False)


def examine(world_size: int, row: int, itemsize: int, settings: Settings, device: str) -> dict[str, Any]:
    """Return everything that `doctor` shows, as one object for JSON. Ranks are started only on GPUs."""
    found, here = _found(device, world_size, settings), _machine()
    return {
        "machine": here,
        "versions": {"flashcomm": flashcomm.__version__, "python": platform.python_version()} | _versions(),
        "paths": _paths(device, found),
        "settings": settings.as_dict(),
        "accuracy": {
            str(fmt): evidence(fmt) for fmt in dict.fromkeys((settings.format, WireFormat.parse(DEFAULT_FORMAT)))
        },
        "predicted": sentence(next(iter(here["gpus"]), ""), found.transport, world_size, str(settings.format)),
        "choices": [_choice(size, row, itemsize, world_size, settings, device, found) for size in SIZES],
    }


def machine_of(ctx: RankContext, fmt: str) -> Machine:
    """Return the machine that ranks find when they create a Communicator: self-tested and, if need be, measured."""
    with Communicator(None, fmt, device=ctx.device.type) as comm:
        return comm.machine


def _found(device: str, world_size: int, settings: Settings) -> Machine:
    """Return the machine that ranks find, if there is a GPU for each, or else would find; see `discovery.connect`."""
    name, rejected = "process_group", []
    if device == "cuda" and 1 < world_size <= torch.cuda.device_count():
        try:
            found = run_ranks(machine_of, world_size, (settings.fmt,), quiet=True, device=device)
            if isinstance(found, Machine):  # None on torchrun's other ranks
                return found
        except FlashcommError as error:
            rejected.append(("ranks", str(error)))
    for kind in discovery.candidates(device, settings.transport):
        here = min(world_size, torch.cuda.device_count()) if device == "cuda" else world_size
        probes = [kind.probe(torch.device(device, rank)) for rank in range(here)]
        missing = f"{world_size} ranks and {here} GPUs here" if here < world_size else ""
        if why := missing or kind.why_not(probes):
            rejected.append((kind.NAME, why))
        else:
            name = kind.NAME
            break
    table = timings.find(
        discovery.machine_name(torch.device(device, 0) if device == "cuda" else torch.device(device)),
        world_size,
        name,
        flashcomm.__version__,
    )
    local_world_size = discovery.asked_local_world_size(settings, world_size)
    if not settings.local_world_size:
        here = torch.cuda.device_count() if device == "cuda" else 1
        local_world_size = discovery.node_size(
            [discovery.locality(torch.device(device, rank % here)) for rank in range(world_size)]
        )
    return Machine(name, table, tuple(rejected), local_world_size)


def _machine() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    peers = [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "peer_access": peers,
        "link_namespaces": link.probe() or "available",
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _paths(device: str, found: Machine) -> dict[str, str]:
    """Return, for each codec, backend and transport, whether it is available here."""
    try:
        import llvmlite

        codec = f"compiled (llvmlite {llvmlite.__version__})"
    except ImportError as why:
        codec = f"plain torch, slower, same bits ({why})"
    nccl = dist.is_nccl_available() and torch.cuda.is_available()
    return {
        "cpu codec": codec,
        "cuda codec": _cuda_codec(),
        "gloo": "available" if dist.is_gloo_available() else "no: this torch was built without gloo",
        "nccl": "available"
        if nccl
        else "no: " + ("torch finds no CUDA device" if dist.is_nccl_available() else "not in this torch"),
        "chosen device": device,
        "chosen transport": found.transport,
        "table of times": found.timings.source
        if found.timings
        else "none: rules of thumb; `flashcomm calibrate` measures",
        **{name: f"no: {why}" for name, why in found.rejected},
    }


def _cuda_codec() -> str:
    if not torch.cuda.is_available():
        return "no: torch finds no CUDA device"
    version = _versions()["triton"]
    return (
        "plain torch, slower, same bits: triton is not installed" if version == "not installed" else f"triton {version}"
    )


def _choice(
    size: int, row: int, itemsize: int, world_size: int, settings: Settings, device: str, found: Machine
) -> dict[str, Any]:
    call = Message(size // itemsize, min(row, size // itemsize), itemsize, world_size, device, found.local_world_size)
    choice = policy.choose(call, settings.format, settings.algorithm, settings.min_bytes, found)
    return {
        "size": size,
        "path": choice.route.algorithm,
        "format": str(choice.route.format),
        "transport": choice.route.transport,
        "wire_bytes": choice.route.wire_bytes,
        "why": choice.route.reason,
        "not": {r.name: r.reason for r in choice.rejected},
    }
