"""Every Python block of the README and of the pages runs, unless it says what it needs."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

import lit_prune
from lit_prune.cli import verbs
from lit_prune.cli.listing import first_sentence, parameters
from lit_prune.cli.main import FUNCTIONS, with_files_as
from lit_prune.cli.prune_cli import build_cli
from lit_prune.cli.recipes import find_recipe
from lit_prune.models import build_backbone
from lit_prune.scores import SCORES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n\s*(<!-- needs: .*? -->)?", re.DOTALL | re.MULTILINE)


def blocks() -> list:
    """The blocks that need nothing which a test has not, as parameters named by page and number."""
    return [
        pytest.param(match[1], id=f"{page.name}:{number}")
        for page in PAGES
        for number, match in enumerate(BLOCK.finditer(page.read_text()))
        if not match[2]
    ]


@pytest.mark.parametrize("code", blocks())
def test_the_block_runs(code: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build_backbone("cifar_convnet", num_classes=4, widths=(8, 12, 16), hidden=20).eval()
    batches = [torch.rand(64, 3, 32, 32) for _ in range(4)]
    exec(compile(code, "block", "exec"), {"model": model, "batches": batches})


def test_every_block_runs_or_is_understood_or_is_marked():
    """A remark after the block says what it needs that a test has not, or that it shows what was printed."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```\n\s*(<!-- (?:needs|printed)\b.*? -->)?", re.DOTALL | re.MULTILINE)
    unmarked = [
        f"{page.name}: {code.splitlines()[0]}"
        for page in [*PAGES, ROOT / "benchmarks" / "README.md"]
        for kind, code, mark in fence.findall(page.read_text())
        if not (mark or kind == "mermaid" or (kind == "python" and page in PAGES))
        and not all(line.startswith(("lit-prune ", "pip install ")) for line in code.splitlines())
    ]
    assert not unmarked


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def commands() -> list[str]:
    """Command lines of the pages, without their remarks; those in a sentence only where they have options."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"^lit-prune (.*?)(?: +#.*)?$", text, re.MULTILINE)
        lines += [line for line in re.findall(r"`lit-prune ([^`]*)`", text) if " " in line]
        found |= dict.fromkeys(" ".join(line.split()) for line in lines)
    return list(found)


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_pages_is_understood(line: str, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lit-prune"])
    (tmp_path / "FILE").touch()
    verb, *args = shlex.split(line.replace("DATA", str(tmp_path)).replace("FILE", str(tmp_path / "FILE")))
    if verb == "predict":
        verb, args, known = "predict", with_files_as(args, "--images"), {"predict": verbs.predict}
    else:
        known = FUNCTIONS
    if verb in known:
        words = [word.split("=")[0] for word in args if word.startswith("--")]
        assert {word.removeprefix("--") for word in words} <= {*inspect.signature(known[verb]).parameters, "config"}
        assert all(find_recipe(name) for option, name in zip(args, args[1:], strict=False) if option == "-c")
    elif verb != "VERB":
        build_cli([verb, *args], run=False)


def test_the_page_of_scores_says_of_every_score_what_the_table_of_scores_says():
    row = r"^\| `(\w+)`(?: \((.+?)\))? \| (\w+) \| (.+?) \| .+? \| (.+) \|$"
    rows = re.findall(row, (ROOT / "docs" / "scores.md").read_text().replace(r"\|", "\u2223"), re.MULTILINE)
    reads = {
        "weights": "weights alone",
        "activations": "one pass, no labels",
        "labels": "one pass, labels or a loss",
        "gradients": "one pass forward and back",
    }
    assert sorted(rows) == sorted(
        (
            name,
            ", ".join(parameters(entry)),
            entry.axis,
            reads[entry.cost],
            first_sentence(entry.function).removesuffix(".").replace("|", "\u2223"),
        )
        for name, entry in SCORES.items()
    )


def test_the_reference_has_every_public_name_where_it_is_defined():
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(f"{home}.{name}" for name, home in lit_prune._HOME.items())


def test_the_page_of_tables_has_the_columns_that_measure_gives():
    page = (ROOT / "docs" / "tables.md").read_text()
    model = build_backbone("cifar_convnet", num_classes=4, widths=(4, 4, 4), hidden=8).eval()
    table = lit_prune.measure(model, [(torch.rand(8, 3, 32, 32), torch.arange(8) % 4)])
    assert all(f"`{column}`" in page for column in table.columns)
