"""What flashcomm does beside vLLM's all-reduces: sequence parallelism, and telling decoding batches from others.

Sequence parallelism replaces an all-reduce by a reduce-scatter of hidden states, the norm of this rank's tokens, and an
all-gather of the result:

    reduce_scatter   low-bit wherever an all-reduce of the same tensor would be; quantized as `WireFormat.reduce`
    all_gather       low-bit if it is the first after such a reduce-scatter, with as many tokens; `WireFormat.gather`

Other all-gathers on dimension 0 may carry anything, so they stay vLLM's own. In batch-invariant mode a reduce-scatter
is an all-reduce of which each rank keeps its tokens: vLLM uses sequence parallelism for large batches only, and a token
must get the same bits in all batches. The all-gather is then vLLM's own, which is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcomm.wire.format import WireFormat

if TYPE_CHECKING:
    from flashcomm.integrations.vllm_group import TensorParallelAllReduce

DTYPES = (torch.bfloat16, torch.float16)  # of hidden states


class SequenceParallel:
    """The reduce-scatters and all-gathers of one tensor-parallel group.

    Args:
        all_reduce: The group's all-reduce. Its `own_calls` also count vLLM's own reduce-scatters and all-gathers.
        batch_invariant: Whether vLLM's batch-invariant mode is on.
    """

    def __init__(self, all_reduce: TensorParallelAllReduce, batch_invariant: bool) -> None:
        self._all_reduce, self._batch_invariant = all_reduce, batch_invariant
        self._scattered: tuple[int, WireFormat] | None = None  # tokens and format of a low-bit reduce-scatter

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor | None:
        """Return this rank's part of the sum of x (tokens, hidden) over the group; None if it is not low-bit."""
        planned = self._all_reduce.planned
        world_size = planned.comm.world_size
        self._scattered, reason = None, "too small to pay"
        if not self._is_hidden_states(x, dim) or x.shape[0] % world_size:
            reason = "not hidden states"
        elif planned.is_low_bit(batch := self._all_reduce.phased(x)):
            if self._batch_invariant:
                return planned(batch).view(x.shape).chunk(world_size)[planned.comm.rank].clone()
            fmt = planned.format_of(batch)
            if not fmt.reduce.uncompressed:
                self._scattered = x.shape[0], fmt
                return planned.comm.reduce_scatter(x, format=fmt)
            reason = "uncompressed"
        self._all_reduce.own_calls[f"reduce_scatter: {reason}"] += 1
        return None

    def all_gather(self, x: Tensor, dim: int) -> Tensor | None:
        """Return the x (tokens, hidden) of all ranks, one after the other; None if that is not low-bit."""
        comm, scattered = self._all_reduce.planned.comm, self._scattered
        follows = scattered is not None and dim == 0 and x.shape[0] * comm.world_size == scattered[0]
        if follows:
            self._scattered = None
        if not self._is_hidden_states(x, dim):
            reason = "not hidden states"
        elif scattered is None or not follows:
            reason = "not after a low-bit reduce_scatter"
        elif scattered[1].gather.uncompressed:
            reason = "uncompressed"
        else:
            return comm.all_gather(x, format=scattered[1])
        self._all_reduce.own_calls[f"all_gather: {reason}"] += 1
        return None

    def warm_up(self, max_tokens: int, dtype: torch.dtype) -> None:
        """Run both ops once in every format that batches of up to max_tokens need: nothing is compiled later."""
        planned, hidden_size = self._all_reduce.planned, self._all_reduce.hidden_size
        comm, plan = planned.comm, planned.plan
        for fmt in dict.fromkeys((plan.format, plan.decode or plan.format)):  # in the same order on all ranks
            low_bit = comm.explain((max_tokens, hidden_size), dtype, fmt).route.low_bit
            if low_bit and not fmt.reduce.uncompressed and not self._batch_invariant:
                x = torch.zeros(comm.world_size, hidden_size, dtype=dtype, device=comm.device)
                part = comm.reduce_scatter(x, format=fmt)
                if not fmt.gather.uncompressed:
                    comm.all_gather(part, format=fmt)

    def _is_hidden_states(self, x: Tensor, dim: int) -> bool:
        return dim == 0 and x.dim() == 2 and x.shape[-1] == self._all_reduce.hidden_size and x.dtype in DTYPES


def only_decodes(config: Any, captured: bool) -> bool:
    """Return whether all requests of the running batch decode: one token each, or those of speculative decoding.

    All ranks of a tensor-parallel group run the same batch, so the answer is equal on them. It is False if vLLM does
    not say so: outside of batches, in profiling runs, and in CUDA graphs that also serve prompts.

    Args:
        config: The VllmConfig.
        captured: Whether a CUDA graph is being captured.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return False
    context = get_forward_context()
    if captured:
        # vLLM captures the graphs of mixed batches with dummies of one token a request. Only in modes with graphs of
        # their own for decoding do full graphs never serve prompts.
        own_graphs = config.compilation_config.cudagraph_mode.separate_routine()
        if not own_graphs or context.cudagraph_runtime_mode.name != "FULL":
            return False
    layers = context.attn_metadata
    for metadata in layers.values() if isinstance(layers, dict) else ():
        if hasattr(metadata, "max_query_len"):
            return bool(metadata.max_query_len <= 1 + config.num_speculative_tokens)
        if hasattr(metadata, "num_prefills"):  # FlashInfer's
            return bool(metadata.num_prefills == 0)
    return False
