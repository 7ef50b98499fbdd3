"""What every test gets: no settings and no timings of this machine's own."""

from __future__ import annotations

import os

import pytest
import support  # noqa: F401  # first: it chooses between a GPU and Triton's interpreter
import torch


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in list(os.environ):
        if name.startswith("FLASHCOMM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))  # no tables of this machine's own
    torch.manual_seed(0)
