"""The notebooks run from top to bottom on small settings."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path, epochs: int) -> list[str]:
    """The code cells, with fewer epochs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [re.sub(r"^EPOCHS = \d+", f"EPOCHS = {epochs}", source, flags=re.MULTILINE) for source in sources]


def test_there_are_three_without_outputs_and_every_cell_compiles():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["compress", "lightning", "trajectory"]
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells)
        for source in code_of(notebook, 3):
            compile(source, str(notebook), "exec")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": notebook.stem}
    for source in code_of(notebook, 3):
        exec(compile(source, str(notebook), "exec"), names)
