"""Lightning modules: the classifier, its loss seam and its schedule."""

from lit_prune.modules.classifier import LitClassifier, Recipe
from lit_prune.modules.loss import LossTerm, TrainingStep
from lit_prune.modules.schedule import PhaseCosine

__all__ = ["LitClassifier", "LossTerm", "PhaseCosine", "Recipe", "TrainingStep"]
