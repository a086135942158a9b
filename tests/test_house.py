"""The doors of the house: who may import whom."""

import ast
from pathlib import Path

import pytest
import torch

from lit_prune.running import replaced

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


def named(node: ast.AST) -> str:
    """What a value is called: a name, an attribute, a function that is called, an item of `batches` is a `batch`."""
    if isinstance(node, ast.Name | ast.Attribute):
        return node.id if isinstance(node, ast.Name) else node.attr
    if isinstance(node, ast.Call | ast.Starred):
        return named(node.func if isinstance(node, ast.Call) else node.value)
    item = isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice) and holds_batches(node.value)
    return "batch" if item else ""


def holds_batches(node: ast.AST) -> bool:
    return named(node).endswith(("batches", "loader"))


def is_batch(node: ast.AST) -> bool:
    return named(node) == "batch" or named(node).endswith("_batch")


def taken_apart(source: str) -> list[str]:
    """Where code takes a batch or a network's output apart by itself."""
    found: list[ast.AST] = []
    several = (ast.Tuple, ast.List)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript):
            by_name = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
            found += [node] if is_batch(node.value) or (named(node.value) in ("output", "outputs") and by_name) else []
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], several):
            found += [node] if is_batch(node.value) and not isinstance(node.value, ast.Call) else []
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, several):
            found += [node.target] if holds_batches(node.iter) else []
        elif isinstance(node, ast.Call) and named(node) == "zip":
            found += [a for a in node.args if isinstance(a, ast.Starred) and holds_batches(a)]
        elif isinstance(node, ast.Attribute) and node.attr in ("logits", "loss"):
            found += [node] if named(node.value) == "output" else []
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


def test_nothing_but_a_task_looks_into_a_batch_or_an_output():
    files = [file for file in (ROOT / "lit_prune").rglob("*.py") if file.parent.name != "task"]
    wrong = {str(file.relative_to(ROOT)): taken_apart(file.read_text()) for file in files}
    assert not {file: lines for file, lines in wrong.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        "images = batch[0]",
        "images = self.batches[0][0][:1]",
        "images, labels = batch",
        "images, labels = next_batch",
        "for images, labels in batches: pass",
        "shapes = [x.shape for x, y in data.train_dataloader()]",
        "images, labels = zip(*batches)",
        "logits = output.logits",
        "logits = output['logits']",
        "labels = test_batches[3]['label']",
    ],
)
def test_a_line_that_looks_into_a_batch_or_an_output_is_found(line):
    assert len(taken_apart(line)) == 1


def test_no_code_of_others_is_changed_but_in_one_place():
    users = [file.name for file in (ROOT / "lit_prune").rglob("*.py") if "unittest" in file.read_text()]
    assert not users, "running.replaced is there for it"
    before = torch.Tensor.numpy, "numpy" in vars(torch.Tensor), torch.Tensor.tolist
    with pytest.raises(KeyError), replaced(torch.Tensor, numpy=len, tolist=len), replaced(torch.Tensor, tolist=repr):
        assert (torch.Tensor.numpy, torch.Tensor.tolist) == (len, repr)
        raise KeyError
    assert (torch.Tensor.numpy, "numpy" in vars(torch.Tensor), torch.Tensor.tolist) == before
