"""Windows of a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import Words

from flashcomm.accuracy import texts
from flashcomm.errors import InputError


def test_windows_are_spread_evenly_from_the_first_to_the_last_token(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(" ".join("x" * (1 + i) for i in range(50)))
    windows = texts.read_windows(tmp_path / "t.txt", Words(), 10, 3)
    assert windows[:, 0].tolist() == [1, 21, 41]
    assert windows[2, -1] == 50


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a b c")
    with pytest.raises(InputError, match=r"t\.txt has 3 tokens, but 2 windows of 512 need 1024: give a longer text"):
        texts.read_windows(tmp_path / "t.txt", Words(), 512, 2)
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        texts.read_windows(tmp_path / "none.txt", Words(), 8, 1)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        texts.read_windows(tmp_path / "b.txt", Words(), 8, 1)
