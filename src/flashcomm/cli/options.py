"""Options that several commands share, and what their values mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from flashcomm.errors import SettingsError, UnavailableError

Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout and nothing else.")]
World = Annotated[int, typer.Option("--world", "-n", min=1, help="Number of ranks.")]
Link = Annotated[
    str | None, typer.Option(help="Give every rank a network namespace and a link of this rate, e.g. 100mbit.")
]
Device = Annotated[str, typer.Option(help="cpu (gloo), cuda (NCCL), or auto: cuda where there are enough GPUs.")]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32.")]
Model = Annotated[Path, typer.Option(help="Model directory: config.json and safetensors, or one GGUF file.")]
MinBytes = Annotated[str | None, typer.Option(help="Leave smaller messages to the backend, e.g. 64K.")]
Algorithm = Annotated[str | None, typer.Option(help="auto, native, one_shot, two_shot or hierarchical.")]
LocalWorld = Annotated[
    int | None, typer.Option(min=1, help="Ranks of a node, for hierarchical; with --link they share one.")
]
Timeout = Annotated[float, typer.Option(help="Seconds after which the whole run is given up.")]
Csv = Annotated[
    Path | None, typer.Option(help="Write the rows, with machine, versions, date and command, to this file.")
]


def device_for(asked: str, world_size: int) -> str:
    import torch

    if asked not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"--device {asked}: allowed are auto, cpu and cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("--device cuda: torch finds no CUDA device; use --device cpu")
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= world_size else "cpu"
    return asked


def dtype_for(name: str) -> Any:
    import torch

    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name not in known:
        raise SettingsError(f"--dtype {name}: allowed are {', '.join(known)}")
    return known[name]


def progress_bar(quiet: bool) -> Progress:
    from flashcomm.cli.report import err_console

    parts = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*parts, console=err_console, transient=True, disable=quiet or not err_console.is_terminal)


def formats_of(text: str, *, plans: bool = False) -> list[str]:
    """The formats in a list, in canonical form; with `plans` also paths of .json files, which are read and checked."""
    from flashcomm.plan import Plan
    from flashcomm.wire.format import WireFormat

    names = []
    for part in text.split(","):
        if plans and part.strip().lower().endswith(".json"):
            Plan.of(part.strip())
            names.append(part.strip())
        else:
            names.append(str(WireFormat.parse(part)))
    return names


def modes_of(asked: str | None, device: str) -> tuple[str, ...]:
    """Which ways to time: CUDA graphs only where there is CUDA."""
    known = {"eager": ("eager",), "graph": ("graph",), "both": ("eager", "graph")}
    asked = asked or ("both" if device == "cuda" else "eager")
    if asked not in known:
        raise SettingsError(f"--mode {asked}: allowed are {', '.join(known)}")
    if device != "cuda" and asked != "eager":
        raise SettingsError(f"--mode {asked}: CUDA graphs need --device cuda; on CPUs there is eager only")
    return known[asked]


def prepare(
    fmt: str, device: str, world_size: int, min_bytes: str | None, algorithm: str | None
) -> tuple[str, dict[str, Any]]:
    """(device, settings), wrong ones refused before any rank starts."""
    from flashcomm.plan import Plan
    from flashcomm.settings import Settings

    where = device_for(device, world_size)
    settings: dict[str, Any] = {k: v for k, v in (("min_bytes", min_bytes), ("algorithm", algorithm)) if v is not None}
    Settings.resolve(where, format=Plan.of(fmt).format, **settings)
    return where, settings


def numbers_of(option: str, text: str) -> list[int]:
    """The positive numbers in a list, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SettingsError(f"{option} {text}: give positive numbers, separated by commas, such as 1,8")
    return list(dict.fromkeys(map(int, parts)))
