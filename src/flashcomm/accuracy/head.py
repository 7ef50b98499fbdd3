"""Hidden states and logits of a model, computed apart.

Logits of a batch take many times the memory of its hidden states: with a vocabulary of 262,144, 1 GiB per 1,024 tokens.
So logits are computed for a few tokens at a time, from hidden states that may come from an earlier run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

PIECE_BYTES = 64 << 20  # of float32 logits; several tensors of this size exist at a time


class Head:
    """The last step of a transformers causal language model, from hidden states to logits.

    It runs the model's own `forward`, with the decoder replaced by its known output. So scaling and soft-capping of
    logits, and heads that are split over ranks, are those of the model.

    Args:
        model: A transformers model for causal language modeling.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.get_decoder()

    def hidden(self, **inputs: Tensor) -> Tensor:
        """Return the hidden states (n, length, channels) of `input_ids` or `inputs_embeds`."""
        return self.decoder(use_cache=False, **inputs).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the float32 logits (tokens, vocabulary) of hidden states (tokens, channels)."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        known = MoeModelOutputWithPast(last_hidden_state=hidden[None])  # what other models return, and router logits
        before = vars(self.decoder).get("forward")
        vars(self.decoder)["forward"] = lambda *args, **kwargs: known
        try:
            return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0].float()  # type: ignore[no-any-return]
        finally:
            del vars(self.decoder)["forward"]
            if before is not None:  # set by another wrapper
                vars(self.decoder)["forward"] = before

    def pieces(self, n_tokens: int) -> Iterator[slice]:
        """Cut tokens 0 to n_tokens into slices whose logits have at most `PIECE_BYTES`."""
        size = max(16, PIECE_BYTES // (4 * self.model.config.get_text_config().vocab_size))
        for begin in range(0, n_tokens, size):
            yield slice(begin, min(begin + size, n_tokens))
