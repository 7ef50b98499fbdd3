"""The pages: their examples run and print what they say, their links lead somewhere, and a reader can find each one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashcomm import settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = {  # the page that explains each program in examples/
    "accuracy": "plan",
    "c10d": "c10d",
    "compile": "compiled",
    "dtensor": "dtensor_mlp",
    "quickstart": "all_reduce",
    "transformers": "transformers_tp",
    "ulysses": "ulysses",
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def links() -> list[tuple[Path, str]]:
    """Each page with each of its links to other pages and files."""
    pattern = r"(?:\]\(|\b(?:src|srcset)=\")(?!https?:)([^)\"\s]+)[)\"]"
    return [(page, link) for page in PAGES for link in re.findall(pattern, page.read_text())]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(example: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{example}.py")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_prints_what_the_page_says(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text()
    outputs = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert len(outputs) == 1, "the output of the example is the only block of text"
    assert run(EXAMPLES[name]).endswith(outputs[0].strip())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_shows_the_example_as_it_is(name: str) -> None:
    page, code = (DOCS / f"{name}.md").read_text(), (ROOT / "examples" / f"{EXAMPLES[name]}.py").read_text()
    assert re.findall(r"```python\n(.*?)```", page, re.DOTALL) == ([] if name == "accuracy" else [code])
    assert f"(../examples/{EXAMPLES[name]}.py)" in page
    file = "all_reduce.py" if name == "quickstart" else f"examples/{EXAMPLES[name]}.py"
    assert re.search(rf"^`python {file}` prints", page, re.MULTILINE)


def test_every_example_is_run() -> None:
    """That of vLLM says why it does nothing where vLLM is not installed; scripts/test-vllm tests vLLM."""
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*EXAMPLES.values(), "vllm_offline"}
    if importlib.util.find_spec("vllm") is None:
        assert run("vllm_offline") == "skipped: vLLM is not installed"


@pytest.mark.parametrize(("page", "link"), links(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_links_lead_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), f"{page.name} links to {link}"
    assert not anchor or anchor in anchors(target), f"{page.name}: {target.name} has no heading for #{anchor}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_linked_from_another(page: Path) -> None:
    assert any((other.parent / link.partition("#")[0]).resolve() == page for other, link in links() if other != page)


def settings_page() -> list[list[str]]:
    """The cells of each row of the table of settings."""
    lines = re.findall(r"^\| (`FLASHCOMM_.*) \|$", (DOCS / "settings.md").read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def test_the_page_of_settings_has_every_variable_and_argument() -> None:
    rows = settings_page()
    names = [row[0].strip("`").removeprefix("FLASHCOMM_") for row in rows]
    assert sorted(names) == sorted((*settings.NAMES, *settings._ELSEWHERE))
    arguments = {name: row[1].strip("`") for name, row in zip(names, rows, strict=True) if name in settings.NAMES}
    assert arguments == settings._ARGUMENTS
    meanings = re.findall(r"^\* \*\*(\w+)\*\*: ", (DOCS / "settings.md").read_text(), re.MULTILINE)
    assert sorted(meanings) == sorted(names)


@pytest.mark.parametrize(("device", "where"), [("cpu", "CPUs"), ("cuda", "GPUs")])
def test_the_page_of_settings_has_the_defaults(device: str, where: str) -> None:
    """Setting each variable to the default that the page names changes nothing."""
    environment = {}
    for variable, _, default, *_ in settings_page():
        cell = next((part for part in default.split(", ") if part.endswith(f" on {where}")), default)
        if cell != "not set" and variable.strip("`").removeprefix("FLASHCOMM_") not in settings._ELSEWHERE:
            environment[variable.strip("`")] = cell.split("`")[1]
    assert len(environment) == len(settings.NAMES) - 1
    assert settings.Settings.resolve(device, environment) == settings.Settings.resolve(device, {})


def test_the_page_of_settings_has_the_allowed_values() -> None:
    cells = {row[0].strip("`"): re.findall(r"`([^`]+)`", row[3]) for row in settings_page()}
    assert tuple(cells["FLASHCOMM_ALGORITHM"]) == settings.ALGORITHMS
    assert tuple(cells["FLASHCOMM_TRANSPORT"]) == settings.TRANSPORTS
