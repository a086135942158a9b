"""Which module runs while functions are watched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.overrides import TorchFunctionMode


class Stack(TorchFunctionMode):
    """Knows which module's forward runs, and what each was called with first: name -> (args, kwargs)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.running: list[str] = []
        self.calls_of: dict[str, tuple[tuple, dict]] = {}

    def enter(self, name: str, args: tuple, kwargs: dict) -> None:
        """A module begins."""
        self.running.append(name)
        self.calls_of.setdefault(name, (args, kwargs))


Watching = TypeVar("Watching", bound=Stack)


@contextmanager
def watching(model: nn.Module, stack: Watching) -> Iterator[Watching]:
    """The mode switched on, with hooks that keep `running`."""
    handles = []
    for name, module in model.named_modules():
        enter = lambda _, args, kwargs, name=name: stack.enter(name, args, kwargs)  # noqa: E731
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: (stack.running.pop(), None)[1]))
    try:
        with stack:
            yield stack
    finally:
        for handle in handles:
            handle.remove()
