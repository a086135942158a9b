"""What Lightning's connectors leave on a Trainer, with its type: the class itself does not declare it."""

from lightning.pytorch import Callback, LightningDataModule, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks, in the order in which they are called; the list itself."""
    return vars(trainer)["callbacks"]


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """The DataModule, where the run has one."""
    return vars(trainer).get("datamodule")


def is_trial(trainer: Trainer) -> bool:
    """Whether it runs a few batches to see that nothing breaks (`fast_dev_run`)."""
    return bool(vars(trainer)["fast_dev_run"])


def steps_between_logs(trainer: Trainer) -> int:
    """Every how many steps figures are logged."""
    return int(vars(trainer)["log_every_n_steps"])
