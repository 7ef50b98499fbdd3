"""The commands that say what a wire format costs a model: eval, tune, probe. Options, progress and tables."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashcomm.cli.options import (
    Csv,
    Device,
    Dtype,
    Json,
    LocalWorld,
    Model,
    World,
    device_for,
    dtype_for,
    formats_of,
    progress_bar,
)
from flashcomm.errors import InputError, SettingsError
from flashcomm.settings import DEFAULT_FORMAT

if TYPE_CHECKING:
    from flashcomm.accuracy.tune import Progress
    from flashcomm.plan import Plan

Text = Annotated[Path, typer.Option(help="UTF-8 text to run through the model.")]
Formats = Annotated[str, typer.Option(help="Wire formats and plans (.json), separated by commas.")]
Context = Annotated[int, typer.Option(min=8, help="Tokens of a window.")]
Windows = Annotated[int, typer.Option(min=1, help="How many windows, spread evenly over the text.")]
Simulated = Annotated[str, typer.Option(help="auto (as a Communicator would), one_shot, two_shot or hierarchical.")]
FORMATS = f"int8,int8-had,{DEFAULT_FORMAT},int6,int6-had,int5-had,int4,int4-had"


def evaluate(
    model: Model,
    text: Text,
    worlds: Annotated[str, typer.Option(help="Numbers of simulated ranks, separated by commas.")] = "2,4,8",
    formats: Formats = FORMATS,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan to evaluate too; may be given again.")] = None,
    context: Context = 512,
    windows: Windows = 16,
    continuation: Annotated[int, typer.Option(min=0, help="Greedy tokens compared; 0: none.")] = 32,
    layers: Annotated[Path | None, typer.Option(help="Also price every layer by itself, into this CSV.")] = None,
    algorithm: Simulated = "auto",
    local_world_size: LocalWorld = None,
    real: Annotated[bool, typer.Option("--real", help="Start real ranks instead of simulating them.")] = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    csv: Csv = None,
    json: Json = False,
) -> None:
    """What each format costs the model: perplexity, divergence, agreement. Ranks are simulated in one process."""
    from flashcomm.accuracy import evaluate as command
    from flashcomm.accuracy.models import check_model
    from flashcomm.accuracy.simulate import TensorParallel
    from flashcomm.accuracy.texts import bytes_in, read_windows
    from flashcomm.cli import report
    from flashcomm.ranks import launch

    counts = _numbers("--worlds", worlds)
    plans = _plans([*formats_of(formats, plans=True), *map(str, plan or [])])
    if layers and all(p.layers or p.format.uncompressed for p in plans.values()):
        raise SettingsError(
            "--layers prices formats, one at a time: give one in --formats that is neither a plan nor bf16"
        )
    settings: dict[str, Any] = {"algorithm": algorithm} | (
        {"local_world_size": local_world_size} if local_world_size else {}
    )
    if local_world_size and any(
        world_size % local_world_size or world_size == local_world_size for world_size in counts
    ):
        raise SettingsError(
            f"--local-world {local_world_size}: not all of --worlds {worlds} are several nodes of that many"
        )
    loaded, tokenizer, where = _load(model, device, dtype, algorithm, max(counts) if real else 1, local_world_size)
    ids = read_windows(text, tokenizer, context, windows)
    n_bytes, ids = bytes_in(ids, tokenizer), ids.to(where)
    _check(loaded, plans, counts)
    if real:
        for world_size in counts:
            check_model(model, world_size)
    rows: list[dict[str, Any]] = []
    priced: list[dict[str, Any]] = []
    with _progress(json) as on:
        for world_size in counts:
            if real:
                args = (model, dtype_for(dtype), ids.cpu(), n_bytes, plans, settings, continuation)
                told: Any = launch.run(
                    command.on_rank, world_size, args, device=where, on_event=lambda e: on(*_three(e)), timeout_s=7200
                )
                if told is None:  # under torchrun, not rank 0
                    return
                rows += told
            else:
                ranks = TensorParallel(loaded, world_size, **settings)
                rows += command.evaluate(ranks, ids, n_bytes, plans, continuation, on)
        if layers:
            priced = _layers(loaded, ids, counts[0], plans, on)
    same = {"model": model.name, "text": text.name, "context": context, "algorithm": algorithm, "dtype": dtype}
    same |= {"local_world_size": local_world_size} if local_world_size else {}
    same["ranks"] = "real" if real else "simulated"
    rows = [same | row for row in rows]
    if csv:
        report.write_csv(csv, rows)
    if layers:
        report.write_csv(layers, [same | {"algorithm": "two_shot", "ranks": "simulated"} | row for row in priced])
    if json:
        report.print_json({"rows": rows, "layers": priced, **report.environment()})
        return
    shown = [r | {"rise": f"{r['rise_pct']:+.2f} [{r['low_pct']:+.2f}, {r['high_pct']:+.2f}]"} for r in rows]
    columns = {"world": "ranks", "format": "format", "bits": "bits/value", "perplexity": "perplexity"}
    columns |= {"rise": "rise % [95 %]", "kl": "KL nats", "same_top1_pct": "same top-1 %", "greedy_pct": "greedy %"}
    report.print_table(f"{model.name}, {rows[0]['tokens']} tokens of {text.name} at context {context}", columns, shown)


def tune(
    model: Model,
    text: Text,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan (.json).")],
    world_size: World = 2,
    budget: Annotated[str | None, typer.Option(help="Rise in perplexity allowed, e.g. 1%.")] = None,
    bits: Annotated[str | None, typer.Option(help="Or bits per value allowed, e.g. 4.6.")] = None,
    decode: Annotated[str | None, typer.Option(help="Format of messages of one token a sequence.")] = None,
    check: Annotated[Path | None, typer.Option(help="Another text, to measure the plan on when it is made.")] = None,
    condition: Annotated[bool, typer.Option(help="Scale and shift channels before coding.")] = True,
    context: Context = 512,
    windows: Windows = 16,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    json: Json = False,
) -> None:
    """Find the formats, layer by layer, that meet a budget at the fewest bits on the wire.

    Several budgets, separated by commas, are priced once; then {} in --output stands for the budget.
    """
    from flashcomm.accuracy import tune as command
    from flashcomm.accuracy.evaluate import evaluate as run
    from flashcomm.accuracy.simulate import TensorParallel
    from flashcomm.accuracy.texts import read_windows
    from flashcomm.cli import report
    from flashcomm.wire.format import WireFormat

    budgets = _budgets(budget, bits)
    if world_size < 2:
        raise SettingsError("--world 1: one rank sends nothing; give the number of ranks the plan is for")
    if output.suffix != ".json" or (len(budgets) > 1 and "{}" not in output.name):
        raise SettingsError(
            f"--output {output}: a plan's name ends in .json and, for several budgets, has a {{}} in it"
        )
    for_decode = WireFormat.parse(decode) if decode else None
    loaded, tokenizer, where = _load(model, device, dtype, "two_shot")
    ids = read_windows(text, tokenizer, context, windows).to(where)
    held_out = read_windows(check, tokenizer, context, windows).to(where) if check else None
    made = {"text": text.name, "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(), "world": world_size}
    fits = {key: getattr(loaded.config, key) for key in ("model_type", "hidden_size", "num_hidden_layers")}
    results = []
    with _progress(json) as on:

        def measured(plan: Plan, tokens: Any = ids) -> dict[str, Any]:
            ranks = TensorParallel(loaded, world_size, algorithm="two_shot")
            return run(ranks, tokens, 1, {"plan": plan}, progress=on)[1]

        prices = command.price(loaded, ids, world_size, conditioned=condition, progress=on)
        for name, limits in budgets.items():
            found = command.tune(prices, lambda plan: measured(plan)["rise_pct"] / 100, **limits)
            told = made | {
                "budget": name,
                "met": found.measured_rise <= limits.get("rise", math.inf)
                and found.bits <= limits.get("bits", math.inf),
                "bits": round(found.bits, 3),
                "predicted_kl": round(found.predicted_kl, 6),
                "rise_pct": round(100 * found.measured_rise, 4),
                "tries": found.tries,
            }
            if held_out is not None and check is not None:
                checked = measured(found.plan, held_out)
                told |= {"check_text": check.name, "check_rise_pct": checked["rise_pct"], "check_kl": checked["kl"]}
            found.plan.decode, found.plan.model, found.plan.made = for_decode, fits, told | report.environment()
            path = Path(str(output).replace("{}", name.removesuffix("%")))
            found.plan.save(path)
            results.append({"plan": str(path), **told})
    if json:
        report.print_json({"plans": results})
    else:
        columns = {"plan": "plan", "bits": "bits/value", "predicted_kl": "KL predicted", "rise_pct": "rise %"}
        columns |= {"check_rise_pct": f"rise % on {check.name}"} if check else {}
        report.print_table(f"{model.name}, {world_size} ranks, {text.name}", columns, results)
    missed = [r for r in results if not r["met"]]
    if missed:
        best = ", ".join(f"{r['budget']} ({r['plan']}: {r['bits']} bits, {r['rise_pct']} %)" for r in missed)
        raise InputError(f"no plan meets the budget; written is the best found for {best}")


def probe(
    model: Model,
    text: Text,
    world_size: World = 2,
    formats: Formats = "int8,int6-had,int4-had,int4",
    contexts: Annotated[str, typer.Option(help="Context lengths of the needle probe; empty: leave it out.")] = "1024",
    prompts: Annotated[int, typer.Option(min=0, help="Prompts of the generation probe; 0: leave it out.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens from each prompt.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 50,
    algorithm: Annotated[str, typer.Option(help="auto (as a Communicator would), one_shot or two_shot.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "fp32",
    csv: Csv = None,
    json: Json = False,
) -> None:
    """Look for failures that perplexity hides: a needle in a long context, and greedy text from many prompts."""
    from flashcomm.accuracy import probe as command
    from flashcomm.accuracy.texts import read_windows
    from flashcomm.cli import report

    plans = _plans(formats_of(formats, plans=True))
    lengths = _numbers("--contexts", contexts) if contexts else []
    loaded, tokenizer, where = _load(model, device, dtype, algorithm)
    most = getattr(loaded.config, "max_position_embeddings", None)
    if lengths and most and max(lengths) > most:
        raise InputError(f"--contexts {max(lengths)}: {model.name} takes at most {most} tokens")
    if lengths and min(lengths) < 64:
        raise InputError(f"--contexts {min(lengths)}: a needle and its question need 64 tokens")
    _check(loaded, plans, [world_size])
    rows: list[dict[str, Any]] = []
    with _progress(json) as on:
        if lengths:
            hay = read_windows(text, tokenizer, max(lengths), 1)[0]
            rows += command.needle(loaded, tokenizer, hay, lengths, plans, world_size, algorithm, on)
        if prompts:
            ids = read_windows(text, tokenizer, 48, prompts).to(where)
            rows += command.generation(loaded, ids, tokens, plans, world_size, algorithm, batch, on)
    if csv:
        keys = {key: None for row in rows for key in row}
        report.write_csv(csv, [{"model": model.name, "dtype": dtype} | keys | row for row in rows])
    if json:
        report.print_json({"rows": rows, **report.environment()})
        return
    columns = {"context": "context", "format": "format", "found_pct": "found %", "nats": "nats of the answer"}
    report.print_table("needle", columns, [r for r in rows if r["probe"] == "needle"])
    columns = {"format": "format", "never_pct": "never differs %", "median_first": "median first", "mean_same": "mean"}
    report.print_table(
        f"generation, {prompts} prompts, {tokens} tokens", columns, [r for r in rows if r["probe"] == "generation"]
    )


def _load(
    path: Path, device: str, dtype: str, algorithm: str, ranks: int = 1, local_world_size: int | None = None
) -> tuple[Any, Any, str]:
    from flashcomm.accuracy.models import check_model, load_model
    from flashcomm.settings import ALGORITHMS

    if algorithm not in ALGORITHMS:
        raise SettingsError(f"--algorithm {algorithm}: allowed are {', '.join(ALGORITHMS)}")
    if (algorithm == "hierarchical") != bool(local_world_size):
        raise SettingsError("--algorithm hierarchical and --local-world, of eval, go together: give both or neither")
    import torch

    where = device_for(device, ranks)
    check_model(path, 1)
    model, tokenizer = load_model(path, 1, torch.device(where), dtype_for(dtype))
    return model, tokenizer, where


def _plans(names: Sequence[str]) -> dict[str, Plan]:
    from flashcomm.plan import Plan

    short = [Path(name).name for name in names]
    return {
        Path(name).name if name.endswith(".json") and short.count(Path(name).name) == 1 else name: Plan.of(name)
        for name in names
        if name != "bf16"
    }


def _check(model: Any, plans: dict[str, Plan], worlds: Sequence[int]) -> None:
    """Refuse a plan for another model, or a number of ranks that cannot share it, before the long work."""
    from flashcomm.accuracy.simulate import TensorParallel

    for world_size in worlds:
        for plan in plans.values():
            TensorParallel(model, world_size, plan)


def _layers(model: Any, ids: Any, world_size: int, plans: dict[str, Plan], on: Progress) -> list[dict[str, Any]]:
    """Rows by layer and uniform format: KL divergence and signal-to-noise of the reduce and the gather step."""
    from flashcomm.accuracy import sensitivity
    from flashcomm.accuracy.simulate import row_parallel_layers

    formats = {name: plan.format for name, plan in plans.items() if not plan.layers and not plan.format.uncompressed}
    steps = list(dict.fromkeys(step for fmt in formats.values() for step in (fmt.reduce, fmt.gather)))
    costs = sensitivity.measure(model, ids, world_size, [s for s in steps if not s.uncompressed], progress=on)
    return [
        {
            "world": world_size,
            "layer": layer,
            "format": name,
            "kl": f"{costs.of(layer, fmt):.3e}",
            "reduce_snr_db": _rounded(costs.snr_db.get((layer, "reduce", fmt.reduce))),
            "gather_snr_db": _rounded(costs.snr_db.get((layer, "gather", fmt.gather))),
        }
        for name, fmt in formats.items()
        for layer in row_parallel_layers(model)
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    with progress_bar(quiet) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _three(event: Any) -> tuple[str, int, int]:
    what, done, total = event
    return what, done, total


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise SettingsError(f"{option} {text}: give numbers of at least 1, separated by commas")
    return numbers


def _budgets(budget: str | None, bits: str | None) -> dict[str, dict[str, float]]:
    """Of "--budget 1%,2%" or "--bits 4.6": by name what `tune` takes, a rise as a part of 1, or bits."""
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
