"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flashcomm.errors import SettingsError, UnavailableError
from flashcomm.plan import Plan
from flashcomm.settings import Settings, parse_size
from flashcomm.wire.format import WireFormat

Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout and nothing else.")]
World = Annotated[int, typer.Option("--world", "-n", min=1, help="Number of ranks.")]
SimulatedWorld = Annotated[
    int | None,
    typer.Option("--world", "-n", min=1, help="Number of ranks; by default the smallest that can share the model."),
]
Bos = Annotated[
    str,
    typer.Option(
        help="Begin each window with the beginning-of-sequence token: yes, no, or auto: as the tokenizer does."
    ),
]
Link = Annotated[
    str | None, typer.Option(help="Give every rank a network namespace and a link of this rate, e.g. 100mbit.")
]
Device = Annotated[str, typer.Option(help="cpu (gloo), cuda (NCCL), or auto: cuda if there are enough GPUs.")]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32.")]
Model = Annotated[Path, typer.Option(help="Model directory: config.json and safetensors, or one GGUF file.")]
MinBytes = Annotated[str | None, typer.Option(help="Smaller messages go to the backend, e.g. 64K.")]
Algorithm = Annotated[str | None, typer.Option(help="auto, backend, one_shot, two_shot or hierarchical.")]
LocalWorld = Annotated[
    int | None,
    typer.Option("--local-world", min=1, help="Ranks per node, for hierarchical; with --link they share a link."),
]
Timeout = Annotated[float, typer.Option(help="Stop the whole run after this many seconds.")]
Csv = Annotated[
    Path | None, typer.Option(help="Write the rows, with machine, versions, date and command, to this file.")
]
Begin = Annotated[str, typer.Option("--begin", "-b", help="Smallest message.")]
End = Annotated[str, typer.Option("--end", "-e", help="Largest message.")]
Factor = Annotated[int, typer.Option("--factor", "-f", min=2, help="Factor from one size to the next.")]
RowLength = Annotated[
    int, typer.Option("--row", min=1, help="Values per row (hidden size), if the message is divisible by it.")
]
Turns = Annotated[int, typer.Option(min=1, help="Samples of each case, in turns; the median counts.")]
Formats = Annotated[str, typer.Option(help="Wire formats, separated by commas.")]
FormatsAndPlans = Annotated[str, typer.Option(help="Wire formats and plans (.json), separated by commas.")]
Text = Annotated[Path, typer.Option(help="UTF-8 text to run through the model.")]
Context = Annotated[int, typer.Option(min=8, help="Tokens per window.")]
Windows = Annotated[int, typer.Option(min=1, help="Number of windows, spread evenly over the text.")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device_of(asked: str, world_size: int) -> str:
    """Return "cpu" or "cuda" for the value of --device."""
    if asked not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"--device {asked}: allowed are auto, cpu and cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("--device cuda: torch finds no CUDA device; use --device cpu")
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= world_size else "cpu"
    return asked


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype for the value of --dtype."""
    if name not in DTYPES:
        raise SettingsError(f"--dtype {name}: allowed are {', '.join(DTYPES)}")
    return DTYPES[name]


def formats_of(text: str, *, plans: bool = False) -> list[str]:
    """Parse a list of formats into canonical form. With `plans`, it may have paths of plans, which are checked."""
    names = []
    for part in text.split(","):
        if plans and part.strip().lower().endswith(".json"):
            Plan.of(part.strip())
            names.append(part.strip())
        else:
            names.append(str(WireFormat.parse(part)))
    return names


def plans_of(names: Sequence[str]) -> dict[str, Plan]:
    """Return plans by the name to show, without uncompressed formats. Files are named without folder if unique."""
    plans: dict[str, Plan] = {}
    files = [Path(name).name for name in names]
    for name, file in zip(names, files, strict=True):
        plan = Plan.of(name)
        if plan.layers or not plan.format.uncompressed:
            plans[file if name.endswith(".json") and files.count(file) == 1 else name] = plan
    return plans


def settings_of(fmt: str, device: str, **given: Any) -> dict[str, Any]:
    """Return the options that are not None as settings of Communicators. Wrong ones raise before any rank starts."""
    settings = {name: value for name, value in given.items() if value is not None}
    Settings.resolve(device, format=Plan.of(fmt).format, **settings)
    return settings


def numbers_of(option: str, text: str) -> list[int]:
    """Parse a list of positive numbers. Return each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SettingsError(f"{option} {text}: give positive numbers, separated by commas, such as 1,8")
    return list(dict.fromkeys(map(int, parts)))


def sizes_of(begin: str, end: str, factor: int) -> list[int]:
    """Return message sizes in bytes: begin, begin * factor, ... up to end."""
    size, last = parse_size("--begin", begin, least=16), parse_size("--end", end)
    sizes = []
    while size <= last:
        sizes.append(size)
        size *= factor
    if not sizes:
        raise SettingsError(f"no sizes from {begin} to {end}: give a --begin that is not above --end")
    return sizes


def with_interval(row: dict[str, Any], key: str, low: str, high: str, spec: str) -> str:
    """Format a row's value and, if it exists, its 95 % interval."""
    text = f"{row[key]:{spec}}"
    return text if row[low] is None else f"{text} [{row[low]:{spec}}, {row[high]:{spec}}]"


def check_several_ranks(world_size: int) -> None:
    """Raise SettingsError for a single rank, which sends nothing."""
    if world_size < 2:
        raise SettingsError(f"--world {world_size}: one rank sends nothing; measuring needs --world 2 or more")
