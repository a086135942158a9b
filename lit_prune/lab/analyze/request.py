"""What to analyse, and how."""

from dataclasses import dataclass

from lit_prune.arguments import check_counts, check_seeds
from lit_prune.errors import InputError
from lit_prune.lab.analyze.extras import extra_names
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL, Protocol
from lit_prune.task import TARGETS

EVERYDAY = ("groupings", "graphs", "hulls", "triplets", "propagation", "boundary", "variants")


@dataclass(frozen=True)
class AnalyzeRequest:
    """Which extras `analyze` adds to the channel and layer tables, and their settings.

    Attributes:
        extras: any of `groupings` (k-means on each axis, adjusted Rand index with its null), `graphs` (modularity of
            the redundancy and the target-excess graph), `hulls`, `triplets`, `propagation` (metrics routed to the next
            layer), `boundary` (weight norm against the local axis), `variants` (BN-folded norm and power), `targets`
            (all task variables), `partners` (partner rules and counts), `label_permutation`, `reparameterisation`
            (function-preserving Conv-BN rescaling), `calibration_sizes`, `exact` (unfolded against streamed signal
            power), `broja`, `ksg`, `damage` (needs lesions: matched pairs, components).
        target: task variable with one value an image.
        layers: names or fnmatch patterns; None takes every Conv2d and Linear layer.
        limit: number of calibration images; None takes all.
        partner_counts: m values of `partners`.
        sizes: numbers of images of `calibration_sizes`, each compared with all images.
        samples: images of `broja` and `ksg` at the most; `exact` uses an eighth of them.
        bins: equal-frequency bins of `broja`.
        seed: of groupings, nulls, triples, permutations and rescalings.
        protocol: measurement conventions.

    Raises:
        InputError: an unknown extra or target, a number out of range.
    """

    extras: tuple[str, ...] = EVERYDAY
    target: str = "true_margin"
    layers: tuple[str, ...] | None = None
    limit: int | None = None
    partner_counts: tuple[int, ...] = (5, 10, 20)
    sizes: tuple[int, ...] = (100, 500, 1000, 2000)
    samples: int = 2000
    bins: int = 4
    seed: int = 0
    protocol: Protocol = DEFAULT_PROTOCOL

    def __post_init__(self) -> None:
        for name in ("extras", "layers", "partner_counts", "sizes"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        unknown = [name for name in self.extras if name not in extra_names()]
        if unknown:
            raise InputError(f"extras: {unknown[0]!r} is not one of {', '.join(extra_names())}")
        if self.target not in TARGETS or self.target == "one_vs_rest":
            known = ", ".join(name for name in TARGETS if name != "one_vs_rest")
            raise InputError(
                f"target: {self.target!r} is not one of {known} (one_vs_rest: ask for the extra 'targets')"
            )
        check_seeds(self.seed)
        least = {"limit": 4, "samples": 8, "bins": 2}
        check_counts(self, least)
        if any(count < 1 for count in self.partner_counts) or any(size < 4 for size in self.sizes):
            raise InputError("partner_counts, sizes: give counts of at least 1 and sizes of at least 4")
