"""A hook of mkdocs: links out of docs/ keep working, in the repository and on the site.

Pages link to `../results/x.svg` and `../LOG.md`, which GitHub follows. The site gets copies of pictures, and links to
the repository for all other files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures of results/."""
    for picture in sorted((ROOT / "results").glob("*.svg")):
        files.append(File(f"results/{picture.name}", str(ROOT), config.site_dir, use_directory_urls=False))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Rewrite links that leave docs/."""

    def target(match: re.Match[str]) -> str:
        path = match[1]
        if path.endswith(".svg"):
            return f"]({path})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({config.extra['repository']}/{kind}/main/{path}{match[2] or ''})"

    return re.sub(r"\]\(\.\./([^)#\s]+)(#[^)]*)?\)", target, markdown)
