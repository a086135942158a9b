"""The user's own validation loop, run once in between, and what it logs."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng

from lit_prune.train.trainer_state import callbacks_of, put

CONNECTOR = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics", "_first_loop_iter", "_current_fx")


def run_validation(trainer: Trainer) -> dict[str, float]:
    """What the validation loop of a running `fit` logs for the network as it stands; {} where there is no such loop.

    All hooks of the module run, those of callbacks and loggers do not: nobody stops, saves or logs because of it.
    Counters, logged metrics, modes and the random state are as before.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not loop._data_source.is_defined():
        return {}
    with _aside(trainer), isolate_rng():
        loop.run()
        found = dict(trainer._logger_connector._callback_metrics)
    return {name: float(value) for name, value in found.items()}


@contextmanager
def _aside(trainer: Trainer) -> Iterator[None]:
    """The trainer in validation, without callbacks and loggers; all as before on exit."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    kept = {name: getattr(connector, name) for name in CONNECTOR}
    progress, restarting, stage = loop.batch_progress.state_dict(), loop.restarting, trainer.state.stage
    callbacks, loggers = callbacks_of(trainer), trainer.loggers
    put(trainer, callbacks=[])
    trainer.loggers = [DummyLogger() for _ in loggers]
    connector.reset_metrics()
    connector._first_loop_iter = None
    trainer.validating, loop.restarting = True, False
    try:
        yield
    finally:
        put(trainer, callbacks=callbacks)
        trainer.loggers = loggers
        trainer.state.stage, loop.restarting = stage, restarting
        loop.batch_progress.load_state_dict(progress)
        for name, value in kept.items():
            setattr(connector, name, value)
