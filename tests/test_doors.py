"""The doors are light: what a name costs to import is seen in what it imports, not in seconds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_prune

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "filelock jinja2 jsonargparse lightning matplotlib networkx onnx pandas pyarrow ray rich scipy sklearn tensorboard "
    "timm torch_pruning torchmetrics torchvision"
).split()
SCRIPT = """
import sys
import torch
before = set(sys.modules)
exec(sys.argv[1])
added = set(sys.modules) - before
print(len(added), *sorted({name.partition(".")[0] for name in added} & set(sys.argv[2:])))
"""


def added_by(statement: str) -> tuple[int, set[str]]:
    """Number of modules that a statement imports beyond torch, and the heavy packages among them."""
    command = [sys.executable, "-c", SCRIPT, statement, *HEAVY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    count, *names = done.stdout.split()
    return int(count), set(names)


def test_the_package_itself_imports_nothing_but_torch_needs():
    count, heavy = added_by("import lit_prune")
    assert count < 5 and not heavy


def test_a_compact_network_loads_without_the_packages_of_training():
    assert not added_by("from lit_prune import load_compact, Plan, apply_plan, cost")[1]


def test_images_are_classified_without_the_packages_of_training():
    assert not added_by("import lit_prune.predict")[1]


def test_the_training_door_leaves_the_surgeons_and_their_libraries_shut():
    heavy = added_by("from lit_prune import LitClassifier")[1]
    assert not heavy & {"timm", "torch_pruning", "ray", "networkx", "onnx", "tensorboard"}


@pytest.mark.parametrize("name", lit_prune.__all__)
def test_every_public_name_is_behind_its_door(name):
    assert getattr(lit_prune, name) is not None


def test_what_the_pages_name_with_its_room_is_there_when_only_the_package_is_imported():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = {name for page in pages for name in re.findall(r"(?<![\w/.])lit_prune\.[a-z_]+\.\w+", page.read_text())}
    found = {name for name in found if not list(ROOT.glob(name.replace(".", "/") + "*"))}  # modules are imported
    assert "lit_prune.structure.trace_groups" in found
    added_by("; ".join(["import lit_prune", *sorted(found)]))
