"""What every test gets: no settings and no timings of this machine's own; and the markers that `selection` adds."""

from __future__ import annotations

import os

import pytest
import selection
import support  # noqa: F401  # first: it chooses between a GPU and Triton's interpreter
import torch

from flashcomm.ranks import processes


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in list(os.environ):
        if name.startswith("FLASHCOMM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))  # no timings of this machine's own
    monkeypatch.setenv("FLASHCOMM_MEASURE", "off")  # routes by rules of thumb, and no time spent on it
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contract", action="store_true", help="print which tests prove which point of the contract")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if len(items) > 300:  # not a mutation's few tests: it pays to import once what many ranks need
        processes.PRELOADED += ["torch._dynamo", "transformers.models.llama.modeling_llama"]
    unmatched = selection.mark(items)
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:  # the whole suite
        faults = unmatched + selection.unproven(items)
        if faults:
            raise pytest.UsageError("\n".join(faults))
    if config.getoption("contract"):
        print(selection.table(items))
        pytest.exit("nothing was run", returncode=0)
