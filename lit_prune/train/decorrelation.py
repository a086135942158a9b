"""Decorrelation regulariser: trains channels to overlap less with their peers."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.measurement.local_axis import DEAD_VARIANCE_RATIO, gaussian_information
from lit_prune.train.added_loss import AddedLoss, add_term, drop_term
from lit_prune.train.locate import find_path, network_at
from lit_prune.train.own_forward import release

TERM = "decorrelation"
LAYERS, CHANNELS, REFERENCES = 6, 128, 64


@checked
class Decorrelation(Callback):
    """Adds `λ/|S| · Σ_{layers in S} R̄_X` of every second batch to the loss of any LightningModule.

    S is at most 6 convolutions spaced evenly over depth. R̄_X of a layer is the mean of g(ρ_ij) in nats over at most 128
    channels i and 64 reference channels j ≠ i, drawn anew in every batch, with ρ over the batch's images and positions
    of the raw outputs. The draw is a function of seed, epoch and batch; torch's random state is not touched.

    Hooks: `on_fit_start` adds the term to what `training_step` returns (manual optimization: `lit_prune.added_loss`),
    `on_train_batch_start` attaches to the network of that moment (one that has just been pruned as well),
    `on_train_batch_end` and `on_train_epoch_end` log, `teardown` detaches. Nothing is kept in the callback's state, so
    a resumed run equals the uninterrupted one. Strategies: one device, DDP (each rank its own images). Logged:
    `train/decorrelation` (the term), `train/peer_overlap` (mean R̄_X over S, where it was measured).

    Args:
        weight: λ ≥ 0. With 0 the training is bit for bit the one without the callback, and R̄_X is still logged.
        every_n_batches: 2 regularises batches 0, 2, 4, ... of each epoch.
        seed: of the channel draws.
        network: path of the network in the module; None finds it, see `find_path`.

    Raises:
        InputError: a value out of range; at fit start: no network found, one without a convolution of two channels, or
            a compiled training step; at the end of an epoch: the chosen layers were never called, or manual
            optimization never took the term.

    Source: the two-axis paper, appendix O and table 17.
    """

    def __init__(
        self, weight: float = 0.1, every_n_batches: int = 2, seed: int = 0, network: str | None = None
    ) -> None:
        if weight < 0:
            raise InputError(f"weight: {weight} is negative; give 0 or more (the paper: 0.1)")
        if every_n_batches < 1:
            raise InputError(f"every_n_batches: {every_n_batches} is below 1")
        self.weight = weight
        self.every_n_batches = every_n_batches
        self.seed = seed
        self.network = network
        self._path = ""
        self._added = AddedLoss()
        self._handles: list[RemovableHandle] = []
        self._hooked: nn.Module | None = None
        self._active = False
        self._draw = torch.Generator()
        self._overlaps: list[Tensor] = []
        self._latest: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the term to the loss."""
        if getattr(pl_module, "compilation", False):
            raise InputError(
                "model.compile: the channel draws of Decorrelation cannot be compiled; set it to false, or remove the "
                "callback"
            )
        self._path = find_path(pl_module, self.network)
        spaced_convolutions(network_at(pl_module, self._path))
        self._added = add_term(pl_module, TERM, self)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the sums of the epoch before."""
        self._added.begin_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's mean of the term.

        Raises:
            InputError: it was never evaluated.
        """
        mean = self._added.mean(TERM)
        if mean is None and self._added.steps:
            raise InputError(
                f"Decorrelation: the loss of {type(pl_module).__name__} never took the term in a whole epoch: "
                f"training_step does not call {self._path!r}, or manual optimization lacks lit_prune.added_loss(self)"
            )
        if mean is not None:
            pl_module.log(f"train/{TERM}", mean, sync_dist=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Attaches to the present network and draws this batch's channels."""
        backbone = network_at(pl_module, self._path)
        if self._hooked is not backbone or batch_idx == 0:
            self._attach(backbone)
        self._active = batch_idx % self.every_n_batches == 0
        self._overlaps, self._latest = [], None
        self._draw.manual_seed((self.seed * 1_000_003 + trainer.current_epoch) * 1_000_003 + batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Logs the overlap that the batch showed."""
        self._active = False
        if self._latest is not None:
            pl_module.log("train/peer_overlap", self._latest, on_step=False, on_epoch=True, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves network and loss as they were."""
        self._detach()
        drop_term(pl_module, TERM)
        release(pl_module)

    def forget(self) -> None:
        """Drops what was kept of a step that took no term."""
        self._overlaps = []

    def __call__(self) -> Tensor | None:
        """Value of the term for the batch that has just gone forward; None in the batches between."""
        overlaps, self._overlaps = self._overlaps, []
        if not overlaps:
            return None
        overlap = torch.stack(overlaps).mean()
        self._latest = overlap.detach()
        return self.weight * overlap if self.weight else torch.zeros_like(overlap)

    def _attach(self, backbone: nn.Module) -> None:
        self._detach()
        chosen = spaced_convolutions(backbone)
        self._handles = [layer.register_forward_hook(self._observe) for layer in chosen.values()]
        self._hooked = backbone

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], None

    def _observe(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook of a chosen layer."""
        if not (self._active and layer.training):
            return
        order = torch.randperm(output.shape[1], generator=self._draw)[:CHANNELS]
        if output.is_cuda:
            order = order.pin_memory()  # copied without waiting for the device
        order = order.to(output.device, non_blocking=True)
        with torch.set_grad_enabled(self.weight > 0), torch.autocast(output.device.type, enabled=False):
            values = output.index_select(1, order).float()  # a copy: a ReLU in place may follow
            self._overlaps.append(sampled_overlap(values, min(REFERENCES, len(order))))


def spaced_convolutions(model: nn.Module, count: int = LAYERS) -> dict[str, nn.Conv2d]:
    """At most `count` convolutions of two channels or more, evenly spaced over module order, first and last included.

    Raises:
        InputError: there is none.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels > 1]
    if not found:
        raise InputError("model: no Conv2d with more than one channel to decorrelate; use a convolutional backbone")
    places = torch.linspace(0, len(found) - 1, min(count, len(found))).round().long().tolist()
    return dict(found[place] for place in places)


def sampled_overlap(values: Tensor, references: int) -> Tensor:
    """Mean of g(ρ_ij) in nats over a layer's channels i and the first `references` j ≠ i, []; outputs [B, N, H, W].

    Channels without variance (at most 1e-10 of the median) take no part; 0 without a pair left.
    """
    samples = values.transpose(0, 1).flatten(1)  # [N, B·H·W]
    samples = samples - samples.mean(1, keepdim=True)
    variance = samples.square().mean(1)
    live = (variance > DEAD_VARIANCE_RATIO * variance.detach().median()) & (variance > 0)
    samples = samples * torch.where(live, variance, 1.0).rsqrt()[:, None]
    correlations = samples @ samples[:references].T / samples.shape[1]  # [N, references]
    pairs = live[:, None] & live[:references]
    pairs.fill_diagonal_(False)
    return torch.where(pairs, gaussian_information(correlations), 0.0).sum() / pairs.sum().clamp_min(1)
