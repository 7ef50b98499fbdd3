"""The sensitivity of a model to rounding in each layer, from one backward pass instead of a run per layer and format.

A layer's all-reduce returns the exact sum plus an error e, one vector per token. The wire format determines e. Let g be
the gradient of a token's log-likelihood with respect to that output, for tokens drawn from the model itself. Then the
KL divergence of the next-token distribution from the uncompressed one is, to second order,

    KL = 1/2 E[(g . e)^2]   nats per token           (the Fisher information is the Hessian of KL)

Errors of different layers and steps are nearly independent, so their divergences add up. The real messages of each
layer are encoded in every format, which gives e and so the sensitivity of both steps. The divergence of a plan is the
sum of these. docs/accuracy.md compares such sums with measured divergences of SmolLM2-135M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashcomm import reference
from flashcomm.accuracy.head import Head
from flashcomm.accuracy.simulate import Progress, TensorParallel, no_progress, row_parallel_layers
from flashcomm.codecs import codec_for
from flashcomm.plan import LayerPlan, Plan
from flashcomm.wire.format import UNCOMPRESSED, StepFormat, WireFormat

NONE = WireFormat.parse(UNCOMPRESSED)
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # messages and gradients of all layers are kept for as many
STEPS = ("reduce", "gather")


@dataclass
class Sensitivities:
    """The effect of each (layer, step, format) alone: KL divergence in nats per token, signal-to-noise ratio in dB."""

    kl: dict[tuple[str, str, StepFormat], float] = field(default_factory=dict)
    snr_db: dict[tuple[str, str, StepFormat], float] = field(default_factory=dict)

    def kl_of(self, layer: str, fmt: WireFormat) -> float:
        """Return the KL divergence in nats per token if one layer's two-shot all-reduce has this format."""
        steps = zip(STEPS, (fmt.reduce, fmt.gather), strict=True)
        return sum(0.0 if step.uncompressed else self.kl[layer, name, step] for name, step in steps)


@dataclass
class _Seen:
    """A layer's partial sums in one batch, their total, and the gradient with respect to it: (tokens, row) each."""

    partials: list[Tensor]
    total: Tensor
    gradient: Tensor


def measure(
    model: Any,
    windows: Tensor,
    world_size: int,
    steps: Sequence[StepFormat],
    conditioning: dict[str, LayerPlan] | None = None,
    progress: Progress = no_progress,
) -> Sensitivities:
    """Measure the sensitivity of every row-parallel layer to each of `steps`.

    Args:
        model: A transformers model with a tensor-parallel plan.
        windows: Token ids (n, length) on the model's device; a few thousand tokens are enough.
        world_size: Ranks to simulate.
        steps: Formats. Each is measured for the reduce step and for the gather step.
        conditioning: The per-channel vectors by layer. Their formats are ignored.
        progress: Called after each step.
    """
    plan = Plan(
        NONE, layers={k: LayerPlan(NONE, v.scale_exponents, v.channel_mean) for k, v in (conditioning or {}).items()}
    )
    squares: dict[
        tuple[str, str, StepFormat], Tensor | float
    ] = {}  # sums stay on the device, because reading one blocks
    noise: dict[tuple[str, str, StepFormat], Tensor | float] = {}
    signal: dict[str, Tensor | float] = {}
    for seen in _batches(model, windows, world_size, "measuring sensitivity", progress):
        for name, part in seen.items():
            signal[name] = signal.get(name, 0.0) + part.total.square().sum(dtype=torch.float64)
            for step in steps:
                for which, error in zip(STEPS, _errors(plan, name, part, world_size, step), strict=True):
                    key = (name, which, step)
                    squares[key] = squares.get(key, 0.0) + (part.gradient * error).sum(1).square().sum(
                        dtype=torch.float64
                    )
                    noise[key] = noise.get(key, 0.0) + error.square().sum(dtype=torch.float64)
    found = Sensitivities()
    for key, square in squares.items():
        found.kl[key] = 0.5 * float(square) / windows.numel()
        found.snr_db[key] = 10 * math.log10(max(float(signal[key[0]]), 1e-300) / max(float(noise[key]), 1e-300))
    return found


