"""The doors of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # room of lit_prune -> rooms that it must not import
    "data": {"task", "measurement", "scores", "replace", "train", "report", "cli", "lab"},
    "task": {"measurement", "scores", "replace", "train", "report", "cli", "lab"},
    "models": {"task", "measurement", "scores", "replace", "train", "report", "cli", "lab"},
    "structure": {"task", "measurement", "scores", "replace", "train", "report", "cli", "lab"},
    "measurement": {"replace", "train", "report", "cli", "lab"},
    "replace": {"scores", "train", "report", "cli", "lab"},
    "scores": {"train", "report", "cli", "lab"},
    "report": {"train", "cli", "lab"},
    "train": {"cli", "lab"},
    "lab": {"cli"},
}


def rooms_imported(file: Path) -> set[str]:
    """Rooms of lit_prune that a file imports anywhere, also inside functions; type hints alone do not count."""
    found = set()
    tree = ast.parse(file.read_text())
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("lit_prune.")}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below_them(room):
    wrong = {
        str(file.relative_to(ROOT)): sorted(rooms_imported(file) & ROOMS[room])
        for file in (ROOT / "lit_prune" / room).rglob("*.py")
        if rooms_imported(file) & ROOMS[room]
    }
    assert not wrong


def test_library_never_imports_the_face():
    for file in (ROOT / "lit_prune").rglob("*.py"):
        assert not any(
            line.startswith(("from callbacks", "import callbacks")) for line in file.read_text().splitlines()
        )
