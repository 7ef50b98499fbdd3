"""Consistency checks: ranks compare what they are about to do, and an error is raised on all of them or on none.

Settings and versions are compared once, when a Communicator is made. Calls are compared every time on CPUs, where a
message of unexpected size makes gloo abort the process. Each rank sends 128 bytes that describe its call and compares
those of all ranks, so that all come to the same decision. On GPUs that would stall the host, so it is off unless asked
for.

All that ranks send each other here is integers and JSON. Nothing is unpickled or evaluated.
"""

from __future__ import annotations

import enum
import json
import math
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.errors import FlashcommError, FormatError, InputError, SettingsError, UnavailableError
from flashcomm.settings import Settings
from flashcomm.transports.process_group import CHECK_TAG, ProcessGroupTransport, has_nccl
from flashcomm.wire.torch_codec import DTYPES

CALLS = ("all_reduce", "reduce_scatter", "all_gather", "all_reduce_add_rms_norm", "making a Communicator")
PLAIN = (Tensor, torch.nn.Parameter)  # whose memory is where they say; subclasses may only wrap others
_MAX_DIMS = 8
_WORDS = 16  # int64 per rank: version, Communicator, call, its number, problem, settings, dtype, dims, up to 8 sizes
_VERSION = 2  # of these words
_MAX_ERROR = 2000  # characters of a rank's error that the others are told


class Problem(enum.IntEnum):
    """Why a rank cannot take part in a call with its tensor."""

    NONE = 0
    NO_TENSOR = 1
    DTYPE = 2
    DEVICE = 3
    LAYOUT = 4
    GRADIENT = 5
    DIVIDE = 6
    DIMS = 7
    OUT = 8
    FORMAT = 9
    MEMORY = 10
    RESIDUAL = 11
    WEIGHT = 12
    EPS = 13
    OVERLAP = 14
    WHOLE = 15

    def text(self, x: Any, device: torch.device, world_size: int) -> str:
        """For the rank whose tensor it is: what was given, what is allowed, what to do."""
        plain = isinstance(x, Tensor) and not x.is_nested  # nested tensors have no shape
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}" if plain else type(x).__name__
        return f"got {got}: {self.advice(device, world_size)}"

    def advice(self, device: torch.device, world_size: int) -> str:
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return {
            Problem.NONE: "",
            Problem.NO_TENSOR: "a torch.Tensor is needed",
            Problem.DTYPE: f"the dtype must be one of {dtypes}; convert it, or use torch.distributed for it",
            Problem.DEVICE: f"the tensor must be on {device} for this group's backend; move it there",
            Problem.LAYOUT: "the tensor must be dense (strided); call .to_dense(), or .values() of a nested tensor",
            Problem.GRADIENT: "flashcomm is for inference and has no gradient; use torch.no_grad() or .detach()",
            Problem.DIVIDE: f"dimension 0 must exist and be a multiple of the world size {world_size}; pad it",
            Problem.OUT: "out= must be contiguous, writable and like x in shape, dtype and device; leave it out",
            Problem.OVERLAP: "out= must not share memory with x, except that all_reduce takes x itself; leave it out",
            Problem.WHOLE: "whole= must be a number of values, at least those of x; leave it out",
            Problem.FORMAT: "format= is no wire format; give one such as 'int4-had', or leave it out",
            Problem.MEMORY: "a tensor with memory of its own is needed; of a DTensor give .to_local()",
            Problem.RESIDUAL: "residual must be like x in shape, dtype and device, dense and without a gradient",
            Problem.WEIGHT: "weight must be (hidden,), x being (..., hidden), like x in dtype and device, dense and "
            "without a gradient: use torch.no_grad()",
            Problem.EPS: "eps must be a finite number that is not negative, such as 1e-6",
            Problem.DIMS: f"at most {_MAX_DIMS} dimensions are supported; reshape it",
        }[self]


