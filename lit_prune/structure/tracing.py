"""Running somebody's network once without leaving a mark on it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.errors import InputError
from lit_prune.running import buffers_kept, check_visible, full_float32, undisturbed
from lit_prune.structure.example import Example, as_example, first_sample
from lit_prune.structure.hooks import TABLES, bare, copy_hooks, without_hooks

_COMPILED = "_compiled_call_impl"  # where `module.compile()` puts what runs in the place of the forward
_PLAIN = frozenset({bool, int, float, str, type(None)})


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, autograd on, every floating-point parameter requiring grad, no hooks, nothing compiled.

    Float32 is computed in float32. All put back on exit. Works inside `torch.no_grad()`, `torch.inference_mode()` and
    autocast. The train/eval flag of each module, the `requires_grad` flag of each parameter, the buffers and the random
    state of torch are as before afterwards.

    Raises:
        InputError: as `check_visible`.
    """
    check_visible(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kind = flags[0][0].device.type if flags else "cpu"
    with (
        undisturbed(model, gradients=True),
        buffers_kept(model),
        torch.autocast(kind, enabled=False),
        full_float32(),  # forms of one network are compared
        torch.compiler.set_stance("force_eager"),
        without_hooks(model),
    ):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.is_floating_point())
            yield
        finally:
            for parameter, required in flags:
                parameter.requires_grad_(required)


def one_sample(model: nn.Module, example_input: Any) -> Example:
    """First sample of what `as_example` takes, a copy on the device and in the precision of `model`.

    Raises:
        InputError: as `as_example`, or it holds NaN, which would hide where channels go.
    """
    sample = first_sample(as_example(example_input))
    if any(tensor.is_floating_point() and tensor.isnan().any() for tensor in sample.tensors):
        raise InputError(f"example_input of shape {sample.shapes} holds NaN; give one whose values are defined")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)

    def prepared(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        if parameter is None:
            return copied
        return copied.to(parameter.device, parameter.dtype if copied.is_floating_point() else None)

    return sample.map(prepared)


def run(model: nn.Module, sample: Example) -> Any:
    """Output of `model` for a sample; a failure is an InputError that names the shapes.

    Raises:
        InputError: the network does not take a sample of those shapes.
    """
    try:
        return model(*sample.args, **sample.kwargs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"the network does not take example_input of shape {sample.shapes}: {reason}"
        raise InputError(message + _uneven_heads(model)) from error


def answered(output: Any) -> list[Tensor]:
    """The tensors of an output, also those that an object of the network's own holds."""
    held = list(vars(output).values()) if hasattr(output, "__dict__") and not isinstance(output, Tensor) else []
    leaves = {id(leaf): leaf for leaf in tree_leaves([output, held])}  # some hold each of theirs by two names
    return [leaf for leaf in leaves.values() if isinstance(leaf, Tensor)]


def _uneven_heads(model: nn.Module) -> str:
    """Says which attention states a number of heads that does not divide what its first layer writes; or ""."""
    for name, module in model.named_modules():
        layers = [getattr(module, "in_proj_weight", None), *(getattr(m, "weight", None) for m in module.children())]
        width = next((len(weight) for weight in layers if isinstance(weight, Tensor) and weight.dim() > 1), 0)
        for key in ("num_heads", "num_attention_heads", "n_heads"):
            heads = vars(module).get(key)
            if type(heads) is int and heads > 0 and width % heads:
                return f"; {name or 'it'} has {key}={heads}, which does not divide the {width} channels it writes"
    return ""


def without(tensor: Tensor, positions: Sequence[int] | np.ndarray, dim: int) -> Tensor:
    """A tensor without some positions along a dimension; a parameter stays one, and keeps its gradient."""
    kept = torch.from_numpy(np.delete(np.arange(tensor.shape[dim]), positions)).to(tensor.device)
    cut = select(tensor.detach(), dim, kept)
    if not isinstance(tensor, nn.Parameter):
        return cut
    parameter = nn.Parameter(cut, requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        parameter.grad = select(tensor.grad, dim, kept)
    return parameter


def select(tensor: Tensor, dim: int, places: Tensor) -> Tensor:
    """As `Tensor.index_select`, which takes value by value along any dimension but the first two.

    >>> select(torch.arange(8).view(2, 2, 2), -1, torch.tensor([1])).flatten().tolist()
    [1, 3, 5, 7]
    """
    dim %= tensor.dim()
    if dim < 2:
        return tensor.index_select(dim, places)
    return tensor.flatten(0, dim - 1).index_select(1, places).unflatten(0, tensor.shape[:dim])


def copy_network(model: nn.Module) -> nn.Module:
    """Deep copy of `model` with its own hooks, and without those (and so without the trainer) that others put on it.

    Tensors that a module keeps and that autograd made (weights derived by a hook, activations kept by the forward pass)
    are copied by value: torch refuses to copy them deeply.
    """
    return _copied(model, {})


def sketch_network(model: nn.Module) -> nn.Module:
    """As `copy_network`, but the copy holds the very parameters of `model`: for trials that replace tensors."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    memo |= {id(buffer): buffer.clone() for buffer in model.buffers() if _alone(buffer)}
    return _copied(model, memo)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep copy, module by module: most of what a module holds are plain values and empty tables."""
    modules = list(model.modules())
    odd = any(hasattr(type(module), "__deepcopy__") or "__getstate__" in vars(type(module)) for module in modules)
    memo |= {} if odd else {id(module): object.__new__(type(module)) for module in modules}
    with bare(model):
        if odd:
            _copy_derived([list(vars(module).values()) for module in modules], memo)
            twin = copy.deepcopy(model, memo)
        else:
            twin = memo[id(model)]
            for module in modules:
                vars(memo[id(module)]).update(_state(module, memo))
    copy_hooks(model, twin, memo)
    return twin


def _state(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """A deep copy of what a module holds, but not of compiled code, which goes on with the module it was made of."""
    state = {}
    for key, held in vars(module).items():
        value: Any = None if key == _COMPILED else held
        if type(value) in _PLAIN:
            state[key] = value
        elif key in TABLES and not value:
            state[key] = type(value)()
        elif key in TABLES and type(value) is dict and all(id(part) in memo for part in value.values()):
            state[key] = {name: memo[id(part)] for name, part in value.items()}
        else:
            _copy_derived(value, memo)
            state[key] = copy.deepcopy(value, memo)
    return state


def _copy_derived(values: Any, memo: dict[int, Any]) -> None:
    """Copies the tensors with a history among values, which torch refuses to copy deeply."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None and id(leaf) not in memo:
            memo[id(leaf)] = leaf.detach().clone()


def _alone(tensor: Tensor) -> bool:
    """Whether no other tensor can lie in its memory but one that fills it."""
    plain = type(tensor) in (Tensor, nn.Buffer) and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.grad_fn is None and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
