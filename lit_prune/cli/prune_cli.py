"""The verbs that need a model and data: Lightning's command line with a run folder, resuming, and our verbs."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO

from lit_prune.cli.checks import as_input_errors, check_processes, check_trainer
from lit_prune.cli.compress import schedule_sweep
from lit_prune.cli.console import LearningRate, RanksEndAtOnce, shown
from lit_prune.cli.failures import narrated_on_stdout
from lit_prune.cli.listing import LIGHTNING, first_sentence
from lit_prune.cli.parsing import OneLineErrors
from lit_prune.cli.recipes import with_recipes
from lit_prune.cli.run_folder import WRITTEN_BEFORE, RunFolderCLI
from lit_prune.cli.trainer import Trainer, last_checkpoint
from lit_prune.data import ImageData
from lit_prune.files import alone, nothing_of_a_refused_run
from lit_prune.lab.reduce.request import ReduceRequest
from lit_prune.lab.reduce.run import Setup, reduce_run
from lit_prune.models import find_blocks
from lit_prune.progress import terminal
from lit_prune.train.checkpoints import checkpoint_writer
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.execution import check_precision
from lit_prune.train.stage_plans import blocks_of_ratio
from lit_prune.train.trainer_state import callbacks_of

TRAINING_VERBS = ("fit", "compress")
LAB_VERBS = ("analyze", "curve", "lesion", "reduce", "sensitivity", "sweep")
VERBS = ("analyze", "compress", "curve", "lesion", "reduce", "sensitivity", "sweep")
DESCRIPTION = (
    "Train a vision network, watch its channels, prune it in stages, repair it, hand over a smaller dense one. "
    "Verbs of their own, each with --help: `demo`, `export`, `recipes`, `report`, `suite`."
)


class OneLineParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with errors of one line."""


