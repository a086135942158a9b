"""A fit of one case of `tasks.py` with the callbacks, in a LightningModule that knows nothing of them."""

import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from task_cases import Case
from torch.utils.data import DataLoader

from lit_prune import AxisTrace, Repair, StagedPruning
from lit_prune.task import Task
from lit_prune.train.stages import ChannelStage


class Theirs(LightningModule):
    """Somebody's module: a network, a loss, an optimizer."""

    def __init__(self, case: Case, task: Task) -> None:
        super().__init__()
        self.net, self.task = case.build().train(), task

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Mean loss; of outputs without a target their mean square."""
        return self.cost_of(batch)

    def cost_of(self, batch: Any) -> torch.Tensor:
        """What is trained."""
        output = self.task.run(self.net, batch)
        if self.task.default_variable(batch) is None:
            return self.task.prediction(output).square().mean()
        return self.task.loss(output, batch).mean()

    def validation_step(self, batch: Any, index: int) -> None:
        """Logs the same."""
        self.log("val/loss", self.cost_of(batch), batch_size=self.task.size(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def fit(case: Case, task: Task) -> str:
    """Two epochs, one stage at the second; what is left and how the loss moved."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    module = Theirs(case, task)
    loader = DataLoader([case.batch(case.samples) for _ in range(2)], batch_size=None)
    before = sum(parameter.numel() for parameter in module.net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        pruning = StagedPruning(
            network="net",
            stages=[ChannelStage(keep=case.keep, epoch=1, score="cmr_logit", allocation="global")],
            monitor="val/loss",
            mode="min",
            task=case.task,
            repair=Repair(form="mse", beta=0.0),
        )
        trace = AxisTrace(network="net", task=case.task, plane=False)
        Trainer(
            max_epochs=2,
            default_root_dir=folder,
            callbacks=[trace, pruning],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ).fit(module, loader, loader)
    after = sum(parameter.numel() for parameter in module.net.parameters())
    return f"{after / before:.0%} of the parameters"
