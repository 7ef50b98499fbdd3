"""Windows of a text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import Words

from flashcomm.accuracy import texts
from flashcomm.errors import InputError


def test_windows_are_spread_evenly_from_the_first_to_the_last_token(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(" ".join("x" * (1 + i) for i in range(50)))
    windows = texts.read_windows(tmp_path / "t.txt", Words(), 10, 3)
    assert windows[:, 0].tolist() == [1, 21, 41]
    assert windows[2, -1] == 50


def test_windows_begin_with_the_token_that_the_tokenizer_says(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(" ".join("x" * (1 + i) for i in range(50)))
    windows = texts.read_windows(tmp_path / "t.txt", Words(), 10, 3, 77)
    assert windows[:, 0].tolist() == [77] * 3
    assert windows[:, 1].tolist() == [1, 21, 42]
    assert windows[2, -1] == 50


def test_bos_is_asked_of_the_tokenizer() -> None:
    class Adds(Words):
        bos_token_id = 9

        def __call__(self, text: str, return_tensors: str = "", add_special_tokens: bool = True) -> Any:
            return SimpleNamespace(input_ids=[9, *super().__call__(text).input_ids])

    class Has(Words):
        bos_token_id = 9

    for asked, expected in (("auto", (9, None, None)), ("no", (None, None, None))):
        assert tuple(texts.bos_of(kind(), asked) for kind in (Adds, Has, Words)) == expected
    assert texts.bos_of(Has(), "yes") == 9
    with pytest.raises(InputError, match="--bos yes: this tokenizer has no beginning-of-sequence token"):
        texts.bos_of(Words(), "yes")
    with pytest.raises(InputError, match="--bos maybe: allowed are auto, yes and no"):
        texts.bos_of(Words(), "maybe")


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 101])
def test_any_first_windows_are_spread_over_the_text(n: int) -> None:
    ids = torch.arange(8 * n + 3)
    windows = texts.all_windows(ids, 9, -1)
    assert windows[:, 0].tolist() == [-1] * n
    assert sorted(windows[:, 1].tolist()) == list(range(0, 8 * n, 8))
    for few in (k for k in (5, 16, 50) if k <= n):
        begins = sorted(windows[:few, 1].tolist())
        gaps = [b - a for a, b in zip([0, *begins], [*begins, 8 * n], strict=True)]
        assert max(gaps) <= 3 * 8 * n / few


def test_bytes_are_those_of_predicted_tokens() -> None:
    class Letters:
        def decode(self, ids: torch.Tensor) -> str:
            return "".join(chr(i) for i in ids.tolist())

    assert texts.bytes_in(torch.tensor([[99, 100, 228], [99, 100, 101]]), Letters()) == 3 + 2


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a b c")
    with pytest.raises(InputError, match=r"t\.txt has 3 tokens, but 2 windows of 512 need 1024: give a longer text"):
        texts.read_windows(tmp_path / "t.txt", Words(), 512, 2)
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        texts.read_windows(tmp_path / "none.txt", Words(), 8, 1)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        texts.read_windows(tmp_path / "b.txt", Words(), 8, 1)
