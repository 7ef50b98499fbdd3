"""`flashcomm tune`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from flashcomm.accuracy import tune as accuracy
from flashcomm.accuracy.texts import read_windows
from flashcomm.bench.records import environment
from flashcomm.cli import options
from flashcomm.cli.console import print_json, print_table, progress
from flashcomm.cli.models import load
from flashcomm.errors import InputError, SettingsError
from flashcomm.plan import Plan
from flashcomm.wire.format import WireFormat


def tune(
    model: options.Model,
    text: options.Text,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan (.json).")],
    world_size: options.World = 2,
    budget: Annotated[str | None, typer.Option(help="The most rise in perplexity, e.g. 1%.")] = None,
    bits: Annotated[str | None, typer.Option(help="Or the most bits per value, e.g. 4.6.")] = None,
    decode: Annotated[str | None, typer.Option(help="Format of messages with one token per sequence.")] = None,
    check: Annotated[Path | None, typer.Option(help="Another text, to measure the plan on.")] = None,
    condition: Annotated[bool, typer.Option(help="Scale channels and remove their means before quantizing.")] = True,
    context: options.Context = 512,
    windows: options.Windows = 16,
    device: options.Device = "auto",
    dtype: options.Dtype = "fp32",
    json: options.Json = False,
) -> None:
    """Find the plan, with a format for each layer, that meets a budget with the fewest bits on the wire.

    Several budgets, separated by commas, share one measurement; {} in --output is replaced by the budget.
    """
    budgets = _budgets(budget, bits)
    if world_size < 2:
        raise SettingsError("--world 1: one rank sends nothing; give the number of ranks that will use the plan")
    if output.suffix != ".json" or (len(budgets) > 1 and "{}" not in output.name):
        raise SettingsError(f"--output {output}: give a name that ends in .json and, for several budgets, has a {{}}")
    for_decode = WireFormat.parse(decode) if decode else None
    loaded, tokenizer, where = load(model, device, dtype, "two_shot")
    ids = read_windows(text, tokenizer, context, windows).to(where)
    held_out = read_windows(check, tokenizer, context, windows).to(where) if check else None
    made = {"text": text.name, "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(), "world": world_size}
    fits = {key: getattr(loaded.config, key) for key in ("model_type", "hidden_size", "num_hidden_layers")}
    results: list[dict[str, Any]] = []
    with progress(json) as report:

        def measured(plan: Plan, tokens: Any = ids) -> dict[str, Any]:
            return accuracy.measure_plan(loaded, tokens, world_size, plan, report)

        candidates = accuracy.find_candidates(loaded, ids, world_size, conditioned=condition, progress=report)
        for name, limits in budgets.items():
            found = accuracy.tune(candidates, lambda plan: measured(plan)["rise_pct"] / 100, **limits)
            row = {"budget": name, "met": found.meets(**limits)} | found.row()
            if check:
                checked = measured(found.plan, held_out)
                row |= {"check_text": check.name, "check_rise_pct": checked["rise_pct"], "check_kl": checked["kl"]}
            path = Path(str(output).replace("{}", name.removesuffix("%")))
            found.plan.decode, found.plan.model, found.plan.made = for_decode, fits, made | row | environment()
            found.plan.save(path)
            results.append({"plan": str(path), **made, **row})
    if json:
        print_json({"plans": results})
    else:
        columns = {"plan": "plan", "bits": "bits/value", "predicted_kl": "KL predicted", "rise_pct": "rise %"}
        columns |= {"check_rise_pct": f"rise % on {check.name}"} if check else {}
        print_table(f"{model.name}, {world_size} ranks, {text.name}", columns, results)
    missed = [r for r in results if not r["met"]]
    if missed:
        best = ", ".join(f"{r['budget']} ({r['plan']}: {r['bits']} bits, {r['rise_pct']} %)" for r in missed)
        raise InputError(f"no plan meets the budget; the best plans found were written: {best}")


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
