"""Consistency checks: ranks compare settings and calls. An error is raised on all ranks or on none.

Settings and versions are compared once, when a Communicator is created. On CPUs every call is compared, because gloo
aborts the process if a message has an unexpected size. Each rank sends 128 bytes that describe its call to all others
and compares those of all ranks, so that all ranks reach the same result. On GPUs the check would stall the host, so it
is off by default.

Ranks exchange only integers and JSON here. Nothing is unpickled or evaluated.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcomm.errors import FlashcommError, FormatError, InputError, SettingsError, UnavailableError
from flashcomm.settings import Settings
from flashcomm.setup.call import PASSED_ON, Call, Problem
from flashcomm.transports.process_group import CHECK_TAG, ProcessGroupTransport, has_nccl
from flashcomm.wire.format import WireFormat
from flashcomm.wire.split import Exchange
from flashcomm.wire.torch_codec import DTYPES

CALLS = (
    *("all_reduce", "reduce_scatter", "all_gather", "all_reduce_add_rms_norm", "all_to_all_single"),
    "creating a Communicator",
)
_WORDS = 16  # int64 per rank: version, Communicator, call, its number, problem, settings, dtype, dims, up to 8 sizes
_VERSION = 2  # of these words
_MAX_ERROR = 2000  # the most characters of an error that are sent to other ranks


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


def agree(transport: ProcessGroupTransport, settings: Settings, call: Call, number: int, carrier: str) -> WireFormat:
    """Check a call, and with check=True compare it with those of all ranks. Collective then.

    Args:
        transport: The transport of the Communicator.
        settings: Its settings.
        call: This rank's call.
        number: The number of the call.
        carrier: The transport of low-bit messages.

    Returns:
        The wire format of the call.

    Raises:
        InputError: This rank's arguments are wrong. With check=True on all ranks, if any rank's are wrong or differ.
        FormatError: The same for the format, without check=True.
    """
    problem, fmt, unknown = call.problem(transport), settings.format, None
    try:
        fmt = settings.format if call.format is None else WireFormat.parse(call.format)
    except FormatError as why:
        unknown = why  # raised below, after all ranks exchanged it
        problem = problem or Problem.FORMAT
    if settings.check and transport.world_size > 1:
        words = [CALLS.index(call.op), number, int(problem), _digest((settings, fmt, call.same(carrier)))]
        if not problem:  # otherwise the shape may be missing or too long
            x = call.x
            words += [(*DTYPES, *PASSED_ON).index(x.dtype), x.dim(), *x.shape]
            words[6:7] = words[6:7] if call.rows is None else [call.rows]
        what = f"the consistency check of {call.op}"
        everyone = _exchange_words(transport, transport.tags.communicator, words, what)
        if any(row != everyone[0] for row in everyone) or everyone[0][4]:
            raise InputError(_differences(everyone, transport))
    elif problem == Problem.FORMAT and unknown:
        raise unknown
    elif problem:
        raise InputError(f"{call.op}: {problem.text(call.x, transport)}")
    return fmt


def check_exchange(transport: ProcessGroupTransport, settings: Settings, mine: Exchange | None) -> None:
    """Compare the splits of an all-to-all with those of all ranks, with check=True. Collective then.

    Raises:
        InputError: On all ranks, if a rank expects other rows than its peer sends.
    """
    if mine is None or not settings.check or transport.world_size == 1:
        return
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
            lines.append(f"  rank {rank}: {what}: {Problem(code).advice(transport)}")
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
