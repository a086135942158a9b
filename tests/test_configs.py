"""Every configuration parses, instantiates, and opens with the command that uses it."""

from pathlib import Path

import pytest
import yaml

from lit_prune.cli.prune_cli import PruneCLI, build_cli
from lit_prune.errors import InputError
from lit_prune.lab.suite.suite import Suite

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_first_line_is_the_command_that_uses_the_file(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# python train.py ") and str(path.relative_to(ROOT)) in first
    named = [part for part in first.split() if part.startswith("configs/")]
    assert all((ROOT / name).exists() for name in named)


def parse(*configs: str) -> PruneCLI:
    arguments = ["fit", *(part for config in configs for part in ("-c", str(ROOT / config)))]
    return build_cli(arguments, run=False)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "model"], ids=lambda p: p.stem)
def test_model_configurations_are_valid(path):
    cli = parse("configs/base.yaml", "configs/data/digits.yaml", str(path.relative_to(ROOT)))
    assert cli.config["fit"]["model"]["backbone"] == yaml.safe_load(path.read_text())["model"]["backbone"]


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "data"], ids=lambda p: p.stem)
def test_data_configurations_are_valid(path):
    cli = parse("configs/base.yaml", str(path.relative_to(ROOT)), "configs/model/cifar_resnet20.yaml")
    assert cli.config["fit"]["data"]["class_path"].startswith("lit_prune.data.")


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "prune"], ids=lambda p: p.stem)
def test_prune_configurations_are_valid(path):
    base = ("configs/base.yaml", "configs/data/digits.yaml", "configs/model/cifar_resnet20.yaml")
    cli = parse(*base, str(path.relative_to(ROOT)))
    assert cli.config["fit"]["trainer"]["callbacks"]


TRACED = {"fit": ["trajectory_cifar10", "decorrelation_cifar10", "everything_on"], "analyze": ["analyze_vit"]}


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in TRACED.items() for name in names])
def test_configurations_of_the_two_axis_experiments_are_valid(verb, name, tmp_path):
    (tmp_path / "train" / "one").mkdir(parents=True)
    arguments = [verb, "-c", str(ROOT / f"configs/experiment/{name}.yaml"), "--data.root", str(tmp_path)]
    small = ["--model.backbone", "cifar_resnet20", "--model.pretrained", "false"]  # the file's may be large or remote
    config = build_cli([*arguments, *small], run=False).config[verb]
    assert config["trainer"]["callbacks"] if verb == "fit" else config["request"]["protocol"]["token"] == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs/experiment").glob("reduce_*.yaml")), ids=lambda p: p.stem)
def test_configurations_of_reductions_are_valid_with_the_files_their_command_names(path, tmp_path):
    (tmp_path / "train" / "one").mkdir(parents=True)
    words = path.read_text().splitlines()[0].split()
    configs = [part for word in words if word.startswith("configs/") for part in ("-c", str(ROOT / word))]
    small = ["--model.pretrained", "false", "--data.root", str(tmp_path), "--run_dir", str(tmp_path / "run")]
    request = build_cli(["reduce", *configs, *small], run=False).config["reduce"]["request"]
    written = yaml.safe_load(path.read_text())["request"]
    assert [method["score"] for method in request["methods"]] == [method["score"] for method in written["methods"]]
    assert list(request["kept"]) == written["kept"]


def test_a_misspelt_key_is_refused(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("model: {backbon: cifar_resnet20}\n")
    with pytest.raises(InputError, match="backbon"):
        build_cli(["fit", "-c", str(ROOT / "configs/base.yaml"), "-c", str(file)], run=False)


@pytest.mark.parametrize("name", ["two_scale", "channels"])
def test_recipes_of_the_papers_say_what_they_choose(name):
    """They must not move with the defaults."""
    callback = yaml.safe_load((ROOT / f"configs/prune/{name}.yaml").read_text())["trainer"]["callbacks+"][0]
    stages = [stage["init_args"] for stage in callback["init_args"]["stages"] if "ChannelStage" in stage["class_path"]]
    assert stages and all({"score", "allocation", "replace"} <= set(stage) for stage in stages)


LAB = sorted((ROOT / "configs/lab").glob("*.yaml"))


@pytest.mark.parametrize("path", LAB, ids=lambda p: p.stem)
def test_configurations_of_the_papers_are_accepted_by_the_verb_of_their_first_line(path, tmp_path):
    verb, *words = path.read_text().splitlines()[0].removeprefix("# python train.py ").split()
    configs = [part for word in words if word.startswith("configs/") for part in ("-c", str(ROOT / word))]
    written = yaml.safe_load(path.read_text())
    if verb != "suite":
        parsed = build_cli([verb, *configs, "--run_dir", str(tmp_path)], run=False).config[verb]
        assert parsed["trainer"]["devices"] == 1
        if verb == "compress":  # which counts epochs by stage and does not read the trainer's
            assert parsed["repair_epochs"] == 1 and "max_epochs" not in written["trainer"]
        return
    suite = Suite(tmp_path, written["base"], written["networks"], tuple(written["seeds"]), then=written.get("then", {}))
    for run in suite.runs():
        run.folder.mkdir(parents=True)
        run.write_config()
        for step in (run, *run.then):
            if step.verb != "report":
                parsed = build_cli(step.arguments, run=False).config[step.verb]
                assert parsed["model"]["backbone"] == run.config["model"]["backbone"]
                assert step.verb != "fit" or parsed["trainer"]["callbacks"]
