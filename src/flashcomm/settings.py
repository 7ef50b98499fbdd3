"""The settings of a Communicator. A keyword argument wins over a `FLASHCOMM_*` variable, which wins over the default.

    FLASHCOMM_FORMAT       wire format                                          int6-had/int7-had
    FLASHCOMM_ALGORITHM    auto, backend, one_shot, two_shot or hierarchical    auto
    FLASHCOMM_LOCAL_WORLD  consecutive ranks per node, for hierarchical         the ranks of a host; on one host, those
                           (argument: local_world_size)                         whose GPUs are near the same CPUs
    FLASHCOMM_MIN_BYTES    the smallest message, in bytes, that `auto`          auto: by measured times, else
                           quantizes                                            `policy.MIN_BYTES`
    FLASHCOMM_TRANSPORT    auto, process_group, symmetric (GPU memory of        auto: symmetric, then host_memory; on
                           peers), host_memory (pinned, GPUs of one host),      CPUs process_group
                           cpu_shared (a test double for GPUs, on CPUs)
    FLASHCOMM_WORKSPACE_BYTES  memory of a rank that its peers write to;        256M (host_memory uses at most 72M)
                           a larger message takes several launches
    FLASHCOMM_HOST_WORKERS the most multiprocessors that quantize, send         auto: 32 or 48, by format and size
                           and sum a message over host_memory
    FLASHCOMM_CHUNK_BYTES  message bytes per chunk (process_group)              4M on CPUs, 32M on GPUs
    FLASHCOMM_TIMEOUT_S    seconds to wait for a peer                           60
    FLASHCOMM_CHECK        1: ranks compare shapes before every call            on for CPUs, off for GPUs
    FLASHCOMM_MEASURE      measure times when a Communicator is created: auto,  auto
                           where there are none, on GPUs over NCCL; off; anew,
                           again in each process
    FLASHCOMM_VERIFY       N: compare the result of every Nth call with the     0: never
                           reference, and raise an error if it is wrong
    FLASHCOMM_DEBUG        info: log each route at its first use, and its       off
                           calls and bytes at the 10th, 100th, ... use

They are read when a Communicator is created, and must be equal on all ranks of its group.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from flashcomm.errors import SettingsError
from flashcomm.routing import policy
from flashcomm.wire.format import WireFormat

DEFAULT_FORMAT = "int6-had/int7-had"  # the fewest bits that cost at most 1 % (docs/accuracy.md)
TRANSPORTS = ("auto", "process_group", "symmetric", "host_memory", "cpu_shared")
ALGORITHMS = (policy.AUTO, *policy.ALGORITHMS)
_RENAMED = {"native": "backend", "host": "host_memory", "shared": "cpu_shared"}  # values of flashcomm 0.1
NAMES = (
    *("FORMAT", "ALGORITHM", "MIN_BYTES", "TRANSPORT", "WORKSPACE_BYTES", "CHUNK_BYTES", "TIMEOUT_S", "CHECK"),
    *("DEBUG", "LOCAL_WORLD", "HOST_WORKERS", "MEASURE", "VERIFY"),
)
MOST_HOST_WORKERS = 128  # equal to `gpu.host_sync.MAX_WORKERS`
_ELSEWHERE = ("GRADIENTS", "EXPERT_FORMAT")  # read by integrations.process_group and integrations.vllm_experts
_ARGUMENTS = {name: name.lower() for name in NAMES} | {"LOCAL_WORLD": "local_world_size"}
_PREFIX = "FLASHCOMM_"
_SIZE = re.compile(r"([0-9]{1,18})\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


class Arguments(TypedDict, total=False):
    """The settings that are keyword arguments of `Communicator`. None counts as not given."""

    algorithm: str | None
    min_bytes: int | str | None
    transport: str | None
    workspace_bytes: int | str | None
    chunk_bytes: int | str | None
    timeout_s: float | None
    check: bool | None
    debug: str | None
    local_world_size: int | None
    host_workers: int | str | None
    measure: str | None
    verify: int | str | None


@dataclass(frozen=True)
class Settings:
    """The settings of one Communicator, resolved and checked. Ranks compare them.

    Attributes:
        fmt: The wire format as text, because ranks compare text.
        algorithm: "auto" or one of `policy.ALGORITHMS`.
        min_bytes: The smallest message, in bytes, that is quantized, or "auto".
        transport: One of `TRANSPORTS`.
        workspace_bytes: Bytes of memory that peers write to.
        chunk_bytes: Message bytes per chunk over `process_group`.
        timeout_s: Seconds to wait for a peer.
        check: Whether ranks compare every call before it runs.
        debug: "off" or "info".
        local_world_size: Consecutive ranks per node; 0 if not set.
        host_workers: The most multiprocessors that work on a message over `host_memory`; 0 if not set.
        measure: "auto", "off" or "anew": whether creating a Communicator measures times.
        verify: The result of every call whose number this divides is compared with the reference; 0: of none.
        plan: The digest of the plan that the caller follows, or "".
    """

    fmt: str
    algorithm: str
    min_bytes: int | str
    transport: str
    workspace_bytes: int
    chunk_bytes: int
    timeout_s: float
    check: bool
    debug: str
    local_world_size: int = 0
    host_workers: int = 0
    measure: str = "auto"
    verify: int = 0
    plan: str = ""

    @property
    def format(self) -> WireFormat:
        """The wire format."""
        return WireFormat.parse(self.fmt)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields by name, as text and numbers that JSON can hold."""
        return asdict(self)

    @classmethod
    def resolve(cls, device_type: str, environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """Return the settings that arguments, environment and defaults give. Warn of unknown FLASHCOMM_* variables.

        Args:
            device_type: "cpu" or "cuda", where the group's tensors are. Some defaults depend on it.
            environ: The environment. None: `os.environ`.
            **given: Keyword arguments, see `Arguments`. None counts as not given.

        Raises:
            FormatError: The format does not exist.
            SettingsError: A setting is unknown, or its value is not allowed.
        """
        if "local_world" in given:
            warnings.warn("local_world= is now local_world_size=", DeprecationWarning, stacklevel=3)
            given["local_world_size"] = given.pop("local_world")
        unknown = sorted(set(given) - set(_ARGUMENTS.values()))
        if unknown:
            raise SettingsError(f"unknown settings {', '.join(unknown)}: allowed are {', '.join(_ARGUMENTS.values())}")
        env = os.environ if environ is None else environ
        warn_unknown(env)

        def value(name: str, default: Any) -> Any:
            argument = _ARGUMENTS[name]
            return given[argument] if given.get(argument) is not None else env.get(_PREFIX + name, default)

        cpu = device_type == "cpu"
        return cls(
            fmt=_format(value("FORMAT", DEFAULT_FORMAT)),
            algorithm=_one_of("algorithm", value("ALGORITHM", "auto"), ALGORITHMS),
            min_bytes=least if (least := value("MIN_BYTES", "auto")) == "auto" else parse_size("min_bytes", least),
            transport=_one_of("transport", value("TRANSPORT", "auto"), TRANSPORTS),
            workspace_bytes=parse_size("workspace_bytes", value("WORKSPACE_BYTES", 256 << 20), least=4 << 20),
            chunk_bytes=parse_size("chunk_bytes", value("CHUNK_BYTES", 4 << 20 if cpu else 32 << 20), least=1),
            timeout_s=_seconds(value("TIMEOUT_S", 60.0)),
            check=_flag("check", value("CHECK", cpu)),
            debug=_one_of("debug", value("DEBUG", "off"), ("off", "info")),
            local_world_size=_ranks(value("LOCAL_WORLD", None)),
            host_workers=_workers(value("HOST_WORKERS", "auto")),
            measure=_one_of("measure", value("MEASURE", "auto"), ("auto", "off", "anew")),
            verify=_calls(value("VERIFY", 0)),
        )


def warn_unknown(environ: Mapping[str, str]) -> None:
    """Warn of every FLASHCOMM_* variable that is not a setting: it is probably misspelled."""
    for name in sorted(environ):
        if name.startswith(_PREFIX) and name[len(_PREFIX) :] not in (*NAMES, *_ELSEWHERE):
            known = ", ".join(_PREFIX + n for n in NAMES)
            warnings.warn(f"{name} is not a flashcomm setting and is ignored; the settings are {known}", stacklevel=3)


def parse_size(name: str, value: int | str, least: int = 0) -> int:
    """Parse a number of bytes such as 65536, '64K', '16M' or '1GiB' (powers of 1024).

    Raises:
        SettingsError: It is not a number of bytes, or less than `least`.
    """
    match = _SIZE.fullmatch(str(value).strip())
    size = int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2].lower()] if match else -1
    if size < least:
        raise SettingsError(f"{name}={value!r}: give a number of bytes of at least {least}, such as 65536, 64K or 16M")
    return size


