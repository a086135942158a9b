"""What to sweep over under which protocol, and the cells that follow, each with the name of its file."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lit_prune.arguments import check_counts, check_seeds
from lit_prune.errors import InputError
from lit_prune.lab.ledger import signature
from lit_prune.scores import find_score
from lit_prune.structure import Budget

Removal = Literal["physical", "mask"]
Allocation = Literal["global", "uniform", "hybrid"]
RecoveryName = Literal["sgd", "adam", "none", "recalibrate", "refit", "recalibrate_sgd", "refit_sgd"]
Executor = Literal["local", "ray"]
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
METHODS = (
    "taylor",
    "magnitude",
    "random",
    "fpgm",
    "chip",
    "network_slimming",
    "activation_rms",
    "composite_ix",
    "cap_qgw",
    "spectral_rs",
    "composite_pid",
    "pid_no_red",
    "hybrid",
)
BUDGET_METHOD = "taylor"


@dataclass(frozen=True)
class Recovery:
    """What follows pruning: a repair without training, then an optimizer.

    Attributes:
        optimizer: of the training; "none": nothing is trained.
        first: "recalibrate" (BatchNorm, on augmented training images), "refit" (every layer from the first cut on is
            solved again on the calibration images), or "none".
    """

    optimizer: str
    lr: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    first: Literal["none", "recalibrate", "refit"] = "none"


SGD = Recovery("sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)
RECOVERIES: dict[str, Recovery] = {
    "sgd": SGD,
    "adam": Recovery("adam", lr=1e-4, weight_decay=5e-4),
    "none": Recovery("none"),
    "recalibrate": Recovery("none", first="recalibrate"),
    "refit": Recovery("none", first="refit"),
    "recalibrate_sgd": replace(SGD, first="recalibrate"),
    "refit_sgd": replace(SGD, first="refit"),
}


@dataclass(frozen=True)
class SweepRequest:
    """Methods × sparsities × seeds × allocations × removals × recoveries, and the protocol that all of them share.

    Attributes:
        methods: names of scores, with parameters where they have them: `ix_minus_redundancy(0.5)`.
        sparsities: shares removed of what `budget` counts, each in (0, 1).
        seeds: each draws its own calibration images, training order, augmentation and random scores; with several
            checkpoints every checkpoint is combined with every seed.
        allocations: `global` (one threshold), `uniform` (the same share in every layer), `hybrid` (layer budgets from
            `taylor` under the global threshold, ranks inside a layer from the method).
        removals: `physical`; `mask` zeroes channels of each layer by itself, for comparison only: MACs count as if
            they were removed; it goes with `global` and `uniform`.
        recoveries: `sgd` (lr 0.01, momentum 0.9, weight decay 1e-4), `adam` (lr 1e-4, weight decay 5e-4), `none`;
            `recalibrate` and `refit` repair without training, `recalibrate_sgd` and `refit_sgd` train after that; with
            physical removal only.
        epochs: of recovery.
        max_batches: of recovery in all, over its epochs.
        recovery_checks: numbers of batches after which the accuracy is measured too: the recovery-budget check.
        alphas: weights of the sweep magnitude + α·input capture.
        betas: weights of the sweep input capture - β·peer overlap.
        budget: what a sparsity is a share of: `channels`, `macs` or `params`.
        normalisation: of scores before the global threshold: `none`, `layer_mean`, `layer_max`, `rank`, `z`.
        round_to: widths are multiples of it.
        cap: largest share of a group that may go.
        only: `mid` (channels inside of blocks), `planes` or null for all.
        limit_test: number of test images, class-balanced; null takes all.
        executor: `local`, or `ray` for the workers of a Ray cluster (extra `ray`).
        workers: null is one for each device, on Ray one for each GPU or CPU; on a CPU one process unless given.
        threads: CPU threads of each worker, so that results do not depend on the number of workers.

    Raises:
        InputError: an unknown method (near matches are listed), a sparsity outside (0, 1), a number out of range.
    """

    methods: tuple[str, ...] = METHODS
    sparsities: tuple[float, ...] = SPARSITIES
    seeds: tuple[int, ...] = (0,)
    allocations: tuple[Allocation, ...] = ("global",)
    removals: tuple[Removal, ...] = ("physical",)
    recoveries: tuple[RecoveryName, ...] = ("sgd",)
    epochs: int = 5
    max_batches: int = 200
    recovery_checks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()
    budget: Literal["channels", "macs", "params"] = "channels"
    normalisation: str = "none"
    round_to: int = 1
    cap: float = 0.95
    only: Literal["mid", "planes"] | None = None
    limit_test: int | None = None
    executor: Executor = "local"
    workers: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in LISTS:
            object.__setattr__(self, name, _distinct(name, getattr(self, name)))
        for method in self.all_methods:
            find_score(method)
        for sparsity in self.sparsities:
            if not 0 < sparsity < 1:
                raise InputError(f"sparsities: {sparsity} lies outside (0, 1); give the share removed, such as 0.5")
        self.structure_budget(0.5)
        if "mask" in self.removals and ("hybrid" in self.allocations or self.budget == "params"):
            raise InputError(
                "removals: 'mask' goes with the allocations global and uniform and a budget of channels or macs"
            )
        unknown = next((name for name in self.recoveries if name not in RECOVERIES), None)
        if unknown is not None:
            raise InputError(f"recoveries: {unknown!r} is none of {', '.join(RECOVERIES)}")
        prepared = [name for name in self.recoveries if RECOVERIES[name].first != "none"]
        if "mask" in self.removals and prepared:
            raise InputError(f"recoveries: {prepared[0]!r} goes with physical removal; leave 'mask' out of removals")
        self._check_counts()

    def _check_counts(self) -> None:
        least = {"epochs": 1, "max_batches": 1, "limit_test": 1, "workers": 1, "threads": 1}
        check_counts(self, least)
        check_seeds(*self.seeds)
        for count in self.recovery_checks:
            if not 1 <= count < self.max_batches:
                raise InputError(
                    f"recovery_checks: {count} must lie in 1..{self.max_batches - 1}, below max_batches, where the"
                    " accuracy is measured anyway"
                )

    @property
    def weight_methods(self) -> tuple[str, ...]:
        """The methods of the weight sweeps; they stay out of the comparison of axes."""
        mixed = tuple(f"magnitude_plus_ix({alpha:g})" for alpha in self.alphas)
        return mixed + tuple(f"ix_minus_redundancy({beta:g})" for beta in self.betas)

    @property
    def all_methods(self) -> tuple[str, ...]:
        """All methods, each once."""
        return tuple(dict.fromkeys((*self.methods, *self.weight_methods)))

    def structure_budget(self, sparsity: float) -> Budget:
        """The budget of a sparsity under the global threshold."""
        return Budget(self.budget, 1 - sparsity, "global", self.round_to, self.normalisation, self.cap, self.only)

    @property
    def planning(self) -> dict[str, Any]:
        """The protocol fields that a plan depends on beside method, sparsity and allocation."""
        return {name: getattr(self, name) for name in ("budget", "normalisation", "round_to", "cap", "only")}

    def recovery_fields(self, name: str) -> dict[str, Any]:
        """The protocol fields of a recovery."""
        fields = asdict(RECOVERIES[name])
        if fields["first"] == "none":
            del fields["first"]  # so that results from before it was there still serve
        if fields["optimizer"] == "none":
            return fields | {"epochs": 0, "max_batches": 0, "recovery_checks": []}
        limits = {"epochs": self.epochs, "max_batches": self.max_batches}
        return fields | limits | {"recovery_checks": list(self.recovery_checks)}


LISTS = ("methods", "sparsities", "seeds", "allocations", "removals", "recoveries")
LISTS += ("recovery_checks", "alphas", "betas")
REQUIRED = LISTS[:6]


def _distinct(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """The values without repetitions; method names without spaces."""
    values = [value.replace(" ", "") if isinstance(value, str) else value for value in values]
    if name in REQUIRED and not values:
        raise InputError(f"{name}: empty; give at least one")
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class Unit:
    """What is resampled by intervals: a checkpoint (its number in the list) and a seed of draws."""

    checkpoint: int
    seed: int


@dataclass(frozen=True)
class Cell:
    """One pruned network: which unit, how it is pruned, how it recovers."""

    unit: Unit
    method: str
    allocation: str
    removal: str
    recovery: str
    sparsity: float


def list_units(request: SweepRequest, checkpoints: int) -> list[Unit]:
    """Every checkpoint with every seed."""
    return [Unit(*pair) for pair in itertools.product(range(checkpoints), request.seeds)]


def list_cells(request: SweepRequest, checkpoints: int) -> Iterator[Cell]:
    """All cells of a sweep, a unit's together."""
    axes = (request.all_methods, request.allocations, request.removals, request.recoveries, request.sparsities)
    for unit in list_units(request, checkpoints):
        for values in itertools.product(*axes):
            yield Cell(unit, *values)


