"""`LitClassifier`: a backbone, its loss seam, its structure in the checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lit_prune.errors import InputError
from lit_prune.models import build_network, check_forward, load_weights
from lit_prune.models.registry import first_line
from lit_prune.structure import Plan, apply_plan
from lit_prune.structure.description import Description
from lit_prune.structure.networks import STRUCTURE_KEY, backbone_weights, refuse_import_path, structure_of
from lit_prune.train.execution import CompiledForward, check_compile, check_precision
from lit_prune.train.loss import LossTerm, TrainingStep
from lit_prune.train.schedule import PhaseCosine, Recipe


class LitClassifier(LightningModule):
    """Trains a backbone with cross-entropy plus whatever terms callbacks add, and survives surgery.

    The structure (backbone name, arguments, plans applied so far) travels in the checkpoint as plain values and is
    rebuilt before the weights load, so a resumed run needs no special case. `plans` is the list of plans applied,
    `phase_start` the epoch at which the current phase began: 0 for the dense training, a stage's epoch after it.

    Args:
        backbone: name of a backbone (`lit_prune.models.backbone_names()`), `timm/NAME`, or
            `package.module:callable`.
        num_classes: width of the classifier head; the command line takes it from the data.
        image_shape: (C, H, W) of one image; the command line takes it from the data.
        arguments: further plain arguments of the backbone, such as `{stem: cifar}`.
        weights: file with trained weights (.pth, .th, .ckpt, .safetensors); None starts from random weights.
        pretrained: start from the weights that the backbone's library publishes (downloads them).
        optimizer: made anew for each phase that has no optimizer of its own.
        scheduler: its schedule; `lit_prune.train.schedule.PhaseCosine` adapts to the length of the phase.
        label_smoothing: of the cross-entropy, in [0, 1).
        channels_last: keep weights and images in the memory order that convolutions on recent devices are fastest in.
        compile: put the training step's forward and backward pass through torch.compile, anew after each surgery: true,
            a mode of inductor (`reduce-overhead`, `max-autotune`) or another back end. Evaluation and the measurements
            of callbacks run the network as it is.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        arguments: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = False,
        optimizer: OptimizerCallable = torch.optim.SGD,
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            ignore=["optimizer", "scheduler", "weights", "pretrained", "channels_last", "compile"]
        )
        self.backbone_name = backbone
        self.image_shape = tuple(int(size) for size in image_shape)
        self.arguments = {"num_classes": num_classes, "in_channels": self.image_shape[0], **(arguments or {})}
        self.backbone = build_network(backbone, self.arguments, pretrained=pretrained, trust=(backbone,))
        check_forward(self.backbone, self.image_shape, num_classes, backbone)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        if weights is not None:
            load_weights(self.backbone, weights)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone = self.backbone.to(memory_format=self.memory_format)
        self.compilation = compile
        self._compiled: CompiledForward | None = None
        self.is_trained = pretrained or weights is not None
        self.recipe = Recipe(optimizer, scheduler)
        self.repair_recipe: Recipe | None = None
        self.label_smoothing = label_smoothing
        self.loss_terms: dict[str, LossTerm] = {}
        self.plans: list[Plan] = []
        self.phase_start = 0
        self.phase_boundaries: tuple[int, ...] = ()
        self.epoch_sums: dict[str, Tensor] = {}
        self.accuracy = nn.ModuleDict(
            {
                split: MulticlassAccuracy(num_classes, average="micro", validate_args=False)
                for split in ("fit", "val", "test")
            }
        )

    @property
    def example_input(self) -> Tensor:
        """A zero image [1, C, H, W] on the module's device, for tracing."""
        return torch.zeros(1, *self.image_shape, device=self.device)

    @property
    def phase_epochs(self) -> int:
        """Length of the current phase in epochs: up to the next stage or the end of the run."""
        ends = [epoch for epoch in self.phase_boundaries if epoch > self.phase_start]
        return (min(ends) if ends else self.trainer.max_epochs) - self.phase_start

    @property
    def schedule_epochs(self) -> int:
        """Epochs that the learning rate schedule spans: the phase, or the whole run where one optimizer serves it."""
        return self.phase_epochs if self.repair_recipe else self.trainer.max_epochs

    @property
    def active_recipe(self) -> Recipe:
        """Recipe of the current phase: the repair's after the first stage, where there is one."""
        return self.repair_recipe if self.plans and self.repair_recipe else self.recipe

    def setup(self, stage: str) -> None:
        """Refuses what cannot be carried out on this device.

        Raises:
            InputError: compilation or precision is not supported here.
        """
        if stage == "fit":
            device = self.trainer.strategy.root_device
            check_precision(str(self.trainer.precision), device)
            check_compile(self.compilation, device)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of `images` [B, C, H, W]."""
        return self.backbone(images.contiguous(memory_format=self.memory_format))

    def _training_forward(self, images: Tensor) -> Tensor:
        """Logits of laid out images, compiled where asked for."""
        if self.compilation is False:
            return self.backbone(images)
        if self._compiled is None:
            self._compiled = CompiledForward(self.backbone, self.compilation)
        return self._compiled(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy plus every loss term; means and accuracy are logged under `train/` at the epoch's end.

        Waits for the device every `log_every_n_steps` only, to find out whether the loss is still finite.
        """
        images, labels = batch[0].contiguous(memory_format=self.memory_format), batch[1]
        logits = self._training_forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        phase_epoch = self.current_epoch - self.phase_start
        step = TrainingStep(self.backbone, images, labels, logits, batch_index, phase_epoch, self.phase_epochs)
        for name, term in self.loss_terms.items():
            value = term(step)
            self._add(name, value)
            loss = loss + value
        self._add("loss", loss)
        self.accuracy["fit"].update(logits.detach(), labels)
        if self.trainer.is_last_batch or (batch_index + 1) % self.trainer.log_every_n_steps == 0:
            self.check_finite()
        return loss

    def _add(self, name: str, value: Tensor) -> None:
        """Adds to the epoch's sum; `self.log` in every step would cost more than a small network's whole step."""
        value = value.detach()
        self.epoch_sums[name] = self.epoch_sums[name] + value if name in self.epoch_sums else value

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means over steps."""
        steps = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        for name, total in self.epoch_sums.items():
            self.log(f"train/{name}", total / steps, prog_bar=name == "loss", sync_dist=True)
        self.log("train/accuracy", self.accuracy["fit"])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Logs `val/loss` and `val/accuracy`."""
        self._evaluation_step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Logs `test/loss` and `test/accuracy`."""
        self._evaluation_step("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, _: int) -> Tensor:
        """Class probabilities [B, K]."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(1)

    def _evaluation_step(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy[split](logits, labels)
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels))
        self.log(f"{split}/accuracy", self.accuracy[split], prog_bar=True)

    def on_train_epoch_start(self) -> None:
        """Seeds the epoch from (seed, epoch, rank), so that dropout repeats in a resumed run, and fits the schedule."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        torch.manual_seed(((seed * 1_000_003 + self.current_epoch) * 4_099 + self.global_rank) % 2**63)
        self.epoch_sums = {}
        steps = -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches)
        for entry in self.trainer.lr_scheduler_configs:
            if isinstance(entry.scheduler, PhaseCosine):
                entry.scheduler.begin(steps * self.schedule_epochs)

    def check_finite(self) -> None:
        """Raises InputError where a loss since the epoch began was NaN or infinite; waits for the device."""
        if "loss" in self.epoch_sums and not torch.isfinite(self.epoch_sums["loss"]):
            raise InputError(
                f"loss is NaN or infinite in epoch {self.current_epoch}, at or before step {self.trainer.global_step}; "
                "the last checkpoint is from before: lower the learning rate or clip gradients"
            )

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of the current phase over the trainable parameters.

        Raises:
            InputError: all parameters are frozen.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise InputError(f"all parameters of {self.backbone_name} are frozen: nothing to train; unfreeze some")
        recipe = self.active_recipe
        optimizer, scheduler = recipe.build(parameters)
        if scheduler is None:
            return optimizer
        interval = getattr(scheduler, "interval", "epoch")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the recipe's norm where it has one, else as the trainer says."""
        limit = self.active_recipe.gradient_clip
        if limit is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)

    def adopt(self, backbone: nn.Module, plan: Plan) -> None:
        """Takes over the network that `plan` made of the present one; the trainer knows nothing of it yet."""
        self.backbone = backbone.to(memory_format=self.memory_format)
        self.plans.append(plan)
        self._compiled = None

    def structure(self) -> dict[str, Any]:
        """Backbone name, arguments, plans and phase, as plain values."""
        return {
            "backbone": self.backbone_name,
            "arguments": self.arguments,
            "plans": [plan.to_dict() for plan in self.plans],
            "phase_start": self.phase_start,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the structure; a network whose loss is not finite is not saved."""
        self.check_finite()
        checkpoint[STRUCTURE_KEY] = self.structure()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuilds the structure before the weights load.

        Raises:
            InputError: the checkpoint holds another network.
        """
        saved = structure_of(checkpoint)
        if saved is None:
            raise InputError("checkpoint has no lit_prune structure: give its file to --model.weights instead")
        described = Description.read(saved, self.image_shape, "checkpoint")
        if (described.backbone, described.arguments) != (self.backbone_name, self.arguments):
            raise InputError(
                f"checkpoint of another network: it holds {described.backbone} {described.arguments}, "
                f"this run is configured for {self.backbone_name} {self.arguments}"
            )
        phase_start = saved.get("phase_start")
        if type(phase_start) is not int:
            raise InputError("checkpoint does not say when its phase began; take another copy of it")
        backbone_weights(checkpoint, "checkpoint")
        for plan in described.plans[len(self.plans) :]:
            try:
                self.adopt(apply_plan(self.backbone, plan, self.example_input), plan)
            except Exception as error:
                raise InputError(f"checkpoint: its plans do not fit the network ({first_line(error)})") from error
        self.phase_start = phase_start

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **arguments: Any) -> "LitClassifier":
        """As Lightning's; an import path that only the checkpoint names is not imported.

        Raises:
            InputError: the checkpoint names one, and `backbone=` was not given.
        """
        if "backbone" not in arguments:
            refuse_import_path(checkpoint_path, cls.CHECKPOINT_HYPER_PARAMS_KEY)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **arguments})
