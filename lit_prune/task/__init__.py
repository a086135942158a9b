"""What a batch and an output mean. Nothing else in the library looks into either."""

from lit_prune.registry import import_files
from lit_prune.task.base import TASKS, Task, Term, register_task
from lit_prune.task.classification import TARGETS, Classification, check_labels, task_variable
from lit_prune.task.custom import Custom
from lit_prune.task.detection import Detection
from lit_prune.task.multi_label import MultiLabel
from lit_prune.task.recognise import find_task, peek, recognise, settle, try_out
from lit_prune.task.regression import Regression
from lit_prune.task.segmentation import Segmentation
from lit_prune.task.unlabelled import Unlabelled

__all__ = [
    "TARGETS",
    "TASKS",
    "Classification",
    "Custom",
    "Detection",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Task",
    "Term",
    "Unlabelled",
    "check_labels",
    "find_task",
    "peek",
    "recognise",
    "register_task",
    "settle",
    "task_variable",
    "try_out",
]

import_files(__file__, __package__)
