"""Overlap in transformers: the stack of decoder layers computes one half of a batch while the other's sums travel.

`overlap` replaces the `forward` of the model's stack (embeddings to last norm) by one that cuts batches in two, runs
the halves in turns (`halves`), and puts the results and the cache together. What it cannot cut runs as before.

The bits are those without overlap: attention sees whole sequences, sums go the way of the whole message, and a matrix
product of half the rows has the same bits wherever the BLAS takes the same kernel for it.

Memory, beyond what the model needs: one layer's cache of one half at a time, as the halves' caches are put together, a
second copy of the last hidden states, and on GPUs the sums in flight (two of half a message each) and a cuBLAS
workspace for the second thread. What a layer computes is half as large at any time, so that the peak is often lower.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from flashcomm.errors import InputError
from flashcomm.integrations.interleave import Halves

MIN_TOKENS = 2  # of a batch that is cut
_STYLES = {"colwise", "rowwise", "rowwise_rep", "rowwise_split_input", "replicated_with_grad_allreduce"}
_SHARED = (bool, int, float, str, type(None))  # arguments that both halves get as they are


def overlap(model: Any, min_tokens: int = MIN_TOKENS) -> Any:
    """The model, whose forward passes now overlap all-reduces with computing; call it after `from_pretrained`.

    Batches of two or more sequences and at least `min_tokens` tokens are cut; smaller ones, single tokens (decoding),
    training, caches other than DynamicCache and hidden states or attentions as outputs run as before. Ranks must call
    the model with the same shapes. Raises InputError for models whose layers make other collectives (experts).
    """
    stack = model.base_model
    layers = {style for name, style in (model.tp_plan or {}).items() if "layers." in name}
    if others := sorted(layers - _STYLES):
        raise InputError(
            f"overlap is for dense models, this one's tensor-parallel plan has {', '.join(others)}: leave overlap out"
        )
    if not isinstance(stack.forward, _Overlapped):
        stack.forward = _Overlapped(stack, min_tokens)
    return model


class _Overlapped:
    """The forward of a stack of decoder layers, in two halves where that can be."""

    def __init__(self, stack: Any, min_tokens: int) -> None:
        self.stack, self.whole, self.min_tokens = stack, stack.forward, min_tokens
        self.enabled = True
        self._signature = inspect.signature(self.whole)
        self._stream: torch.cuda.Stream | None = None
        self._helper: ThreadPoolExecutor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        given |= given.pop("kwargs", {})
        cut = self._cut(given)
        if cut is None:
            return self.whole(*args, **kwargs)
        if given.get("inputs_embeds") is None:  # a sharded embedding is a collective of its own: not among the sums
            given["inputs_embeds"] = self.stack.get_input_embeddings()(given.pop("input_ids"))
        n = given["inputs_embeds"].shape[0]
        past = given.get("past_key_values")
        pieces = [slice(None, cut), slice(cut, None)]
        asked = [{k: _part(v, piece, n) for k, v in given.items()} for piece in pieces]
        device = given["inputs_embeds"].device
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, "flashcomm-half")
        halves = Halves((cut, n - cut), device, self._stream, self._helper)
        outs = halves.run((lambda: self.whole(**asked[0]), lambda: self.whole(**asked[1])))
        caches = [out.past_key_values for out in outs]
        if past is None:
            past = caches[0]
        if past is not None:
            past.layers = [_joined(a, b) for a, b in zip(caches[0].layers, caches[1].layers, strict=True)]
        hidden = torch.cat([out.last_hidden_state for out in outs])
        return type(outs[0])(last_hidden_state=hidden, past_key_values=past)

    def _cut(self, given: Mapping[str, Any]) -> int | None:
        """How many sequences the first half has; None if these arguments must run as before."""
        x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if not self.enabled or torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return None
        n, length = x.shape[:2]
        if n < 2 or length < 2 or n * length < self.min_tokens or not given.get("return_dict", True):
            return None
        config = self.stack.config
        if any(given.get(k, getattr(config, k, False)) for k in ("output_attentions", "output_hidden_states")):
            return None
        known = all(isinstance(v, _SHARED) or _can_cut(v, n) for v in given.values())
        return n // 2 if known and _same_padding(given.get("attention_mask"), n // 2) else None


def _can_cut(value: Any, n: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 or value.shape[0] in (1, n)
    return type(value) is DynamicCache and all(isinstance(layer, DynamicLayer) for layer in value.layers)


def _same_padding(mask: Any, cut: int) -> bool:
    """Whether both halves or neither are padded: attention takes another kernel where no mask is needed."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return True
    return bool(mask[:cut].all()) == bool(mask[cut:].all())


def _part(value: Any, piece: slice, n: int) -> Any:
    """The part of an argument that a half gets; tensors and caches are cut without copying."""
    if isinstance(value, Tensor):
        return value[piece] if value.dim() > 1 and value.shape[0] == n else value
    if not isinstance(value, DynamicCache):
        return value
    part = copy.copy(value)
    part.layers = [copy.copy(layer) for layer in value.layers]
    for layer in part.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[piece], layer.values[piece]
    return part


def _joined(a: DynamicLayer, b: DynamicLayer) -> DynamicLayer:
    """The cache of a layer for both halves, in a's object."""
    if not a.is_initialized:
        return a
    a.keys, b.keys = torch.cat([a.keys, b.keys]), None
    a.values, b.values = torch.cat([a.values, b.values]), None
    return a
