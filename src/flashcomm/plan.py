"""Plans: which wire format each layer's all-reduce takes, and how its values are conditioned for it.

A plan is a JSON file, written by hand or by `flashcomm tune`, and goes wherever a format goes:

    {"flashcomm_plan": 1,
     "format": "int6-had",                                  layers that no pattern names
     "decode": "int8",                                      optional: messages of one token a sequence, all layers
     "layers": {"model.layers.29.mlp.down_proj": {"format": "int7-had/int6-had", "shift": "...", "offset": "..."},
                "*.mlp.down_proj": "int4-had"},             the first pattern that matches counts
     "model": {"model_type": "llama", "hidden_size": 576},  optional: what it was made for
     "made": {...}}                                         optional: how it was made, for people

Conditioning costs nothing on the wire. Per channel of a row, each rank sends (x - offset / world) * 2^shift instead of
its x, and the sum is scaled back and the offset added: what is the same for all tokens (the offset, a channel's mean)
does not travel, and channels whose errors the model feels get more of the precision. `shift` is int8 and `offset`
bfloat16, a number per channel each, in base64.
"""

from __future__ import annotations

import base64
import hashlib
import json
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


@dataclass(frozen=True)
class LayerPlan:
    """One layer's part: its format, and the conditioning vectors (both or neither), of the row's length.

    shift: int8, |shift| <= 60; offset: bfloat16.
    """

    format: WireFormat
    shift: Tensor | None = None
    offset: Tensor | None = None