def layer_rows(
    model: Any, windows: Tensor, world_size: int, formats: dict[str, WireFormat], progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """Return a row for each format and layer alone: KL divergence, and signal-to-noise ratios of both steps."""
    steps = dict.fromkeys(
        step for fmt in formats.values() for step in (fmt.reduce, fmt.gather) if not step.uncompressed
    )
    found = measure(model, windows, world_size, list(steps), progress=progress)

    def snr_db(layer: str, which: str, step: StepFormat) -> float | None:
        return None if step.uncompressed else round(found.snr_db[layer, which, step], 2)

    return [
        {
            "world": world_size,
            "layer": layer,
            "format": name,
            "kl": f"{found.kl_of(layer, fmt):.3e}",
            "reduce_snr_db": snr_db(layer, "reduce", fmt.reduce),
            "gather_snr_db": snr_db(layer, "gather", fmt.gather),
        }
        for name, fmt in formats.items()
        for layer in row_parallel_layers(model)
    ]


def condition(
    model: Any,
    windows: Tensor,
    world_size: int,
    progress: Progress = no_progress,
) -> dict[str, LayerPlan]:
    """Compute the per-channel scaling and mean removal of each layer from its outputs and gradients.

    channel_mean is each channel's mean over tokens. Tokens with a norm above four times the median (often the first of
    a text) are left out.

    scale_exponents are the nearest integers to log2(sqrt(g / s)), less their median. g is the root mean square of the
    gradient, and s^2 is the mean square of the output minus channel_mean^2. With this scaling, errors that are equal in
    all channels cause the least divergence.

    Args:
        model: A transformers model with a tensor-parallel plan.
        windows: Token ids (n, length) on the model's device.
        world_size: Ranks to simulate.
        progress: Called after each step.

    Returns:
        The vectors by layer.
    """
    count: dict[str, float] = {}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    gradient: dict[str, Tensor] = {}
    usual: dict[str, float] = {}
    for seen in _batches(model, windows, world_size, "conditioning", progress):
        for name, part in seen.items():
            size = part.total.norm(dim=1)
            usual[name] = usual.get(name) or size.median().item()
            kept = part.total[size <= 4 * usual[name]].double()
            zero = torch.zeros_like(part.total[0], dtype=torch.float64)
            count[name] = count.get(name, 0) + kept.shape[0]
            first[name] = first.get(name, zero) + kept.sum(0)
            second[name] = second.get(name, zero) + part.total.double().square().sum(0)
            gradient[name] = gradient.get(name, zero) + part.gradient.double().square().sum(0)
    out = {}
    for name, n in count.items():
        mean = first[name] / max(n, 1)
        spread = (second[name] / windows.numel() - mean.square()).clamp_min(1e-30)
        wanted = (gradient[name] / windows.numel()).clamp_min(1e-30).log2() / 4 - spread.log2() / 4
        exponents = (wanted - wanted.median()).round().clamp(-20, 20)
        out[name] = LayerPlan(NONE, exponents.to(torch.int8).cpu(), mean.to(torch.bfloat16).cpu())
    return out


def _errors(plan: Plan, name: str, seen: _Seen, world_size: int, step: StepFormat) -> tuple[Tensor, Tensor]:
    """Return the errors of the reduce step and of the gather step in format `step`: (tokens, row) each."""
    codec = codec_for(seen.total.device.type)
    sent = [plan.before_reduce(name, p, world_size) for p in seen.partials]
    exact = sum(sent[1:], sent[0])
    dtype = exact.dtype
    back = plan.after_reduce(name, exact, world_size, dtype)
    reduced = reference.quantized_sum(sent, step, codec).view(exact.shape)
    gathered = reference.quantized_sum([exact], step, codec).view(exact.shape)
    return (
        plan.after_reduce(name, reduced, world_size, dtype) - back,
        plan.after_reduce(name, gathered, world_size, dtype) - back,
    )


def _batches(model: Any, windows: Tensor, world_size: int, what: str, progress: Progress) -> Iterator[dict[str, _Seen]]:
    """Yield the messages and gradients of each layer, by batch. Labels are drawn from the model's output."""
    found: dict[str, tuple[list[Tensor], Tensor]] = {}

    def observe(name: str, partials: list[Tensor], total: Tensor) -> None:
        total.retain_grad()
        found[name] = [p.detach() for p in partials], total

    generator = torch.Generator(windows.device).manual_seed(0)
    head, batch_size = Head(model), max(1, BATCH_TOKENS[windows.device.type] // windows.shape[1])
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        for i, batch in enumerate(torch.split(windows, batch_size)):
            progress(what, i * batch_size, len(windows))
            found.clear()
            with TensorParallel(model, world_size, observer=observe), torch.enable_grad():
                embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
                hidden = head.hidden(inputs_embeds=embedded).flatten(0, 1)
                gradient = torch.empty_like(hidden)
                for piece in head.pieces(len(hidden)):
                    end = hidden[piece].detach().requires_grad_()
                    logits = head.logits(end)
                    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
                    assert end.grad is not None
                    gradient[piece] = end.grad
                hidden.backward(gradient)  # type: ignore[no-untyped-call]
            seen = {}
            for name, (partials, total) in found.items():
                assert total.grad is not None
                rows = total.shape[-1]
                tensors = [p.reshape(-1, rows).float() for p in (*partials, total.detach(), total.grad)]
                seen[name] = _Seen(tensors[:-2], *tensors[-2:])
            with torch.no_grad():
                yield seen
            seen.clear()  # before the next batch is run
        progress(what, len(windows), len(windows))
    finally:
        for p in frozen:
            p.requires_grad_(True)
