"""`flashcomm probe`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashcomm.accuracy import probe as accuracy
from flashcomm.accuracy.evaluate import BATCH_TOKENS
from flashcomm.accuracy.texts import bos_of, read_windows
from flashcomm.cli import options
from flashcomm.cli.console import print_table, progress, write_rows
from flashcomm.cli.models import open_model
from flashcomm.errors import InputError


def probe(
    model: options.Model,
    text: options.Text,
    world_size: options.SimulatedWorld = None,
    formats: options.FormatsAndPlans = "int8,int6-had,int4-had,int4",
    contexts: Annotated[str, typer.Option(help="Context lengths of the needle probe; empty: skip it.")] = "1024",
    prompts: Annotated[int, typer.Option(min=0, help="Prompts of the generation probe; 0: skip it.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate from each prompt.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 50,
    algorithm: Annotated[str, typer.Option(help="auto (as a Communicator would), one_shot or two_shot.")] = "auto",
    bos: options.Bos = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "fp32",
    csv: options.Csv = None,
    json: options.Json = False,
) -> None:
    """Look for failures that perplexity hides: a needle in a long context, and greedy text from many prompts."""
    plans = options.plans_of(options.formats_of(formats, plans=True))
    lengths = options.numbers_of("--contexts", contexts) if contexts else []
    opened = open_model(model, device, dtype, algorithm, [world_size] if world_size else [], plans)
    tokenizer, where, n_ranks = opened.tokenizer, opened.device, opened.worlds[0]
    most = getattr(opened.config, "max_position_embeddings", None)
    if lengths and most and max(lengths) > most:
        raise InputError(f"--contexts {max(lengths)}: {model.name} supports at most {most} tokens")
    if lengths and min(lengths) < 64:
        raise InputError(f"--contexts {min(lengths)}: a needle and its question need 64 tokens")
    first = bos_of(tokenizer, bos)
    hay = read_windows(text, tokenizer, max(lengths), 1, first)[0] if lengths else None
    ids = read_windows(text, tokenizer, 48, prompts, first).to(where) if prompts else None
    loaded = opened.load(max(BATCH_TOKENS[where], *lengths, 0), 0)
    rows: list[dict[str, Any]] = []
    with progress(json) as report:
        if hay is not None:
            rows += accuracy.needle(loaded, tokenizer, hay, lengths, plans, n_ranks, algorithm, report)
        if ids is not None:
            rows += accuracy.generation(loaded, ids, tokens, plans, n_ranks, algorithm, batch, report)
    if write_rows([{"model": model.name, "dtype": dtype} | row for row in rows], csv, json):
        return
    columns = {"context": "context", "format": "format", "found_pct": "found %", "nats": "nats of the answer"}
    print_table("needle", columns, [r for r in rows if r["probe"] == "needle"])
    columns = {"format": "format", "never_pct": "never differs %", "median_first": "median first", "mean_same": "mean"}
    title = f"generation, {prompts} prompts, {tokens} tokens"
    print_table(title, columns, [r for r in rows if r["probe"] == "generation"])
