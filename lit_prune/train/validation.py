"""The user's own validation loop, run once in between, and what it logs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities.seed import isolate_rng

from lit_prune.train.locate import network_at
from lit_prune.train.module_state import attributes_kept
from lit_prune.train.trainer_state import callbacks_of

CONNECTOR = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics", "_first_loop_iter", "_current_fx")
HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_validation_"))


def run_validation(trainer: Trainer, path: str) -> dict[str, float]:
    """What the validation loop of a running `fit` logs for the network as it stands; {} where there is no such loop.

    All hooks of the module run, those of callbacks do not, and loggers keep nothing: nobody stops, saves or logs
    because of it. Counters, logged metrics, modes, the module's attributes and the random state are as before.

    Args:
        trainer: in `fit`.
        path: of the network in its module.
    """
    loop, module = trainer.fit_loop.epoch_loop.val_loop, trainer.lightning_module
    if not loop._data_source.is_defined():
        return {}
    with _aside(trainer), attributes_kept(module, network_at(module, path)), isolate_rng():
        loop.run()
        found = dict(trainer._logger_connector._callback_metrics)
    return {name: float(value) for name, value in found.items()}


@contextmanager
def _aside(trainer: Trainer) -> Iterator[None]:
    """The trainer in validation, its callbacks and loggers there but still; all as before on exit."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    kept = {name: getattr(connector, name) for name in CONNECTOR}
    progress, restarting, stage = loop.batch_progress.state_dict(), loop.restarting, trainer.state.stage
    loggers, own = trainer.loggers, [(callback, dict(vars(callback))) for callback in callbacks_of(trainer)]
    trainer.loggers = [_Deaf(logger) for logger in loggers]
    connector.reset_metrics()
    connector._first_loop_iter = None
    trainer.validating, loop.restarting = True, False
    try:
        for callback, _ in own:
            vars(callback).update(dict.fromkeys(HOOKS, _nothing))
        yield
    finally:
        for callback, attributes in own:
            for name in HOOKS:
                vars(callback).pop(name, None)
            vars(callback).update((name, attributes[name]) for name in HOOKS if name in attributes)
        trainer.loggers = loggers
        trainer.state.stage, loop.restarting = stage, restarting
        loop.batch_progress.load_state_dict(progress)
        for name, value in kept.items():
            setattr(connector, name, value)


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of a callback's hook."""


class _Deaf(Logger):
    """In the place of a logger: has its name and folders, which modules write images to, and keeps nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger, self.experiment = logger, DummyExperiment()

    @property
    def name(self) -> str | None:
        """The logger's own."""
        return self._logger.name

    @property
    def version(self) -> int | str | None:
        """The logger's own."""
        return self._logger.version

    @property
    def root_dir(self) -> str | None:
        """The logger's own."""
        return self._logger.root_dir

    @property
    def log_dir(self) -> str | None:
        """The logger's own."""
        return self._logger.log_dir

    @property
    def save_dir(self) -> str | None:
        """The logger's own, or what the Trainer gives out as its `log_dir`."""
        return self.log_dir if isinstance(self._logger, CSVLogger | TensorBoardLogger) else self._logger.save_dir

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Keeps nothing."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        """Other methods, such as `log_image`, keep nothing either."""
        return _nothing
