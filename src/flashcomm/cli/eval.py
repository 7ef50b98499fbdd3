"""`flashcomm eval`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flashcomm.accuracy import evaluate as accuracy
from flashcomm.accuracy.experts import ExpertParallel
from flashcomm.accuracy.recommend import implausible, recommendation
from flashcomm.accuracy.sensitivity import layer_rows
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.accuracy.texts import all_windows, bos_of, bytes_in, even_windows, tokens_of
from flashcomm.bench.records import read_csv, write_csv
from flashcomm.cli import options
from flashcomm.cli.console import console, err_console, print_table, progress, run_ranks, write_rows
from flashcomm.cli.models import open_model
from flashcomm.errors import InputError, SettingsError
from flashcomm.plan import Plan
from flashcomm.settings import DEFAULT_FORMAT

FORMATS = f"int8,int8-had,{DEFAULT_FORMAT},int6,int6-had,int5-had,int4,int4-had"
QUICK_FORMATS = f"int8,int8-had,{DEFAULT_FORMAT},int6-had,int5-had,int4-had"
QUICK_S = {"cpu": 600, "cuda": 200}  # measuring may take this long; loading and a slow first window come on top
QUICK_WINDOWS = (8, 64)
NUMBERS = (
    *("world", "bits", "perplexity", "bits_per_byte", "rise_pct", "low_pct", "high_pct", "kl", "kl_low", "kl_high"),
    *("same_top1_pct", "greedy_pct", "tokens"),
)


def evaluate(
    model: options.Model,
    text: options.Text,
    worlds: Annotated[
        str | None, typer.Option(help="Numbers of simulated ranks, e.g. 2,4; by default all from 2 to 8 that can be.")
    ] = None,
    formats: Annotated[
        str | None, typer.Option(help=f"Wire formats and plans (.json), separated by commas; by default {FORMATS}.")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan to evaluate, too; may be repeated.")] = None,
    context: options.Context = 512,
    windows: options.Windows = 16,
    bos: options.Bos = "auto",
    continuation: Annotated[int, typer.Option(min=0, help="Number of greedy tokens to compare; 0: none.")] = 32,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Which format for this model? One number of ranks, a few formats, as many windows as fit time.",
        ),
    ] = False,
    layers: Annotated[
        Path | None, typer.Option(help="Also measure the sensitivity of every layer, into this CSV file.")
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="two_shot, one_shot, hierarchical, or auto: as a Communicator would.")
    ] = "two_shot",
    local_world_size: options.LocalWorld = None,
    experts: Annotated[
        bool,
        typer.Option("--experts", help="Simulate expert parallelism: formats are combine/dispatch, all else is exact."),
    ] = False,
    real: Annotated[bool, typer.Option("--real", help="Start real ranks instead of simulating them.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "fp32",
    csv: options.Csv = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows of --csv from an interrupted run, and measure the others.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Accuracy by format: perplexity, KL divergence, equal tokens. Ranks are simulated in one process."""
    names = options.formats_of(formats or (QUICK_FORMATS if quick else FORMATS), plans=True)
    plans = options.plans_of([*names, *map(str, plan or [])])
    uniform = {name: p.format for name, p in plans.items() if not p.layers}
    if layers and not uniform:
        raise SettingsError(
            "--layers measures single formats: give at least one in --formats that is low-bit and not a plan"
        )
    if experts and (
        real or layers or local_world_size or algorithm != "two_shot" or any(p.layers for p in plans.values())
    ):
        raise SettingsError(
            "--experts simulates exchanges of all layers in one format: give it without --real, --layers, "
            "--local-world, --algorithm and plans by layer"
        )
    if resume and not csv:
        raise SettingsError("--resume continues a file of rows: give it with --csv")
    if quick and (real or resume):
        raise SettingsError("--quick simulates ranks and is short: give it without --real and --resume")
    if quick and not plans:
        raise SettingsError(f"--quick compares formats: give at least one in --formats, such as {DEFAULT_FORMAT}")
    settings: dict[str, Any] = {"algorithm": algorithm}
    asked = options.numbers_of("--worlds", worlds) if worlds else []
    if local_world_size:
        if not asked or any(n % local_world_size or n == local_world_size for n in asked):
            raise SettingsError(
                f"--local-world {local_world_size}: each of --worlds {worlds} must be 2 or more times this number"
            )
        settings["local_world_size"] = local_world_size
    kind: dict[str, Any] = {"real": real, "local_world_size": local_world_size, "experts": experts}
    opened = open_model(model, device, dtype, algorithm, asked, plans, **kind)

    def simulated(n: int) -> TensorParallel | ExpertParallel:
        return ExpertParallel(loaded, n) if experts else TensorParallel(loaded, n, **settings)

    counts = opened.worlds[:1] if quick and not asked else opened.worlds
    tokenizer, where, first = opened.tokenizer, opened.device, bos_of(opened.tokenizer, bos)
    found = tokens_of(text, tokenizer)
    ids = even_windows(found, context, QUICK_WINDOWS[0] if quick else windows, first, str(text))
    loaded = None
    if not real or layers:
        batch = max(accuracy.BATCH_TOKENS[where], context)
        loaded = opened.load(batch, ids.numel() * (8 if quick else 1), backward=layers is not None)
    if quick:
        ids = all_windows(found, context, first)
        ids = ids[: _windows_in_time(simulated(counts[0]), ids.to(where), plans)]
        continuation = 0
    n_bytes, ids = bytes_in(ids, tokenizer), ids.to(where)
    same = {"model": model.name, "text": text.name, "context": context, "bos": "yes" if first is not None else "no"}
    same |= {
        "algorithm": algorithm,
        "dtype": dtype,
        "ranks": "real" if real else "simulated experts" if experts else "simulated",
    }
    same |= {"local_world_size": local_world_size} if local_world_size else {}
    table = _Rows(csv, same, len(ids) * (context - 1), resume)
    for i, n in enumerate(counts):
        left = {name: p for name, p in plans.items() if not table.has(n, name, p)}
        if resume and not left:
            continue
        if real:
            args = (model, opened.dtype, ids.cpu(), n_bytes, left, settings, continuation)
            done = run_ranks(accuracy.on_rank, n, args, quiet=json, device=where, timeout_s=7 * 86400, on_row=table.add)
            if done is None:
                return
            continue
        with progress(json) as report:

            def step(what: str, done: int, total: int, i: int = i) -> None:
                report(what, i * total + done, total * len(counts))

            accuracy.evaluate(simulated(n), ids, n_bytes, left, continuation, step, table.add)
    sensitivity: list[dict[str, Any]] = []
    if layers:
        with progress(json) as report:
            sensitivity = layer_rows(loaded, ids, counts[0], uniform, report)
        write_csv(layers, [same | {"ranks": "simulated", "algorithm": "two_shot"} | row for row in sensitivity])
    advice = recommendation(table.rows, model.name)
    if write_rows(table.rows, csv, json, layers=sensitivity, recommendation=advice):
        return
    rows = [r | {"rise": options.with_interval(r, "rise_pct", "low_pct", "high_pct", "+.2f")} for r in table.rows]
    rows = [r | {"kl_text": options.with_interval(r, "kl", "kl_low", "kl_high", ".4f")} for r in rows]
    columns = {"world": "ranks", "format": "format", "bits": "bits/value", "perplexity": "perplexity"}
    columns |= {"rise": "rise % [95 %]", "kl_text": "KL nats [95 %]", "same_top1_pct": "same top-1 %"}
    columns |= {} if continuation == 0 else {"greedy_pct": "greedy %"}
    begin = "with" if first is not None else "without"
    title = f"{model.name}, {rows[0]['tokens']} tokens of {text.name} at context {context}, {algorithm}, {begin} BOS"
    print_table(title, columns, rows)
    console.print(advice, markup=False, soft_wrap=True)


