"""Low-bit exchanges of a mixture of experts in vLLM, with data or expert parallelism. `vllm.py` installs it.

    FLASHCOMM_FORMAT=int8 FLASHCOMM_EXPERT_FORMAT=int8/int6-had vllm serve MODEL --data-parallel-size 2 ...

vLLM's default manager of these exchanges (`allgather_reducescatter`) calls two methods of a group's device communicator
around the experts:

    dispatch   all_gatherv of a list of tensors, of which the first are hidden states: every rank gets all tokens
    combine    reduce_scatterv of hidden states: every rank gets the sums of its own tokens

FLASHCOMM_EXPERT_FORMAT is "combine/dispatch", because a combine carries sums and a dispatch activations. One format is
for both. Only hidden states are low-bit: never router weights, ids or scales, nor hidden states that vLLM has
quantized.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashcomm.communicator import Communicator
from flashcomm.integrations import vllm_group
from flashcomm.integrations.vllm_sequence import DTYPES
from flashcomm.routing import policy
from flashcomm.wire.format import WireFormat

SETTING = "FLASHCOMM_EXPERT_FORMAT"
GROUPS = ("dp", "ep", "pcp")  # vLLM's names of the groups that exchange tokens
log = logging.getLogger("flashcomm")


def format_setting() -> str:
    """Return FLASHCOMM_EXPERT_FORMAT, which turns these exchanges on; "" if it is not set."""
    return os.environ.get(SETTING, "").strip()


class ExpertExchange:
    """The combine and dispatch of one group.

    Args:
        comm: The Communicator of the group.
        hidden_size: The hidden size of the model, in values.
    """

    def __init__(self, comm: Communicator, hidden_size: int) -> None:
        self.comm, self.hidden_size = comm, hidden_size
        given, transport = comm.settings.min_bytes, comm.machine.transport
        by_rule = policy.MIN_BYTES.get(transport, policy.MIN_BYTES[comm.device.type])
        self.min_bytes = given if isinstance(given, int) else by_rule

    def takes(self, x: Tensor, tokens: int, dim: int) -> bool:
        """Return whether an exchange is low-bit; equal on all ranks.

        Args:
            x: The input.
            tokens: Tokens of all ranks together.
            dim: The dimension that is divided among ranks.
        """
        hidden = x.dim() == 2 and x.shape[1] == self.hidden_size and x.dtype in DTYPES
        return hidden and dim in (0, -2) and tokens * self.hidden_size * x.element_size() >= self.min_bytes

    def warm_up(self, dtype: torch.dtype) -> None:
        """Run both exchanges, so that nothing is compiled later."""
        x = torch.zeros(self.comm.world_size, self.hidden_size, dtype=dtype, device=self.comm.device)
        self.comm.all_gather(self.comm.reduce_scatter(x))
        self.comm.synchronize()
        self.comm.calls.clear()
        self.comm.sent.clear()


class ExpertCommunicator:
    """A mixin that precedes vLLM's DeviceCommunicatorBase among the parents of a class.

    Attributes:
        flashcomm_experts: The group's low-bit exchanges; None if vLLM's own are used.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flashcomm_experts = _create(self)

    def reduce_scatterv(self, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
        """Return this rank's rows of the sum: a combine if these are hidden states."""
        ours = self.flashcomm_experts
        if ours is not None and ours.takes(input_, len(input_), dim):
            return ours.comm.reduce_scatter(input_, sizes=sizes)
        own: Tensor = super().reduce_scatterv(input_, dim, sizes)  # type: ignore[misc]
        return own

    def reduce_scatterv_into_output(
        self, input_: Tensor, output: Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> Any:
        """Write this rank's rows of the sum into output, as `reduce_scatterv` returns them."""
        ours = self.flashcomm_experts
        if ours is None or not ours.takes(input_, len(input_), dim):
            return super().reduce_scatterv_into_output(input_, output, dim, sizes)  # type: ignore[misc]
        if output.is_contiguous():
            return ours.comm.reduce_scatter(input_, output, sizes=sizes)
        return output.copy_(ours.comm.reduce_scatter(input_, sizes=sizes))

    def all_gatherv(
        self, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> Tensor | list[Tensor]:
        """Return the tensors of all ranks: a dispatch if the first are hidden states. All others go to vLLM's own."""
        ours, tensors = self.flashcomm_experts, [input_] if isinstance(input_, Tensor) else list(input_)
        if ours is None or not tensors or not ours.takes(tensors[0], self._tokens(tensors[0], sizes), dim):
            own: Tensor | list[Tensor] = super().all_gatherv(input_, dim, sizes)  # type: ignore[misc]
            return own
        first = ours.comm.all_gather(tensors[0], sizes=sizes)
        if isinstance(input_, Tensor):
            return first
        rest = super().all_gatherv(tensors[1:], dim, sizes) if len(tensors) > 1 else []  # type: ignore[misc]
        return [first, *rest]

    def _tokens(self, x: Tensor, sizes: Sequence[int] | None) -> int:
        return len(x) * self.world_size if sizes is None else sum(sizes)  # type: ignore[attr-defined]

    def destroy(self) -> None:
        """Close the Communicator. vLLM calls this when it exits."""
        if self.flashcomm_experts is not None:
            self.flashcomm_experts.comm.close()
        super().destroy()  # type: ignore[misc]


def _create(device_comm: Any) -> ExpertExchange | None:
    """Create the exchanges of a new device communicator; None if vLLM keeps its own. Collective over the group.

    Raises:
        FlashcommError: On all workers that called this, if one did not, or has other settings.
    """
    if not format_setting() or device_comm.unique_name.split(":")[0] not in GROUPS or device_comm.world_size == 1:
        return None
    config = vllm_group.admitted(device_comm, lambda: f", experts {WireFormat.parse(format_setting())}")
    if config is None:
        return None
    if vllm_group.batch_invariant():
        vllm_group.keep_own(device_comm, "batch-invariant mode is on, but small exchanges are not low-bit")
        return None
    hidden_size, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
    settings = vllm_group.settings_for(config, hidden_size, device_comm.world_size)
    comm = Communicator(
        device_comm.device_group, format_setting(), device=device_comm.device.type, measure="off", **settings
    )
    exchange = ExpertExchange(comm, hidden_size)
    exchange.warm_up(dtype)
    return exchange
