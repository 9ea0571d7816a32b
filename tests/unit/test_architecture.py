"""The rules of docs/architecture.md: rooms import one way, files are short, and nobody reaches for private names."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "kdlib").rglob("*.py"))
}
BASE = {"strict", "recipe", "protocol", "config", "files", "record", "metrics"}
ALLOWED = {  # room -> the rooms that it may import from
    "data": set(),
    "models": set(),
    "losses": set(),
    "training": {"data", "models", "losses"},
    "evaluation": {"data", "models", "losses", "training"},
    "experiments": {"data", "models", "losses", "training", "evaluation"},
    "inference": {"data", "models", "losses", "training", "evaluation", "analysis"},
    "analysis": set(),
    "apps": {"data", "models", "losses", "training", "evaluation", "experiments", "inference", "analysis"},
}


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def imports(module: str) -> list[tuple[str, str]]:
    """(module, name) of each import from kdlib, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "kdlib"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kdlib":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, "") if whole in FILES else (node.module, alias.name))
    return found


@pytest.mark.parametrize("module", [name for name in FILES if room(name) in ALLOWED])
def test_rooms_import_one_way_and_no_private_names(module):
    for target, name in imports(module):
        assert room(target) in BASE | ALLOWED[room(module)] | {room(module)}, f"{module} imports {target}"
        assert not name.startswith("_"), f"{module} imports {name}, which {target} keeps to itself"


def test_config_is_at_the_bottom():
    for module in FILES:
        if room(module) in BASE:
            assert {room(target) for target, _ in imports(module)} <= BASE, module


def test_no_circle_of_files():
    # a package's __init__ collects the names of its files, which do not import from it
    graph = {module: {target for target, _ in imports(module)} - {module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", FILES)
def test_no_file_is_over_450_lines(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 450


def test_analysis_needs_no_torch():
    names = [name for name in FILES if room(name) == "analysis"]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
