"""The console script `flashcomm`. It needs the extra `cli` (typer and rich), and says so if that is missing."""

from __future__ import annotations

import sys
from typing import NoReturn

from flashcomm.errors import FlashcommError


def main() -> None:
    """Run the command line. A FlashcommError is printed to stderr, with exit code 1. Ctrl-C has exit code 130."""
    try:
        from flashcomm.cli.app import app
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        _fail(f"the command line needs {package}: pip install 'flashcomm[cli]'")
    try:
        app()
    except FlashcommError as why:
        _fail(str(why))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"flashcomm: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