class PruneCLI(RunFolderCLI):
    """LightningCLI with a run folder, resuming, and the project's verbs.

    Attributes:
        fits_networks: whether a verb that does not train by itself is training a network just now.
    """

    trainer: Trainer
    fits_networks = False

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs that need a model and data, with the arguments that are not on the command line."""
        return {**LightningCLI.subcommands(), **{verb: {"model", "datamodule"} for verb in VERBS}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run folder and takes the classifier's sizes from the data."""
        parser.add_argument(
            "--run_dir", type=str, default="runs/run", help="Folder for everything that the run writes."
        )
        parser.add_argument(
            "--correct_stages",
            type=bool,
            default=False,
            help="Go on in a run folder with other stages of StagedPruning than before, where they are not done yet.",
        )
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_shape", "model.image_shape", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser of a verb, whose help begins with what is ours; the trainer's many options are last."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"lit-prune {subcommand} -c RECIPE [--run_dir DIR] [--option value ...]"
        parser.description = LIGHTNING.get(subcommand) or first_sentence(getattr(klass, subcommand))
        groups: Any = parser._action_groups
        groups.sort(key=lambda group: "lightning.pytorch.Trainer" in str(group.title))
        return parser

    def _parse_ckpt_path(self) -> None:
        """The configuration says what is built; the checkpoint's structure is checked against it when it loads."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line. InputError: whatever is wrong with it or with a file that it names."""
        with as_input_errors("the command line or a file of -c"):
            super().parse_arguments(parser, args)

    def _set_seed(self) -> None:
        with as_input_errors("seed_everything"):
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer. InputError: whatever one of them refuses."""
        with as_input_errors("the configuration"):
            check_processes(self.config[self.subcommand]["trainer"])
            super().instantiate_classes()
            check_trainer(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Trainer that logs and saves under the run folder."""
        settings = self._get(self.config_init, "trainer")
        callbacks = list(settings.get("callbacks") or [])
        trains = self.subcommand in TRAINING_VERBS or self.fits_networks
        if trains and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks.append(last_checkpoint(self.run_dir))
        callbacks.append(RanksEndAtOnce())
        if trains:
            added, changed = shown(callbacks, settings)
            callbacks = [*added, *callbacks]
            kwargs |= changed
        logger = settings.get("logger")
        if logger in (None, True):
            logger = trains and TensorBoardLogger(self.run_dir, name="", version="tensorboard", default_hp_metric=False)
        if trains and logger:
            callbacks.append(LearningRate())
        given = settings.get("plugins") or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, checkpoint_writer()]
        trainer: Any = super().instantiate_trainer(callbacks=callbacks, logger=logger, **kwargs)
        check_precision(str(trainer.precision), trainer.strategy.root_device, asked=settings.get("precision"))
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Carries out the verb while no other process is at work in its run folder."""
        if not self.trainer.is_global_zero:
            return super()._run_subcommand(subcommand)
        with alone(self.run_dir), nothing_of_a_refused_run(self.run_dir, WRITTEN_BEFORE):
            if subcommand in LAB_VERBS:
                self._write_lab_config(subcommand)
            return super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Enters the run folder: refuses another run's, resumes this run's."""
        self._enter_run_folder()

    before_compress = before_fit

    def before_validate(self) -> None:
        """Takes the run's own weights."""
        self._take_trained_weights()

    before_test = before_predict = before_validate

    def compress(self, ratios: list[float] | None = None, **arguments: Any) -> None:
        """Runs the trainer's `compress`, once or once for each ratio of a schedule sweep."""
        if ratios is None:
            self.trainer.compress(**arguments)
            return
        blocks = find_blocks(self.model.backbone, torch.zeros(1, *self.model.image_shape))
        one, count = partial(self._one_ratio, arguments=arguments), partial(blocks_of_ratio, blocks)
        terminal().print(schedule_sweep(self.run_dir, ratios, one, count))

    def _one_ratio(self, ratio: float, run_dir: Path, arguments: dict[str, Any]) -> None:
        """One run of a schedule sweep in its own folder, with a network and a trainer of its own."""
        settings = self.config[self.subcommand]
        settings["run_dir"] = settings["trainer"]["default_root_dir"] = str(run_dir)
        self.instantiate_classes()
        for callback in callbacks_of(self.trainer):
            if hasattr(callback, "set_block_ratio"):
                callback.set_block_ratio(ratio)
        last = run_dir / "checkpoints" / "last.ckpt"
        fresh = {"model": self.model, "datamodule": self.datamodule, "ckpt_path": str(last) if last.exists() else None}
        self.trainer.compress(**{**arguments, **fresh})

    def reduce(self, request: ReduceRequest, ckpt_path: str | None = None, **_: Any) -> None:
        """Runs `reduce` with networks that it may train itself, one a seed."""
        setup = Setup(self.trainer, self.model, self.datamodule, ckpt_path, self._make_network)
        reduce_run(setup, request)

    def _make_network(self, seed: int, run_dir: Path) -> tuple[Trainer, LitClassifier, ImageData]:
        """Trainer, untrained module and data of the configuration, for one seed in a folder of its own."""
        settings = self.config[self.subcommand]
        settings["run_dir"] = settings["trainer"]["default_root_dir"] = str(run_dir)
        settings["data"]["init_args"]["seed"] = seed
        seed_everything(seed, workers=True)
        self.fits_networks = True
        self.instantiate_classes()
        return self.trainer, self.model, self.datamodule


def build_cli(args: Sequence[str], run: bool = True) -> PruneCLI:
    """Parses the command line of a verb that needs a model and data, and carries it out unless `run` is off."""
    sys.argv[1:] = args = with_recipes(args)  # Lightning's launchers start the other ranks with this command line
    chosen: Any = PruneCLI if run else ParsedCLI
    if args and args[0] in PruneCLI.subcommands():  # the parsers of the other verbs would take seconds to build
        verb = {args[0]: PruneCLI.subcommands()[args[0]]}
        chosen = type(chosen.__name__, (chosen,), {"subcommands": staticmethod(lambda: verb)})
    with narrated_on_stdout():  # Lightning has made its handlers by now
        return chosen(
            LitClassifier,
            ImageData,
            subclass_mode_data=True,
            trainer_class=Trainer,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=OneLineParser,
            seed_everything_default=0,
            parser_kwargs={"prog": "lit-prune", "description": DESCRIPTION},
        )


class ParsedCLI(PruneCLI):
    """Stops after parsing: what `--print_config` and the tests of the configurations need."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def fit_parts(args: list[str]) -> tuple[LitClassifier, ImageData, dict[str, Any]]:
    """Model, data and trainer settings of a `fit` command line, which is not carried out."""
    cli = build_cli(args, run=False)
    settings = cli.parser.instantiate_classes(cli.config)["fit"]
    return settings["model"], settings["data"], dict(settings["trainer"])
