"""The house rules: imports run one way, importing is inert, files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashcomm

SOURCE = Path(flashcomm.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# What each part may import from flashcomm besides itself; the longest matching name counts.
MAY_IMPORT = {
    "errors": set(),
    "compat": set(),
    "wire": {"errors"},
    "cpu": {"wire"},
    "gpu": {"errors", "wire"},
    "codecs": {"wire", "cpu", "gpu"},
    "reference": {"errors", "wire"},
    "transports": {"errors"},
    "transports.staging": {"errors", "gpu", "transports"},
    "collectives": {"errors", "wire", "gpu", "transports", "reference", "routing"},
    "routing": {"errors", "wire.format"},
    "settings": {"errors", "wire.format", "routing"},
    "setup": {
        "compat",
        "errors",
        "settings",
        "routing",
        "transports",
        "collectives",
        "codecs",
        "gpu",
        "wire",
        "__version__",
    },
    "communicator": {
        *(
            "errors",
            "settings",
            "routing",
            "setup",
            "codecs",
            "wire",
            "transports",
            "collectives",
            "gpu",
            "add_rms_norm",
        ),
    },
    "ops": {"compat", "errors", "wire.format", "communicator"},
    "plan": {"errors", "wire.format"},
    "integrations": {"compat", "errors", "routing", "settings", "wire", "communicator", "ops", "plan", ""},
    "ranks": {"errors"},
    "testing": {"ranks"},
    "accuracy": {"errors", "routing", "reference", "codecs", "plan", "wire", "integrations", "ranks"},
    "bench": {
        *("errors", "routing", "setup", "reference", "codecs", "communicator", "integrations", "wire", ""),
        *("ranks", "accuracy.models", "transports"),
    },
    "cli": {
        *("errors", "settings", "routing", "setup", "plan", "wire", ""),
        *("accuracy", "bench", "ranks"),
    },
    "": {"communicator", "errors", "ops", "wire.format"},
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of flashcomm modules a file imports, without the leading 'flashcomm.'; also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "flashcomm" else {module}
    return {name.removeprefix("flashcomm").lstrip(".") for name in found if name.split(".")[0] == "flashcomm"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    part = name.split(".")[0]
    allowed = MAY_IMPORT.get(name, MAY_IMPORT[part]) | {part}
    for imported in imports_of(path):
        public = imported in flashcomm.__all__
        fits = any(
            imported == a or (a and imported.startswith(a + ".")) or (f"{imported}.".startswith(f"{a}.") and a)
            for a in allowed
        )
        assert fits or (public and part in ("cli",)), (
            f"{name} imports flashcomm.{imported}: allowed are {sorted(allowed)}"
        )


def test_transports_know_bytes_and_no_formats() -> None:
    for path in (SOURCE / "transports").glob("*.py"):
        assert not any(name.startswith("wire") for name in imports_of(path))


def test_import_is_inert() -> None:
    """No compiler, no engine, no plotting, no GPU; the op is there."""
    code = (
        "import sys, flashcomm, torch\n"
        "heavy = [m for m in ('llvmlite', 'triton', 'transformers', 'vllm', 'sglang', 'pyroute2', 'typer',"
        " 'rich', 'matplotlib', 'psutil')"
        " if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "torch.ops.flashcomm.all_reduce\n"
        "torch.ops.flashcomm.all_reduce_add_rms_norm\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names() -> None:
    classes = ["Communicator", "FlashcommError", "WireFormat", "__version__"]
    ops = ["all_gather", "all_reduce", "all_reduce_add_rms_norm", "reduce_scatter"]
    assert flashcomm.__all__ == classes + ops


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= 450, f"{path} wants to be split by idea"
