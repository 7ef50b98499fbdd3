"""CSV files: written rows are read again, and older files are read with current names."""

from __future__ import annotations

from pathlib import Path

from flashcomm.bench import records
from flashcomm.wire.format import UNCOMPRESSED


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.csv"
    records.write_csv(path, [{"size": 1, "path": "auto"}, {"size": 2, "path": "backend", "note": "a, b"}])
    first, second = records.read_csv(path)
    assert (first["size"], first["path"], first["note"]) == ("1", "auto", "")
    assert (second["size"], second["path"], second["note"]) == ("2", "backend", "a, b")
    assert {first["machine"], second["machine"]} == {records.environment()["machine"]}


def test_older_files_are_read_under_todays_names(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("format,model\nbf16,bf16\nint4,bf16\n")
    assert [list(row.values()) for row in records.read_csv(path)] == [[UNCOMPRESSED, "bf16"], ["int4", "bf16"]]


def test_bytes_have_a_unit() -> None:
    assert [records.human_bytes(n) for n in (12, 1500, 12.5e6, 3e9)] == ["12 B", "1.5 kB", "12.5 MB", "3 GB"]
