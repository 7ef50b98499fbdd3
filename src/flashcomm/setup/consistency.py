"""How ranks make sure they are about to do the same thing: an error is raised on all of them or on none.

Settings are compared once, when a Communicator is made. Calls are compared every time where a peer's mistake would
otherwise kill the process (gloo aborts on a message of unexpected size): each rank sends 128 bytes that say what it is
about to do, looks at everybody's, and all come to the same verdict. On GPUs that would stall the host, so it is off
there unless asked for.
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

from flashcomm.errors import FlashcommError, FormatError, InputError, SettingsError
from flashcomm.settings import Settings
from flashcomm.transports.process_group import ProcessGroupTransport, has_nccl
from flashcomm.wire.torch_codec import DTYPES

SETTINGS_BYTES = 2048
CALLS = ("all_reduce", "reduce_scatter", "all_gather", "all_reduce_add_rms_norm", "making a Communicator")
PLAIN = (Tensor, torch.nn.Parameter)  # whose memory is where they say; subclasses may only wrap others
_MAX_DIMS = 8
_WORDS = 16  # int64 per rank: version, call, its number, problem, settings, dtype, dims, up to 8 sizes, 1 spare
_VERSION = 1


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

    def text(self, x: Any, device: torch.device, world_size: int) -> str:
        """For the rank whose tensor it is: what was given, what is allowed, what to do."""
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        return f"got {got}: {self.advice(device, world_size)}"

    def advice(self, device: torch.device, world_size: int) -> str:
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return {
            Problem.NONE: "",
            Problem.NO_TENSOR: "a torch.Tensor is needed",
            Problem.DTYPE: f"the dtype must be one of {dtypes}; convert it, or use torch.distributed for it",
            Problem.DEVICE: f"the tensor must be on {device} for this group's backend; move it there",
            Problem.LAYOUT: "the tensor must be dense (strided); call .to_dense()",
            Problem.GRADIENT: "flashcomm is for inference and has no gradient; use torch.no_grad() or .detach()",
            Problem.DIVIDE: f"dimension 0 must exist and be a multiple of the world size {world_size}; pad it",
            Problem.OUT: "out= must be contiguous, writable and like x in shape, dtype and device; leave it out",
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


def problem_with(name: str, x: Any, device: torch.device, world_size: int, out: Any = None) -> Problem:
    """What is wrong with this rank's tensor for the call `name`, if anything."""
    if not isinstance(x, Tensor):
        return Problem.NO_TENSOR
    if x.dtype not in DTYPES:
        return Problem.DTYPE
    if x.device.type != device.type or x.device.index not in (None, device.index):
        return Problem.DEVICE
    if x.layout != torch.strided:
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
        and out.is_contiguous()
        and not (out.requires_grad and torch.is_grad_enabled())
        and (torch.is_inference_mode_enabled() or not out.is_inference())
    ):
        return Problem.OUT
    return Problem.NONE


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


def agree_on_call(
    transport: ProcessGroupTransport, name: str, x: Any, problem: Problem, number: int, settings: object
) -> None:
    """Return if every rank is about to make this very call; otherwise raise the same InputError on all of them.

    settings: what else must be equal: the settings of the Communicator, in which another one of the same group differs,
    and the format of this call; anything whose `repr` says it all.
    """
    words = [_VERSION, CALLS.index(name), number, int(problem), _digest(settings)]
    if isinstance(x, Tensor) and problem not in (Problem.DTYPE, Problem.DIMS):
        words += [DTYPES.index(x.dtype), x.dim(), *x.shape]
    mine = torch.tensor(words + [0] * (_WORDS - len(words)), dtype=torch.int64)
    rows = _gather(transport, mine.view(torch.uint8), f"agreement on {name}").view(torch.int64).tolist()
    if all(row == rows[0] for row in rows) and not rows[0][3]:
        return
    lines = []
    for rank, (_, call, count, code, digest, dtype, dims, *sizes) in enumerate(rows):
        what = f"{CALLS[call]} number {count}" + (", of other settings or format," if digest != rows[0][4] else "")
        if CALLS[call] == CALLS[-1]:
            lines.append(f"  rank {rank}: {CALLS[call]}")
        elif code:
            lines.append(f"  rank {rank}: {what}: {Problem(code).advice(transport.device, transport.world_size)}")
        else:
            lines.append(f"  rank {rank}: {what} of {tuple(sizes[:dims])} {str(DTYPES[dtype]).removeprefix('torch.')}")
    raise InputError("the ranks did not make the same valid call; nothing was sent:\n" + "\n".join(lines))


def agree_on_settings(transport: ProcessGroupTransport, mine: Settings | FlashcommError) -> Settings:
    """This rank's settings, if they are valid and equal on every rank; otherwise the same error on all of them."""
    agree_on_call(transport, CALLS[-1], None, Problem.NONE, 0, None)  # a peer may be in a call of another Communicator
    said: dict[str, Any]
    if isinstance(mine, Settings):
        said = {"device": transport.device.type} | mine.as_dict()
    else:
        text = str(mine).encode("ascii", "replace").decode()[: SETTINGS_BYTES // 2]
        said = {"error": text, "kind": type(mine).__name__}
    payload = json.dumps(said).encode()
    if len(payload) > SETTINGS_BYTES:
        raise SettingsError(f"settings of {len(payload)} bytes; {SETTINGS_BYTES} are allowed")
    padded = torch.frombuffer(bytearray(payload.ljust(SETTINGS_BYTES)), dtype=torch.uint8)
    everybody = [json.loads(bytes(row.tolist())) for row in _gather(transport, padded, "comparing settings")]
    errors = [(rank, s) for rank, s in enumerate(everybody) if "error" in s]
    if errors:
        ranks = ", ".join(str(rank) for rank, _ in errors)
        kind = FormatError if errors[0][1]["kind"] == "FormatError" else SettingsError
        raise kind(f"rank {ranks}: {errors[0][1]['error']}")
    differing = [key for key in everybody[0] if any(s[key] != everybody[0][key] for s in everybody)]
    if differing or not isinstance(mine, Settings):
        told = "\n".join(
            f"  {k}: " + ", ".join(f"rank {r} {s[k]!r}" for r, s in enumerate(everybody)) for k in differing
        )
        raise SettingsError(f"settings differ between ranks; give all of them the same:\n{told}")
    return mine


def _digest(settings: object) -> int:
    """32 bits that differ between Communicators of different settings and calls of different formats."""
    return zlib.crc32(repr(settings).encode())


def _gather(transport: ProcessGroupTransport, mine: Tensor, what: str) -> Tensor:
    """uint8 (world, n) on the CPU: every rank's `mine` (n,). Waits for it on the host."""
    sent = transport.n_bytes_sent
    out = torch.empty((transport.world_size, mine.numel()), dtype=torch.uint8, device=transport.device)
    transport.all_gather(out, mine.to(transport.device), what, overlap=False).wait()
    transport.n_bytes_sent = sent  # the counter is of messages
    return out.cpu()


def tell(transport: ProcessGroupTransport, mine: Any, what: str) -> list[Any]:
    """Every rank's `mine`, anything that JSON holds, in rank order. Collective, twice: lengths, then texts."""
    text = json.dumps(mine).encode()
    length = torch.tensor([len(text)], dtype=torch.int64).view(torch.uint8)
    size = max(int(row.view(torch.int64).item()) for row in _gather(transport, length, what))
    padded = torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist())) for row in _gather(transport, padded, what)]
