"""The model of time: constants are what results/ give, errors what the page says, formulas what links do."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from flashcomm.errors import InputError
from flashcomm.predict import fit, machines, model, report, schedule
from flashcomm.wire.format import WireFormat

ROOT = Path(__file__).parents[2]
PLAIN, INT4 = WireFormat.parse("none"), WireFormat.parse("int4")


def test_the_constants_are_what_the_measurements_give() -> None:
    assert json.loads(model.CONSTANTS.read_text()) == fit.fit(ROOT / "results")


def test_every_measurement_is_predicted() -> None:
    """The median is off by at most 10 %. The page names each file that has a row that is off by more than 25 %."""
    found = list(fit.check(ROOT / "results"))
    for m in found:
        print(f"{m.error:+7.1%}  {m.file}: {m.what}: measured {m.measured:.1f} us, predicted {m.predicted:.1f}")
    assert statistics.median(abs(m.error) for m in found) <= 0.10
    for file in {m.file for m in found}:
        assert statistics.median(abs(m.error) for m in found if m.file == file) <= 0.25, file
    page = (ROOT / "docs" / "predict.md").read_text().partition("What is off, and why:")[2].partition("\n## ")[0]
    explained = re.findall(r"`([\w.*-]+\.csv)`", page)
    assert {m.file for m in found if abs(m.error) > 0.25} == {
        path.name for pattern in explained for path in (ROOT / "results").glob(pattern)
    }
    measured = [path.name for path in (ROOT / "results").glob("*.csv") if re.match(r"allreduce|ttft|h200", path.name)]
    kinds = "before-after", "all-to-all", "all-gather", "reduce-scatter"
    others = {name for name in measured if any(kind in name for kind in kinds)}
    assert {m.file for m in found} == {*measured} - others


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_simulation_moves_the_bytes_of_the_formulas(ranks: int) -> None:
    """Each rank has a link of its own, or all share one."""
    n_bytes, row = 1 << 20, 4096
    encoded = model.sent_bytes("one_shot", n_bytes, row, INT4, 2)
    for algorithm, transfers in (
        ("one_shot", schedule.one_shot(ranks, encoded)),
        ("two_shot", schedule.two_shot(ranks, encoded)),
        ("backend", schedule.ring(ranks, n_bytes)),
    ):
        sent = model.sent_bytes(algorithm, n_bytes, row, INT4, ranks)
        own = schedule.simulate(transfers, schedule.Network(1e9, ranks))
        assert own * 1e9 == pytest.approx(sent, rel=0.01)
        one = schedule.simulate(transfers, schedule.Network(1e9, ranks, shared=ranks))
        assert one == pytest.approx(ranks * own, rel=1e-6)


@pytest.mark.parametrize(("hosts", "local"), [(2, 2), (2, 4), (4, 4), (8, 2)])
def test_the_simulation_of_hosts_takes_the_time_of_the_formulas(hosts: int, local: int) -> None:
    """Links within hosts take no time here, so that only what hosts exchange counts."""
    n_bytes, row, ranks = 16 << 20, 4096, hosts * local
    slow = machines.Link("slow", "ethernet", 1e-3)
    fast = machines.link_of("nvlink", machines.REFERENCE, local, link_gbs=1e9)
    machine = model.Machine(machines.REFERENCE, fast, ranks, hosts, slow)
    encoded = model.sent_bytes("one_shot", n_bytes, row, INT4, 2)
    for algorithm, transfers in (
        ("backend", schedule.ring(ranks, n_bytes)),
        ("two_shot", schedule.two_shot(ranks, encoded)),
        ("hierarchical", schedule.hierarchical(ranks, local, encoded)),
    ):
        seconds = schedule.simulate(transfers, schedule.Network(1e18, local, 1e6))
        us = model.all_reduce_us(machine, algorithm, INT4, n_bytes, row)
        assert us == pytest.approx(1e6 * seconds, rel=0.01), algorithm


def test_a_shared_link_takes_longer_and_more_bits_too() -> None:
    h200 = machines.REFERENCE
    machine = model.Machine(h200, machines.link_of("host-memory", h200, 4), 4)
    one, shared = (model.all_reduce_us(machine._replace(shared=s), "two_shot", INT4, 64 << 20, 4096) for s in (1, 2))
    assert 1.8 < shared / one < 2
    times = [
        model.best(machine, WireFormat.parse(f), 64 << 20, 4096)[1]
        for f in ("int4", "int6-had/int7-had", "int8", "none")
    ]
    assert times == sorted(times)
    assert model.best(machine, INT4, 16 << 10, 4096)[0] == "one_shot"
    assert model.best(machine, INT4, 64 << 20, 4096)[0] == "two_shot"


def test_rows_are_near_what_two_gpus_measured() -> None:
    """The gain of int4-had and the limit, 8B, 8 x 1024 tokens, no peer access."""
    h200 = machines.REFERENCE
    machine = model.Machine(h200, machines.link_of("host-memory", h200, 2), 2)
    backend, ours = report.rows_of(machine, report.shape_of("llama-3-8b"), ["int4-had"], 8, 1024)
    measured = [
        r for r in fit.read_csv(ROOT / "results" / fit.FIRST_TOKENS) if (r["batch"], r["layers"]) == ("8", "32")
    ]
    there = next(r for r in measured if r["format"] == "int4-had" and r["overlap"] == "False")
    assert ours["gain"] == pytest.approx(float(there["speedup"]), rel=0.1)
    assert ours["wire_bytes"] == int(there["wire_bytes"])
    assert backend["gain"] == 1
    assert backend["limit"] == pytest.approx(float(there["limit"]), rel=0.1)
    assert ours["rise_pct"] == model.constants()["rise_pct"]["2"]["int4-had"]


def test_models(tmp_path: Path) -> None:
    config = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    shape = report.shape_of(str(tmp_path))
    assert shape.head_dim == 64
    assert 30 * shape.layer_weights + 49152 * 576 == 134_479_872  # SmolLM2-135M, without its norms' 35,136
    shape.check_ranks(3)
    with pytest.raises(InputError, match=r"2 ranks cannot share .* \(9 heads, 3 KV heads.*allowed are 3"):
        shape.check_ranks(2)
    path.write_text(json.dumps(config | {"num_experts": 8}))
    with pytest.raises(InputError, match="mixture of experts"):
        report.shape_of(str(path))
    path.write_text(json.dumps({"hidden_size": 576}))
    with pytest.raises(InputError, match=r"no usable 'num_attention_heads'"):
        report.shape_of(str(path))
    path.write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        report.shape_of(str(path))


def test_machines() -> None:
    assert machines.gpu_of("NVIDIA H100 80GB HBM3") == machines.GPUS["h100"]
    assert machines.gpu_of("NVIDIA L40S") == machines.GPUS["l40s"]
    assert machines.gpu_of("mine", 100, 500).tflops == 100
    with pytest.raises(InputError, match=r"--gpu mine is not known; known are h200, .*give --tflops"):
        machines.gpu_of("mine")
    with pytest.raises(InputError, match="this GPU has none"):
        machines.link_of("nvlink", machines.GPUS["l40"], 2)
    assert machines.link_of("nvlink", machines.GPUS["mi300x"], 2).gbs == 64
    assert machines.ethernet("100mbit").gbs == pytest.approx(0.0125 * 1448 / 1514)
    with pytest.raises(InputError, match="--host-link fast: give the rate"):
        machines.ethernet("fast")
    assert report.sentence("NVIDIA H200", "host_memory", 2, "int4-had").startswith(
        "llama-3-8b, 8 x 1024 tokens, 2 ranks: time to first token 1."
    )
    assert report.sentence("Some GPU", "symmetric", 2, "int4").startswith("nothing: --gpu Some GPU is not known")
