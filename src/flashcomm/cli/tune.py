"""`flashcomm tune`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from flashcomm.accuracy import tune as accuracy
from flashcomm.accuracy.sensitivity import BATCH_TOKENS
from flashcomm.accuracy.texts import all_windows, bos_of, even_windows, tokens_of
from flashcomm.bench.records import environment, write_csv
from flashcomm.cli import options
from flashcomm.cli.console import print_json, print_table, progress
from flashcomm.cli.models import open_model
from flashcomm.errors import InputError, SettingsError
from flashcomm.wire.format import WireFormat


def tune(
    model: options.Model,
    text: options.Text,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan (.json).")],
    world_size: options.SimulatedWorld = None,
    budget: Annotated[str | None, typer.Option(help="The most rise in perplexity, e.g. 1%.")] = None,
    bits: Annotated[str | None, typer.Option(help="Or the most bits per value, e.g. 4.6.")] = None,
    decode: Annotated[str | None, typer.Option(help="Format of messages with one token per sequence.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Another text, to measure plans on; without it the second half of --text.")
    ] = None,
    check_windows: Annotated[
        int, typer.Option(min=accuracy.LEAST_WINDOWS, help="The most windows to measure plans on.")
    ] = 64,
    condition: Annotated[bool, typer.Option(help="Scale channels and remove their means before quantizing.")] = True,
    context: options.Context = 512,
    windows: options.Windows = 16,
    bos: options.Bos = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "fp32",
    csv: options.Csv = None,
    json: options.Json = False,
) -> None:
    """Find the plan, with a format for each layer, that meets a budget with the fewest bits on the wire.

    A plan meets a budget if the upper end of its loss's 95 % interval does, on text that it was not tuned on.
    Several budgets, separated by commas, share one measurement; {} in --output is replaced by the budget.
    """
    budgets = _budgets(budget, bits)
    if world_size == 1:
        raise SettingsError("--world 1: one rank sends nothing; give the number of ranks that will use the plan")
    if output.suffix != ".json" or (len(budgets) > 1 and "{}" not in output.name):
        raise SettingsError(f"--output {output}: give a name that ends in .json and, for several budgets, has a {{}}")
    for_decode = WireFormat.parse(decode) if decode else None
    opened = open_model(model, device, dtype, "two_shot", [world_size] if world_size else [])
    n_ranks, where, first = opened.worlds[0], opened.device, bos_of(opened.tokenizer, bos)
    ids = tokens_of(text, opened.tokenizer)
    half, name = (len(ids), str(text)) if check else (len(ids) // 2, f"the first half of {text}")
    other = tokens_of(check, opened.tokenizer) if check else ids[half:]
    tuned_on = even_windows(ids[:half], context, windows, first, name).to(where)
    held_out = all_windows(other, context, first)[:check_windows].to(where)
    if len(held_out) < accuracy.LEAST_WINDOWS:
        raise InputError(
            f"{check or f'the second half of {text}'} has {len(other)} tokens, and measuring a plan needs "
            f"{accuracy.LEAST_WINDOWS} windows of {context}: give a longer text or a shorter --context"
        )
    loaded = opened.load(max(BATCH_TOKENS[where], context), held_out.numel(), backward=True)
    made = {"text": text.name, "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(), "world": n_ranks}
    made |= {"check_text": check.name if check else f"second half of {text.name}", "context": context}
    fits = {key: getattr(loaded.config, key) for key in ("model_type", "hidden_size", "num_hidden_layers")}
    results: list[dict[str, Any]] = []
    with progress(json) as report:
        sample = accuracy.Sample(loaded, held_out, n_ranks, report)
        if budget:
            accuracy.check_budget(sample.once, min(limits["rise"] for limits in budgets.values()))
        candidates = accuracy.find_candidates(loaded, tuned_on, n_ranks, conditioned=condition, progress=report)
        for asked, limits in budgets.items():
            found = accuracy.tune(candidates, sample.measure, **limits)
            row = {"budget": asked} | found.row()
            path = Path(str(output).replace("{}", asked.removesuffix("%")))
            found.plan.decode, found.plan.model, found.plan.made = for_decode, fits, made | row | environment()
            found.plan.save(path)
            results.append({"model": model.name, "plan": str(path), "why_not": found.why_not, **made, **row})
    if csv:
        write_csv(csv, results)
    if json:
        print_json({"plans": results})
    else:
        columns = {
            "plan": "plan",
            "bits": "bits/value",
            "predicted_kl": "KL predicted",
            "kl_text": "KL measured [95 %]",
        }
        columns |= {"rise": "rise % [95 %]", "check_windows": "windows", "met": "met"}
        shown = [r | {"rise": options.with_interval(r, "rise_pct", "low_pct", "high_pct", "+.2f")} for r in results]
        shown = [r | {"kl_text": options.with_interval(r, "kl", "kl_low", "kl_high", ".4f")} for r in shown]
        print_table(f"{model.name}, {n_ranks} ranks, measured on {made['check_text']}", columns, shown)
    missed = [r for r in results if r["why_not"]]
    if missed:
        best = "; ".join(f"{r['budget']} ({r['plan']}, {r['bits']} bits): {r['why_not']}" for r in missed)
        raise InputError(f"no plan meets the budget; the best plan found was written: {best}")


def _budgets(budget: str | None, bits: str | None) -> dict[str, dict[str, float]]:
    """Parse --budget "1%,2%" or --bits "4.6" into arguments of `accuracy.tune`, by name."""
    given = budget if budget is not None else bits
    if given is None or (budget is not None and bits is not None):
        raise SettingsError("give one of --budget (a rise in perplexity, such as 1%) and --bits (per value)")
    out = {}
    for name in (part.strip() for part in given.split(",")):
        try:
            value = float(name.removesuffix("%")) / (100 if name.endswith("%") else 1)
        except ValueError:
            value = 0.0
        if budget is not None and not 0 < value < 10:
            raise SettingsError(f"--budget {name}: give a rise in perplexity above 0, such as 1% or 0.01")
        if bits is not None and not 2 < value <= 16:
            raise SettingsError(f"--bits {name}: give bits per value, above 2 and up to 16")
        out[name] = {"rise" if budget is not None else "bits": value}
    return out
