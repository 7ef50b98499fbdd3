"""`flashcomm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashcomm.accuracy import evaluate as accuracy
from flashcomm.accuracy.models import check_model
from flashcomm.accuracy.sensitivity import layer_rows
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.accuracy.texts import bytes_in, read_windows
from flashcomm.bench.records import write_csv
from flashcomm.cli import options
from flashcomm.cli.console import print_table, progress, run_ranks, write_rows
from flashcomm.cli.models import check_plans, load
from flashcomm.errors import SettingsError
from flashcomm.settings import DEFAULT_FORMAT


def evaluate(
    model: options.Model,
    text: options.Text,
    worlds: Annotated[str, typer.Option(help="Numbers of simulated ranks, separated by commas.")] = "2,4,8",
    formats: options.FormatsAndPlans = f"int8,int8-had,{DEFAULT_FORMAT},int6,int6-had,int5-had,int4,int4-had",
    plan: Annotated[list[Path] | None, typer.Option(help="A plan to evaluate, too; may be repeated.")] = None,
    context: options.Context = 512,
    windows: options.Windows = 16,
    continuation: Annotated[int, typer.Option(min=0, help="Number of greedy tokens to compare; 0: none.")] = 32,
    layers: Annotated[
        Path | None, typer.Option(help="Also measure the sensitivity of every layer, into this CSV file.")
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="auto (as a Communicator would), one_shot, two_shot or hierarchical.")
    ] = "auto",
    local_world_size: options.LocalWorld = None,
    real: Annotated[bool, typer.Option("--real", help="Start real ranks instead of simulating them.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "fp32",
    csv: options.Csv = None,
    json: options.Json = False,
) -> None:
    """Accuracy by format: perplexity, KL divergence, equal tokens. Ranks are simulated in one process."""
    counts = options.numbers_of("--worlds", worlds)
    plans = options.plans_of([*options.formats_of(formats, plans=True), *map(str, plan or [])])
    uniform = {name: p.format for name, p in plans.items() if not p.layers}
    if layers and not uniform:
        raise SettingsError(
            "--layers measures single formats: give at least one in --formats that is low-bit and not a plan"
        )
    settings: dict[str, Any] = {"algorithm": algorithm}
    if local_world_size:
        if any(n % local_world_size or n == local_world_size for n in counts):
            raise SettingsError(
                f"--local-world {local_world_size}: each of --worlds {worlds} must be 2 or more times this number"
            )
        settings["local_world_size"] = local_world_size
    loaded, tokenizer, where = load(model, device, dtype, algorithm, max(counts) if real else 1, local_world_size)
    ids = read_windows(text, tokenizer, context, windows)
    n_bytes, ids = bytes_in(ids, tokenizer), ids.to(where)
    for n in counts:
        check_plans(loaded, plans, n)
        if real:
            check_model(model, n)
    rows: list[dict[str, Any]] = []
    sensitivity: list[dict[str, Any]] = []
    for n in counts if real else ():
        args = (model, options.dtype_of(dtype), ids.cpu(), n_bytes, plans, settings, continuation)
        found = run_ranks(accuracy.on_rank, n, args, quiet=json, device=where, timeout_s=7200)
        if found is None:
            return
        rows += found
    with progress(json) as report:
        for n in () if real else counts:
            ranks = TensorParallel(loaded, n, **settings)
            rows += accuracy.evaluate(ranks, ids, n_bytes, plans, continuation, report)
        if layers:
            sensitivity = layer_rows(loaded, ids, counts[0], uniform, report)
    same = {"model": model.name, "text": text.name, "context": context, "algorithm": algorithm, "dtype": dtype}
    same |= {"local_world_size": local_world_size} if local_world_size else {}
    rows = [same | {"ranks": "real" if real else "simulated"} | row for row in rows]
    if layers:
        write_csv(layers, [same | {"ranks": "simulated", "algorithm": "two_shot"} | row for row in sensitivity])
    if write_rows(rows, csv, json, layers=sensitivity):
        return
    shown = [r | {"rise": f"{r['rise_pct']:+.2f} [{r['low_pct']:+.2f}, {r['high_pct']:+.2f}]"} for r in rows]
    columns = {"world": "ranks", "format": "format", "bits": "bits/value", "perplexity": "perplexity"}
    columns |= {"rise": "rise % [95 %]", "kl": "KL nats", "same_top1_pct": "same top-1 %", "greedy_pct": "greedy %"}
    print_table(f"{model.name}, {rows[0]['tokens']} tokens of {text.name} at context {context}", columns, shown)
