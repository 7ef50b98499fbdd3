"""A roll call at start-up: does every worker of a group take part, before the first of them waits for the others?

Engines load plugins worker by worker. Where one lacks the package or the variable that asks for it, the others would
stand in a collective that it never makes. Here each puts its name into the store that all of them share already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import Store

from flashcomm.errors import UnavailableError


def roll_call(
    store: Store,
    group: str,
    rank: int,
    ranks: Sequence[int],
    timeout_s: float,
    advice: str,
    problem: str = "",
    settings: str = "",
) -> None:
    """Return once all `ranks` of `group` (global ranks, as `rank`) have called this, each without a problem and with
    the same settings.

    group: a name that was not called before on this store. Raises UnavailableError on every rank that came: it names
    those that did not within the time-out, with the advice, or tells the problems that ranks had, or how they differ.
    """
    name = f"flashcomm/here/{group}/"
    store.set(name + str(rank), json.dumps([problem, settings]))
    keys = [name + str(r) for r in ranks]
    try:
        store.wait(keys, timedelta(milliseconds=math.ceil(1000 * timeout_s)))
    except DistStoreError as why:
        absent = [str(r) for r, key in zip(ranks, keys, strict=True) if not store.check([key])]
        who = f"rank{'s' if len(absent) > 1 else ''} {', '.join(absent)}" if absent else "a rank"
        raise UnavailableError(
            f"{who} of group {group!r} did not come with flashcomm within {timeout_s:g} s: {advice}"
        ) from why
    problems, have = zip(*(json.loads(store.get(key).decode()) for key in keys), strict=True)
    wrong = "; ".join(f"rank {r}: {text}" for r, text in zip(ranks, problems, strict=True) if text)
    if wrong:
        raise UnavailableError(f"group {group!r} cannot use flashcomm: {wrong}")
    if len(set(have)) > 1:
        unlike = "; ".join(f"rank {r}: {text}" for r, text in zip(ranks, have, strict=True))
        raise UnavailableError(f"group {group!r} cannot use flashcomm, give all its workers the same: {unlike}")
