"""Consistency checks: ranks compare settings and calls. An error is raised on all ranks or on none.

Settings and versions are compared once, when a Communicator is created. On CPUs every call is compared, because gloo
aborts the process if a message has an unexpected size. Each rank sends 128 bytes that describe its call to all others
and compares those of all ranks, so that all ranks reach the same result. On GPUs the check would stall the host, so it
is off by default.

Ranks exchange only integers and JSON here. Nothing is unpickled or evaluated.
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

from flashcomm.collectives.recent import PLAIN
from flashcomm.errors import FlashcommError, FormatError, InputError, SettingsError, UnavailableError
from flashcomm.settings import Settings
from flashcomm.transports.process_group import CHECK_TAG, ProcessGroupTransport, has_nccl
from flashcomm.wire.split import Exchange, Split
from flashcomm.wire.torch_codec import DTYPES

CALLS = (
    *("all_reduce", "reduce_scatter", "all_gather", "all_reduce_add_rms_norm", "all_to_all_single"),
    "creating a Communicator",
)
# An all-to-all passes on values of these types, too.
PASSED_ON = (
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
_MAX_DIMS = 8
_WORDS = 16  # int64 per rank: version, Communicator, call, its number, problem, settings, dtype, dims, up to 8 sizes
_VERSION = 2  # of these words
_MAX_ERROR = 2000  # the most characters of an error that are sent to other ranks


class Problem(enum.IntEnum):
    """What is wrong with the arguments of a rank's call."""

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
    SIZES = 16
    SPLITS = 17

    def text(self, x: Any, device: torch.device, world_size: int) -> str:
        """Return the message for the rank itself: what was given, what is allowed, what to do."""
        plain = isinstance(x, Tensor) and not x.is_nested  # nested tensors have no shape
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}" if plain else type(x).__name__
        return f"got {got}: {self.advice(device, world_size)}"

    def advice(self, device: torch.device, world_size: int) -> str:
        """Return what is allowed and what to do. Other ranks can say this, too."""
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return {
            Problem.NONE: "",
            Problem.NO_TENSOR: "x must be a torch.Tensor",
            Problem.DTYPE: f"the dtype must be one of {dtypes}; convert the tensor, or use torch.distributed for it",
            Problem.DEVICE: f"the tensor must be on {device}, the device of this Communicator; move it there",
            Problem.LAYOUT: "the tensor must be dense (strided); call .to_dense(), or .values() of a nested tensor",
            Problem.GRADIENT: "flashcomm is for inference and computes no gradients; use torch.no_grad() or .detach()",
            Problem.DIVIDE: f"dimension 0 must exist and be a multiple of the world size {world_size}; pad it",
            Problem.OUT: "out= must be contiguous, writable and of the result's shape, dtype and device; leave it out",
            Problem.OVERLAP: "out= must not share memory with x, except that all_reduce accepts x itself; leave it out",
            Problem.WHOLE: "whole= must be a number of values, at least x.numel(); leave it out",
            Problem.SIZES: f"sizes= must be {world_size} numbers of rows, at least 0 and below 2 GiB a piece: for "
            "reduce_scatter they add up to x.shape[0], for all_gather each is the x.shape[0] of its rank",
            Problem.SPLITS: f"input_split_sizes and output_split_sizes must each be {world_size} numbers of rows, at "
            "least 0 and below 2 GiB a piece. The first add up to x.shape[0], the second to the rows of the result, "
            "and both say the same for this rank itself. Leave both out for equal pieces",
            Problem.FORMAT: "format= is not a wire format; give one such as 'int4-had', or leave it out",
            Problem.MEMORY: "the tensor must have memory of its own; of a DTensor give .to_local()",
            Problem.RESIDUAL: "residual must have x's shape, dtype and device, be dense and need no gradient",
            Problem.WEIGHT: "weight must have shape (hidden,) for x (..., hidden), x's dtype and device, be dense and "
            "need no gradient: use torch.no_grad()",
            Problem.EPS: "eps must be a finite number of at least 0, such as 1e-6",
            Problem.DIMS: f"at most {_MAX_DIMS} dimensions are supported; reshape the tensor",
        }[self]


