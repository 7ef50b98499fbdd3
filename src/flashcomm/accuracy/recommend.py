"""Which format to take: from what `eval` measured on a model, or from what was measured on all models so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flashcomm.wire.format import WireFormat

BUDGET = 0.01  # the rise in perplexity that the default format is meant to keep
IMPLAUSIBLE_BITS_PER_BYTE = 2.2  # above it a model predicts a text worse than gzip does


def within(row: Mapping[str, Any], rise: float = BUDGET) -> bool:
    """Return whether a row of `eval` shows that a format keeps a rise in perplexity.

    It does if the upper end of its KL divergence does, and the lower end of its measured rise. See `tune.Measured`.
    """
    high, low = row["kl_high"], row["low_pct"]
    return high is not None and float(high) <= math.log1p(rise) and float(low) <= 100 * rise


def recommendation(rows: Sequence[Mapping[str, Any]], model: str) -> str:
    """Return one sentence: the format with the fewest bits that is `within` the budget at all numbers of ranks."""
    by_format: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["rise_pct"] is not None and row["kl_high"] not in (None, ""):
            by_format.setdefault(row["format"], []).append(row)
    kept = {name: many for name, many in by_format.items() if all(within(row) for row in many)}
    limit = f"{100 * BUDGET:g} %"
    if not by_format:
        return f"No recommendation for {model}: intervals need two windows or more."
    if not kept:
        return (
            f"Recommendation for {model}: none of these formats is shown to keep {limit}. "
            "Measure more --windows, or look for a plan with flashcomm tune --budget."
        )
    best = min(kept, key=lambda name: max(float(row["bits"]) for row in kept[name]))
    bits = max(float(row["bits"]) for row in kept[best])
    most = max(100 * math.expm1(float(row["kl_high"])) for row in kept[best])
    return (
        f"Recommendation for {model}: {best}, {bits:.2f} bits a value, with a loss of at most {most:.2g} %. "
        f"flashcomm tune --budget 1% looks for a plan with fewer bits."
    )


def implausible(bits_per_byte: float) -> str:
    """Return a warning if a model predicts a text worse than a general-purpose compressor would, else ""."""
    if bits_per_byte <= IMPLAUSIBLE_BITS_PER_BYTE:
        return ""
    return (
        f"warning: the uncompressed model needs {bits_per_byte:.1f} bits per byte of this text, where language models "
        "need 0.5 to 1.5. The tokenizer may be broken, --bos wrong, or the text in a language that the model does not "
        "know. The figures of formats mean little then."
    )


def is_safe(fmt: WireFormat) -> bool:
    """Return whether a format is one that kept `BUDGET` on every model measured; docs/accuracy.md has the figures."""
    steps = [step for step in (fmt.reduce, fmt.gather) if not step.uncompressed]
    transformed = all(step.hadamard for step in steps) and fmt.reduce.bits >= 6 and fmt.gather.bits >= 7
    return all(step.group <= 64 for step in steps) and (transformed or all(step.bits == 8 for step in steps))


def evidence(fmt: WireFormat) -> str:
    """Return what the models measured so far say about a format, in one sentence."""
    if fmt.uncompressed:
        return "no loss"
    if is_safe(fmt):
        return "raised perplexity by less than 1 % on every model measured"
    measure = "measure it on your model with flashcomm eval --quick"
    if all(step.uncompressed or step.hadamard for step in (fmt.reduce, fmt.gather)):
        return f"raised perplexity by more than 1 % on some models: {measure}"
    return (
        f"a plain format, as in the paper: loses 1.5 to 4 times as much as the -had format of as many bits; {measure}"
    )
