"""Which channels to lesion, and how."""

from dataclasses import dataclass

from lit_prune.arguments import check_counts, check_seeds
from lit_prune.errors import InputError
from lit_prune.measurement.protocol import Protocol
from lit_prune.task import TARGETS

LESION_PROTOCOL = Protocol(token=None)  # a lesion acts on every token, so its statistics are of every token


@dataclass(frozen=True)
class LesionRequest:
    """Which channels `lesion` sets to zero and replaces by their peers, on which images.

    Attributes:
        layers: names or fnmatch patterns of Conv2d and Linear layers ('*' for all); None takes the middle of the
            first, second and last third of the network's depth.
        per_third: layers taken of each third where `layers` is not given, evenly spaced.
        channels: channels drawn of each layer, seeded, among those that are not dead; None takes all.
        images: evaluation images, a class-balanced subset of the evaluation split; None takes all.
        limit: calibration images for the metrics and the peers' fit; None takes all.
        peers: number of peers in a replacement.
        ridge: penalty of the fit, relative to the peers' variances.
        target: task variable with one value an image.
        values: bound on the values of an activation with all variants that run at once; None suits the device.
        seed: of the channel draw and the bootstrap.
        protocol: measurement conventions; lesions are of raw outputs, so its hook point is `pre_bn`.

    Raises:
        InputError: a number out of range, an unknown target.
    """

    layers: tuple[str, ...] | None = None
    per_third: int = 1
    channels: int | None = 64
    images: int | None = 2000
    limit: int | None = 2000
    peers: int = 8
    ridge: float = 1e-6
    target: str = "true_margin"
    values: int | None = None
    seed: int = 0
    protocol: Protocol = LESION_PROTOCOL

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers:
                raise InputError("layers: empty; give names or patterns, or null for some of each third of the depth")
        check_seeds(self.seed)
        least = {"per_third": 1, "channels": 1, "images": 1, "limit": self.peers + 2, "peers": 1, "values": 1}
        check_counts(self, least)
        if not self.ridge > 0:
            raise InputError(f"ridge: {self.ridge} is not above 0; give something like 1e-6")
        if self.target not in TARGETS or self.target == "one_vs_rest":
            known = ", ".join(name for name in TARGETS if name != "one_vs_rest")
            raise InputError(f"target: {self.target!r} is not one of {known}")
        if self.protocol.hook_point != "pre_bn":
            raise InputError(f"protocol.hook_point: {self.protocol.hook_point!r}; lesions need 'pre_bn'")
