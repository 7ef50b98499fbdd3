"""Compiled kernels are cached, and the cache is bounded."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support import same_bits

from flashcomm.cpu import codec, jit
from flashcomm.wire import torch_codec
from flashcomm.wire.format import Layout, WireFormat


def test_the_last_kernels_are_kept_and_the_others_go() -> None:
    class Kernel:
        pass

    built: list[weakref.ref[Kernel]] = []

    @jit.once
    def build(i: int) -> Kernel:
        kernel = Kernel()
        built.append(weakref.ref(kernel))
        return kernel

    first = build(0)
    for i in range(jit.MAX_KERNELS + 10):
        build(i)
        assert build(0) is first, "it is used all the time, so it must stay cached"
        build(i)
    gc.collect()
    assert sum(ref() is not None for ref in built) == jit.MAX_KERNELS
    n = len(built)
    build(1)
    assert len(built) == n + 1, "it was dropped, so it must be built again"


def test_kernels_that_come_and_go_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "MAX_KERNELS", 2)
    step = WireFormat.parse("int4").reduce
    for row in [1, 2, 3, 4, 1, 2, 3, 4]:
        layout, x = Layout(step, row, 4), torch.randn(3 * row)
        wires = [torch.zeros(layout.nbytes(0, x.numel()), dtype=torch.uint8) for _ in range(2)]
        torch_codec.encode(x, layout, 0, x.numel(), wires[0])
        codec.encode(x, layout, 0, x.numel(), wires[1])
        assert torch.equal(*wires)
        outs = [torch.empty_like(x) for _ in range(2)]
        for part, out in zip((torch_codec, codec), outs, strict=True):
            part.decode_sum(wires[0][None], layout, 0, x.numel(), out, x.dtype)
        assert same_bits(*outs)
