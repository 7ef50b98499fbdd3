"""The rows of `bench codec`, and that a wrong codec stops it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashcomm.bench import codec as codec_bench
from flashcomm.errors import FlashcommError, UnavailableError
from flashcomm.wire import torch_codec

BF16 = torch.bfloat16


def test_the_last_rows_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that is wrong only at the end of a message is not timed."""

    class Wrong:
        encode = staticmethod(torch_codec.encode)

        @staticmethod
        def decode_sum(wires: Any, layout: Any, start: int, stop: int, out: torch.Tensor, dtype: torch.dtype) -> None:
            torch_codec.decode_sum(wires, layout, start, stop, out, dtype)
            out[-1] += 1

    rows = codec_bench.codec(["int4"], [1 << 17], 64, BF16, 1, 1)
    assert next(rows)["ranks"] == 4
    monkeypatch.setattr(codec_bench, "codec_for", lambda device: Wrong)
    with pytest.raises(FlashcommError, match="int4: the codec for cpu differs from the plain torch codec"):
        next(codec_bench.codec(["int4"], [1 << 17], 64, BF16, 1, 1))


def test_codec_columns() -> None:
    row = next(codec_bench.codec(["int4"], [1 << 16], 64, BF16, 1, 2, ranks=3))
    assert row["ranks"] == 3
    assert row["device"] == "cpu"
    wire = (1 << 15) // 2 + (1 << 15) // 64 * 2  # bytes of a rank's buffer: codes and scales
    message = 1 << 16
    moved = row["encode_share"] * (message + wire) / (2 * message)
    assert row["encode_traffic_share"] == pytest.approx(moved, rel=0.02, abs=2e-3)
    moved = row["decode_share"] * (3 * wire + message) / (3 * wire) / 2
    assert row["decode_traffic_share"] == pytest.approx(moved, rel=0.02, abs=2e-3)
    assert row["encode_us"] == pytest.approx(message / row["encode"] / 1e3, rel=0.02, abs=0.1)
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="no CUDA device"):
            next(codec_bench.codec(["int4"], [1 << 16], 64, BF16, 1, 2, "cuda"))
