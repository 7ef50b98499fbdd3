"""The house rules: imports run one way, files and functions stay readable, and calls can be followed by reading."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashcomm

SOURCE = Path(flashcomm.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
MOST_LINES, MOST_PARAMETERS, LARGEST_FOLDER = 450, 12, 0.2
name_of = lambda path: ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")  # noqa: E731

# What each part may import from flashcomm besides itself and compat; the longest matching name counts.
MAY_IMPORT = {
    "errors": set(),
    "compat": set(),
    "counts": set(),
    "wire": {"errors"},
    "cpu": {"wire"},
    "gpu": {"compat", "errors", "wire"},
    "codecs": {"wire", "cpu", "gpu"},
    "reference": {"errors", "wire"},
    "transports": {"errors"},
    "collectives": {"errors", "wire", "gpu", "transports", "reference", "routing"},
    "routing": {"errors", "wire.format", "wire.split"},
    "settings": {"errors", "wire.format", "routing"},
    "setup": {"errors", "settings", "routing", "transports", "collectives", "codecs", "gpu", "reference", "wire", ""},
    "communicator": {
        *("errors", "settings", "routing", "setup", "codecs", "wire", "transports", "collectives", "gpu", "counts"),
    },
    "ops": {"errors", "wire.format", "communicator"},
    "plan": {"errors", "wire.format"},
    "integrations": {"errors", "routing", "settings", "transports", "wire", "communicator", "ops", "plan", ""},
    "integrations.sglang": {"contrib"},
    "contrib": {"errors", "routing", "communicator", "integrations", "plan"},
    "ranks": {"errors"},
    "testing": {"ranks"},
    "accuracy": {"errors", "routing", "reference", "codecs", "plan", "wire", "integrations", "ranks"},
    "bench": {
        *("errors", "routing", "setup", "reference", "codecs", "communicator", "integrations", "wire", ""),
        *("ranks", "accuracy.models", "transports"),
    },
    "predict": {"errors", "routing", "wire", "bench"},
    "cli": {
        *("errors", "settings", "routing", "setup", "plan", "wire", ""),
        *("accuracy", "bench", "predict", "ranks"),
    },
    "": {"communicator", "errors", "ops", "wire.format"},
}


# What breaks a rule today. These lists only shrink: an entry that no longer breaks it must go.
TOO_MANY_PARAMETERS: set[str] = set()
LOOKED_UP_BY_NAME = {"integrations.vllm._resolve"}


def imports_of(path: Path) -> set[str]:
    """Dotted names of flashcomm modules a file imports, without the leading "flashcomm."; also inside functions.

    What the package itself exports (`from flashcomm import Communicator`) is an import of the package: "".
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            for alias in node.names:
                found.add(f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module)
    return {name.removeprefix("flashcomm").lstrip(".") for name in found if name.split(".")[0] == "flashcomm"}


def is_module(name: str) -> bool:
    """Whether the package has a module or folder of this name, flashcomm.* or, without that prefix, a part."""
    path = SOURCE.joinpath(*name.removeprefix("flashcomm").lstrip(".").split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def within(imported: str, allowed: str) -> bool:
    """Whether an import is of the allowed module or of one inside it. The package "" is only itself."""
    return imported == allowed or (allowed != "" and imported.startswith(f"{allowed}."))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    name = name_of(path)
    part = name.split(".")[0]
    allowed = MAY_IMPORT.get(name, MAY_IMPORT[part]) | {part, "compat"}
    for imported in imports_of(path):
        assert any(within(imported, a) for a in allowed), (
            f"{name} imports flashcomm.{imported}: allowed are {sorted(allowed)}"
        )


def test_the_import_rules_name_modules_that_exist() -> None:
    named = {name for part, allowed in MAY_IMPORT.items() for name in (part, *allowed)}
    assert not {name for name in named if not is_module(name)}


def test_an_import_rule_covers_what_is_inside_and_nothing_beside() -> None:
    assert within("wire.format", "wire.format")
    assert within("wire.format", "wire")
    assert not within("wire", "wire.format")
    assert not within("wired", "wire")
    assert not within("wire", "")


def test_transports_know_bytes_and_no_formats() -> None:
    for path in (SOURCE / "transports").glob("*.py"):
        assert not any(within(name, "wire") for name in imports_of(path)), path


def test_public_names() -> None:
    classes = ["Communicator", "FlashcommError", "WireFormat", "__version__"]
    ops = ["all_gather", "all_reduce", "all_reduce_add_rms_norm", "all_to_all_single", "reduce_scatter"]
    assert flashcomm.__all__ == classes + ops


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_says_what_it_is_and_fits_on_a_few_screens(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    n = len(text.splitlines())
    assert n <= MOST_LINES, f"{path} has {n} lines, {MOST_LINES} are allowed: split it by idea"


def test_no_folder_holds_more_than_a_fifth_of_the_lines() -> None:
    lines: dict[str, int] = {}
    for path in MODULES:
        folder = path.relative_to(SOURCE).parts[0]
        lines[folder] = lines.get(folder, 0) + len(path.read_text().splitlines())
    largest, n = max(lines.items(), key=lambda item: item[1])
    assert n <= LARGEST_FOLDER * sum(lines.values()), f"{largest} has {n} of {sum(lines.values())} lines"


def long_signatures() -> Iterator[str]:
    """Functions of too many parameters, self aside; Triton's kernels included, commands excepted.

    The parameters of a function in cli/ are a command's options.
    """
    for path in MODULES:
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                n = len(parameters) - (bool(parameters) and parameters[0].arg in ("self", "cls"))
                if n > MOST_PARAMETERS:
                    yield f"{name_of(path)}.{node.name}"


def lookups_by_name() -> Iterator[str]:
    """Functions of the package that call getattr(module, name) with a name that is computed. `compat` modules may."""
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if path.name == "compat.py":
            continue
        modules = {"importlib"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = [alias for alias in node.names if is_module(f"{node.module}.{alias.name}")]
                modules |= {
                    alias.asname or alias.name for alias in names if (node.module or "").startswith("flashcomm")
                }
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"):
                    continue
                of, name = node.args[:2]
                if not isinstance(name, ast.Constant) and ast.unparse(of).split(".")[0].split("(")[0] in modules:
                    yield f"{name_of(path)}.{function.name}"


@pytest.mark.parametrize(
    ("breaks", "listed", "advice"),
    [
        (long_signatures, TOO_MANY_PARAMETERS, f"more than {MOST_PARAMETERS} parameters: bundle them in a NamedTuple"),
        (lookups_by_name, LOOKED_UP_BY_NAME, "getattr(module, name) hides a call from readers and mypy: name objects"),
    ],
    ids=["parameters", "lookups"],
)
def test_no_function_breaks_the_rule_but_those_listed(breaks: object, listed: set[str], advice: str) -> None:
    found = set(breaks())  # type: ignore[operator]
    assert not found - listed, advice
    assert not listed - found, "these break the rule no longer: take them off the list"