@dataclass(frozen=True)
class Keys:
    """Names of result files; equal exactly where all that a result depends on is equal.

    Attributes:
        request: the sweep.
        networks: fingerprint of each checkpoint's network.
        context: further plain values that every result depends on (data, precision).
    """

    request: SweepRequest
    networks: tuple[str, ...]
    context: dict[str, Any]

    def dense(self, checkpoint: int) -> str:
        """Of the dense network's cost and accuracy."""
        return self._name("dense", checkpoint, {"limit_test": self.request.limit_test})

    def plans(self, unit: Unit, method: str) -> str:
        """Of a method's plans in a unit, for all removals, allocations and sparsities."""
        wanted = {name: getattr(self.request, name) for name in ("removals", "allocations", "sparsities")}
        fields = {"method": method, "seed": unit.seed, **wanted, **self.request.planning}
        return self._name(f"{method}-seed{unit.seed}", unit.checkpoint, fields)

    def cell(self, cell: Cell) -> str:
        """Of a cell."""
        parts = (cell.method, cell.allocation, cell.removal, cell.recovery)
        label = f"{'-'.join(parts)}-{cell.sparsity:g}-seed{cell.unit.seed}"
        fields = asdict(cell) | {"unit": cell.unit.seed, "limit_test": self.request.limit_test}
        fields |= self.request.planning | self.request.recovery_fields(cell.recovery)
        return self._name(label, cell.unit.checkpoint, fields)

    def _name(self, label: str, checkpoint: int, fields: dict[str, Any]) -> str:
        signed = signature(self.networks[checkpoint], self.context, fields)
        return f"{re.sub(r'[^-.0-9A-Za-z_]+', '_', label)}-{signed[:16]}"
