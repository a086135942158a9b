"""Forward passes that wait: a network is run once over many batches, and its weights change ahead of the front.

Each batch has its own thread, of which only one runs at a time. A pass stops at every watched layer and goes on when it
is told to, with whatever weights the layer has by then. So a network of L layers is refitted in forward order in one
pass instead of L, on any module that runs, and the memory holds the live activations of the waiting passes.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.errors import InputError
from lit_prune.measurement.layers import removing, without_gradients
from lit_prune.task import Task

ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_running = threading.local()


@dataclass(frozen=True)
class Stop:
    """Where a pass waits.

    Attributes:
        layer: qualified name of a convolution or linear layer.
        norm: name of the norm that alone reads its output, or "".
        joined: wait at the addition that reads the layer's (or the norm's) output, instead of at the layer.
        clip: range to which that output, or the sum, is clipped before anything else reads it; None: it is not.
    """

    layer: str
    norm: str = ""
    joined: bool = False
    clip: tuple[float, float] | None = None


@dataclass(frozen=True)
class AtStop:
    """What a pass has at hand at a stop.

    Attributes:
        inputs: the layer's input.
        output: the layer's output or, at a joined stop, the sum; None for a layer that has not run yet.
        other: the other operand of the addition, None elsewhere.
    """

    inputs: Tensor
    output: Tensor | None = None
    other: Tensor | None = None


class Walk:
    """One forward pass in its own thread; it runs only inside `advance`.

    Args:
        run: runs the network, which has the hooks of `watching`, on one batch.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._seen: tuple[str, AtStop] | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self.output: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.tails: dict[str, Tensor] = {}  # joined layer -> tensor that the addition will read
        self.replaying = False
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.start()

    def advance(self, layer: str | None = None) -> AtStop | None:
        """Runs to the next stop, which must be at `layer`; without a name to the end of the pass."""
        self._go.release()
        self._there.acquire()
        if self._error is not None:
            raise self._error
        if self._seen is None or self._seen[0] != layer:
            if layer is None and self._seen is None:
                return None
            raise InputError(
                f"model: {self._seen[0] if self._seen else 'the end'!r} came where layer {layer!r} was to run next: in "
                "these batches layers run in another order, or more often, than for one sample; give batches of one"
            )
        return self._seen[1]

    def close(self) -> None:
        """Ends the pass wherever it is."""
        self._cancelled = True
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(0.01)

    def stop(self, layer: str, seen: AtStop) -> None:
        """Called inside the pass: waits until it may go on."""
        self._seen = (layer, seen)
        self._there.release()
        self._go.acquire()
        self._seen = None
        if self._cancelled:
            raise _Cancelled

    def _run(self, run: Callable[[], Any]) -> None:
        _running.walk = self
        self._go.acquire()
        try:
            with without_gradients():
                if not self._cancelled:
                    self.output = run()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        self._seen = None
        self.inputs, self.tails = {}, {}
        self._there.release()


class _Cancelled(BaseException):
    """Unwinds a pass that nobody wants any more."""


@contextmanager
def watching(model: nn.Module, task: Task, stops: Mapping[str, Stop], before: bool) -> Iterator[Callable[[Any], Walk]]:
    """Hooks that make passes of `model` wait at `stops`; yields the function that starts a pass.

    Args:
        model: network in evaluation mode.
        task: runs it on a batch.
        stops: by layer name.
        before: True: wait before the layer runs (it is to be changed) and repeat it after a joined stop with the
            weights it then has. False: wait after it, with its output.
    """
    modules = dict(model.named_modules())
    handles, walks = [], []
    for stop in stops.values():
        handles += _layer_hooks(modules, stop, before)

    def start(batch: Any) -> Walk:
        def run() -> Any:
            with _Additions(modules, stops, before):
                return task.run(model, task.to(batch, model))

        walks.append(Walk(run))
        return walks[-1]

    try:
        with removing(handles):
            yield start
    finally:
        for walk in walks:
            walk.close()


def _layer_hooks(modules: dict[str, nn.Module], stop: Stop, before: bool) -> list:
    def on_input(module: nn.Module, args: tuple) -> None:
        walk = getattr(_running, "walk", None)
        if walk is not None and not walk.replaying:
            if before and not stop.joined:
                walk.stop(stop.layer, AtStop(args[0]))
            else:
                walk.inputs[stop.layer] = args[0]

    def on_output(module: nn.Module, args: tuple, output: Tensor) -> None:
        walk = getattr(_running, "walk", None)
        if walk is None or walk.replaying:
            return
        if stop.joined:
            walk.tails[stop.layer] = output
        elif not before:
            walk.stop(stop.layer, AtStop(walk.inputs.pop(stop.layer), output))

    tail = modules[stop.norm] if stop.joined and stop.norm else modules[stop.layer]
    return [modules[stop.layer].register_forward_pre_hook(on_input), tail.register_forward_hook(on_output)]


class _Additions(TorchFunctionMode):
    """Stops a pass, in the thread that runs it, at the additions that read a joined layer."""

    def __init__(self, modules: Mapping[str, nn.Module], stops: Mapping[str, Stop], before: bool) -> None:
        super().__init__()
        self.modules, self.stops, self.before = modules, stops, before

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Runs the function; at a watched addition it waits, and may add the layer's new output instead."""
        kwargs = kwargs or {}
        walk = _running.walk
        if function in ADDITIONS and len(args) == 2 and not kwargs and walk.tails:
            for layer, tail in walk.tails.items():
                if any(operand is tail for operand in args):
                    return self._joined(walk, layer, function, args)
        return function(*args, **kwargs)

    def _joined(self, walk: Walk, layer: str, function: Callable, args: tuple) -> Tensor:
        tail = walk.tails.pop(layer)
        place = 0 if args[0] is tail else 1
        inputs, other = walk.inputs.pop(layer), args[1 - place]
        if not self.before:
            total = function(*args)
            walk.stop(layer, AtStop(inputs, total, other))
            return total
        walk.stop(layer, AtStop(inputs, None, other))
        walk.replaying = True
        stop = self.stops[layer]
        fresh = self.modules[layer](inputs)
        tail.copy_(self.modules[stop.norm](fresh) if stop.norm else fresh)  # also right for an addition in place
        walk.replaying = False
        return function(*args)
