"""Plans: the wire format of each layer's all-reduce, and how its values are conditioned before they are quantized.

A plan is a JSON file, written by hand or by `flashcomm tune`. It is accepted wherever a format is:

    {"flashcomm_plan": 1,
     "format": "int6-had",                                  for layers that no pattern matches
     "decode": "int8",                                      optional: for all layers, at one token per sequence
     "layers": {"model.layers.29.mlp.down_proj": {"format": "int7-had/int6-had", "shift": "...", "offset": "..."},
                "*.mlp.down_proj": "int4-had"},             the first pattern that matches is used
     "model": {"model_type": "llama", "hidden_size": 576},  optional: the model that the plan was made for
     "made": {...}}                                         optional: how it was made, for human readers

Conditioning is per-channel scaling (as in SmoothQuant, here by powers of two) and mean removal. Each rank sends

    (x - channel_mean / world_size) * 2^scale_exponents          instead of x

The sum is scaled back, and the mean is added to it. The mean of a channel is the same for all tokens, so it need not
travel. Scaling gives more precision to channels whose errors affect the model most. The number of bytes on the wire
stays the same. In JSON, "shift" holds the exponents (int8) and "offset" the means (bfloat16), one per channel, both in
base64.
"""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcomm.errors import FormatError, PlanError
from flashcomm.wire.format import WireFormat

VERSION = 1
MAX_EXPONENT = 60  # of a channel's scale; 2^60 times any usual activation stays inside float32's range


@dataclass(frozen=True)
class LayerPlan:
    """The format of one layer and, optionally, its two conditioning vectors.

    Args:
        format: The wire format of the layer's all-reduce.
        scale_exponents: int8 (channels,), each between -60 and 60: channel c is multiplied by 2^scale_exponents[c].
        channel_mean: bfloat16 (channels,): the mean of the layer's summed output in each channel.
    """

    format: WireFormat
    scale_exponents: Tensor | None = None
    channel_mean: Tensor | None = None

    @property
    def shift(self) -> Tensor | None:
        """Deprecated name of `scale_exponents`."""
        _deprecated("LayerPlan.shift", "LayerPlan.scale_exponents")
        return self.scale_exponents

    @property
    def offset(self) -> Tensor | None:
        """Deprecated name of `channel_mean`."""
        _deprecated("LayerPlan.offset", "LayerPlan.channel_mean")
        return self.channel_mean