def group_device(group: dist.ProcessGroup, asked: str | None) -> torch.device:
    """The device of the tensors this group will be given: the one asked for, else CUDA under NCCL, else the CPU.

    Raises SettingsError for a device that cannot be had.
    """
    if asked not in (None, "cpu", "cuda"):
        raise SettingsError(f"device={asked!r}: allowed are 'cpu' and 'cuda'")
    if asked == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device='cuda' was asked for and torch finds no CUDA device: use device='cpu'")
    on_gpu = asked == "cuda" or (asked is None and torch.cuda.is_available() and has_nccl(group))
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def result_shape(op: str, shape: tuple[int, ...], world_size: int) -> tuple[int, ...]:
    """The shape that a collective makes of an input's, on every rank."""
    if op == "all_gather":
        return (shape[0] * world_size, *shape[1:])
    return (shape[0] // world_size, *shape[1:]) if op == "reduce_scatter" else shape


def problem_with(
    name: str, x: Any, device: torch.device, world_size: int, out: Any = None, whole: object = None
) -> Problem:
    """What is wrong with this rank's arguments for the call `name`, if anything."""
    if not isinstance(x, Tensor):
        return Problem.NO_TENSOR
    if x.dtype not in DTYPES:
        return Problem.DTYPE
    if x.device.type != device.type or x.device.index not in (None, device.index):
        return Problem.DEVICE
    if x.layout != torch.strided or x.is_nested:
        return Problem.LAYOUT
    if type(x) not in PLAIN and x.numel() and x.data_ptr() == 0:
        return Problem.MEMORY
    if x.requires_grad and torch.is_grad_enabled():
        return Problem.GRADIENT
    if x.dim() > _MAX_DIMS:
        return Problem.DIMS
    if name in ("reduce_scatter", "all_gather") and (
        x.dim() == 0 or (name == "reduce_scatter" and x.shape[0] % world_size)
    ):
        return Problem.DIVIDE
    if out is not None and not (
        isinstance(out, Tensor)
        and out.shape == result_shape(name, tuple(x.shape), world_size)
        and (out.dtype, out.device) == (x.dtype, x.device)
        and out.layout == torch.strided
        and out.is_contiguous()
        and not out.is_neg()
        and not (out.requires_grad and torch.is_grad_enabled())
        and (torch.is_inference_mode_enabled() or not out.is_inference())
    ):
        return Problem.OUT
    if out is not None and _overlap(x, out) and not (name == "all_reduce" and _same_memory(x, out)):
        return Problem.OVERLAP
    if whole is not None and (not isinstance(whole, int) or whole < max(1, x.numel())):
        return Problem.WHOLE
    return Problem.NONE


def _same_memory(x: Tensor, out: Tensor) -> bool:
    return x.data_ptr() == out.data_ptr() and x.is_contiguous()


def _overlap(x: Tensor, out: Tensor) -> bool:
    """Whether the memory from the first value of x to its last meets that of out, which is contiguous."""
    if not x.numel() or not out.numel():
        return False
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    begin, end = x.data_ptr(), x.data_ptr() + span * x.element_size()
    return begin < out.data_ptr() + out.numel() * out.element_size() and out.data_ptr() < end


def problem_beside(x: Any, residual: Any, weight: Any, eps: Any, device: torch.device, world_size: int) -> Problem:
    """What is wrong with this rank's arguments of all_reduce_add_rms_norm, if anything; x's faults come first."""
    problem = problem_with("all_reduce_add_rms_norm", x, device, world_size)
    if problem:
        return problem
    for other, shape, wrong in (
        (residual, x.shape, Problem.RESIDUAL),
        (weight, x.shape[-1:], Problem.WEIGHT),
    ):
        if problem_with("all_reduce_add_rms_norm", other, device, world_size):
            return wrong
        if (other.shape, other.dtype, other.device) != (shape, x.dtype, x.device):
            return wrong
    if x.dim() == 0:
        return Problem.WEIGHT
    return Problem.NONE if isinstance(eps, (int, float)) and 0 <= eps < math.inf else Problem.EPS


def check_call(
    transport: ProcessGroupTransport, name: str, x: Any, problem: Problem, number: int, settings: object
) -> None:
    """Return if every rank is about to make this very call; otherwise raise the same InputError on all of them.

    Args:
        transport: Of the Communicator.
        name: One of CALLS.
        x: This rank's tensor.
        problem: What is wrong with it.
        number: Of the call.
        settings: What else must be equal: the settings of the Communicator and the format of this call. Anything whose
            `repr` says it all.
    """
    words = [CALLS.index(name), number, int(problem), _digest(settings)]
    if problem == Problem.NONE and isinstance(x, Tensor):  # others may have no shape, or too long a one
        words += [DTYPES.index(x.dtype), x.dim(), *x.shape]
    rows = _exchange_words(transport, transport.tags.communicator, words, f"the consistency check of {name}")
    if all(row == rows[0] for row in rows) and not rows[0][4]:
        return
    raise InputError(_differences(rows, transport))


def check_settings(transport: ProcessGroupTransport, n_made: int, mine: Settings | FlashcommError) -> Settings:
    """This rank's settings, if they are valid and equal on every rank; otherwise raise the same error on all of them.

    Also gives the Communicator its number, the same on all ranks.

    Args:
        transport: Of the Communicator that is being made.
        n_made: How many Communicators of this group this rank knows.
        mine: The settings, or why there are none.
    """
    # A peer may be in a call of another Communicator instead. Ranks that failed to make one may count differently.
    rows = _exchange_words(
        transport, n_made, [CALLS.index(CALLS[-1])], "the consistency check of making a Communicator"
    )
    if any(row[0] != rows[0][0] or row[2] != rows[0][2] for row in rows):
        raise InputError(_differences(rows, transport))
    transport.tags.communicator = max(row[1] for row in rows)
    transport.tags.begin(0)
    everybody = tell(transport, _described(transport, mine), "comparing settings")
    errors = [(rank, s) for rank, s in enumerate(everybody) if "error" in s]
    if errors:
        ranks = ", ".join(str(rank) for rank, _ in errors)
        kind = FormatError if errors[0][1]["kind"] == "FormatError" else SettingsError
        raise kind(f"rank {ranks}: {errors[0][1]['error']}")
    keys = list(dict.fromkeys(key for s in everybody for key in s))  # another version may have more of them, or fewer
    differing = [key for key in keys if any(s.get(key) != everybody[0].get(key) for s in everybody)]
    if differing or not isinstance(mine, Settings):
        lines = "\n".join(
            f"  {k}: " + ", ".join(f"rank {r} {s.get(k, 'not known')!r}" for r, s in enumerate(everybody))
            for k in differing
        )
        what = "versions" if any("version" in key for key in differing) else "settings"
        raise SettingsError(f"{what} differ between ranks; give all of them the same:\n{lines}")
    return mine


def tell(transport: ProcessGroupTransport, mine: Any, what: str) -> list[Any]:
    """Every rank's `mine`, in rank order. Collective: two exchanges, of lengths and of texts.

    Args:
        transport: Among these ranks.
        mine: Anything that JSON holds.
        what: The phase, for error messages.

    Raises:
        UnavailableError: A rank came here by `tell_failure`; the same on all ranks.
    """
    return _tell(transport, {"value": mine}, what)


def tell_failure(transport: ProcessGroupTransport, error: Exception) -> None:
    """Make every rank's `tell`, this one's included, raise UnavailableError with this rank's error."""
    _tell(transport, {"error": f"{type(error).__name__}: {error}"[:_MAX_ERROR]}, "telling of a failure")


def _tell(transport: ProcessGroupTransport, mine: dict[str, Any], what: str) -> list[Any]:
    text = json.dumps(mine).encode()
    length = torch.tensor([len(text)], dtype=torch.int64).view(torch.uint8)
    size = max(int(row.view(torch.int64).item()) for row in _gather(transport, length, what))
    padded = torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)
    everybody = [json.loads(bytes(row.tolist())) for row in _gather(transport, padded, what)]
    if errors := [f"rank {rank}: {said['error']}" for rank, said in enumerate(everybody) if "error" in said]:
        raise UnavailableError(f"a rank failed while the ranks set up what they share: {'; '.join(errors)}")
    return [said["value"] for said in everybody]


