"""`flashcomm bench epilogue`: the all-reduce with residual and RMS norm behind it, in one launch and apart.

Per format, and for the backend's own all-reduce (format bf16, `native`):

    fused             all_reduce_add_rms_norm; `note` says whether it is one launch here
    then ours         the all-reduce, then our own kernel for add and norm, in new tensors
    then vllm         the all-reduce, then vLLM's fused_add_rms_norm, in place, where vllm is installed
    then flashinfer   the same of FlashInfer, where it is installed
    then compiled     the all-reduce, then add and norm in torch, compiled; on GPUs

Every case is verified before it is timed: ours bit for bit with `flashcomm.reference`, those of others by the error of
their own roundings, and all ranks with each other. How they are timed: see `timing`. `speedup` is over the fastest way
apart of the same format, size and mode; `over_native` over the fastest way behind the backend's own all-reduce.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm import epilogue, reference
from flashcomm.cli import timing
from flashcomm.cli.bench import BLOCK_NUMEL, example
from flashcomm.cli.launch import RankContext
from flashcomm.cli.peers import Way, agreed, first_line
from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError
from flashcomm.wire.format import WireFormat

EPS = 1e-6
Norm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of total, residual, weight; may be in place
TOLERANCE = 0.02  # relative, root mean square, of ways that round in other places


class Layer(Way):
    """A way from x, residual and weight to normed and new residual; `run` gives the first."""

    equal = True
    exact = True  # its bits are those of `reference`
    one_launch = False
    weight: Tensor
    residuals: Sequence[Tensor] = ()

    def __init__(self, comm: Communicator | None, path: str, norm: Norm | None) -> None:
        self.comm, self.path, self.norm = comm, path, norm
        self.format = str(comm.format) if comm else "bf16"
        self.exact = comm is not None and path in ("fused", "then ours")

    def load(self, inputs: Sequence[Tensor]) -> None:
        """inputs: all messages, then all residuals, then the weight."""
        half = len(inputs) // 2
        self.inputs, self.first_residuals, self.weight = inputs[:half], inputs[half:-1], inputs[-1]
        self.residuals = [r.clone() for r in self.first_residuals]
        self.buffers = [x.clone() for x in self.inputs] if self.comm is None else self.inputs

    def refill(self, scale: float = 1.0) -> None:
        """Undo what was done in place; inputs are used as they are, each once in a sample."""
        for residual, first in zip(self.residuals, self.first_residuals, strict=True):
            residual.copy_(first)
        if self.comm is None:
            for buffer, x in zip(self.buffers, self.inputs, strict=True):
                buffer.copy_(x)

    def both(self, i: int) -> tuple[Tensor, Tensor]:
        """(normed, new residual) of input i."""
        x, residual = self.buffers[i], self.residuals[i]
        if self.norm is None:
            assert self.comm is not None
            return self.comm.all_reduce_add_rms_norm(x, residual, self.weight, EPS)
        if self.comm is None:
            dist.all_reduce(x)
            return self.norm(x, residual, self.weight)
        return self.norm(self.comm.all_reduce(x), residual, self.weight)

    def run(self, i: int) -> Tensor:
        return self.both(i)[0]


def layers(
    ctx: RankContext,
    formats: Sequence[str],
    sizes: Sequence[int],
    row: int,
    dtype: torch.dtype,
    turns: int,
    modes: Sequence[str],
    engines: Sequence[str],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """On every rank: `rows`, one per size, mode, format and path, and `unavailable`, why a path has none.

    What is being verified is emitted as it goes. Raises FlashcommError on every rank where a result is wrong.
    """
    norms, unavailable = _norms(ctx, dtype, row, engines)
    comms = [Communicator(None, f, device=ctx.device.type, **settings) for f in formats]
    ways = [Layer(None, path, norm) for path, norm in norms.items()]
    for comm in comms:
        ways += [Layer(comm, "fused", None), *(Layer(comm, path, norm) for path, norm in norms.items())]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        n_sets = timing.sets_for(size, ctx.device)
        shape = (max(1, size // dtype.itemsize // row), row)
        messages = [example(shape, dtype, i, ctx.rank).to(ctx.device) for i in range(n_sets)]
        residuals = [example(shape, dtype, 100 + i, 0).to(ctx.device) for i in range(n_sets)]
        weight = (example((row,), torch.float32, 99, 0) * 0.2 + 1).to(dtype).to(ctx.device)
        everyone = [messages[0] if r == 0 else example(shape, dtype, 0, r).to(ctx.device) for r in range(ctx.world)]
        for way in ways:
            ctx.emit({"size": size, "format": way.format, "path": way.path})
            way.load([*messages, *residuals, weight])
            _verify(ctx, way, everyone)
        del everyone
        timings = timing.measure(ctx, ways, modes, n_sets, n_sets, turns)
        for way, taken in zip(ways, timings, strict=True):
            if taken.no_graph:
                unavailable[f"{way.format} {way.path} in a graph"] = taken.no_graph
        for mode in modes:
            timed = [(w, t.seconds[mode]) for w, t in zip(ways, timings, strict=True) if mode in t.seconds]
            rows += [_row(way, seconds, timed, mode, shape, dtype, ctx.world) for way, seconds in timed]
    return {"rows": rows, "unavailable": unavailable}


def _norms(
    ctx: RankContext, dtype: torch.dtype, row: int, engines: Sequence[str]
) -> tuple[dict[str, Norm], dict[str, str]]:
    """What can follow an all-reduce here, by path, and why the rest cannot. Collective."""
    found: dict[str, Norm] = {"then ours": lambda t, r, w: epilogue.add_rms_norm(t, r, w, EPS)}
    missing: dict[str, str] = {}
    for name in engines:
        make, path = ENGINES[name], f"then {name}"
        norm, why = None, "for CUDA tensors only" if ctx.device.type != "cuda" else None
        if why is None:
            try:
                norm = make()
                example = [torch.ones(s, dtype=dtype, device=ctx.device) for s in ((16, row), (16, row), (row,))]
                norm(*example)
            except Exception as error:  # whatever another project raises: it is told, and this path left out
                why = first_line(error)
        why = agreed(why)
        if norm is not None and why is None:
            found[path] = norm
        else:
            missing[path] = why or ""
    return found, missing


def _vllm() -> Norm:
    if not importlib.util.find_spec("vllm"):
        raise ModuleNotFoundError("vllm is not installed")
    importlib.import_module("vllm._custom_ops")

    def norm(total: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(total, residual, weight, EPS)
        return total, residual

    return norm


def _flashinfer() -> Norm:
    if not importlib.util.find_spec("flashinfer"):
        raise ModuleNotFoundError("flashinfer is not installed")
    in_place = importlib.import_module("flashinfer.norm").fused_add_rmsnorm

    def norm(total: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        in_place(total, residual, weight, EPS)
        return total, residual

    return norm


def _compiled() -> Norm:
    def plain(total: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        summed = total + residual
        y = summed.float()
        inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
        return weight * (y * inverse).to(total.dtype), summed

    return torch.compile(plain)


ENGINES: dict[str, Callable[[], Norm]] = {"vllm": _vllm, "flashinfer": _flashinfer, "compiled": _compiled}


def _verify(ctx: RankContext, way: Layer, everyone: Sequence[Tensor]) -> None:
    """Raise FlashcommError on every rank where a way's results for the first input are wrong or differ between ranks.

    everyone: every rank's input.
    """
    way.refill()
    before = _launches(way)
    got = way.both(0)
    way.one_launch = _launches(way) > before
    residual, problem = way.first_residuals[0], None
    off = torch.zeros(4, dtype=torch.float64, device=ctx.device)  # squares of errors and of what is right, for both
    step = max(1, BLOCK_NUMEL // residual.shape[-1])
    for at in range(0, residual.shape[0] if ctx.rank == 0 else 0, step):
        parts, mine = [x[at : at + step] for x in everyone], [g[at : at + step] for g in got]
        want = reference.add_rms_norm(_total(way, parts, residual.shape), residual[at : at + step], way.weight, EPS)
        for k, (a, b) in enumerate(zip(mine, want, strict=True)):
            if way.exact and not torch.equal(a, b):
                problem = f"{int((a != b).sum())} values differ from the reference"
            off[2 * k] += (a.double() - b.double()).square().sum()
            off[2 * k + 1] += b.double().square().sum()
    if ctx.rank == 0 and not way.exact and bool((off[::2].sqrt() > TOLERANCE * off[1::2].sqrt()).any()):
        problem = f"squared errors {off.tolist()}"
    for mine_now in got:
        first = mine_now.clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, mine_now):
            problem = problem or "ranks differ"
    if (wrong := agreed(problem)) is not None:
        raise FlashcommError(f"{way.format} {way.path}: {wrong}")


def _launches(way: Layer) -> int:
    """How often its Communicator did all of it in one launch so far."""
    return sum(n for call, n in way.comm.calls.items() if "/fused " in call) if way.comm else 0


def _total(way: Layer, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """What the all-reduce of a message of that shape gives of these rows; natively: up to roundings."""
    route = way.comm.explain(shape, parts[0].dtype).route if way.comm else None
    if way.comm is None or route is None or route.algorithm in ("native", "copy"):
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(parts[0].dtype)
    return reference.all_reduce(route.algorithm, parts, WireFormat.parse(route.fmt), way.comm.machine.local_world)


def _row(
    way: Layer,
    seconds: float,
    timed: Sequence[tuple[Layer, float]],
    mode: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    world: int,
) -> dict[str, Any]:
    """Times in us; algbw in GB/s of the message's bytes."""
    apart = min((s for w, s in timed if w.comm is way.comm and w.path != "fused"), default=None)
    native = min((s for w, s in timed if w.comm is None), default=None)
    size = shape[0] * shape[1] * dtype.itemsize
    route = way.comm.explain(shape, dtype).route if way.comm else None
    return {
        "size": size,
        "count": shape[0] * shape[1],
        "row": shape[1],
        "type": str(dtype).removeprefix("torch."),
        "format": way.format,
        "world": world,
        "path": way.path,
        "mode": mode,
        "algorithm": route.algorithm if route else "native",
        "transport": str(getattr(route, "transport", "")),
        "time_us": round(seconds * 1e6, 1),
        "algbw": float(f"{size / seconds / 1e9:.4g}"),
        "speedup": round(apart / seconds, 3) if apart else None,
        "over_native": round(native / seconds, 3) if native else None,
        "note": "one launch" if way.one_launch else "",
    }
