"""A smaller network beside the dense one, on samples that neither was made with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_prune.compression_report import Comparison
from lit_prune.running import undisturbed
from lit_prune.task import Task


@dataclass(frozen=True)
class Judge:
    """Compares networks with the dense one.

    Attributes:
        dense: the dense network.
        samples: batches that the figures are of.
        task: what they mean.
    """

    dense: nn.Module
    samples: Sequence[Any]
    task: Task

    def __call__(self, small: nn.Module) -> dict[str, float]:
        """`figure` (NaN without targets), `loss` (how much worse than dense), `agreement`, `dense` (its figure)."""
        comparison = Comparison(self.task)
        with undisturbed(self.dense), undisturbed(small):
            for batch in self.samples:
                pair = (self.task.run(net, self.task.to(batch, net)) for net in (self.dense, small))
                comparison.add(*pair, batch)
        figures, name = comparison.figures(), self.task.metric_name
        dense, compact = (figures.get(which, {}).get(name, float("nan")) for which in ("dense", "compact"))
        loss = dense - compact if self.task.higher_is_better else compact - dense
        return {"figure": compact, "loss": loss, "agreement": comparison.distances()["agreement"], "dense": dense}
