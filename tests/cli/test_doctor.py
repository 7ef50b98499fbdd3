"""`flashcomm doctor`."""

from __future__ import annotations

import pytest
import torch
from command_line import as_json, flashcomm, process, refused

from flashcomm.cli import doctor
from flashcomm.errors import UnavailableError
from flashcomm.routing.route import Machine
from flashcomm.routing.timings import Timings
from flashcomm.settings import Settings


def test_json() -> None:
    got = as_json(flashcomm("doctor", "--world", 3, "--format", "int4", "--row", 576, "--json"))
    assert set(got) == {"machine", "versions", "paths", "settings", "accuracy", "predicted", "choices"}
    assert got["predicted"] == "GPUs only; try `flashcomm predict --gpu NAME --world N`"
    assert got["paths"]["table of times"] == "none: rules of thumb; `flashcomm calibrate` measures"
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
    assert "predicted: GPUs only" in done.stdout.splitlines()[-1]
    assert "FLASHCOMM_MIN_BYTE is not a flashcomm setting" in done.stderr


def test_refusals() -> None:
    refused(flashcomm("doctor", "--device", "cuda"), "no CUDA device")


def test_on_gpus_it_shows_what_real_ranks_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among it the pair that failed the self-test, and times that were measured at set-up."""
    table = Timings(
        "measured at set-up on 2 x G", (1 << 12, 1 << 27), {"backend": (9.0, 900.0), "int4 one_shot": (3.0, 300.0)}
    )
    pair = "the self-test failed: rank 1 got 3 wrong values from rank 0"
    asked = []

    def run_ranks(*args: object, **options: object) -> Machine:
        asked.append((args, options))
        return Machine("host_memory", table, (("symmetric", pair),))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor, "run_ranks", run_ranks)
    settings = Settings.resolve("cuda", {}, format="int4")
    found = doctor.examine(2, 4096, 2, settings, "cuda")
    assert asked == [((doctor.machine_of, 2, ("int4",)), {"quiet": True, "device": "cuda"})]
    assert found["paths"]["chosen transport"] == "host_memory"
    assert found["paths"]["symmetric"] == f"no: {pair}"
    assert found["paths"]["table of times"] == "measured at set-up on 2 x G"
    assert all(c["not"]["symmetric"] == pair for c in found["choices"])
    assert [c["path"] for c in found["choices"] if c["size"] == 1 << 24] == ["one_shot"]

    def fail(*args: object, **options: object) -> None:
        raise UnavailableError("rank 0: no memory")

    monkeypatch.setattr(doctor, "run_ranks", fail)
    monkeypatch.setattr(doctor.discovery, "candidates", lambda *_: [])
    monkeypatch.setattr(doctor.discovery, "machine_name", lambda _: "G")
    monkeypatch.setattr(doctor.discovery, "locality", lambda _: ["host", ""])
    assert doctor.examine(2, 4096, 2, settings, "cuda")["paths"]["ranks"] == "no: rank 0: no memory"
