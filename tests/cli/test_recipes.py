"""Recipes are found by name from anywhere, listed and copied; the command and its version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lit_prune
from lit_prune import version
from lit_prune.cli import recipes
from lit_prune.cli.main import main
from lit_prune.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "name", ["demo", "digits_demo", "experiment/digits_demo", "recipes/demo", "configs/experiment/digits_demo.yaml"]
)
def test_a_recipe_is_found_by_name_from_an_empty_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs" / "experiment" / "digits_demo.yaml"
    assert recipes.find_recipe(name) == file
    assert recipes.with_recipes(["fit", "-c", name, "--x", name]) == ["fit", "-c", str(file), "--x", name]
    assert recipes.with_recipes([f"--config={name}"]) == [f"--config={file}"]


def test_files_that_exist_and_written_out_configurations_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("seed_everything: 1")
    for given in ("demo", "{seed_everything: 2}"):
        assert recipes.with_recipes(["-c", given]) == ["-c", given]


@pytest.mark.parametrize(("name", "words"), [("demoo", "did you mean demo"), ("data/cifar1", "data/cifar10")])
def test_an_unknown_name_is_refused_with_the_nearest(name, words):
    with pytest.raises(InputError, match=words):
        recipes.find_recipe(name)


def test_recipes_are_listed_and_copied_and_never_overwritten(tmp_path, capsys):
    main(["recipes"])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == recipes.recipe_names()
    main(["recipes", "--names", "[demo, cifar10]", "--to", str(tmp_path)])
    copies = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.yaml"))
    assert copies == ["data/cifar10.yaml", "experiment/digits_demo.yaml"]
    assert yaml.safe_load((tmp_path / copies[1]).read_text())["model"]["backbone"] == "cifar_resnet20"
    with pytest.raises(SystemExit):
        main(["recipes", "--names", "[demo]", "--to", str(tmp_path)])


def test_every_recipe_that_names_a_public_data_set_downloads_it():
    for name in recipes.recipe_names():
        asked = yaml.safe_load(recipes.find_recipe(name).read_text())
        data = (asked.get("base") or asked).get("data", {})
        if any(public in name + str(data.get("class_path")) for public in ("cifar", "CIFAR", "MNIST", "Tiny")):
            assert "class_path" not in data or data["init_args"]["download"] is True, name


def test_the_command_ends_with_exit_code_0_and_nothing_but_what_it_says(tmp_path):
    """In a project with a folder `callbacks` of its own, where a folder of that name of ours would be hidden."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").write_text("raise RuntimeError('the user's own')")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from lit_prune.__main__ import command as c; sys.exit(c())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == f"lit-prune {version.version_line()}\n" and not done.stderr


def test_the_version_is_one_and_a_clone_knows_its_commit():
    assert version.version_line().startswith(lit_prune.__version__)
    if (ROOT / ".git").exists():
        assert len((version.commit() or "").removesuffix("-dirty")) == 40


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")
def test_what_is_built_knows_the_commit_that_it_was_built_from(tmp_path, monkeypatch):
    copy = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--no-checkout", "--shared", str(ROOT), str(copy)], check=True)
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "configs"):
        subprocess.run(["git", "-C", str(copy), "checkout", "-q", "HEAD", "--", part], check=True)
    (copy / "setup.py").write_text((ROOT / "setup.py").read_text())
    (copy / "lit_prune").mkdir()
    for part in ("__init__.py", "version.py"):
        (copy / "lit_prune" / part).write_text((ROOT / "lit_prune" / part).read_text())
    built = tmp_path / "built"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120)
    monkeypatch.setattr(version, "CLONE", built)
    monkeypatch.setattr(version, "BUILT", built / "lit_prune" / "commit.txt")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert version.commit() == f"{head}-dirty"


def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path):
    command = f"set -o pipefail; {sys.executable} -m lit_prune recipes | head -1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "base\n", "")
