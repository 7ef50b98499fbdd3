"""`flashcomm generate`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from flashcomm.accuracy import generate as accuracy
from flashcomm.accuracy.models import check_model
from flashcomm.bench.records import human_bytes
from flashcomm.cli import options
from flashcomm.cli.console import err_console, print_json
from flashcomm.ranks import launch
from flashcomm.settings import DEFAULT_FORMAT


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="The prompt.")],
    world_size: options.World = 2,
    format: Annotated[
        str,
        typer.Option("--format", "-f", envvar="FLASHCOMM_FORMAT", help="Wire format of the all-reduces, or a plan."),
    ] = DEFAULT_FORMAT,
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 64,
    min_bytes: options.MinBytes = None,
    algorithm: options.Algorithm = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    link: options.Link = None,
    timeout: options.Timeout = 600,
    json: options.Json = False,
) -> None:
    """Generate text greedily with a tensor-parallel model. Starts its ranks itself, or uses those of torchrun."""
    where = options.device_of(device, world_size)
    settings = options.settings_of(format, where, min_bytes=min_bytes, algorithm=algorithm)
    check_model(model, world_size)

    def on_text(text: Any) -> None:
        if not json:
            sys.stdout.write(text)
            sys.stdout.flush()

    args = (model, format, prompt, tokens, options.dtype_of(dtype), settings)
    result: Any = launch.run(
        accuracy.generate, world_size, args, device=where, link=link, on_event=on_text, timeout_s=timeout
    )
    if result is None:  # under torchrun, not rank 0
        return
    if json:
        print_json(result)
        return
    sent = human_bytes(result["wire_bytes"])
    summary = (
        f"{len(result['tokens'])} tokens in {result['seconds']} s, {format}; each of {world_size} ranks sent {sent}"
    )
    err_console.print(f"\n[dim]{summary}[/dim]")
