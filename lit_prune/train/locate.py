"""Where a LightningModule keeps the network, and how another takes its place."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.running import COMPILED, is_compiled
from lit_prune.train.own_forward import has_forward, own_network, put_own_network
from lit_prune.train.rewire import configure_network

USUAL_NAMES = ("backbone", "model", "net", "network")
NEARLY_ALL = 0.95  # of the parameters
ITSELF = "."
"""Path of the network that a LightningModule itself is."""


def find_path(module: nn.Module, given: str | None = None) -> str:
    """Attribute path of the network inside `module`.

    Args:
        module: a LightningModule.
        given: the path, such as `net` or `student.encoder`, or "." for the module itself, whose `forward` is that of
            the network; None takes the only child with at least 95 % of the parameters, else the only child that is
            called `backbone`, `model`, `net` or `network`, else the module itself where it has a `forward`.

    Raises:
        InputError: there is no such submodule, or more than one that it could be; the candidates are named.
    """
    if given is not None:
        return _checked(module, given)
    sizes = {name: _parameters(child) for name, child in module.named_children() if _parameters(child)}
    total = _parameters(module)
    holders = [name for name, size in sizes.items() if size >= NEARLY_ALL * total]
    named = [name for name in USUAL_NAMES if name in sizes]
    for found in (holders, named):
        if len(found) == 1 and (has_forward(module.get_submodule(found[0])) or not has_forward(module)):
            return found[0]
    kind = type(module).__name__
    if total and has_forward(module):
        return ITSELF
    if not sizes:
        raise InputError(f"network: {kind} has no submodule with parameters; make the network an attribute of it")
    candidates = ", ".join(f"{name} ({size:,} parameters)" for name, size in list(sizes.items())[:6])
    raise InputError(f"network: {kind} holds several; name one by network=: {candidates}")


def told_apart(module: nn.Module, path: str) -> str:
    """A sentence on what lies outside of a network that was found by its name; "" where that is next to nothing."""
    share = _parameters(network_at(module, path)) / max(1, _parameters(module))
    if path == ITSELF or share >= NEARLY_ALL:
        return ""
    whole = "; network='.' takes the whole module" if has_forward(module) else ""
    return (
        f"network: {path!r}, {share:.0%} of the parameters of {type(module).__name__}; the rest stays as it is{whole}"
    )


def when_built(trainer: Trainer, given: str | None, begin: Callable[[], None]) -> None:
    """Calls `begin` now, or, where the network is not there yet, as soon as the module's own hooks have built it.

    Lightning calls the `setup` of callbacks first, then the module's, then its `configure_model`; many modules build
    their network in one of these.

    Args:
        trainer: of the module.
        given: path of the network; None: it is there when the module has parameters.
        begin: finds the network, or refuses.
    """
    module = trainer.lightning_module
    found = list(module.parameters())
    shaped = bool(found) and not any(map(_is_lazy, found))
    there = shaped if given in (None, ITSELF) else given in dict(module.named_modules())
    if not is_overridden("setup", module):
        configure_network(trainer)
        begin()
        return
    if there:
        begin()
        return
    own = module.setup

    @functools.wraps(own)
    def setup(stage: str) -> None:
        own(stage)
        module.__dict__.pop("setup", None)
        configure_network(trainer)
        begin()

    module.__dict__["setup"] = setup


def _checked(module: nn.Module, path: str) -> str:
    if path == ITSELF:
        if not has_forward(module):
            kind = type(module).__name__
            raise InputError(f"network: '.' is {kind} itself, which has no forward; give it one that its steps call")
        return path
    try:
        found = module.get_submodule(path)
    except AttributeError:
        known = ", ".join(name for name, _ in module.named_children()) or "none"
        raise InputError(f"network: {type(module).__name__} has no submodule {path!r}; its own are {known}") from None
    if found is module:
        raise InputError("network: ''; give '.' for the LightningModule itself, or the name of a submodule")
    if not _parameters(found):
        raise InputError(f"network: {path!r} ({type(found).__name__}) has no parameters")
    return path


def _is_lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.UninitializedParameter)


def _parameters(module: nn.Module) -> int:
    """How many values they have. InputError: those of a lazy layer have no shape yet."""
    found = list(module.parameters())
    if any(map(_is_lazy, found)):
        raise InputError(
            f"network: a lazy layer of {type(module).__name__} has no weights before it runs; call the network once on "
            "a batch in __init__ or setup"
        )
    return sum(parameter.numel() for parameter in found)


def network_at(module: nn.Module, path: str) -> nn.Module:
    """The network, without what torch.compile wraps around it."""
    if path == ITSELF:
        return own_network(module)
    found = module.get_submodule(path)
    return getattr(found, COMPILED, found)


def prefix_of(path: str) -> str:
    """What stands before the network's own names in the module's state."""
    return "" if path == ITSELF else f"{path}."


def check_replaceable(module: nn.Module, path: str) -> None:
    """Refuses a network that another could not take the place of.

    Raises:
        InputError: it, or a part of it, is compiled, or a parameter of it is used by another part of the module too.
    """
    parts = (module if path == ITSELF else module.get_submodule(path)).modules()
    if getattr(module, "_compiler_ctx", None) or any(is_compiled(part) for part in parts):
        raise InputError(
            f"network: {path!r} goes through torch.compile, whose code would go on with the network before the cut; "
            "compile nothing, or only the final network"
        )
    if path == ITSELF:
        return
    network = network_at(module, path)
    own = {id(parameter) for parameter in network.parameters()}
    inside = {id(part) for part in network.modules()}
    for name, part in module.named_modules():
        if id(part) in inside:
            continue
        for key, parameter in part.named_parameters(recurse=False):
            if id(parameter) in own:
                shared = f"{name}.{key}" if name else key
                raise InputError(f"network: {path!r} shares the parameter {shared}, which would not follow a cut")


def copies_of(network: nn.Module, holders: Mapping[str, Any]) -> list[str]:
    """Names of what holds other tensors of the names and shapes of all the network's parameters, such as an average.

    Args:
        network: the network.
        holders: by name, modules (their parts are looked at), and dicts of tensors whose keys may have a prefix.
    """
    shapes = {name: value.shape for name, value in network.named_parameters()}
    own = {id(part) for part in network.modules()}
    found = []
    for name, value in holders.items():
        if isinstance(value, nn.Module):
            for inner, part in value.named_modules():
                held = {key: tensor.shape for key, tensor in part.named_parameters()}
                if id(part) not in own and held == shapes and not any(id(inside) in own for inside in part.modules()):
                    found.append(f"{name}.{inner}".strip("."))
                    break
        elif isinstance(value, Mapping):
            held = {key: item.shape for key, item in value.items() if isinstance(item, Tensor) and isinstance(key, str)}
            if any(all(held.get(prefix + key) == shape for key, shape in shapes.items()) for prefix in _prefixes(held)):
                found.append(name)
    return found


def _prefixes(keys: Iterable[str]) -> set[str]:
    """What may stand before the network's own names in the keys of a state."""
    return {"", *(key[: place + 1] for key in keys for place, letter in enumerate(key) if letter == ".")}


def put_network(module: nn.Module, path: str, network: nn.Module) -> None:
    """Puts `network` in the place of the one at `path`, and its parts where the module holds them by other names too.

    Raises:
        InputError: the module holds a part of the network by another name, and that part is gone.
    """
    if path == ITSELF:
        return put_own_network(module, network)
    for alias, part in list(_aliases(module, path)):
        try:
            _assign(module, alias, network.get_submodule(part))
        except AttributeError:
            raise InputError(f"network: {alias!r} is {path}.{part}, which the plan removes; protect it") from None
    _assign(module, path, network)


def _aliases(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Other names in the module of the network or of parts of it, outermost only, with the part's name inside it."""
    parts = {id(part): name for name, part in network_at(module, path).named_modules()}
    found: list[str] = []
    for name, part in module.named_modules(remove_duplicate=False):
        inside = name == path or name.startswith((f"{path}.", *(f"{alias}." for alias in found)))
        if id(part) in parts and not inside:
            found.append(name)
            yield name, parts[id(part)]


def _assign(module: nn.Module, path: str, network: nn.Module) -> None:
    owner, _, key = path.rpartition(".")
    setattr(module.get_submodule(owner), key, network)
