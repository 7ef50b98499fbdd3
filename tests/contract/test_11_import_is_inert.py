"""Point 11 of the contract: importing flashcomm touches no GPU and loads no compiler and no engine.

A device or transport that was requested and is not available is an error.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import errors_of, run_ranks

from flashcomm import Communicator
from flashcomm.errors import SettingsError

pytestmark = pytest.mark.contract(11)


def test_importing_loads_no_compiler_no_engine_and_touches_no_gpu() -> None:
    """It loads no plotting and no command-line packages either. The ops are registered."""
    code = (
        "import sys, flashcomm, torch\n"
        "heavy = [m for m in ('llvmlite', 'triton', 'transformers', 'vllm', 'sglang', 'pyroute2', 'typer',"
        " 'rich', 'psutil',"
        " 'matplotlib')"
        " if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "torch.ops.flashcomm.all_reduce\n"
        "torch.ops.flashcomm.all_reduce_add_rms_norm\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_device_that_cannot_be_had_is_an_error() -> None:
    errors_of(run_ranks(1, lambda g, r: Communicator(g, "int4", device="cuda")), SettingsError)
    errors_of(run_ranks(1, lambda g, r: Communicator(g, "int4", device="tpu")), SettingsError)


def test_a_transport_that_cannot_run_is_an_error_on_all_ranks() -> None:
    for got in run_ranks(2, lambda group, rank: Communicator(group, "int4", transport="symmetric")):
        assert isinstance(got, SettingsError)
        assert "transport='symmetric'" in str(got)
