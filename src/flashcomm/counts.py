"""Counts of calls and bytes by route, and their log with debug="info"."""

from __future__ import annotations

import logging
from collections import Counter

from torch import Tensor

log = logging.getLogger("flashcomm")


class Counts:
    """The numbers of calls and bytes of a Communicator, and their log.

    Attributes:
        calls: Number of calls by op and route, such as "all_reduce/two_shot". Replays of CUDA graphs are not counted.
        sent: Payload bytes sent to other ranks, by the same keys.
    """

    def __init__(self, who: str, verbose: bool) -> None:
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._who, self._verbose = who, verbose
        if verbose:  # visible even if the program has not configured logging
            log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
            if not log.hasHandlers():
                log.addHandler(logging.StreamHandler())

    def add(self, name: str, n_bytes: int, x: Tensor) -> None:
        """Count a call. If verbose, log the first call of a name, and the totals at the 10th, the 100th, ...

        Args:
            name: Op and route, such as "all_reduce/two_shot".
            n_bytes: Payload bytes that this rank sent.
            x: This rank's input.
        """
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
