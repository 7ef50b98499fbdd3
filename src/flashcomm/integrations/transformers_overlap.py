"""Two-batch overlap in transformers: one half of the tokens computes during the all-reduces of the other half.

`overlap` replaces the `forward` of the model's stack of decoder layers (embeddings to last norm). The new one splits
its input into two micro-batches, runs them in turns (`two_batch_overlap`) and joins their results and caches:

    sequences   a batch of two or more: each half of the sequences is a micro-batch
    tokens      a single sequence: two blocks of tokens. They share one cache. In each layer the second block attends to
                the first one's keys and values, which the first block has always written by then.

Inputs that it cannot split run as before. So do, in mode "auto", those for which it does not pay: the first passes of
a shape run both ways in turn, and the faster way by the slowest rank's clock is kept (`_Trial`).

Results of halves of a batch have the same bits as without overlap, if the BLAS uses the same kernel for half the rows
of a matrix product: attention gets whole sequences, and an all-reduce takes the route of the whole message. Blocks of
tokens need that of the attention kernel, too: for the second block it gets half the queries. Otherwise results differ
by the rounding of sums in another order.

It needs additional memory: a second copy of the last hidden states, and on GPUs two all-reduces in flight, each of half
a message. Halves of a batch: while caches are joined, one layer's cache of one half. Blocks of tokens: the cache, even
with use_cache=False; and a mask of tokens^2 / 2 bytes, except on GPUs with the attention "sdpa". Activations within a
layer are half as large, so the peak is often lower.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicCache, DynamicLayer

from flashcomm.errors import InputError, SettingsError
from flashcomm.integrations.two_batch_overlap import TwoBatchOverlap, check_available

MIN_TOKENS = 2
MODES = ("auto", "always", "never")
N_TIMED = 3  # passes of each way that count in a trial, after one that warms up
MIN_GAIN = 1.02  # what overlap must gain in a trial: less is within what timings vary
_STYLES = {"colwise", "rowwise", "rowwise_rep", "rowwise_split_input", "replicated_with_grad_allreduce"}
_NOT_CUT = (bool, int, float, str, type(None))  # both micro-batches get arguments of these types unchanged

Kind = Literal["sequences", "tokens"]


def overlap(model: Any, min_tokens: int = MIN_TOKENS, mode: str = "auto") -> Any:
    """Overlap the model's all-reduces with computation in its forward passes from now on.

    Call it after `from_pretrained`. All ranks must call the model with the same shapes. These calls run as before:
    single tokens (decoding), training, caches other than DynamicCache, and calls that return all hidden states or
    attentions. A single sequence also does, if it is padded, or if the model has sliding windows.

    Another call changes `min_tokens` and `mode`, and forgets what was measured.

    Args:
        model: A dense transformers model that was loaded with a tensor-parallel plan.
        min_tokens: Inputs of fewer tokens are not split.
        mode: "auto": only for shapes for which the first passes show a gain. "always", "never": for measurements.

    Returns:
        The same model.

    Raises:
        InputError: Layers of the model use other collectives, as in mixtures of experts.
        SettingsError: There is no such mode.
        UnavailableError: The package greenlet is missing.
    """
    if mode not in MODES:
        raise SettingsError(f"overlap mode {mode!r}: give one of {', '.join(MODES)}")
    check_available()
    stack = model.base_model
    layers = {style for name, style in (model.tp_plan or {}).items() if "layers." in name}
    if others := sorted(layers - _STYLES):
        raise InputError(
            f"overlap is for dense models, but this model's tensor-parallel plan has {', '.join(others)}: do not use "
            "overlap for it"
        )
    plain = stack.forward.plain if isinstance(stack.forward, _OverlappedForward) else stack.forward
    mesh = getattr(model, "_device_mesh", None)
    stack.forward = _OverlappedForward(stack, plain, None if mesh is None else tp_group(mesh), min_tokens, mode)
    return model


def tp_group(mesh: Any) -> Any:
    """Return the process group of a device mesh's tensor parallelism."""
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


