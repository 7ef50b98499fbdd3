"""Models by the shape of well-known ones, with random weights: for timing, which needs no checkpoint.

Each rank makes its own shards, normally distributed with the deviation that the model is trained from (0.02).
"""

from __future__ import annotations

from typing import Any

import torch

from flashcomm.accuracy.models import cut, import_transformers
from flashcomm.errors import InputError

_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _shape(base: dict[str, Any], hidden: int, mlp: int, layers: int, heads: tuple[int, int, int]) -> dict[str, Any]:
    """heads: of queries, of keys and values, and the length of one."""
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


def config_of(name: str, layers: int | None = None) -> Any:
    """The config of a shape, cut to so many layers. Raises InputError for a name that is none."""
    if name not in SHAPES:
        raise InputError(
            f"--model {name}: no such directory, and no such shape: there are {', '.join(SHAPES)}; "
            "a directory has config.json and safetensors, or one GGUF file"
        )
    said = dict(SHAPES[name])
    config = import_transformers().AutoConfig.for_model(said.pop("model_type"), **said)
    if layers is not None:
        cut(config, layers, name)
    return config


def bytes_per_rank(config: Any, world_size: int, itemsize: int) -> tuple[int, int]:
    """(bytes of one decoder layer, of all else) that a rank of so many holds."""
    head, hidden = config.head_dim, config.hidden_size
    attention = hidden * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size
    tables = config.vocab_size * hidden
    rest = tables // world_size if config.tie_word_embeddings else tables + tables // world_size
    return layer // world_size * itemsize, rest * itemsize


def layers_that_fit(config: Any, world_size: int, itemsize: int, memory_bytes: int) -> int:
    """How many layers leave a quarter of the memory free for activations, the cache and workspaces."""
    layer, rest = bytes_per_rank(config, world_size, itemsize)
    return min(int(config.num_hidden_layers), (memory_bytes * 3 // 4 - rest) // layer)


def build(name: str, layers: int | None, world_size: int, device: torch.device, dtype: torch.dtype) -> Any:
    """This rank's part of a model of that shape, in evaluation mode, under transformers' tensor parallelism."""
    transformers = import_transformers()
    from transformers.distributed import DistributedConfig

    config = config_of(name, layers)
    transformers.utils.logging.disable_progress_bar()
    plan = {"distributed_config": DistributedConfig(tp_size=world_size, tp_plan="auto")} if world_size > 1 else {}
    plan = plan or {"device_map": {"": device}}  # else the CPU would draw the weights
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    torch.manual_seed(0)  # weights that ranks share are equal
    return kind.from_pretrained(None, config=config, state_dict={}, dtype=dtype, **plan).to(device).eval()