def _described(transport: ProcessGroupTransport, mine: Settings | FlashcommError) -> dict[str, Any]:
    """What `check_settings` compares: settings and versions, or this rank's error. JSON holds it."""
    from flashcomm import __version__  # here, as the package imports this module
    from flashcomm.wire.format import WIRE_VERSION

    if isinstance(mine, Settings):
        said = {"version": __version__, "wire version": WIRE_VERSION}
        said |= {"device": transport.device.type} | mine.as_dict()
        try:
            json.dumps(said)
            return said
        except (TypeError, ValueError) as why:  # a plan that is no text
            mine = SettingsError(f"{why}: settings must be text and numbers")
    return {"error": str(mine)[:_MAX_ERROR], "kind": type(mine).__name__}


def _exchange_words(
    transport: ProcessGroupTransport, communicator: int, words: list[int], what: str
) -> list[list[int]]:
    """Every rank's words. They have one size and one tag whatever the call, and so match those of any other call."""
    words = [_VERSION, communicator, *words]
    mine = torch.tensor(words + [0] * (_WORDS - len(words)), dtype=torch.int64)
    rows: list[list[int]] = _gather(transport, mine.view(torch.uint8), what, CHECK_TAG).view(torch.int64).tolist()
    return rows


def _differences(rows: list[list[int]], transport: ProcessGroupTransport) -> str:
    lines, told = [], next(row for row in rows if row[0] == _VERSION)
    for rank, (version, communicator, call, count, code, digest, dtype, dims, *sizes) in enumerate(rows):
        if version != _VERSION:
            lines.append(
                f"  rank {rank}: another version of flashcomm (consistency check {version}, here {_VERSION}): install "
                "the same version on all ranks"
            )
            continue
        if CALLS[call] == CALLS[-1]:
            lines.append(f"  rank {rank}: {CALLS[call]}")
            continue
        what = f"{CALLS[call]} number {count}"
        if any(row[1] != communicator for row in rows):
            what += f" of Communicator {communicator}"
        what += ", of other settings or format," if digest != told[5] else ""
        if code:
            lines.append(f"  rank {rank}: {what}: {Problem(code).advice(transport.device, transport.world_size)}")
        else:
            lines.append(f"  rank {rank}: {what} of {tuple(sizes[:dims])} {str(DTYPES[dtype]).removeprefix('torch.')}")
    return "the ranks did not make the same valid call; nothing was sent:\n" + "\n".join(lines)


def _digest(settings: object) -> int:
    """32 bits that differ between Communicators of different settings and calls of different formats."""
    return zlib.crc32(repr(settings).encode())


def _gather(transport: ProcessGroupTransport, mine: Tensor, what: str, tag: int | None = None) -> Tensor:
    """uint8 (world_size, n) on the CPU: every rank's `mine` (n,). Waits for it on the host."""
    sent = transport.n_bytes_sent
    out = torch.empty((transport.world_size, mine.numel()), dtype=torch.uint8, device=transport.device)
    transport.all_gather(out, mine.to(transport.device), what, overlap=False, tag=tag).wait()
    transport.n_bytes_sent = sent  # the counter is of messages
    return out.cpu()
