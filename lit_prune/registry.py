"""What can be named: registries, each filled where its things are written."""

import pkgutil
from collections.abc import Callable, Iterator, MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from lit_prune.errors import InputError, near_names

Thing = TypeVar("Thing")


class Registry(MutableMapping[str, Thing]):
    """Things by the name that configurations and arguments use; a name that is taken is never given away silently.

    Args:
        argument: what that argument is called, such as `budget`: refusals begin with it.
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self._things: dict[str, Thing] = {}
        self._homes: dict[str, str] = {}

    def __getitem__(self, name: str) -> Thing:
        return self._things[name]

    def __setitem__(self, name: str, thing: Thing) -> None:
        self.add(name, thing)

    def __delitem__(self, name: str) -> None:
        del self._things[name], self._homes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)

    def add(self, name: str, thing: Thing, written: Any = None) -> Thing:
        """The thing, which now goes by that name; one that is written again, as in a notebook, takes its own place.

        Args:
            name: which name.
            thing: what goes by it.
            written: the class or function that it was made from; None: the thing itself.

        Raises:
            InputError: something that is written elsewhere has the name.
        """
        home = _home(thing if written is None else written)
        if self._homes.setdefault(name, home) != home:
            raise InputError(f"{self.argument}: two things are named {name!r}; give one of them another name")
        self._things[name] = thing
        return thing

    def latest_first(self) -> list[Thing]:
        """The things, the last one added first: one's own are asked before those that ship."""
        return [*self._things.values()][::-1]

    def find(self, name: str) -> Thing:
        """The thing of a name, or what `package.module:name` imports.

        Importing runs code, so such a name may come from the caller's own words only, never from a file of a run.

        >>> colours = Registry("colour")
        >>> colours.add("red", 1)
        1
        >>> colours.find("rad")
        Traceback (most recent call last):
        lit_prune.errors.InputError: colour='rad' is unknown: did you mean red? use one of red

        Raises:
            InputError: there is none of that name.
        """
        if name in self:
            return self[name]
        if ":" in name:
            found: Any = imported(name, self.argument)
            return found
        hint = " ".join(filter(None, (near_names(name, self), f"use one of {', '.join(self)}")))
        raise InputError(f"{self.argument}={name!r} is unknown: {hint}")


def _home(thing: Any) -> str:
    """Where a class or function is written; for anything else, which object it is."""
    return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else str(id(thing))


Base = TypeVar("Base", bound="Named")


class Named:
    """Something that a user names."""

    name: str = ""


class Kinds(Registry[type[Base]]):
    """Classes by name; asked for, one is made.

    Args:
        argument: as in `Registry`.
        base: what all of them derive from.
    """

    def __init__(self, argument: str, base: type[Base]) -> None:
        super().__init__(argument)
        self.base = base

    def register(self, name: str) -> Callable[[type[Base]], type[Base]]:
        """Class decorator: the class goes by that name."""

        def register(cls: type[Base]) -> type[Base]:
            cls.name = name
            return self.add(name, cls)

        return register

    def make(self, name: str) -> Base:
        """A new one by its name, or of the class that `package.module:Class` imports.

        Raises:
            InputError: as `find`, or the class is of another kind.
        """
        cls = self.find(name)
        if not isinstance(cls, type) or not issubclass(cls, self.base):
            raise InputError(f"{self.argument}: {name!r} is no subclass; give a subclass of {_home(self.base)}")
        found = cls()
        found.name = name
        return found


def imported(name: str, argument: str) -> Callable[..., Any]:
    """The function or class that `package.module:name` names. Importing runs code: the name must be the caller's own.

    Raises:
        InputError: the module cannot be imported, or has nothing callable of that name.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{argument}: {name!r} cannot be imported ({error}); give package.module:function") from error
    if not callable(found):
        raise InputError(f"{argument}: {name!r} is a {type(found).__name__}; give package.module:function")
    return found


def import_files(file: str, package: str, above: tuple[str, ...] = ()) -> None:
    """Imports every module beside a file: what lies in a new one registers itself.

    Args:
        file: `__file__` of the caller.
        package: the package that its folder is.
        above: modules that use the registry, and are left out.
    """
    for module in pkgutil.iter_modules([str(Path(file).parent)]):
        if module.name not in above:
            import_module(f"{package}.{module.name}")