@dataclass
class Plan:
    """Formats by layer; see the module. `layers` maps patterns (`fnmatch`) to parts, the first match counts."""

    format: WireFormat
    decode: WireFormat | None = None
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    _found: dict[str, LayerPlan] = field(default_factory=dict, repr=False)
    _vectors: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, given: str | WireFormat | Plan | Path) -> Plan:
        """A plan as it is, one read from a `.json` file, or a format for every layer. Raises PlanError, FormatError."""
        if isinstance(given, Plan):
            return given
        if isinstance(given, Path) or (isinstance(given, str) and given.strip().lower().endswith(".json")):
            return cls.load(given if isinstance(given, Path) else Path(given.strip()))
        return cls(WireFormat.parse(given))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a file. Raises PlanError saying which part of it is wrong."""
        try:
            said = json.loads(path.read_text(), object_pairs_hook=_unique)
        except OSError as why:
            raise PlanError(f"no plan at {path}: {why.strerror}; `flashcomm tune` writes one") from why
        except PlanError as why:
            raise PlanError(f"{path}: {why}") from why
        except (ValueError, RecursionError) as why:
            raise PlanError(f"{path} is no JSON that can be read: {why}") from why
        try:
            return cls.from_dict(said)
        except (PlanError, FormatError) as why:
            raise PlanError(f"{path}: {why}") from why

    @classmethod
    def from_dict(cls, said: Any) -> Plan:
        """The plan of a JSON object. Raises PlanError or FormatError."""
        if not isinstance(said, Mapping) or said.get("flashcomm_plan") != VERSION:
            raise PlanError(f'not a plan: a JSON object with "flashcomm_plan": {VERSION} is needed')
        unknown = sorted(set(said) - {"flashcomm_plan", "format", "decode", "layers", "model", "made"})
        if unknown or "format" not in said:
            wrong = f"unknown keys {', '.join(unknown)}" if unknown else 'no "format" for the layers not named'
            raise PlanError(f"{wrong}; a plan has format, layers and optionally decode, model and made")
        layers = said.get("layers", {})
        if not all(isinstance(said.get(key, {}), Mapping) for key in ("layers", "model", "made")):
            raise PlanError('"layers", "model" and "made" are objects')
        decode = WireFormat.parse(said["decode"]) if said.get("decode") is not None else None
        parts = {pattern: _layer(pattern, part) for pattern, part in layers.items()}
        return cls(
            WireFormat.parse(said["format"]), decode, parts, dict(said.get("model", {})), dict(said.get("made", {}))
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON object; `from_dict` of it is this plan."""
        said: dict[str, Any] = {"flashcomm_plan": VERSION, "format": str(self.format)}
        if self.decode is not None:
            said["decode"] = str(self.decode)
        return said | {
            "layers": {pattern: _said(part) for pattern, part in self.layers.items()},
            "model": self.model,
            "made": self.made,
        }

    @property
    def digest(self) -> str:
        """16 hex digits that differ between plans that do different things; ranks compare them."""
        said = self.as_dict()
        acts = {key: said.get(key) for key in ("format", "decode", "layers")}
        return hashlib.sha256(json.dumps(acts).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def layer(self, name: str) -> LayerPlan:
        """The part of the layer with this module name."""
        if name not in self._found:
            parts = (part for pattern, part in self.layers.items() if fnmatchcase(name, pattern))
            self._found[name] = next(parts, LayerPlan(self.format))
        return self._found[name]

    def check(self, names: Sequence[str], config: Any = None) -> None:
        """Raise PlanError unless every pattern names one of these layers and the model is the one it was made for."""
        for key, wanted in self.model.items():
            found = getattr(config, key, wanted)
            if found != wanted:
                raise PlanError(f"the plan was made for a model with {key}={wanted}, this one has {found}: tune anew")
        idle = [p for p in self.layers if not any(fnmatchcase(name, p) for name in names)]
        if idle:
            some = ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")
            raise PlanError(
                f"the plan names layers that the model does not have ({', '.join(idle[:3])}); it has {some}"
            )

    def format_of(self, name: str, x: Tensor) -> WireFormat:
        """The format of layer `name`'s all-reduce of x (..., row)."""
        return self.decode if self.decode is not None and is_decode(x) else self.layer(name).format

    def send(self, name: str, x: Tensor, world_size: int) -> Tensor:
        """What a rank of `world` gives to layer `name`'s all-reduce, if that is coded, for its x (..., row).

        Raises PlanError where the vectors do not fit the row.
        """
        part = self.layer(name)
        if part.shift is None or (self.decode is not None and is_decode(x)):
            return x
        if x.dtype == torch.float16:  # whose range a shift can leave
            x = x.float()
        up, _, share, _ = self._vectors_for(name, part, x, world_size)
        return (x - share) * up

    def receive(self, name: str, total: Tensor, world_size: int, dtype: torch.dtype) -> Tensor:
        """The layer's output, of the dtype that x had, out of the sum of what the ranks gave."""
        part = self.layer(name)
        if part.shift is None or (self.decode is not None and is_decode(total)):
            return total
        _, down, _, whole = self._vectors_for(name, part, total, world_size)
        return (total * down + whole).to(dtype)

    def _vectors_for(
        self, name: str, part: LayerPlan, x: Tensor, world_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """2^shift, 2^-shift, a rank's share of the offset, and `world` times that share, in x's dtype."""
        key = (name, x.dtype, x.device, world_size)
        if key not in self._vectors:
            assert part.shift is not None
            assert part.offset is not None
            if part.shift.shape != x.shape[-1:]:
                raise PlanError(
                    f"the plan's vectors for {name} have {part.shift.numel()} channels, the layer {x.shape[-1]}: "
                    "it was made for another model"
                )
            with torch.inference_mode(False):  # kept: what is made in inference mode cannot be used outside it
                shift = part.shift.to(x.device, torch.float32)
                share = (part.offset.to(x.device, torch.float32) / world_size).to(x.dtype)
                whole = (share.float() * world_size).to(x.dtype)
                self._vectors[key] = shift.exp2().to(x.dtype), (-shift).exp2().to(x.dtype), share, whole
        return self._vectors[key]


def is_decode(x: Tensor) -> bool:
    """Whether a message is of the decode phase: one token of each sequence, (batch, 1, row), or a single row."""
    return x.dim() >= 2 and x.shape[-2] == 1


def _layer(pattern: str, said: Any) -> LayerPlan:
    """A part of the JSON: a format, or an object with one and, optionally, the vectors."""
    part = {"format": said} if isinstance(said, str) else said
    if not isinstance(part, Mapping) or "format" not in part or set(part) - {"format", "shift", "offset"}:
        raise PlanError(f'layer {pattern}: give a format, or an object with "format" and optionally "shift", "offset"')
    if ("shift" in part) != ("offset" in part):
        raise PlanError(f'layer {pattern}: "shift" and "offset" go together')
    fmt = WireFormat.parse(part["format"])
    if "shift" not in part:
        return LayerPlan(fmt)
    shift, offset = (
        _vector(pattern, key, part[key], dtype) for key, dtype in (("shift", torch.int8), ("offset", torch.bfloat16))
    )
    if shift.shape != offset.shape or int(shift.int().abs().max()) > 60 or not bool(offset.isfinite().all()):
        raise PlanError(f"layer {pattern}: shift and offset must be equally long, |shift| <= 60 and offset finite")
    return LayerPlan(fmt, shift, offset)


def _vector(pattern: str, key: str, text: Any, dtype: torch.dtype) -> Tensor:
    try:
        raw = base64.b64decode(text, validate=True)
        return torch.frombuffer(bytearray(raw), dtype=dtype)
    except (TypeError, ValueError) as why:  # binascii.Error is a ValueError; so is a length that does not fit
        raise PlanError(f"layer {pattern}: {key} is not base64 of {dtype} values: {why}") from why


def _said(part: LayerPlan) -> Any:
    if part.shift is None or part.offset is None:
        return str(part.format)
    encoded = {
        key: base64.b64encode(bytes(vector.view(torch.uint8).tolist())).decode()
        for key, vector in (("shift", part.shift), ("offset", part.offset))
    }
    return {"format": str(part.format), **encoded}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises PlanError if a key comes twice, of which Python would keep the last."""
    said = dict(pairs)
    if len(said) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise PlanError(f"the key {twice!r} comes twice in one object")
    return said
