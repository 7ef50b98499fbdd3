"""A small model, and the directory of the real one, for the tests of accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
MODEL = Path(__file__).parent.parent.parent / ".assets" / "smollm2-135m-instruct"
needs_model = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no model: run scripts/fetch_assets.py")
IDS = torch.arange(40).view(2, 20)
LAYERS = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.o_proj", "mlp.down_proj")]


def tiny(kv_heads: int = 2) -> Any:
    """A Llama with random weights and biases: 2 layers, 64 channels."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        vocab_size=200, attention_bias=True, mlp_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


class Words:
    """A tokenizer whose tokens are words: ids are lengths of words."""

    bos_token_id: int | None = None

    def __call__(self, text: str, return_tensors: str = "", add_special_tokens: bool = True) -> Any:
        ids = [len(word) for word in text.split()]
        return type("Encoding", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})
