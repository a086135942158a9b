"""What a LightningModule keeps beside weights, through steps and loops that are run only to measure."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

COUNTS = ("_update_count", "_computed", "_forward_cache")  # of a metric of torchmetrics


@contextmanager
def attributes_kept(module: nn.Module, network: nn.Module) -> Iterator[None]:
    """On exit attributes, lists and dicts of outputs, and metrics are those that there were.

    Lists, dicts, sets and deques have the same entries again, and are the same objects. What other objects of the
    user's own have counted stays counted.

    Args:
        module: and its parts.
        network: in it; the attributes of its parts are left alone.
    """
    inside = {id(part) for part in network.modules()} - {id(module)}
    metrics = [(part, _state_of(part)) for part in module.modules() if isinstance(part, Metric)]
    parts = [part for part in module.modules() if id(part) not in inside and not isinstance(part, Metric)]
    attributes = [(part, dict(part.__dict__)) for part in parts]
    held = [value for _, values in (*attributes, *metrics) for value in values.values()]
    entries = _entries_of(held)
    try:
        yield
    finally:
        for part, values in attributes:
            part.__dict__.clear()
            part.__dict__.update(values)
        for container, found in entries:
            _refill(container, found)
        for metric, state in metrics:
            metric.__dict__.update(state)


def _state_of(metric: Metric) -> dict[str, Any]:
    """What a metric has summed up so far, its count and its last result."""
    sums = {name: value.clone() if isinstance(value, Tensor) else value for name, value in metric.metric_state.items()}
    return {**sums, **{key: metric.__dict__[key] for key in COUNTS}}


def _entries_of(values: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """Each container among the values and in them, however deep, with its entries."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if not isinstance(value, dict | list | set | deque | tuple) or id(value) in found:
            continue
        inner = list(value.values()) if isinstance(value, dict) else list(value)
        found[id(value)] = value, list(value.items()) if isinstance(value, dict) else inner
        waiting += inner
    return [entry for entry in found.values() if not isinstance(entry[0], tuple)]


def _refill(container: Any, entries: list[Any]) -> None:
    """Gives a container the entries that it had."""
    container.clear()
    if isinstance(container, dict):
        for key, value in entries:  # `update` of a Counter counts
            container[key] = value
    else:
        (container.update if isinstance(container, set) else container.extend)(entries)
