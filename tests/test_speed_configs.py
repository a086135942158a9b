"""The configurations of speed go with a model and data, and the canonical suite is the paper's."""

from pathlib import Path

import pytest
import yaml

from lit_prune.cli.prune_cli import build_cli
from lit_prune.lab.suite.suite import Suite

ROOT = Path(__file__).resolve().parents[1]
SPEED = sorted((ROOT / "configs" / "speed").glob("*.yaml"))


@pytest.mark.parametrize("path", SPEED, ids=lambda path: path.stem)
def test_speed_configurations_are_valid(path):
    configs = ("configs/base.yaml", "configs/data/digits.yaml", "configs/model/cifar_resnet20.yaml")
    given = [part for config in (*configs, str(path)) for part in ("-c", str(ROOT / config))]
    cli = build_cli(["fit", *given], run=False)
    assert cli.config["fit"]["model"]["channels_last"] and cli.config["fit"]["trainer"]["precision"] == "bf16-mixed"


def test_the_canonical_suite_is_appendix_c(tmp_path):
    given = yaml.safe_load((ROOT / "configs" / "experiment" / "two_axis_cifar100.yaml").read_text())
    runs = Suite(tmp_path, given["base"], given["networks"], tuple(given["seeds"])).runs()
    assert len(runs) == 15 and {run.seed for run in runs} == {42, 123, 456, 789, 1011}
    rates = {"resnet18": 0.1, "vgg16_bn": 0.1, "mobilenet_v2": 0.05}
    for run in runs[:3]:
        run.write_config()
        parsed = build_cli(run.arguments, run=False).config["fit"]
        optimizer = parsed["model"]["optimizer"]["init_args"]
        assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (rates[run.network], 0.9, 5e-4)
        assert parsed["model"]["arguments"] == {"stem": "cifar"} and parsed["trainer"]["max_epochs"] == 200
        assert parsed["data"]["init_args"]["calibration_size"] == 5000
