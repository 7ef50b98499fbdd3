"""Models on disk: checked before any rank starts, then loaded by each rank.

A model is a directory in the format of Hugging Face (config.json and safetensors), or one with a single GGUF file. A
GGUF file is converted once, to float32 safetensors in the cache directory, and loaded from there afterwards.
"""

from __future__ import annotations

import fcntl
import io
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from flashcomm.errors import FlashcommError, InputError, UnavailableError
from flashcomm.routing.timings import own_directory


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


def possible_ranks(config: Any, *, replicate: bool) -> list[int]:
    """Return the numbers of ranks that can share a model of this config, ascending.

    Attention heads, KV heads and the intermediate size must be divisible by the number of ranks.

    Args:
        config: The model's config.
        replicate: Whether ranks may share a KV head, as in vLLM and SGLang: then the number of ranks may also be a
            multiple of the number of KV heads. transformers' tensor parallelism cannot do this.
    """
    heads, kv_heads, width = (getattr(config, name, None) or 0 for name in _SHARED)
    return [
        n
        for n in range(1, (heads or kv_heads or 1) + 1)
        if heads % n == 0 and width % n == 0 and (kv_heads % n == 0 or (replicate and n % kv_heads == 0))
    ]


_SHARED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_divisible(config: Any, world_size: int, name: str, *, replicate: bool = False) -> None:
    """Raise InputError unless world_size ranks can share a model of this config; see `possible_ranks`."""
    possible = possible_ranks(config, replicate=replicate)
    if world_size not in possible:
        sizes = ", ".join(f"{part}={size}" for part in _SHARED if (size := getattr(config, part, None)))
        raise InputError(
            f"{world_size} ranks cannot share {name} ({sizes}): it allows --world {', '.join(map(str, possible))}"
        )


def cut(config: Any, layers: int, name: str) -> None:
    """Reduce a config to its first layers. Raises InputError if it has fewer."""
    if not 1 <= layers <= config.num_hidden_layers:
        raise InputError(f"--layers {layers}: {name} has {config.num_hidden_layers}; give a number from 1 to that")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def load_tokenizer(path: Path) -> Any:
    """Load a model's tokenizer. Raises InputError if it has none."""
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(_local_files(path))
        tokenizer("text")
    except FlashcommError:
        raise
    except Exception as why:
        raise InputError(
            f"{path} has no usable tokenizer ({type(why).__name__}: {_first_line(why)}): "
            "add the model's tokenizer.json and tokenizer_config.json"
        ) from why
    return tokenizer


def skeleton(config: Any) -> Any:
    """Return the model of a config without weights, on the meta device."""
    with torch.device("meta"):
        return import_transformers().AutoModelForCausalLM.from_config(config)


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
    tokenizer, files = load_tokenizer(path), _local_files(path)
    plan: dict[str, Any] = {}
    if world_size > 1:
        plan["distributed_config"] = DistributedConfig(tp_size=world_size, tp_plan="auto")
    if layers is not None:
        plan["config"] = transformers.AutoConfig.from_pretrained(files)
        cut(plan["config"], layers, path.name)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(files, dtype=dtype, **plan)
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


def convert_gguf(gguf: Path, target: Path) -> None:
    """Convert config, tokenizer and weights (float32) of a GGUF file to Hugging Face files in the directory `target`.

    Raises:
        InputError: The file cannot be converted.
    """
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())  # in a log each step is a line
    try:
        with bar:  # disable_progress_bar does not reach it, and a large file takes a minute
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            dequantized = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as why:
        raise InputError(f"{gguf} cannot be converted: {type(why).__name__}: {_first_line(why)}") from why
    config = dequantized.config
    if hasattr(config, "quantization_config"):  # the weights are no longer quantized
        del config.quantization_config
    model = skeleton(config)
    model.load_state_dict(dequantized.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _local_files(path: Path) -> Path:
    """Return a directory of Hugging Face files: `path`, or the conversion of its GGUF file, which is made once."""
    source = _source(path)
    if not source:
        return path
    gguf = path / source["gguf_file"]
    seen = gguf.stat()
    kept = own_directory() / "models" / f"{gguf.stem}-{seen.st_size:x}-{seen.st_mtime_ns:x}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / f"{kept.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ranks that load at once convert once
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                convert_gguf(gguf, Path(scratch) / "model")
                shutil.move(Path(scratch) / "model", kept)  # a rename: all or nothing
    return kept


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
