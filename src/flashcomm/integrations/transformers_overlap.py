"""Two-batch overlap in transformers: one half of a batch computes during the all-reduces of the other half.

`overlap` replaces the `forward` of the model's stack of decoder layers (embeddings to last norm). The new one splits a
batch into two micro-batches, runs them in turns (`two_batch_overlap`) and joins their results and caches. Batches that
it cannot split run as before.

Results have the same bits as without overlap, if the BLAS uses the same kernel for half the rows of a matrix product.
Attention always gets whole sequences, and an all-reduce takes the route of the whole message.

It needs additional memory: while caches are joined, one layer's cache of one micro-batch; a second copy of the last
hidden states; and on GPUs, two all-reduces in flight, each of half a message, and a cuBLAS workspace for the second
thread. Activations within a layer are half as large, so the peak is often lower.
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
from flashcomm.integrations.two_batch_overlap import TwoBatchOverlap

MIN_TOKENS = 2
_STYLES = {"colwise", "rowwise", "rowwise_rep", "rowwise_split_input", "replicated_with_grad_allreduce"}
_NOT_CUT = (bool, int, float, str, type(None))  # both micro-batches get arguments of these types unchanged


def overlap(model: Any, min_tokens: int = MIN_TOKENS) -> Any:
    """Overlap the model's all-reduces with computation in its forward passes from now on.

    Call it after `from_pretrained`. All ranks must call the model with the same shapes. These calls run as before:
    single sequences, single tokens (decoding), training, caches other than DynamicCache, and calls that return all
    hidden states or attentions.

    Args:
        model: A dense transformers model that was loaded with a tensor-parallel plan.
        min_tokens: Batches of fewer tokens are not split.

    Returns:
        The same model.

    Raises:
        InputError: Layers of the model use other collectives, as in mixtures of experts.
    """
    stack = model.base_model
    layers = {style for name, style in (model.tp_plan or {}).items() if "layers." in name}
    if others := sorted(layers - _STYLES):
        raise InputError(
            f"overlap is for dense models, but this model's tensor-parallel plan has {', '.join(others)}: do not use "
            "overlap for it"
        )
    if not isinstance(stack.forward, _OverlappedForward):
        stack.forward = _OverlappedForward(stack, min_tokens)
    return model


class _OverlappedForward:
    """The forward of a stack of decoder layers, in two micro-batches if the batch can be split."""

    def __init__(self, stack: Any, min_tokens: int) -> None:
        self.stack, self.plain, self.min_tokens = stack, stack.forward, min_tokens
        self.enabled = True
        self._signature = inspect.signature(self.plain)
        self._stream: torch.cuda.Stream | None = None
        self._helper: ThreadPoolExecutor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        given |= given.pop("kwargs", {})
        cut = self._cut(given)
        if cut is None:
            return self.plain(*args, **kwargs)
        if given.get("inputs_embeds") is None:  # outside: a sharded embedding has a collective
            given["inputs_embeds"] = self.stack.get_input_embeddings()(given.pop("input_ids"))
        n, device = given["inputs_embeds"].shape[0], given["inputs_embeds"].device
        first, second = (
            {name: _slice(value, rows, n) for name, value in given.items()}
            for rows in (slice(None, cut), slice(cut, None))
        )
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, "flashcomm-micro-batch")
        run = TwoBatchOverlap((cut, n - cut), device, self._stream, self._helper)
        outs = run.run((lambda: self.plain(**first), lambda: self.plain(**second)))
        caches = [out.past_key_values for out in outs]
        past = caches[0] if given.get("past_key_values") is None else given["past_key_values"]
        if past is not None:
            past.layers = [_join(a, b) for a, b in zip(caches[0].layers, caches[1].layers, strict=True)]
        hidden = torch.cat([out.last_hidden_state for out in outs])
        return type(outs[0])(last_hidden_state=hidden, past_key_values=past)

    def _cut(self, given: Mapping[str, Any]) -> int | None:
        """Return the number of sequences in the first micro-batch; None if a call cannot be split."""
        x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if not self.enabled or torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return None
        n, length = x.shape[:2]
        if n < 2 or length < 2 or n * length < self.min_tokens or not given.get("return_dict", True):
            return None
        config = self.stack.config
        if any(given.get(k, getattr(config, k, False)) for k in ("output_attentions", "output_hidden_states")):
            return None
        known = all(isinstance(v, _NOT_CUT) or _can_cut(v, n) for v in given.values())
        return n // 2 if known and _same_padding(given.get("attention_mask"), n // 2) else None


def _can_cut(value: Any, n: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 or value.shape[0] in (1, n)
    return type(value) is DynamicCache and all(isinstance(layer, DynamicLayer) for layer in value.layers)


def _same_padding(mask: Any, cut: int) -> bool:
    """Return whether both micro-batches are padded, or neither: attention uses another kernel without a mask."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return True
    return bool(mask[:cut].all()) == bool(mask[cut:].all())


def _slice(value: Any, rows: slice, n: int) -> Any:
    """Return a micro-batch's rows of an argument, a tensor or cache of n rows, as views."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and value.shape[0] == n else value
    if not isinstance(value, DynamicCache):
        return value
    part = copy.copy(value)
    part.layers = [copy.copy(layer) for layer in value.layers]
    for layer in part.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return part


def _join(a: DynamicLayer, b: DynamicLayer) -> DynamicLayer:
    """Concatenate the caches of a layer into a, and free the tensors of b."""
    if not a.is_initialized:
        return a
    a.keys, b.keys = torch.cat([a.keys, b.keys]), None
    a.values, b.values = torch.cat([a.values, b.values]), None
    return a