def _format(value: Any) -> str:
    if str(value).strip().lower().endswith(".json"):
        raise SettingsError(
            f"format={value!r} is a plan with a format for each layer; a Communicator has one format. Pass plans to an "
            "integration: flashcomm.integrations.transformers.enable, or backend='flashcomm'"
        )
    return str(WireFormat.parse(value))


def _seconds(value: float | str) -> float:
    try:
        plain = not isinstance(value, str) or re.fullmatch(r"[0-9.e+-]{1,30}", value.strip())  # not "1_0"
        seconds = float(value) if plain else 0.0
    except (TypeError, ValueError, OverflowError):
        seconds = 0.0
    if not 1e-3 <= seconds < 1e7:  # torch.distributed counts milliseconds, and 0 of them mean no time-out
        raise SettingsError(f"timeout_s={value!r}: give a number of seconds from 0.001 to 1e7")
    return seconds


def _workers(value: int | str) -> int:
    text = str(value).strip()
    if text != "auto" and not (re.fullmatch(r"[0-9]{1,3}", text) and 0 < int(text) <= MOST_HOST_WORKERS):
        raise SettingsError(f"host_workers={value!r}: give a number from 1 to {MOST_HOST_WORKERS}, or auto")
    return 0 if text == "auto" else int(text)


def _calls(value: int | str) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", str(value).strip()):
        raise SettingsError(f"verify={value!r}: give N to verify every Nth call, or 0")
    return int(value)


def _ranks(value: int | str | None) -> int:
    if value is not None and not re.fullmatch(r"0*[1-9][0-9]{0,8}", str(value).strip()):
        raise SettingsError(f"local_world_size={value!r}: give the number of ranks per node")
    return 0 if value is None else int(value)


def _flag(name: str, value: bool | str) -> bool:
    return value if isinstance(value, bool) else _one_of(name, value, ("0", "1")) == "1"


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value in _RENAMED and _RENAMED[value] in allowed:
        warnings.warn(f"{name}={value!r} is now {_RENAMED[value]!r}", DeprecationWarning, stacklevel=4)
        value = _RENAMED[value]
    if value not in allowed:
        raise SettingsError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    return value
