"""Counts of calls and bytes by route, and their log with debug="info"."""

from __future__ import annotations

import logging
from collections import Counter

from torch import Tensor

log = logging.getLogger("flashcomm")


class Counts:
    """What a Communicator did.

    Attributes:
        calls: Calls by op and route, such as "all_reduce/two_shot"; replays of CUDA graphs are not seen.
        sent: Payload bytes to other ranks, by the same names.
    """

    def __init__(self, who: str, verbose: bool) -> None:
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._who, self._verbose = who, verbose
        if verbose:  # to be seen also where the program has not set up logging
            log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
            if not log.hasHandlers():
                log.addHandler(logging.StreamHandler())

    def add(self, name: str, n_bytes: int, x: Tensor) -> None:
        """Count a call of that name for x. The first is logged, and the sums at the 10th, the 100th, ..."""
        self.calls[name] += 1
        self.sent[name] += n_bytes
        if not self._verbose:
            return
        n = self.calls[name]
        if n == 1:
            what = f"shape {tuple(x.shape)} {x.dtype}, {n_bytes} bytes sent"
            log.info("%s: first %s goes %s, %s", self._who, *name.split("/"), what)
        elif str(n).strip("0") == "1":
            log.info("%s: %d calls of %s, %d bytes sent", self._who, n, name, self.sent[name])
