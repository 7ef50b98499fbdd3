"""Models on disk: checked before any rank starts, then loaded by each rank.

A model is a directory in the format of Hugging Face (config.json and safetensors), or one with a single GGUF file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flashcomm.errors import FlashcommError, InputError, UnavailableError


def check_model(path: Path, world_size: int) -> Any:
    """Check that a model's files are complete and that world_size ranks can share it. Return its config.

    Raises:
        InputError: Files are missing or corrupt, or the ranks cannot share the model.
        UnavailableError: transformers is not installed.
    """
    transformers = import_transformers()
    source = _source(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, **source)
    except Exception as why:  # transformers raises what its parsers raise
        raise InputError(f"{path} has no readable model config: {_first_line(why)}") from why
    for file in sorted(path.glob("*.safetensors")):
        _check_safetensors(file)
    check_divisible(config, world_size, path.name)
    return config


def check_divisible(config: Any, world_size: int, name: str) -> None:
    """Raise InputError unless world_size ranks can share a model of this config."""
    indivisible = [
        f"{part}={size}"
        for part in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        if (size := getattr(config, part, None)) and size % world_size
    ]
    if indivisible:
        heads = [getattr(config, n) for n in ("num_attention_heads", "num_key_value_heads") if getattr(config, n, None)]
        possible = [w for w in range(1, min(heads, default=1) + 1) if all(h % w == 0 for h in heads)]
        raise InputError(
            f"{world_size} ranks cannot share {name}: {', '.join(indivisible)} is not a multiple of {world_size}; "
            f"its heads allow --world {', '.join(map(str, possible))}"
        )


def cut(config: Any, layers: int, name: str) -> None:
    """Reduce a config to its first layers. Raises InputError if it has fewer."""
    if not 1 <= layers <= config.num_hidden_layers:
        raise InputError(f"--layers {layers}: {name} has {config.num_hidden_layers}; give a number from 1 to that")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def load_model(
    path: Path, world_size: int, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> tuple[Any, Any]:
    """Load this rank's part of a model, in evaluation mode, and its tokenizer.

    Args:
        path: The model's directory.
        world_size: Number of ranks. Above 1 the model is loaded with transformers' tensor parallelism.
        device: The device of the model.
        dtype: The dtype of its weights.
        layers: The number of first layers to keep. None: all.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: The model cannot be loaded.
    """
    transformers = import_transformers()
    from transformers.distributed import DistributedConfig

    transformers.utils.logging.disable_progress_bar()
    plan: dict[str, Any] = {}
    if world_size > 1:
        plan["distributed_config"] = DistributedConfig(tp_size=world_size, tp_plan="auto")
    if layers is not None:
        plan["config"] = transformers.AutoConfig.from_pretrained(path, **_source(path))
        cut(plan["config"], layers, path.name)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **plan, **_source(path))
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **_source(path))
    except FlashcommError:
        raise
    except Exception as why:
        raise InputError(f"{path} cannot be loaded: {type(why).__name__}: {_first_line(why)}") from why
    return model.to(device).eval(), tokenizer


def import_transformers() -> Any:
    """Import transformers and reduce its logging. Raises UnavailableError with the command that installs it."""
    try:
        import transformers
    except ImportError as why:
        raise UnavailableError("this command needs transformers: pip install 'flashcomm[transformers]'") from why
    transformers.logging.set_verbosity_error()
    return transformers


def _source(path: Path) -> dict[str, str]:
    """Return the arguments of `from_pretrained` for a directory: none, or its only GGUF file."""
    if not path.is_dir():
        raise InputError(
            f"no model directory at {path}: give a directory with config.json and weights, or a GGUF file in it"
        )
    if (path / "config.json").exists():
        if not any(path.glob("*.safetensors")):
            raise InputError(f"{path} has a config.json but no *.safetensors weights: download them again")
        return {}
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) != 1:
        raise InputError(f"{path} has {len(gguf)} GGUF files and no config.json: give a directory with one of either")
    return {"gguf_file": gguf[0].name}


def _check_safetensors(file: Path) -> None:
    """Raise InputError unless the header is readable and the file is as long as the header says."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            handle.keys()
    except Exception as why:  # safetensors' own error type is not importable in every version
        raise InputError(f"{file} is corrupt or cut short ({_first_line(why)}): download it again") from why


def _first_line(why: BaseException) -> str:
    return (str(why).strip().splitlines() or [type(why).__name__])[0]