class _OverlappedForward:
    """The forward of a stack of decoder layers, in two micro-batches if the input can be split and that pays."""

    def __init__(self, stack: Any, plain: Callable[..., Any], group: Any, min_tokens: int, mode: str) -> None:
        self.stack, self.plain, self.group, self.min_tokens, self.mode = stack, plain, group, min_tokens, mode
        self.trials: dict[tuple[Kind, int], _Trial] = {}
        self.last: Kind | None = None  # how the last input was split
        self._signature = inspect.signature(plain)
        # its name in transformers 5.24, which knows the old one as an alias
        self._cache = "cache" if "cache" in self._signature.parameters else "past_key_values"
        self._stream: torch.cuda.Stream | None = None
        config = stack.config
        self._causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", None)
        self._full_attention = self._causal and _full(DynamicCache(config=config))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            kwargs[self._cache] = kwargs.pop("past_key_values")
        bound = self._signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        given |= given.pop("kwargs", {})
        kind, self.last = self._kind(given), None
        if kind is None:
            return self.plain(*args, **kwargs)
        if given.get("inputs_embeds") is None:  # outside: a sharded embedding has a collective
            given["inputs_embeds"] = self.stack.get_input_embeddings()(given.pop("input_ids"))
        x = given["inputs_embeds"]
        if x.device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(x.device, priority=-1)  # type: ignore[no-untyped-call]
        halves = self._sequences if kind == "sequences" else self._tokens

        def run(split: bool) -> Any:
            self.last = kind if split else None
            return halves(given) if split else self.plain(**given)

        if self.mode == "always":
            return run(True)
        n_tokens = x.shape[0] * x.shape[1]
        trial = self.trials.setdefault((kind, n_tokens.bit_length()), _Trial(self.group))
        if trial.pays is None and not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return trial.run(run, x.device, n_tokens)
        return run(bool(trial.pays))

    def _kind(self, given: Mapping[str, Any]) -> Kind | None:
        """Return how to split an input; None if it cannot be split."""
        x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if (
            self.mode == "never"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not isinstance(x, Tensor)
        ):
            return None
        n, length = x.shape[:2]
        if length < 2 or n * length < self.min_tokens or not given.get("return_dict", True):
            return None
        config, mask = self.stack.config, given.get("attention_mask")
        if any(given.get(k, getattr(config, k, False)) for k in ("output_attentions", "output_hidden_states")):
            return None
        if n > 1:
            known = all(isinstance(v, _NOT_CUT) or _can_cut(v, n) for v in given.values())
            return "sequences" if known and _same_padding(mask, n // 2) else None
        others = {k: v for k, v in given.items() if k not in ("input_ids", "inputs_embeds", "attention_mask")}
        known = all(isinstance(v, _NOT_CUT) or _can_cut_tokens(k, v, length) for k, v in others.items())
        if not known or not self._full_attention or length < 4:
            return None
        cached = given.get(self._cache) is not None or self._use_cache(given)
        if given.get("position_ids") is not None and not cached:
            return None  # without a cache they may mark several sequences in one row
        padded = mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))
        return None if padded else "tokens"

    def _use_cache(self, given: Mapping[str, Any]) -> bool:
        use_cache = given.get("use_cache")
        return bool(getattr(self.stack.config, "use_cache", False) if use_cache is None else use_cache)

    def _run(self, given: Mapping[str, Any], cut: int, n: int, slice_of: Callable[..., Any]) -> list[Any]:
        """Run both parts of an input in turns; slice_of returns a part of an argument."""
        first, second = (
            {name: slice_of(name, value, part) for name, value in given.items()}
            for part in (slice(None, cut), slice(cut, None))
        )
        run = TwoBatchOverlap((cut, n - cut), given["inputs_embeds"].device, self._stream)
        return list(run.run((lambda: self.plain(**first), lambda: self.plain(**second))))

    def _sequences(self, given: Mapping[str, Any]) -> Any:
        n = given["inputs_embeds"].shape[0]
        outs = self._run(given, n // 2, n, lambda _, value, rows: _slice(value, rows, n))
        caches = [getattr(out, self._cache) for out in outs]
        past = caches[0] if given.get(self._cache) is None else given[self._cache]
        if past is not None:
            past.layers = [_join(a, b) for a, b in zip(caches[0].layers, caches[1].layers, strict=True)]
        hidden = torch.cat([out.last_hidden_state for out in outs])
        return type(outs[0])(last_hidden_state=hidden, **{self._cache: past})

    def _tokens(self, given: dict[str, Any]) -> Any:
        x, config = given["inputs_embeds"], self.stack.config
        length, past = x.shape[1], given.get(self._cache)
        cache = DynamicCache(config=config) if past is None else past
        seen, cut = cache.get_seq_length(), length // 2
        kernel = x.device.type == "cuda" and getattr(config, "_attn_implementation", "") == "sdpa"
        mask = {  # of each block. Masks of ones were given, or none
            0: _lower_right(x.device) if kernel and seen else None,
            cut: _lower_right(x.device) if kernel else None,
        }

        def slice_of(name: str, value: Any, part: slice) -> Any:
            if name == "attention_mask":
                return mask[part.start or 0]
            if name == "inputs_embeds" or isinstance(value, Tensor):
                return value[:, part] if value.dim() > 1 else value[part]
            return value

        outs = self._run({"attention_mask": None, **given, self._cache: cache}, cut, length, slice_of)
        hidden = torch.cat([out.last_hidden_state for out in outs], dim=1)
        returned = cache if past is not None or self._use_cache(given) else None
        return type(outs[0])(last_hidden_state=hidden, **{self._cache: returned})


class _Trial:
    """Finds out whether overlap pays for inputs of about one size. All ranks decide alike.

    Passes without and with overlap take turns, and the first of each warms up. After `N_TIMED` more of each, every rank
    knows the slowest rank's median of both. Sizes may differ by up to two, so it compares seconds per token.

    Args:
        group: The tensor-parallel group; None with one rank.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.pays: bool | None = None  # None: not known yet
        self.seconds: dict[bool, list[float]] = {False: [], True: []}  # a token, by whether the input was split

    def run(self, forward: Callable[[bool], Any], device: torch.device, n_tokens: int) -> Any:
        """Run forward(split) once, timed; decide after the last one of the trial."""
        split = len(self.seconds[True]) < len(self.seconds[False])
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
        wait(device)
        begin = time.perf_counter()
        result = forward(split)
        wait(device)
        self.seconds[split].append((time.perf_counter() - begin) / n_tokens)
        if len(self.seconds[True]) > N_TIMED:
            medians = [statistics.median(self.seconds[way][1:]) for way in (False, True)]
            slowest = torch.tensor(medians, dtype=torch.float64, device=device)
            if self.group is not None:
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=self.group)
            plain, overlapped = slowest.tolist()
            self.pays = plain > MIN_GAIN * overlapped
        return result


class _LowerRight(Tensor):
    """Stands for the causal mask of the last queries of a sequence, for which attention has a fast kernel.

    It has the four dimensions of a mask that transformers hands on as it is to torch's attention.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[0], args[1]
            kwargs["attn_mask"] = causal_lower_right(query.shape[-2], key.shape[-2])
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def _lower_right(device: torch.device) -> Tensor:
    return torch.empty(1, 1, 1, 1, device=device).as_subclass(_LowerRight)


def _full(cache: Any) -> bool:
    """Return whether a cache keeps all tokens of every layer."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _can_cut(value: Any, n: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 or value.shape[0] in (1, n)
    return type(value) is DynamicCache and all(isinstance(layer, DynamicLayer) for layer in value.layers)


def _can_cut_tokens(name: str, value: Any, length: int) -> bool:
    if isinstance(value, Tensor):
        return name in ("position_ids", "cache_position") and value.shape in ((length,), (1, length))
    return _full(value)


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
