"""What a network is called with."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """Arguments of one call of a network: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
