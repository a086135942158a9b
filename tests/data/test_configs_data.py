from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from lit_prune.data import ImageData

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_data_config_names_its_command_and_parses_into_its_class(file):
    assert file.read_text().startswith(f"# python train.py fit -c configs/base.yaml -c configs/data/{file.name} ")
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageData, "data")
    parsed = parser.parse_object(yaml.safe_load(file.read_text()))
    given = yaml.safe_load(file.read_text())["data"]["init_args"]
    assert {name: parsed.data.init_args[name] for name in given if name not in ("mean", "std")} == {
        name: value for name, value in given.items() if name not in ("mean", "std")
    }
