"""Kernels are compiled for an H100, without a GPU, to see that all pieces of a group stay within a thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COUNT = """
import json, torch
from triton.backends.compiler import GPUTarget
from flashcomm.gpu import codec, compat
from flashcomm.wire.format import Layout, StepFormat

found = {}
for name in ("int4", "int4-had"):
    step = StepFormat.parse(name)
    _, planes, place, constants, short, num_warps = codec._launches(Layout(step, 4096, 2), 0, 1 << 20)[0]
    groups = codec.Groups(True, short, step.hadamard)
    kernel = compat.compile_kernel(
        codec.encode_kernel, (torch.bfloat16, torch.uint8), compat.types_of((planes, place)), (constants, groups),
        num_warps, target=GPUTarget("cuda", 90, 32),
    )
    n = constants.GROUPS * constants.PIECES * constants.LANES // (32 * num_warps)
    found[name] = n, kernel.asm["ptx"].count("shfl.sync"), kernel.asm["ptx"].count("st.shared")
print(json.dumps(found))
"""


def test_few_values_change_threads() -> None:
    """Two threads share a group: they exchange its extremes, in one round of the transform each value, and two sums.

    With Triton 3.7 a thread once held parts of four groups, and exchanged 3 (int4-had: 11) numbers a value.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    n, shuffles, shared_stores = found["int4"]
    assert (n, shuffles <= 4, shared_stores) == (32, True, 0), found
    n, shuffles, shared_stores = found["int4-had"]
    assert (n, n <= shuffles <= n + 6, shared_stores) == (32, True, 0), found
