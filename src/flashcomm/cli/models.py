"""Loading of models for the commands that simulate ranks: eval, tune and probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flashcomm.accuracy.models import check_model, load_model
from flashcomm.accuracy.simulate import TensorParallel
from flashcomm.cli import options
from flashcomm.errors import SettingsError
from flashcomm.plan import Plan
from flashcomm.settings import ALGORITHMS


def load(
    path: Path, device: str, dtype: str, algorithm: str, ranks: int = 1, local_world_size: int | None = None
) -> tuple[Any, Any, str]:
    """Check options, then load a model. Return the whole model, its tokenizer and the device.

    Args:
        path: The model's directory.
        device: The value of --device.
        dtype: The value of --dtype.
        algorithm: The value of --algorithm.
        ranks: Number of ranks that need a device.
        local_world_size: The value of --local-world.

    Raises:
        FlashcommError: An option is wrong, or the model cannot be loaded.
    """
    if algorithm not in ALGORITHMS:
        raise SettingsError(f"--algorithm {algorithm}: allowed are {', '.join(ALGORITHMS)}")
    if (algorithm == "hierarchical") != bool(local_world_size):
        raise SettingsError("--algorithm hierarchical and --local-world, of eval, go together: give both or neither")
    where = options.device_of(device, ranks)
    check_model(path, 1)
    model, tokenizer = load_model(path, 1, torch.device(where), options.dtype_of(dtype))
    return model, tokenizer, where


def check_plans(model: Any, plans: dict[str, Plan], world_size: int) -> None:
    """Raise an error, before any measurement, if plans do not fit the model or the ranks cannot share it."""
    for plan in plans.values():
        TensorParallel(model, world_size, plan)
