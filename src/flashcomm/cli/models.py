"""Models of the commands that simulate ranks (eval, tune, probe): all is checked before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashcomm.accuracy import models
from flashcomm.accuracy.experts import ExpertParallel, expert_layers
from flashcomm.accuracy.memory import check_memory, needed_bytes
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.cli import options
from flashcomm.cli.console import err_console
from flashcomm.errors import InputError, SettingsError
from flashcomm.plan import Plan
from flashcomm.settings import ALGORITHMS

MOST_RANKS = 8  # by default


@dataclass
class Opened:
    """A model whose weights are not loaded yet.

    Attributes:
        path: The model's directory.
        config: Its config.
        tokenizer: Its tokenizer.
        worlds: The numbers of ranks to simulate.
        device: "cpu" or "cuda".
        dtype: The dtype of its weights.
    """

    path: Path
    config: Any
    tokenizer: Any
    worlds: list[int]
    device: str
    dtype: torch.dtype

    def load(self, batch_tokens: int, kept_tokens: int, *, backward: bool = False) -> Any:
        """Say how much memory the measurement takes and load the model. See `memory.needed_bytes` for the arguments.

        Raises:
            InputError: There is not enough memory, or the model cannot be loaded.
        """
        empty, itemsize = models.skeleton(self.config), self.dtype.itemsize
        needed = needed_bytes(empty, itemsize, max(self.worlds), batch_tokens, kept_tokens, backward=backward)
        err_console.print(f"{self.path.name} {check_memory(self.path.name, needed, self.device)}", style="dim")
        return models.load_model(self.path, 1, torch.device(self.device), self.dtype)[0]


def open_model(
    path: Path,
    device: str,
    dtype: str,
    algorithm: str,
    worlds: Sequence[int] = (),
    plans: dict[str, Plan] | None = None,
    *,
    real: bool = False,
    local_world_size: int | None = None,
    experts: bool = False,
) -> Opened:
    """Check everything that can be checked without weights.

    Args:
        path: The model's directory.
        device: The value of --device.
        dtype: The value of --dtype.
        algorithm: The value of --algorithm.
        worlds: The numbers of ranks that were asked for. None: those from 2 to 8 that can share the model.
        plans: Plans by the name to show.
        real: Whether ranks are real. transformers cannot replicate KV heads.
        local_world_size: The value of --local-world.
        experts: Whether ranks share the experts of a mixture, and nothing else.

    Raises:
        FlashcommError: An option is wrong, the ranks cannot share the model, a plan is for another one, or the model
            has no tokenizer.
    """
    if algorithm not in ALGORITHMS:
        raise SettingsError(f"--algorithm {algorithm}: allowed are {', '.join(ALGORITHMS)}")
    if (algorithm == "hierarchical") != bool(local_world_size):
        raise SettingsError("--algorithm hierarchical and --local-world, of eval, go together: give both or neither")
    kind = options.dtype_of(dtype)
    config = models.check_model(path, 1)
    if experts:
        return _opened_for_experts(path, config, kind, worlds, options.device_of(device, 1))
    possible = models.possible_ranks(config, replicate=not real)
    chosen = list(worlds) or [n for n in possible if 2 <= n <= MOST_RANKS] or possible[1:2]
    if not chosen:
        raise InputError(f"{path.name} cannot be split among ranks: its attention heads allow only one rank")
    for n in chosen:
        models.check_divisible(config, n, path.name, replicate=not real)
    empty = models.skeleton(config)
    for plan in (plans or {}).values():
        TensorParallel(empty, chosen[0], plan)
    where = options.device_of(device, max(chosen) if real else 1)
    return Opened(path, config, models.load_tokenizer(path), chosen, where, kind)


def _opened_for_experts(path: Path, config: Any, kind: torch.dtype, worlds: Sequence[int], where: str) -> Opened:
    empty = models.skeleton(config)
    n_experts = min(module.num_experts for module in expert_layers(empty).values())
    chosen = list(worlds) or [n for n in range(2, MOST_RANKS + 1) if n_experts % n == 0]
    if not chosen:
        raise InputError(f"no 2 to {MOST_RANKS} ranks can share the {n_experts} experts of {path.name}")
    for n in chosen:
        ExpertParallel(empty, n)
    return Opened(path, config, models.load_tokenizer(path), chosen, where, kind)
