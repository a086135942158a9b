"""The batches that callbacks measure on: which loader they come from, as the network gets them."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, RandomSampler

from lit_prune.errors import InputError
from lit_prune.task.batches import map_tensors
from lit_prune.train.capture import NotCalledError, Seen, see, step_for_evaluation
from lit_prune.train.rewire import sum_over_ranks, training_loader, validation_loader
from lit_prune.train.trainer_state import datamodule_of

LARGEST = 1 << 30  # bytes of samples that are kept
SAMPLES = 1024  # of the validation loader, where nobody says how many
Numbered = tuple[Any, int, int]  # batch, its index, number of its loader


@dataclass(frozen=True)
class Samples:
    """Batches as the network gets them (`Seen`), the same at every iteration, with the random state left as found.

    Batches for which the step does not call the network are left out.

    Attributes:
        trainer: in `fit`.
        path: of the network in its module.
        loader: makes the loader.
        step: the step of the module that they go through up to the network.
        origin: where they come from, for records and messages.
        shared: whether every rank reads the same ones; else each has its own.
        limit: samples at the most; None takes all.
        batches: batches at the most; None takes all.
    """

    trainer: Trainer
    path: str
    loader: Callable[[], Any]
    step: str
    origin: str
    shared: bool = False
    limit: int | None = None
    batches: int | None = None

    def __iter__(self) -> Iterator[Seen]:
        return self._seen()

    def _seen(self, workers: bool = True) -> Iterator[Seen]:
        left, missed, met = self.limit, None, False
        for number, (batch, index, loader) in enumerate(numbered_batches(self.loader(), self.step, workers)):
            if number == self.batches or left == 0:
                break
            try:
                seen = see(self.trainer, self.path, batch, index, self.step, loader)
            except NotCalledError as error:  # steps may leave batches out
                missed = error
                continue
            met = True
            if left is not None:
                seen = seen.first(left)
                left -= seen.size
            yield seen
        if missed is not None and not met:
            raise missed

    def _look(self) -> Seen | None:
        """The first batch, if there is one, made in this process: where others are spawned, each takes seconds."""
        try:
            return next(self._seen(workers=False), None)
        except (NotCalledError, InputError):
            raise
        except Exception:  # a data set that opens its files in workers alone; any other error comes again
            return next(self._seen(), None)

    def first(self) -> Seen:
        """The first batch; to be asked for on every rank.

        Raises:
            InputError: on every rank where one has none: the others would wait for it for ever.
        """
        found, missed, ranks = None, None, self.trainer.world_size
        try:
            found = self._look()
        except NotCalledError as error:
            missed = error
        without = int(sum_over_ranks(self.trainer, torch.tensor([float(found is None)])))
        if missed is not None:
            raise missed
        if without or found is None:
            which = f" on {without} of {ranks} ranks; give more samples, or fewer devices" if ranks > 1 else ""
            raise InputError(f"{self.origin}: it holds no batch{which or '; give at least one'}")
        return found


class Kept:
    """Samples that are read once: every pass gets copies of them, since networks and steps may write into theirs.

    More than `LARGEST` bytes of them are read anew in every pass.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.origin, self.first = samples.origin, samples.first
        self._kept: list[Seen] | None = None

    def __iter__(self) -> Iterator[Seen]:
        if self._kept is None:
            self._kept = self._read()
        return (map_tensors(seen, torch.clone) for seen in self._kept or self._samples)

    def _read(self) -> list[Seen]:
        """All of them; none where they are too many."""
        found, left = [], LARGEST
        for seen in self._samples:
            found.append(seen)
            left -= sum(tensor.nbytes for tensor in _tensors(seen))
            if left < 0:
                return []
        return found


def _tensors(seen: Seen) -> list[torch.Tensor]:
    """The tensors of a batch, each once."""
    found: dict[int, torch.Tensor] = {}
    map_tensors(seen, lambda tensor: found.setdefault(id(tensor), tensor))
    return list(found.values())


def check_calibration(given: Iterable[Any] | int | None) -> None:
    """Refuses a number of samples below 1."""
    if isinstance(given, int) and given < 1:
        raise InputError(f"calibration: {given} samples; give at least 1, or a loader")


