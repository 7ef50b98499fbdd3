"""Models on disk: who can share them, and GGUF files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import tiny, transformers

from flashcomm.accuracy import memory, models
from flashcomm.errors import InputError


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "replicated", "split"),
    [
        (32, 8, 14336, [1, 2, 4, 8, 16, 32], [1, 2, 4, 8]),  # Llama 3 8B
        (14, 2, 4864, [1, 2], [1, 2]),  # Qwen2.5 0.5B: 7 ranks are no multiple of 2 KV heads, 14 do not divide 4864
        (8, 1, 16384, [1, 2, 4, 8], [1]),  # Gemma 2B: one KV head, that all ranks compute
        (9, 3, 1536, [1, 3], [1, 3]),  # SmolLM2 135M
        (12, None, None, [1, 2, 3, 4, 6, 12], [1, 2, 3, 4, 6, 12]),
    ],
)
def test_numbers_of_ranks_that_engines_run(
    heads: int, kv_heads: int | None, width: int | None, replicated: list[int], split: list[int]
) -> None:
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=width)
    assert models.possible_ranks(config, replicate=True) == replicated
    assert models.possible_ranks(config, replicate=False) == split
    assert 5 not in replicated
    with pytest.raises(InputError, match=f"5 ranks cannot share x .*: it allows --world {', '.join(map(str, split))}$"):
        models.check_divisible(config, 5, "x")


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []

    def convert(gguf: Path, target: Path) -> None:
        converted.append(gguf)
        tiny().save_pretrained(target)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "convert_gguf", convert)
    gguf = tmp_path / "m" / "small.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    first = models._local_files(gguf.parent)
    assert models._local_files(gguf.parent) == first
    assert converted == [gguf]
    assert {"config.json", "model.safetensors"} <= {file.name for file in first.iterdir()}
    gguf.write_bytes(b"GGUF, another one")
    assert models._local_files(gguf.parent) != first
    assert len(converted) == 2
    gguf.write_bytes(b"GGUF, which cannot be converted")
    monkeypatch.setattr(models, "convert_gguf", lambda gguf, target: target.mkdir() or 1 / 0)
    for _ in range(2):  # half of a conversion is not taken for one
        with pytest.raises(ZeroDivisionError):
            models._local_files(gguf.parent)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no usable tokenizer .*: add the model's tokenizer.json"):
        models.load_tokenizer(tmp_path)


def test_memory_is_told_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 8 billion parameters in bf16, whose row-parallel weights exist twice, and a vocabulary of 262,144."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=262144,
    )  # fmt: skip
    skeleton = models.skeleton(config)
    assert next(skeleton.parameters()).device.type == "meta"
    n_parameters = sum(p.numel() for p in skeleton.parameters())
    row_parallel = 32 * 4096 * (4096 + 14336)
    needed = memory.needed_bytes(skeleton, 2, 8, 1024, 16384, backward=False)
    assert 0 < needed - 2 * (n_parameters + row_parallel + 16384 * 4096) < 2 << 30
    with_messages = memory.needed_bytes(skeleton, 2, 8, 1024, 16384, backward=True)
    assert with_messages - needed > 4 * 1024 * 64 * 4096 * (8 + 4)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 8 << 30)
    with pytest.raises(
        InputError, match=r"measuring big takes about \d+.\d GiB, and 8.0 GiB are free: use --dtype bf16"
    ):
        memory.check_memory("big", needed, "cpu")
    assert memory.check_memory("small", 3 << 29, "cpu") == "takes about 1.5 GiB of memory"
    assert torch.zeros(()).device.type == "cpu"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_conversion_shows_its_progress_on_a_terminal_only(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(**_: object) -> None:
        print("Converting:  50%", file=sys.stderr)
        raise ValueError("no such type")

    monkeypatch.setattr(models.import_transformers().AutoTokenizer, "from_pretrained", noisy)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(InputError, match="cannot be converted: ValueError: no such type"):
        models.convert_gguf(Path("m.gguf"), Path("out"))
    assert capsys.readouterr().err == ("Converting:  50%\n" if terminal else "")
