"""The pages: their examples run and print what they say, their links lead somewhere, and a reader can find each one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOW_TOS = ["compile", "dtensor", "transformers"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def links() -> list[tuple[Path, str]]:
    """Each page with each of its links to other pages and files."""
    return [(page, link) for page in PAGES for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", HOW_TOS)
def test_the_example_prints_what_the_page_says(name: str, tmp_path: Path) -> None:
    page = (DOCS / f"{name}.md").read_text()
    (code,), (output,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "text"))
    assert f"`python {name}_example.py` prints" in page
    file = tmp_path / f"{name}_example.py"
    file.write_text(code)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == output.strip()


@pytest.mark.parametrize(("page", "link"), links(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_links_lead_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), f"{page.name} links to {link}"
    assert not anchor or anchor in anchors(target), f"{page.name}: {target.name} has no heading for #{anchor}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_linked_from_another(page: Path) -> None:
    assert any((other.parent / link.partition("#")[0]).resolve() == page for other, link in links() if other != page)