def calibration_samples(trainer: Trainer, path: str, given: Iterable[Any] | int | None = None) -> Samples:
    """The fixed samples to measure on.

    Args:
        trainer: in `fit`.
        path: of the network.
        given: a loader, or a number of samples; None: the DataModule's `calibration_dataloader`, else the first 1,024
            samples of the validation loader, else of the training loader.

    Raises:
        InputError: a loader that shuffles, or no loader at all.
    """
    step = step_for_evaluation(trainer.lightning_module)
    number = given if isinstance(given, int) else None
    own = getattr(datamodule_of(trainer), "calibration_dataloader", None)
    if given is not None and number is None:
        _refuse_shuffling(given, "the loader given")
        return Samples(trainer, path, lambda: given, step, "calibration: the loader given", shared=True)
    if own is not None:
        _refuse_shuffling(own(), "calibration_dataloader")
        return Samples(trainer, path, own, step, "calibration: calibration_dataloader", shared=True, limit=number)
    if validation_loader(trainer) is not None:
        loader, origin = validation_loader, "validation loader"
    else:
        loader, origin, step = training_loader, "training loader, as augmented as it is", "training_step"
    limit = -(-(number or SAMPLES) // trainer.world_size)
    origin = f"calibration: first {number or SAMPLES} samples of the {origin}"
    return Samples(trainer, path, lambda: loader(trainer), step, origin, limit=limit)


def recalibration_samples(trainer: Trainer, path: str, batches: int) -> Samples:
    """Batches of the training distribution: the DataModule's `recalibration_dataloader`, else the training loader."""
    own = getattr(datamodule_of(trainer), "recalibration_dataloader", None)
    loader = own if own is not None else lambda: training_loader(trainer)
    return Samples(trainer, path, loader, "training_step", "recalibration", batches=batches)


def _refuse_shuffling(loader: Any, name: str) -> None:
    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise InputError(f"calibration: {name} shuffles, so that figures could not be compared; set shuffle=False")


def numbered_batches(loader: Any, step: str, workers: bool = True) -> Iterator[Numbered]:
    """Batches of a loader, or of several as Lightning combines them for a step, each with its index and loader.

    Neither the random state nor the loader's own generators and workers move.

    Args:
        loader: one or several.
        step: what they are for.
        workers: whether batches are made in the worker processes that a loader asks for, or in this one.
    """
    if step == "validation_step":
        loader = CombinedLoader(_copied(loader, workers), "sequential")
    elif not isinstance(loader, CombinedLoader):
        loader = CombinedLoader(_copied(loader, workers), "max_size_cycle")
    with _generators_as_found(loader):
        with _quiet_rng():
            torch.manual_seed(0)
            iterator = iter(loader)
        index = 0
        while True:
            with _quiet_rng():
                torch.manual_seed(index)
                found = next(iterator, None)
            if found is None:
                return
            yield found
            index += 1


@contextmanager
def _quiet_rng() -> Iterator[None]:
    with isolate_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about workers, which the run itself gives once
        yield


def _copied(loader: Any, workers: bool = True) -> Any:
    """The loaders with iterators of their own, so that persistent workers of the run are left alone."""
    if isinstance(loader, DataLoader):
        other = copy.copy(loader)
        other.__dict__ |= {"_iterator": None} | ({} if workers else {"num_workers": 0, "timeout": 0})
        return other
    if isinstance(loader, dict):
        return {key: _copied(item, workers) for key, item in loader.items()}
    if isinstance(loader, CombinedLoader):
        return _copied(loader.iterables, workers)
    return [_copied(item, workers) for item in loader] if type(loader) in (list, tuple) else loader


@contextmanager
def _generators_as_found(loader: CombinedLoader) -> Iterator[None]:
    """Puts the states of generators back that loaders and samplers hold."""
    found = [generator for part in loader.flattened for generator in _generators(part)]
    with ExitStack() as stack:
        for generator in found:
            stack.callback(generator.set_state, generator.get_state())
        yield


def _generators(loader: Any) -> Iterable[torch.Generator]:
    sampler = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    owners = (loader, sampler, inner)
    return {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}.values()
