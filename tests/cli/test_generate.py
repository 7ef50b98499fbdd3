"""`flashcomm generate`: a real model generates the same text on three ranks as on one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from command_line import MODEL, as_json, flashcomm, needs_model, process, refused

PROMPT = "Explain in two sentences why the sky is blue."

pytestmark = needs_model


def generate(fmt: object, world_size: int = 3, tokens: int = 8) -> dict[str, Any]:
    given = ("--world", world_size, "--format", fmt, "--prompt", PROMPT, "--tokens", tokens, "--min-bytes", 0)
    return as_json(flashcomm("generate", "--model", MODEL, *given, "--dtype", "fp32", "--json"))


def test_three_ranks_say_what_one_says() -> None:
    """Uncompressed and 8-bit all-reduces over 3 ranks give the tokens of a single process."""
    single, uncompressed, int8 = generate("none", world_size=1), generate("none"), generate("int8")
    assert single["text"].startswith("The sky is blue")
    assert uncompressed["tokens"] == single["tokens"]
    assert int8["tokens"] == single["tokens"]
    assert single["wire_bytes"] == 0
    assert int8["wire_bytes"] < 0.4 * uncompressed["wire_bytes"]  # one-shot at 8.3 bits, a ring at 32
    assert sum(int8["calls"].values()) == 60 * len(int8["tokens"])
    assert set(int8["calls"]) <= {"all_reduce/one_shot", "all_reduce/two_shot"}


def test_a_plan_with_a_format_for_decoding(tmp_path: Path) -> None:
    plan = {"flashcomm_plan": 1, "format": "int8", "decode": "none", "layers": {"*.o_proj": "int6-had"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    got = generate(tmp_path / "plan.json", tokens=4)
    assert len(got["tokens"]) == 4
    low_bit = sum(got["calls"].get(f"all_reduce/{name}", 0) for name in ("one_shot", "two_shot"))
    assert low_bit == 60  # the prompt
    assert sum(got["calls"].values()) == 4 * 60  # and three tokens


def test_torchrun() -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 3)
    given = ("--model", MODEL, "--world", 3, "--format", "int8", "--prompt", PROMPT, "--tokens", 4)
    assert as_json(process("generate", *given, "--json", launcher=torchrun))["world"] == 3


def test_refusals(tmp_path: Path) -> None:
    say = ("--prompt", "x", "--json")
    refused(flashcomm("generate", "--model", tmp_path / "none", *say), "no model directory at")
    refused(flashcomm("generate", "--model", tmp_path, *say), "0 GGUF files and no config.json")
    refused(flashcomm("generate", "--model", MODEL, "--world", 2, *say), "2 ranks cannot share", "--world 1, 3")
    refused(flashcomm("generate", "--model", MODEL, "--world", 3, "-f", "int4-g99", *say), "a group of 99 asked for")
    refused(flashcomm("generate", "--model", MODEL, *say, "--format", tmp_path / "no.json"), "no plan at")
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    refused(
        flashcomm("generate", "--model", broken, "--world", 3, *say), "is corrupt or cut short", "download it again"
    )
    (broken / "config.json").write_text("{not json")
    refused(flashcomm("generate", "--model", broken, "--world", 3, *say), "no readable model config")