class _Rows:
    """The rows of a table. With a CSV file, each is written as soon as it is measured.

    Args:
        csv: The file, or None.
        same: The columns that all rows have in common.
        n_tokens: The number of tokens of each row.
        resume: Whether to begin with the rows of the file.

    Raises:
        InputError: The rows of the file are from another measurement.
    """

    def __init__(self, csv: Path | None, same: dict[str, Any], n_tokens: int, resume: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self._csv, self._same = csv, same
        if resume and csv and csv.exists():
            self.rows = [{k: _number(v) if k in NUMBERS else v for k, v in row.items()} for row in read_csv(csv)]
        for row in self.rows:
            wrong = [key for key, value in (same | {"tokens": n_tokens}).items() if str(row.get(key)) != str(value)]
            if wrong:
                raise InputError(
                    f"--resume: {csv} was measured with {wrong[0]}={row.get(wrong[0])}, this run has "
                    f"{(same | {'tokens': n_tokens})[wrong[0]]}: give the same options, or another --csv"
                )

    def has(self, world_size: int, name: str, plan: Plan) -> bool:
        """Return whether a plan's row is there already."""
        return any((r["world"], r["format"], r["plan"]) == (world_size, name, plan.digest) for r in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row. The baseline's shows whether the model knows the text, and whether the file is this model's."""
        baseline = row["low_pct"] is None and row["rise_pct"] == 0
        before = [r for r in self.rows if (r["world"], r["format"]) == (row["world"], row["format"])]
        if baseline and (warning := implausible(row["bits_per_byte"])) and not self.rows:
            err_console.print(warning, style="yellow", markup=False, soft_wrap=True)
        if baseline and before:
            if abs(before[0]["perplexity"] / row["perplexity"] - 1) > 1e-3:
                raise InputError(
                    f"--resume: the uncompressed perplexity in {self._csv} is {before[0]['perplexity']}, now it is "
                    f"{row['perplexity']}: the model or the text has changed; give another --csv"
                )
            return
        self.rows.append(self._same | dict(row))
        if self._csv:
            write_csv(self._csv, self.rows)


def _number(text: str) -> float | None:
    """Return the number in a CSV field, or None if it is empty."""
    return None if text == "" else int(text) if text.isdecimal() else float(text)


def _windows_in_time(ranks: TensorParallel | ExpertParallel, windows: torch.Tensor, plans: dict[str, Plan]) -> int:
    """Return how many windows can be measured in `QUICK_S`, from the time of one batch. Say how long they take."""
    baseline, begin = accuracy.Baseline(ranks, windows), time.perf_counter()
    with ranks, torch.inference_mode():
        baseline.tally(None, 1)
        plain = time.perf_counter() - begin
        baseline.tally(next(reversed(plans.values())), 1)
    each = (plain + len(plans) * (time.perf_counter() - begin - plain)) / min(baseline.size, len(windows))
    n = min(max(int(QUICK_S[windows.device.type] / each), QUICK_WINDOWS[0]), QUICK_WINDOWS[1], len(windows))
    err_console.print(f"{n} windows, about {max(1, round(n * each / 60))} min", style="dim")
    return n
