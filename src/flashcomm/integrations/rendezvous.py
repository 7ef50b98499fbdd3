"""The rendezvous of an engine's workers, which finds missing workers before the first collective.

An engine loads plugins in each worker. If one worker lacks the package or the setting, the others would hang in a
collective that it never calls. So each worker first writes its settings into the store that all workers share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import Store

import flashcomm
from flashcomm.errors import FlashcommError, UnavailableError
from flashcomm.settings import Settings


def rendezvous(
    store: Store, group: str, rank: int, ranks: Sequence[int], check: Callable[[], str], advice: str
) -> None:
    """Return once all workers of a group have called this without a problem and with equal settings.

    Args:
        store: The store that all workers share.
        group: The group's name, used only once with this store.
        rank: The global rank of this worker.
        ranks: The global ranks of the group.
        check: Returns text that must be equal on all workers, besides flashcomm's version, such as ", plan 12ab". It
            raises FlashcommError if this worker cannot take part.
        advice: What to do if a worker is missing, for the error message.

    Raises:
        UnavailableError: On every worker that called this. It names the workers that did not within
            FLASHCOMM_TIMEOUT_S, or their problems, or how their settings differ.
    """
    timeout_s, problem, settings = 60.0, "", ""
    try:
        timeout_s = Settings.resolve("cpu", format="none").timeout_s
        settings = f"flashcomm {flashcomm.__version__}{check()}"
    except FlashcommError as why:
        problem = str(why)
    prefix = f"flashcomm/here/{group}/"
    store.set(prefix + str(rank), json.dumps([problem, settings]))
    keys = [prefix + str(r) for r in ranks]
    try:
        store.wait(keys, timedelta(milliseconds=math.ceil(1000 * timeout_s)))
    except DistStoreError as why:
        absent = [str(r) for r, key in zip(ranks, keys, strict=True) if not store.check([key])]
        who = f"rank{'s' if len(absent) > 1 else ''} {', '.join(absent)}" if absent else "a rank"
        raise UnavailableError(
            f"{who} of group {group!r} did not come with flashcomm within {timeout_s:g} s: {advice}"
        ) from why
    problems, all_settings = zip(*(json.loads(store.get(key).decode()) for key in keys), strict=True)
    wrong = "; ".join(f"rank {r}: {text}" for r, text in zip(ranks, problems, strict=True) if text)
    if wrong:
        raise UnavailableError(f"group {group!r} cannot use flashcomm: {wrong}")
    if len(set(all_settings)) > 1:
        by_rank = "; ".join(f"rank {r}: {text}" for r, text in zip(ranks, all_settings, strict=True))
        raise UnavailableError(f"group {group!r} cannot use flashcomm, give all its workers the same: {by_rank}")
