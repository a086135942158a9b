"""`LitClassifier`: a backbone trained with cross-entropy, the LightningModule of the command line."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lit_prune.arguments import check_arguments
from lit_prune.errors import InputError
from lit_prune.models import build_network, check_forward, load_weights, taken_arguments
from lit_prune.structure.description import Description
from lit_prune.structure.networks import backbone_weights, refuse_import_path, structure_of
from lit_prune.structure.record import Record, note_record
from lit_prune.task.classification import Classification
from lit_prune.train.execution import CompiledForward, check_compile, check_precision
from lit_prune.train.pruned_checkpoint import restore_structure, save_structure
from lit_prune.train.schedule import configure
from lit_prune.train.trainer_state import steps_between_logs


class LitClassifier(LightningModule):
    """Trains a backbone with cross-entropy; callbacks add to its loss and change its backbone as in any other module.

    Attributes:
        task: reads its batches, of any kind that `lit_prune.task` knows: (images, labels), with more behind, dicts.

    Args:
        backbone: name of a backbone (`lit_prune.models.backbone_names()`), `timm/NAME`, or
            `package.module:callable`.
        num_classes: width of the classifier head; the command line takes it from the data.
        image_shape: (C, H, W) of one image; the command line takes it from the data.
        arguments: further plain arguments of the backbone, such as `{stem: cifar}`.
        weights: file with trained weights (.pth, .th, .ckpt, .safetensors); None starts from random weights.
        pretrained: start from the weights that the backbone's library publishes (downloads them).
        optimizer: made from the trainable parameters.
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
        check_arguments(LitClassifier.__init__, locals(), "LitClassifier")
        self.task = Classification()
        image_shape = [int(n) for n in image_shape]  # type: ignore[assignment]  # hparams.yaml is to be plain YAML
        self.save_hyperparameters(
            ignore=["optimizer", "scheduler", "weights", "pretrained", "channels_last", "compile"]
        )
        self.backbone_name = backbone
        self.image_shape = tuple(image_shape)
        known = {"num_classes": num_classes, "in_channels": self.image_shape[0]}
        self.arguments = taken_arguments(backbone, known) | (arguments or {})
        self.backbone = build_network(backbone, self.arguments, pretrained=pretrained, trust=(backbone,))
        note_record(self.backbone, Record(backbone, self.arguments))
        check_forward(self.backbone, self.image_shape, num_classes, backbone)
        if num_classes < 2:
            raise InputError(f"num_classes={num_classes}: give at least 2 classes to tell apart")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        if weights is not None:
            load_weights(self.backbone, weights)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone = self.backbone.to(memory_format=self.memory_format)
        self.compilation = compile
        self._compiled: CompiledForward | None = None
        self.is_trained = pretrained or weights is not None
        self.optimizer, self.scheduler = optimizer, scheduler
        self.label_smoothing = label_smoothing
        self.epoch_loss: Tensor | None = None
        self.accuracy: Any = nn.ModuleDict(
            {
                split: MulticlassAccuracy(num_classes, average="micro", validate_args=False)
                for split in ("fit", "val", "test")
            }
        )

    @property
    def example_input(self) -> Tensor:
        """A zero image [1, C, H, W] on the module's device, for tracing."""
        return torch.zeros(1, *self.image_shape, device=self.device)

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
        if self._compiled is None or self._compiled.backbone is not self.backbone:
            self._compiled = CompiledForward(self.backbone, self.compilation)
        return self._compiled(images)

    def _read(self, batch: Any) -> tuple[Tensor, Any]:
        """Images, laid out, and labels of a batch of any kind that the task reads."""
        images = self.task.inputs(batch).args[0]
        return images.contiguous(memory_format=self.memory_format), self.task.target(batch)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Cross-entropy; its mean and the accuracy are logged under `train/` at the epoch's end.

        Waits for the device every `log_every_n_steps` only, to find out whether the loss is still finite.
        """
        images, labels = self._read(batch)
        logits = self._training_forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self._add(loss)
        self.accuracy["fit"].update(logits.detach(), labels)
        if self.trainer.is_last_batch or (batch_index + 1) % steps_between_logs(self.trainer) == 0:
            self.check_finite()
        return loss

    def _add(self, loss: Tensor) -> None:
        """Adds to the epoch's sum; `self.log` in every step would cost more than a small network's whole step."""
        loss = loss.detach()
        self.epoch_loss = loss if self.epoch_loss is None else self.epoch_loss + loss

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's mean over steps; a loss that is not finite stops the run."""
        self.check_finite()
        steps = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if self.epoch_loss is not None:
            self.log("train/loss", self.epoch_loss / steps, prog_bar=True, sync_dist=True)
        self.log("train/accuracy", self.accuracy["fit"])

    def validation_step(self, batch: Any, _: int) -> None:
        """Logs `val/loss` and `val/accuracy`."""
        self._evaluation_step("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs `test/loss` and `test/accuracy`."""
        self._evaluation_step("test", batch)

    def predict_step(self, batch: Any, _: int) -> Tensor:
        """Class probabilities [B, K]."""
        return self.backbone(self._read(batch)[0]).softmax(1)

    def _evaluation_step(self, split: str, batch: Any) -> None:
        images, labels = self._read(batch)
        logits = self.backbone(images)
        self.accuracy[split](logits, labels)
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels))
        self.log(f"{split}/accuracy", self.accuracy[split], prog_bar=True)

    def on_train_epoch_start(self) -> None:
        """Seeds the epoch from (seed, epoch, rank), so that dropout repeats in a resumed run."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        torch.manual_seed(((seed * 1_000_003 + self.current_epoch) * 4_099 + self.global_rank) % 2**63)
        self.epoch_loss = None

    def check_finite(self) -> None:
        """Raises InputError where a loss since the epoch began was NaN or infinite; waits for the device."""
        if self.epoch_loss is not None and not torch.isfinite(self.epoch_loss):
            raise InputError(
                f"loss is NaN or infinite in epoch {self.current_epoch}, at or before step {self.trainer.global_step}; "
                "the last checkpoint is from before: lower the learning rate or clip gradients"
            )

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule over the trainable parameters.

        Raises:
            InputError: all parameters are frozen.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise InputError(f"all parameters of {self.backbone_name} are frozen: nothing to train; unfreeze some")
        return configure(self.optimizer, self.scheduler, parameters, lambda: self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the structure; a network whose loss is not finite is not saved."""
        self.check_finite()
        save_structure(self, "backbone", checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuilds the structure before the weights load.

        Raises:
            InputError: the checkpoint holds another network, or a run is to go on from weights alone.
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
        backbone_weights(checkpoint, "checkpoint")
        if self._trainer is not None and self._trainer.state.fn == "fit" and not checkpoint.get("optimizer_states"):
            raise InputError(
                "checkpoint: it holds no state of an optimizer, so that no run can go on from it; give its file to "
                "--model.weights to begin with its weights"
            )
        restore_structure(self, checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **arguments: Any) -> "LitClassifier":
        """As Lightning's, of a file; an import path that only the checkpoint names is not imported.

        Raises:
            InputError: the checkpoint names one, and `backbone=` was not given; or it is no path of a file.
        """
        if not isinstance(checkpoint_path, str | Path):
            raise InputError(f"checkpoint_path is a {type(checkpoint_path).__name__}; give the path of a file")
        if "backbone" not in arguments:
            refuse_import_path(checkpoint_path, cls.CHECKPOINT_HYPER_PARAMS_KEY)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **arguments})
