"""The run folder of a verb: whose it is, what a run resumes from, what is written before it begins."""

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_prune.cli.parsing import changed_keys, differ_in_stages, import_paths
from lit_prune.cli.yaml_text import read_yaml
from lit_prune.errors import InputError
from lit_prune.files import LOCK, write_text
from lit_prune.train.run_record import write_run

WRITTEN_BEFORE = ("config.yaml", "run.json", "tensorboard", "trace", LOCK)


class RunFolderCLI(LightningCLI):
    """A LightningCLI whose verbs work in a run folder."""

    config_dump: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        """Folder for everything that the run writes."""
        return Path(self.config[self.subcommand]["run_dir"])

    def _enter_run_folder(self) -> None:
        self._dump_config()
        settings = self.config_init[self.subcommand]
        if settings["trainer"].get("fast_dev_run"):
            return
        written = self.run_dir / "config.yaml"
        if int(os.environ.get("LOCAL_RANK", "0")) == 0 and written.exists() and self._has_begun():
            self._refuse_other_run(read_yaml(written))
        last = self.run_dir / "checkpoints" / "last.ckpt"
        if settings.get("ckpt_path") is None and last.exists():
            settings["ckpt_path"] = str(last)
        if self.subcommand == "fit":
            settings["weights_only"] = True  # a checkpoint holds plain values and tensors; nothing in it is executed
        self._write_record(written)

    def _refuse_other_run(self, old: dict[str, Any]) -> None:
        changed = self.changed_since(old)
        stages = changed == ["trainer.callbacks"] and differ_in_stages(old, self.config_dump)
        if not changed or (stages and self.config[self.subcommand]["correct_stages"]):
            return
        remedy = "give --correct_stages true to go on with these stages, " if stages else "give "
        raise InputError(
            f"run folder {self.run_dir} holds a run with another configuration ({', '.join(changed[:4])}); "
            f"{remedy}another --run_dir, or delete the folder"
        )

    def _has_begun(self) -> bool:
        """Whether the run folder holds more than what is written before the first epoch: nothing is lost by another."""
        return any(entry.name not in WRITTEN_BEFORE for entry in self.run_dir.iterdir())

    def changed_since(self, old: dict[str, Any]) -> list[str]:
        """Dotted names of settings that differ from those of an older run, as `changed_keys`.

        An option that is newer than the run counts with its default; it did not change what the run did.
        """
        self._dump_config()
        if not isinstance(old, dict):
            return ["config.yaml"]
        if import_paths(old) <= import_paths(self.config_dump):  # what only the folder names is not imported
            parser = self._parser(self.subcommand)
            with suppress(InputError):  # it has options that are no more: compared as it is, they are named
                full = parser.parse_object(copy.deepcopy(old))  # it changes what it is given
                old = yaml.safe_load(parser.dump(full, skip_link_targets=False, skip_none=False, format="yaml"))
        return changed_keys(old, self.config_dump)

    @rank_zero_only
    def _write_record(self, written: Path) -> None:
        write_text(written, yaml.safe_dump(self.config_dump, sort_keys=False))
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        write_run(
            self.run_dir,
            {
                "verb": self.subcommand,
                "seed": self.config_dump.get("seed_everything"),
                "backbone": {"name": self.model.backbone_name, "arguments": self.model.arguments},
                "data": self.datamodule.fingerprint(),
                "validation": {"split": self.datamodule.validation_split, "images": self.datamodule.size("val")},
                "calibration_indices": self.datamodule.calibration_indices,
            },
        )

    def _write_lab_config(self, verb: str) -> None:
        """The configuration of a verb of the lab: `config.yaml`, beside that of a fit `config-VERB.yaml`."""
        self._dump_config()
        text = yaml.safe_dump(self.config_dump, sort_keys=False)
        own = self.run_dir / f"config-{verb}.yaml"
        whole = self.run_dir / "config.yaml"
        write_text(own if own.exists() or (whole.exists() and whole.read_text() != text) else whole, text)

    def _take_trained_weights(self) -> None:
        """Evaluates the run folder's last checkpoint unless other weights are given; never random ones.

        Raises:
            InputError: there are none.
        """
        settings = self.config_init[self.subcommand]
        if settings.get("ckpt_path") is not None or self.model.is_trained:
            return
        last = self.run_dir / "checkpoints" / "last.ckpt"
        if not last.is_file():
            raise InputError(
                f"{self.subcommand} needs a trained network: {last} does not exist; give --ckpt_path FILE, the "
                "--run_dir of a fit, or --model.weights FILE"
            )
        settings["ckpt_path"] = str(last)