def group_device(group: dist.ProcessGroup, asked: str | None) -> torch.device:
    """Return the device of a Communicator's tensors. By default it is CUDA if the group's backend is NCCL, else CPU.

    Args:
        group: The process group.
        asked: "cpu", "cuda", or None for the default.

    Raises:
        SettingsError: The device does not exist here.
    """
    if asked not in (None, "cpu", "cuda"):
        raise SettingsError(f"device={asked!r}: allowed are 'cpu' and 'cuda'")
    if asked == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device='cuda' was requested, but torch finds no CUDA device: use device='cpu'")
    on_gpu = asked == "cuda" or (asked is None and torch.cuda.is_available() and has_nccl(group))
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def result_shape(
    op: str, shape: tuple[int, ...], world_size: int, split: Split | Exchange | None = None, rank: int = 0
) -> tuple[int, ...]:
    """Return the shape of a collective's result, given that of this rank's input and the rows of each rank's piece."""
    if isinstance(split, Exchange):
        return (split.received.rows, *shape[1:])
    if split is not None:
        return (split.rows if op == "all_gather" else split.sizes[rank], *shape[1:])
    if op == "all_gather":
        return (shape[0] * world_size, *shape[1:])
    return (shape[0] // world_size, *shape[1:]) if op == "reduce_scatter" else shape


def problem_with(
    name: str,
    x: Any,
    device: torch.device,
    world_size: int,
    out: Any = None,
    whole: object = None,
    split: Split | Exchange | None = None,
    rank: int = 0,
) -> Problem:
    """Return what is wrong with this rank's arguments, or `Problem.NONE`.

    Args:
        name: One of `CALLS`.
        x: The input.
        device: The device of the Communicator.
        world_size: Ranks of the group.
        out: The output, or None.
        whole: See `Communicator.all_reduce`.
        split: The sizes of the call, not checked yet.
        rank: This rank.
    """
    if not isinstance(x, Tensor):
        return Problem.NO_TENSOR
    if x.dtype not in DTYPES and not (name == "all_to_all_single" and x.dtype in PASSED_ON):
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
        x.dim() == 0 or (name == "reduce_scatter" and split is None and x.shape[0] % world_size)
    ):
        return Problem.DIVIDE
    row_bytes = math.prod(x.shape[1:]) * x.element_size()
    if name == "all_to_all_single" and not (
        isinstance(split, Exchange) and split.fits(len(x), rank, world_size, row_bytes)
    ):
        return Problem.SPLITS
    if isinstance(split, Split) and not (
        split.fits(world_size, row_bytes) and x.shape[0] == (split.sizes[rank] if name == "all_gather" else split.rows)
    ):
        return Problem.SIZES
    if out is not None and not (
        isinstance(out, Tensor)
        and out.shape == result_shape(name, tuple(x.shape), world_size, split, rank)
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
    """Return whether the memory from x's first value to its last overlaps that of out, which is contiguous."""
    if not x.numel() or not out.numel():
        return False
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    begin, end = x.data_ptr(), x.data_ptr() + span * x.element_size()
    return begin < out.data_ptr() + out.numel() * out.element_size() and out.data_ptr() < end


def problem_with_add_rms_norm(
    x: Any, residual: Any, weight: Any, eps: Any, device: torch.device, world_size: int
) -> Problem:
    """Return what is wrong with this rank's arguments of all_reduce_add_rms_norm, x first, or `Problem.NONE`."""
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
    transport: ProcessGroupTransport,
    name: str,
    x: Any,
    problem: Problem,
    number: int,
    settings: object,
    rows: int | None = None,
) -> None:
    """Compare this call with those of all ranks. Collective.

    Args:
        transport: The transport of the Communicator.
        name: One of `CALLS`.
        x: This rank's tensor.
        problem: What is wrong with this rank's arguments.
        number: The number of the call.
        settings: Other values that must be equal, such as the settings of the Communicator and the format of the call.
            Their `repr` is compared.
        rows: What is compared in place of dimension 0, if that may differ between ranks.

    Raises:
        InputError: On all ranks, if calls differ or any rank has a problem.
    """
    words = [CALLS.index(name), number, int(problem), _digest(settings)]
    if problem == Problem.NONE and isinstance(x, Tensor):  # otherwise the shape may be missing or too long
        words += [(*DTYPES, *PASSED_ON).index(x.dtype), x.dim(), *x.shape]
        words[6:7] = words[6:7] if rows is None else [rows]
    everyone = _exchange_words(transport, transport.tags.communicator, words, f"the consistency check of {name}")
    if all(row == everyone[0] for row in everyone) and not everyone[0][4]:
        return
    raise InputError(_differences(everyone, transport))


