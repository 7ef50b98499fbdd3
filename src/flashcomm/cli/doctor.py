"""`flashcomm doctor`: this machine, its links and versions, and which way messages of each size would go and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import policy
from flashcomm.cli import link
from flashcomm.cli.report import cpu_name
from flashcomm.settings import Settings

SIZES = tuple(1 << k for k in range(12, 28, 3))
PACKAGES = ("torch", "numpy", "llvmlite", "transformers", "triton", "pyroute2", "vllm", "sglang")


def examine(world: int, row: int, itemsize: int, settings: Settings, device: str) -> dict[str, Any]:
    """Everything `doctor` shows, as one JSON-able object. Starts no ranks."""
    return {
        "machine": _machine(),
        "versions": {"flashcomm": flashcomm.__version__, "python": platform.python_version()} | _versions(),
        "paths": _paths(device),
        "settings": settings.as_dict(),
        "choices": [_choice(size, row, itemsize, world, settings, device) for size in SIZES],
    }


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


def _paths(device: str) -> dict[str, str]:
    """Each thing a message could go through, and whether it can here."""
    try:
        import llvmlite

        codec = f"compiled (llvmlite {llvmlite.__version__})"
    except ImportError as why:
        codec = f"plain torch, slower, same bits ({why})"
    nccl = dist.is_nccl_available() and torch.cuda.is_available()
    return {
        "cpu codec": codec,
        "cuda codec": "plain torch" if torch.cuda.is_available() else "no: torch finds no CUDA device",
        "gloo": "available" if dist.is_gloo_available() else "no: this torch was built without gloo",
        "nccl": "available"
        if nccl
        else "no: " + ("torch finds no CUDA device" if dist.is_nccl_available() else "not in this torch"),
        "chosen device": device,
    }


def _choice(size: int, row: int, itemsize: int, world: int, settings: Settings, device: str) -> dict[str, Any]:
    call = policy.Call(size // itemsize, min(row, size // itemsize), itemsize, world, device)
    choice = policy.choose(call, settings.format, settings.algorithm, settings.min_bytes)
    return {
        "size": size,
        "path": choice.route.algorithm,
        "wire_bytes": choice.route.wire_bytes,
        "why": choice.route.reason,
        "not": {r.algorithm: r.reason for r in choice.rejected},
    }
