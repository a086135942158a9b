"""What is refused before a verb begins: what a constructor refuses, and settings that would change the run silently."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lit_prune.arguments import check_at_once
from lit_prune.cli.parsing import causes
from lit_prune.errors import InputError, first_line


@contextmanager
def as_input_errors(what: str) -> Iterator[None]:
    """Raises whatever the block raises as an InputError: all it does is to build what the user asked for.

    Raises:
        InputError: what was raised further down, else that `what` cannot be built, in the exception's own words.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        given = next((cause for cause in causes(error) if isinstance(cause, InputError)), None)
        if given is not None:  # jsonargparse collects what each type of a union says
            raise given from None
        raise InputError(f"{what} is refused ({type(error).__name__}: {first_line(error)})") from error


def check_processes(settings: Mapping[str, Any]) -> None:
    """Refuses more processes than a machine carries, before Lightning makes a list of them or starts them.

    Raises:
        InputError: the setting is named.
    """
    for name in ("devices", "num_nodes"):
        given = str(settings.get(name))
        if given.isdigit():
            check_at_once(f"trainer.{name}={given}", int(given))


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuses settings that Lightning takes and that would train nothing, or backwards.

    Raises:
        InputError: the setting is named.
    """
    for split in ("train", "val", "test", "predict"):
        limit = getattr(trainer, f"limit_{split}_batches")
        if (limit == 0 and split == "train") or (isinstance(limit, int | float) and limit < 0):
            raise InputError(f"trainer.limit_{split}_batches={limit} leaves no batch; give more than 0")
    clip = trainer.gradient_clip_val
    if clip is not None and not clip >= 0:
        raise InputError(f"trainer.gradient_clip_val={clip} would turn gradients around; give a value above 0")
    least = {"accumulate_grad_batches": 1, "log_every_n_steps": 1, "check_val_every_n_epoch": 1}
    for name, minimum in {**least, "val_check_interval": 1e-9}.items():
        value = getattr(trainer, name)
        if isinstance(value, int | float) and value < minimum:
            raise InputError(f"trainer.{name}={value} must be at least {max(minimum, 1)}, or a share above 0")
