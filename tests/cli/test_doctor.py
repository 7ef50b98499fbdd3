"""`flashcomm doctor`."""

from __future__ import annotations

from command_line import as_json, flashcomm, process, refused


def test_json() -> None:
    got = as_json(flashcomm("doctor", "--world", 3, "--format", "int4", "--row", 576, "--json"))
    assert set(got) == {"machine", "versions", "paths", "settings", "accuracy", "choices"}
    assert got["accuracy"]["int4"].startswith("a plain format, as in the paper")
    assert got["accuracy"]["int6-had/int7-had"] == "raised perplexity by less than 1 % on every model measured"
    paths = {c["size"]: c["path"] for c in got["choices"]}
    assert paths[4096] == "backend"
    assert paths[1 << 24] == "two_shot"
    assert {c["format"] for c in got["choices"] if c["path"] == "two_shot"} == {"int4"}
    assert all(set(c["not"]) | {c["path"]} == {"backend", "one_shot", "two_shot"} for c in got["choices"])


def test_table_and_environment() -> None:
    done = process("doctor", FLASHCOMM_FORMAT="int5-g32", FLASHCOMM_MIN_BYTE="7")
    assert done.returncode == 0
    assert "as int5-g32, 2 ranks" in done.stdout
    assert "FLASHCOMM_MIN_BYTE is not a flashcomm setting" in done.stderr


def test_refusals() -> None:
    refused(flashcomm("doctor", "--device", "cuda"), "no CUDA device")