@dataclass
class Plan:
    """The format and the conditioning of every layer.

    Args:
        format: The format of layers that no pattern matches.
        decode: The format of all layers in the decode phase (see `is_decode`), or None to use each layer's own.
        layers: Maps patterns of module names (see `fnmatch`) to the plans of those layers. The first match is used.
        model: Fields of the model's configuration that `check` compares.
        made: How the plan was made, for human readers only.
    """

    format: WireFormat
    decode: WireFormat | None = None
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    _matched: dict[str, LayerPlan] = field(default_factory=dict, repr=False)
    _vectors: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, given: str | WireFormat | Plan | Path) -> Plan:
        """Return the plan that `given` stands for.

        Args:
            given: A plan, the path of a plan (a Path, or a string that ends in `.json`), or a format for every layer.

        Raises:
            PlanError: The file cannot be read, or is not a plan.
            FormatError: The format does not exist.
        """
        if isinstance(given, Plan):
            return given
        if isinstance(given, Path) or (isinstance(given, str) and given.strip().lower().endswith(".json")):
            return cls.load(given if isinstance(given, Path) else Path(given.strip()))
        return cls(WireFormat.parse(given))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: The file cannot be read, or is not a plan. The message names the invalid entry.
        """
        try:
            content = json.loads(path.read_text(), object_pairs_hook=_unique)
        except OSError as why:
            raise PlanError(f"no plan at {path}: {why.strerror}; `flashcomm tune` writes one") from why
        except PlanError as why:
            raise PlanError(f"{path}: {why}") from why
        except (ValueError, RecursionError) as why:
            raise PlanError(f"{path} is not valid JSON: {why}") from why
        try:
            return cls.from_dict(content)
        except (PlanError, FormatError) as why:
            raise PlanError(f"{path}: {why}") from why

    @classmethod
    def from_dict(cls, content: Any) -> Plan:
        """Return the plan of a decoded JSON object.

        Raises:
            PlanError: The object is not a plan.
            FormatError: It names a format that does not exist.
        """
        version = content.get("flashcomm_plan") if isinstance(content, Mapping) else None
        if type(version) is not int or version != VERSION:
            raise PlanError(f'not a plan: a JSON object with "flashcomm_plan": {VERSION} is needed')
        unknown = sorted(set(content) - {"flashcomm_plan", "format", "decode", "layers", "model", "made"})
        if unknown or "format" not in content:
            wrong = (
                f"unknown keys {', '.join(unknown)}" if unknown else 'no "format" for layers that no pattern matches'
            )
            raise PlanError(f"{wrong}; a plan has format, layers and optionally decode, model and made")
        if not all(isinstance(content.get(key, {}), Mapping) for key in ("layers", "model", "made")):
            raise PlanError('"layers", "model" and "made" must be JSON objects')
        return cls(
            WireFormat.parse(content["format"]),
            WireFormat.parse(content["decode"]) if content.get("decode") is not None else None,
            {pattern: _layer_from_json(pattern, entry) for pattern, entry in content.get("layers", {}).items()},
            dict(content.get("model", {})),
            dict(content.get("made", {})),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object that `from_dict` turns into this plan."""
        content: dict[str, Any] = {"flashcomm_plan": VERSION, "format": str(self.format)}
        if self.decode is not None:
            content["decode"] = str(self.decode)
        layers = {pattern: _layer_to_json(layer) for pattern, layer in self.layers.items()}
        return content | {"layers": layers, "model": self.model, "made": self.made}

    @property
    def digest(self) -> str:
        """A hash of 16 hex digits, by which ranks check that their plans have the same effect."""
        content = self.as_dict()
        acts = {key: content.get(key) for key in ("format", "decode", "layers")}
        return hashlib.sha256(json.dumps(acts).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the plan to a JSON file. Its folder is created if it does not exist."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def layer(self, name: str) -> LayerPlan:
        """Return the plan of the layer with this module name."""
        if name not in self._matched:
            matching = (layer for pattern, layer in self.layers.items() if fnmatchcase(name, pattern))
            self._matched[name] = next(matching, LayerPlan(self.format))
        return self._matched[name]

    def check(self, names: Sequence[str], config: Any = None) -> None:
        """Check that the plan fits a model.

        Args:
            names: The module names of the layers that end in an all-reduce.
            config: The model's configuration: an object whose attributes are compared with `model`.

        Raises:
            PlanError: A pattern matches none of the names, or the plan was made for another model.
        """
        for key, wanted in self.model.items():
            found = getattr(config, key, wanted)
            if found != wanted:
                raise PlanError(
                    f"the plan was made for a model with {key}={wanted}, this one has {found}: run `flashcomm tune`"
                )
        unmatched = [p for p in self.layers if not any(fnmatchcase(name, p) for name in names)]
        if unmatched:
            some = ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")
            raise PlanError(
                f"the plan names layers that the model does not have ({', '.join(unmatched[:3])}); it has {some}"
            )

    def format_of(self, name: str, x: Tensor) -> WireFormat:
        """Return the format of layer `name`'s all-reduce of x (..., channels)."""
        return self.decode if self.decode is not None and is_decode(x) else self.layer(name).format

    def before_reduce(self, name: str, x: Tensor, world_size: int) -> Tensor:
        """Condition a rank's input of a layer's low-bit all-reduce.

        Args:
            name: The layer's module name.
            x: (..., channels), this rank's partial sum.
            world_size: The number of ranks that take part.

        Returns:
            (x - channel_mean / world_size) * 2^scale_exponents, or x itself if the layer has no conditioning. It has
            x's dtype, but float32 for float16, because scaled values may exceed the range of float16.

        Raises:
            PlanError: The length of the vectors is not the number of channels.
        """
        layer = self.layer(name)
        if layer.scale_exponents is None or (self.decode is not None and is_decode(x)):
            return x
        if x.dtype == torch.float16:
            x = x.float()
        scale, _, mean_share, _ = self._vectors_for(name, layer, x, world_size)
        return (x - mean_share) * scale

    def after_reduce(self, name: str, total: Tensor, world_size: int, dtype: torch.dtype) -> Tensor:
        """Undo the conditioning after the all-reduce.

        Args:
            name: The layer's module name.
            total: (..., channels), the sum over ranks of what `before_reduce` returned.
            world_size: The number of ranks that took part.
            dtype: The dtype of the layer's output.

        Returns:
            total * 2^-scale_exponents + channel_mean, or total itself if the layer has no conditioning.
        """
        layer = self.layer(name)
        if layer.scale_exponents is None or (self.decode is not None and is_decode(total)):
            return total
        _, inverse, _, mean = self._vectors_for(name, layer, total, world_size)
        return (total * inverse + mean).to(dtype)

    def send(self, name: str, x: Tensor, world_size: int) -> Tensor:
        """Deprecated name of `before_reduce`."""
        _deprecated("Plan.send", "Plan.before_reduce")
        return self.before_reduce(name, x, world_size)

    def receive(self, name: str, total: Tensor, world_size: int, dtype: torch.dtype) -> Tensor:
        """Deprecated name of `after_reduce`."""
        _deprecated("Plan.receive", "Plan.after_reduce")
        return self.after_reduce(name, total, world_size, dtype)

    def _vectors_for(
        self, name: str, layer: LayerPlan, x: Tensor, world_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """2^exponents, 2^-exponents, a rank's share of the mean, and world_size times that share, in x's dtype."""
        key = (name, x.dtype, x.device, world_size)
        if key not in self._vectors:
            assert layer.scale_exponents is not None
            assert layer.channel_mean is not None
            if layer.scale_exponents.shape != x.shape[-1:]:
                raise PlanError(
                    f"the plan's vectors for {name} have {layer.scale_exponents.numel()} channels, the layer "
                    f"{x.shape[-1]}: it was made for another model"
                )
            with torch.inference_mode(False):  # a cached inference tensor could not be used outside inference mode
                exponents = layer.scale_exponents.to(x.device, torch.float32)
                share = (layer.channel_mean.to(x.device, torch.float32) / world_size).to(x.dtype)
                mean = (share.float() * world_size).to(x.dtype)  # exactly what all ranks together subtracted
                self._vectors[key] = exponents.exp2().to(x.dtype), (-exponents).exp2().to(x.dtype), share, mean
        return self._vectors[key]


def is_decode(x: Tensor) -> bool:
    """Return whether x is from the decode phase: one token per sequence, (batch, 1, channels), or a single row."""
    return x.dim() >= 2 and x.shape[-2] == 1


def _layer_from_json(pattern: str, entry: Any) -> LayerPlan:
    """The plan of a layer. entry: a format, or an object with a format and, optionally, the two vectors."""
    entry = {"format": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or "format" not in entry or set(entry) - {"format", "shift", "offset"}:
        raise PlanError(f'layer {pattern}: give a format, or an object with "format" and optionally "shift", "offset"')
    if ("shift" in entry) != ("offset" in entry):
        raise PlanError(f'layer {pattern}: give both "shift" and "offset", or neither')
    fmt = WireFormat.parse(entry["format"])
    if "shift" not in entry:
        return LayerPlan(fmt)
    exponents = _vector_from_json(pattern, "shift", entry["shift"], torch.int8)
    mean = _vector_from_json(pattern, "offset", entry["offset"], torch.bfloat16)
    if exponents.shape != mean.shape or int(exponents.int().abs().max()) > MAX_EXPONENT or not mean.isfinite().all():
        raise PlanError(
            f"layer {pattern}: shift and offset must be equally long, |shift| <= {MAX_EXPONENT} and offset finite"
        )
    return LayerPlan(fmt, exponents, mean)


def _vector_from_json(pattern: str, key: str, text: Any, dtype: torch.dtype) -> Tensor:
    try:
        raw = base64.b64decode(text, validate=True)
        return torch.frombuffer(bytearray(raw), dtype=dtype)
    except (TypeError, ValueError) as why:  # binascii.Error is a ValueError; so is a length that does not fit
        raise PlanError(f"layer {pattern}: {key} is not base64 of {dtype} values: {why}") from why


def _layer_to_json(layer: LayerPlan) -> Any:
    if layer.scale_exponents is None or layer.channel_mean is None:
        return str(layer.format)
    encoded = {
        key: base64.b64encode(bytes(vector.view(torch.uint8).tolist())).decode()
        for key, vector in (("shift", layer.scale_exponents), ("offset", layer.channel_mean))
    }
    return {"format": str(layer.format), **encoded}


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=3)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises PlanError if a key occurs twice: Python would silently keep the last one."""
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise PlanError(f"the key {twice!r} occurs twice in one object")
    return content
