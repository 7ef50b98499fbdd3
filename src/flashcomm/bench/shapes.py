"""Models to time: from a directory, or in the shape of a well-known model with random weights, without a checkpoint.

Each rank creates its own shards, normally distributed with the standard deviation of the model's initialization (0.02).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashcomm.accuracy.models import check_divisible, check_model, cut, import_transformers, load_model
from flashcomm.errors import InputError

_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _shape(base: dict[str, Any], hidden: int, mlp: int, layers: int, heads: tuple[int, int, int]) -> dict[str, Any]:
    """Return the config of a shape. `heads` is (number of query heads, number of KV heads, values per head)."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return {**base, **sizes, **dict(zip(names, heads, strict=True))}


_QWEN3 = {
    **_LLAMA3,
    "model_type": "qwen3",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

SHAPES = {
    "llama-3.2-1b": _shape(_LLAMA3 | {"tie_word_embeddings": True}, 2048, 8192, 16, (32, 8, 64)),
    "llama-3-8b": _shape(_LLAMA3, 4096, 14336, 32, (32, 8, 128)),
    "llama-3-70b": _shape(_LLAMA3, 8192, 28672, 80, (64, 8, 128)),
    "qwen3-32b": _shape(_QWEN3, 5120, 25600, 64, (64, 8, 128)),
    "tiny": _shape(_LLAMA3 | {"vocab_size": 512}, 128, 256, 3, (4, 2, 32)),  # for tests
}


class TimedModel(NamedTuple):
    """A model to time, checked before any rank starts.

    Attributes:
        source: A directory, or the name of a shape.
        label: The name to show.
        layers: The number of first layers to keep; None: all.
        all_layers: The number of layers of the whole model.
    """

    source: Path | str
    label: str
    layers: int | None
    all_layers: int

    def load(self, world_size: int, device: torch.device, dtype: torch.dtype) -> Any:
        """Load or build this rank's part of the model, in evaluation mode."""
        if isinstance(self.source, Path):
            return load_model(self.source, world_size, device, dtype, self.layers)[0]
        return build(self.source, self.layers, world_size, device, dtype)


def find_model(name: str, world_size: int, layers: int | None, device: str, dtype: torch.dtype) -> TimedModel:
    """Find the model of --model and --layers. By default, a shape gets as many layers as fit this machine's memory.

    Raises:
        InputError: There is no such model, or world_size ranks cannot share it, or no layer fits.
    """
    path = Path(name)
    if name not in SHAPES:
        if not path.exists() and os.sep not in name:
            config_of(name)  # raises an error that lists directories and shapes
        config = check_model(path, world_size)
        all_layers = int(config.num_hidden_layers)
        if layers is not None:
            cut(config, layers, path.name)
        return TimedModel(path, path.name, layers, all_layers)
    config = config_of(name)
    all_layers = int(config.num_hidden_layers)
    check_divisible(config, world_size, name)
    if layers is None:
        fit = layers_that_fit(config, world_size, dtype.itemsize, memory_bytes(device, world_size))
        if fit < 1:
            raise InputError(f"no layer of {name} fits the memory of {world_size} ranks: use more ranks")
        layers = fit if fit < all_layers else None
    config_of(name, layers)
    return TimedModel(name, name, layers, all_layers)


def memory_bytes(device: str, world_size: int) -> int:
    """Return the bytes of memory per rank: those of its GPU, or its share of this machine's."""
    if device == "cuda":
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world_size


def config_of(name: str, layers: int | None = None) -> Any:
    """Return the config of a shape, with its first `layers` layers. Raises InputError if there is no such shape."""
    if name not in SHAPES:
        raise InputError(
            f"--model {name}: no such directory and no such shape; shapes are {', '.join(SHAPES)}; "
            "a directory has config.json and safetensors, or one GGUF file"
        )
    fields = dict(SHAPES[name])
    config = import_transformers().AutoConfig.for_model(fields.pop("model_type"), **fields)
    if layers is not None:
        cut(config, layers, name)
    return config


def bytes_per_rank(config: Any, world_size: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes of weights per rank: (of one decoder layer, of everything else)."""
    head, hidden = config.head_dim, config.hidden_size
    attention = hidden * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size
    tables = config.vocab_size * hidden
    rest = tables // world_size if config.tie_word_embeddings else tables + tables // world_size
    return layer // world_size * itemsize, rest * itemsize


def layers_that_fit(config: Any, world_size: int, itemsize: int, memory_bytes: int) -> int:
    """Return how many layers fit three quarters of the memory. The rest is for activations, cache and workspaces."""
    layer, rest = bytes_per_rank(config, world_size, itemsize)
    return min(int(config.num_hidden_layers), (memory_bytes * 3 // 4 - rest) // layer)


def build(name: str, layers: int | None, world_size: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Build this rank's part of a model of a shape, in evaluation mode, with transformers' tensor parallelism."""
    transformers = import_transformers()
    from transformers.distributed import DistributedConfig

    config = config_of(name, layers)
    transformers.utils.logging.disable_progress_bar()
    plan = {"distributed_config": DistributedConfig(tp_size=world_size, tp_plan="auto")} if world_size > 1 else {}
    plan = plan or {"device_map": {"": device}}  # otherwise the CPU would initialize the weights
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    torch.manual_seed(0)  # weights that ranks share are equal
    return kind.from_pretrained(None, config=config, state_dict={}, dtype=dtype, **plan).to(device).eval()