def exchange_of(x: Any, out: Any, received: object, sent: object, world_size: int) -> Exchange | None:
    """Return the splits of an all-to-all, not checked yet; None if x has no rows or no splits follow from it.

    Args:
        x: The input.
        out: The output, or None.
        received: Rows from each rank. None: equal pieces of out or, if there is none, of a result like x.
        sent: Rows for each rank. None: equal pieces of x.
        world_size: Ranks of the group.
    """
    if not isinstance(x, Tensor) or x.is_nested or x.dim() == 0 or (received is None and sent is not None is out):
        return None
    like = out if isinstance(out, Tensor) and not out.is_nested and out.dim() else x
    splits = Split.of(sent) or Split.even(len(x), world_size), Split.of(received) or Split.even(len(like), world_size)
    return Exchange(*splits, explicit=sent is not None or received is not None)


def check_exchange(transport: ProcessGroupTransport, mine: Exchange) -> None:
    """Compare the splits of an all-to-all with those of all ranks. Collective.

    Raises:
        InputError: On all ranks, if a rank expects other rows than its peer sends.
    """
    n = transport.world_size
    words = torch.tensor([*mine.sent.sizes, *mine.received.sizes], dtype=torch.int64).view(torch.uint8)
    rows = _gather(transport, words, "comparing splits").view(torch.int64).view(n, 2, n)
    sent, received = rows[:, 0], rows[:, 1].t()
    wrong = [f"  rank {i} sends {sent[i, j]} rows to rank {j}, which expects {received[i, j]}"
             for i, j in (sent != received).nonzero().tolist()]  # fmt: skip
    if wrong:
        raise InputError("the splits of all_to_all_single differ; nothing was sent:\n" + "\n".join(wrong))


def check_settings(transport: ProcessGroupTransport, n_made: int, mine: Settings | FlashcommError) -> Settings:
    """Compare the settings of a new Communicator with those of all ranks, and number it. Collective.

    Args:
        transport: The transport of the new Communicator. Its number, equal on all ranks, is set in `transport.tags`.
        n_made: Number of Communicators that this rank has created for the group.
        mine: This rank's settings, or the error that they raised.

    Returns:
        This rank's settings.

    Raises:
        FormatError, SettingsError: On all ranks, if settings are wrong on any rank or differ between ranks.
        InputError: On all ranks, if a rank is in another call instead.
    """
    # A peer may be in a call of another Communicator. Ranks may have different counts if creating one failed.
    rows = _exchange_words(
        transport, n_made, [CALLS.index(CALLS[-1])], "the consistency check of creating a Communicator"
    )
    if any(row[0] != rows[0][0] or row[2] != rows[0][2] for row in rows):
        raise InputError(_differences(rows, transport))
    transport.tags.communicator = max(row[1] for row in rows)
    transport.tags.begin(0)
    described = exchange(transport, _described(transport, mine), "comparing settings")
    errors = [(rank, s) for rank, s in enumerate(described) if "error" in s]
    if errors:
        ranks = ", ".join(str(rank) for rank, _ in errors)
        kind = FormatError if errors[0][1]["kind"] == "FormatError" else SettingsError
        raise kind(f"rank {ranks}: {errors[0][1]['error']}")
    keys = list(dict.fromkeys(key for s in described for key in s))  # other versions may have more settings, or fewer
    differing = [key for key in keys if any(s.get(key) != described[0].get(key) for s in described)]
    if differing or not isinstance(mine, Settings):
        lines = "\n".join(
            f"  {k}: " + ", ".join(f"rank {r} {s.get(k, 'not known')!r}" for r, s in enumerate(described))
            for k in differing
        )
        what = "versions" if any("version" in key for key in differing) else "settings"
        raise SettingsError(f"{what} differ between ranks; use the same on all ranks:\n{lines}")
    return mine


