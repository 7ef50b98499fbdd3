"""Settings: where they come from, and what wrong ones say."""

from __future__ import annotations

import warnings

import pytest

from flashcomm.errors import SettingsError
from flashcomm.settings import Settings, parse_size


def test_argument_over_environment_over_default() -> None:
    env = {"FLASHCOMM_FORMAT": "int5", "FLASHCOMM_MIN_BYTES": "2K", "FLASHCOMM_CHECK": "0"}
    got = Settings.resolve("cpu", env)
    assert (got.fmt, got.min_bytes, got.check, got.algorithm) == ("int5", 2048, False, "auto")
    given = Settings.resolve("cpu", env, format="int4", min_bytes=7, check=True)
    assert (given.fmt, given.min_bytes, given.check) == ("int4", 7, True)
    default = Settings.resolve("cpu", {})
    assert (default.fmt, default.min_bytes, default.check) == ("int6-had/int7-had", "auto", True)
    assert (default.transport, default.workspace_bytes) == ("auto", 256 << 20)
    on_gpu = Settings.resolve("cuda", {"FLASHCOMM_TRANSPORT": "symmetric", "FLASHCOMM_WORKSPACE_BYTES": "32M"})
    assert (on_gpu.check, on_gpu.transport, on_gpu.workspace_bytes) == (False, "symmetric", 32 << 20)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FLASHCOMM_ALGORITHM": "ring"}, "algorithm='ring': allowed are auto, backend, one_shot, two_shot"),
        ({"FLASHCOMM_MIN_BYTES": "-1"}, "min_bytes='-1': give a number of bytes"),
        ({"FLASHCOMM_CHUNK_BYTES": "0"}, "chunk_bytes='0': give a number of bytes of at least 1"),
        (
            {"FLASHCOMM_TRANSPORT": "pigeon"},
            "transport='pigeon': allowed are auto, process_group, symmetric, host_memory, cpu_shared",
        ),
        ({"FLASHCOMM_WORKSPACE_BYTES": "1M"}, "workspace_bytes='1M': give a number of bytes of at least 4194304"),
        ({"FLASHCOMM_TIMEOUT_S": "soon"}, "timeout_s='soon': give a number of seconds"),
        ({"FLASHCOMM_TIMEOUT_S": "0"}, "timeout_s='0'"),
        ({"FLASHCOMM_TIMEOUT_S": "1_0"}, "timeout_s='1_0'"),
        ({"FLASHCOMM_TIMEOUT_S": "٦"}, "timeout_s="),
        ({"FLASHCOMM_TIMEOUT_S": "nan"}, "timeout_s="),
        ({"FLASHCOMM_MIN_BYTES": "٦٥٥٣٦"}, "min_bytes="),
        ({"FLASHCOMM_LOCAL_WORLD": "9" * 5000}, "local_world_size="),
        ({"FLASHCOMM_CHECK": "maybe"}, "check='maybe': allowed are 0, 1"),
        ({"FLASHCOMM_HOST_WORKERS": "0"}, "host_workers='0': give a number from 1 to 128, or auto"),
        ({"FLASHCOMM_HOST_WORKERS": "129"}, "host_workers='129': give a number from 1 to 128, or auto"),
        ({"FLASHCOMM_DEBUG": "loud"}, "debug='loud': allowed are off, info"),
    ],
)
def test_wrong_values_say_what_is_allowed(env: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        Settings.resolve("cpu", env)


def test_workers_over_host_memory() -> None:
    from flashcomm.settings import MOST_HOST_WORKERS

    assert Settings.resolve("cuda", {}).host_workers == 0
    assert Settings.resolve("cuda", {"FLASHCOMM_HOST_WORKERS": "24"}).host_workers == 24
    assert Settings.resolve("cuda", {}, host_workers=MOST_HOST_WORKERS).host_workers == 128


def test_a_plan_is_no_format() -> None:
    with pytest.raises(SettingsError, match=r"format='p\.json' is a plan with a format for each layer"):
        Settings.resolve("cpu", {"FLASHCOMM_FORMAT": "p.json"})


def test_misspelt_arguments_are_errors() -> None:
    with pytest.raises(SettingsError, match="unknown settings algoritm: allowed are format, algorithm"):
        Settings.resolve("cpu", {}, algoritm="two_shot")
    with pytest.raises(SettingsError, match="timeout_s="):
        Settings.resolve("cpu", {}, timeout_s=[1])


def test_unknown_names_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="FLASHCOMM_FROMAT is not a flashcomm setting"):
        Settings.resolve("cpu", {"FLASHCOMM_FROMAT": "int4"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Settings.resolve("cpu", {"FLASHCOMM_FORMAT": "int4", "OTHER": "x"})


def test_sizes() -> None:
    assert [parse_size("s", t) for t in ("7", "64K", "16M", "1GiB", "2kb", 5)] == [
        7,
        65536,
        16 << 20,
        1 << 30,
        2048,
        5,
    ]