def exchange(transport: ProcessGroupTransport, mine: Any, what: str) -> list[Any]:
    """Gather a value from every rank. Collective: two exchanges, of lengths and of texts.

    Args:
        transport: The transport among the ranks.
        mine: This rank's value: anything that JSON can hold.
        what: The phase, for error messages.

    Returns:
        The values of all ranks, in rank order.

    Raises:
        UnavailableError: On all ranks, if any rank called `exchange_failure` instead.
    """
    return _exchange(transport, {"value": mine}, what)


def exchange_failure(transport: ProcessGroupTransport, error: Exception) -> None:
    """Take part in an `exchange` with an error: all ranks, this one included, raise UnavailableError with its text."""
    _exchange(transport, {"error": f"{type(error).__name__}: {error}"[:_MAX_ERROR]}, "reporting a failure")


def _exchange(transport: ProcessGroupTransport, mine: dict[str, Any], what: str) -> list[Any]:
    text = json.dumps(mine).encode()
    length = torch.tensor([len(text)], dtype=torch.int64).view(torch.uint8)
    size = max(int(row.view(torch.int64).item()) for row in _gather(transport, length, what))
    padded = torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)
    answers = [json.loads(bytes(row.tolist())) for row in _gather(transport, padded, what)]
    if errors := [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]:
        raise UnavailableError(f"a rank failed while the ranks created a Communicator: {'; '.join(errors)}")
    return [answer["value"] for answer in answers]


def _described(transport: ProcessGroupTransport, mine: Settings | FlashcommError) -> dict[str, Any]:
    """Return what `check_settings` compares, for JSON: settings and versions, or this rank's error."""
    from flashcomm import __version__  # not at the top, because the package imports this module
    from flashcomm.wire.format import WIRE_VERSION

    if isinstance(mine, Settings):
        described = {"version": __version__, "wire version": WIRE_VERSION}
        described |= {"device": transport.device.type} | mine.as_dict()
        try:
            json.dumps(described)
            return described
        except (TypeError, ValueError) as why:  # such as a `plan` that is not text
            mine = SettingsError(f"{why}: settings must be text and numbers")
    return {"error": str(mine)[:_MAX_ERROR], "kind": type(mine).__name__}


def _exchange_words(
    transport: ProcessGroupTransport, communicator: int, words: list[int], what: str
) -> list[list[int]]:
    """Gather every rank's words. Their size and tag are the same for all calls, so that different calls match, too."""
    words = [_VERSION, communicator, *words]
    mine = torch.tensor(words + [0] * (_WORDS - len(words)), dtype=torch.int64)
    rows: list[list[int]] = _gather(transport, mine.view(torch.uint8), what, CHECK_TAG).view(torch.int64).tolist()
    return rows


def _differences(rows: list[list[int]], transport: ProcessGroupTransport) -> str:
    lines, reference = [], next(row for row in rows if row[0] == _VERSION)
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
        what += ", with other settings or another format," if digest != reference[5] else ""
        if code:
            lines.append(f"  rank {rank}: {what}: {Problem(code).advice(transport.device, transport.world_size)}")
        else:
            shape, kind = sizes[:dims], str((*DTYPES, *PASSED_ON)[dtype]).removeprefix("torch.")
            shown = tuple(shape) if CALLS[call] != "all_to_all_single" else f"(rows, {', '.join(map(str, shape[1:]))})"
            lines.append(f"  rank {rank}: {what} of {shown} {kind}")
    return "the ranks did not make the same valid call; nothing was sent:\n" + "\n".join(lines)


def _digest(settings: object) -> int:
    """Return 32 bits that differ if settings or formats differ."""
    return zlib.crc32(repr(settings).encode())


def _gather(transport: ProcessGroupTransport, mine: Tensor, what: str, tag: int | None = None) -> Tensor:
    """Gather uint8 (n,) from every rank into uint8 (world_size, n) on the CPU. Blocks the host."""
    sent = transport.n_bytes_sent
    out = torch.empty((transport.world_size, mine.numel()), dtype=torch.uint8, device=transport.device)
    transport.all_gather(out, mine.to(transport.device), what, overlap=False, tag=tag).wait()
    transport.n_bytes_sent = sent  # the counter does not include checks
    return out.cpu()
