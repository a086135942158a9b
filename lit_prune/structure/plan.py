"""What a structural step keeps, as plain values that can be stored, sent to other ranks and replayed without data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.files import check_seal, read_json, sealed, write_json

FORMAT = "lit_prune.plan"
VERSION = 1


@checked
@dataclass(frozen=True, repr=False)
class Plan:
    """Blocks to drop and, after that, the channels to keep.

    >>> Plan(keep_channels={"conv1": (0, 2)}, sizes={"conv1": 4}).removed("conv1")
    [1, 3]

    Attributes:
        drop_blocks: names of the blocks that go.
        keep_channels: group name -> kept units, ascending. Groups that are not named keep everything.
        sizes: group name -> number of units before the step, for every group of `keep_channels`.
        notes: how the plan came about: plain JSON values (budget, requested, achieved, met, reason, ...).
        added_biases: convolutions and linear layers that gain a bias (of zeros) after the channels have gone.
    """

    drop_blocks: tuple[str, ...] = ()
    keep_channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    added_biases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Turns the values into plain ints and strings and checks that they fit together.

        Raises:
            InputError: they do not.
        """
        for name, kind in _FIELDS.items():
            value = getattr(self, name)
            if not isinstance(value, Mapping if kind is dict else list | tuple | set | frozenset):
                raise InputError(f"Plan: {name} is a {type(value).__name__}; give a {kind.__name__}")
        object.__setattr__(self, "drop_blocks", tuple(str(name) for name in self.drop_blocks))
        keep = {str(name): tuple(int(unit) for unit in units) for name, units in self.keep_channels.items()}
        object.__setattr__(self, "keep_channels", keep)
        object.__setattr__(self, "sizes", {str(name): int(size) for name, size in self.sizes.items()})
        object.__setattr__(self, "notes", _plain(self.notes))
        object.__setattr__(self, "added_biases", tuple(str(name) for name in self.added_biases))
        _check(self)

    def __repr__(self) -> str:
        """What goes and what stays, in a line; `to_dict` has the units."""
        kept, all_units = sum(map(len, self.keep_channels.values())), sum(self.sizes.values())
        parts = [f"{len(self.drop_blocks)} blocks dropped"] if self.drop_blocks else []
        parts += [f"{kept} of {all_units} units kept in {len(self.sizes)} groups"] if self.sizes else []
        parts += (
            [f"{self.notes['achieved']:.1%} of the {self.notes.get('budget', 'cost')} left"] if _has_share(self) else []
        )
        return f"Plan({', '.join(parts) or 'removes nothing'})"

    @property
    def removes_nothing(self) -> bool:
        """Whether the step would leave the network as it is."""
        return not self.drop_blocks and all(
            len(units) == self.sizes[name] for name, units in self.keep_channels.items()
        )

    def removed(self, group: str) -> list[int]:
        """Units that `group` loses, ascending; none for a group that the plan does not name.

        Takes memory for as many units as the plan says: compare `sizes` with the network first.
        """
        if group not in self.keep_channels:
            return []
        return sorted(set(range(self.sizes[group])) - set(self.keep_channels[group]))

    @property
    def removals(self) -> dict[str, list[int]]:
        """Units that each group loses, of the groups that lose some."""
        return {group: units for group in self.keep_channels if (units := self.removed(group))}

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, with format and version."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "drop_blocks": list(self.drop_blocks),
            "keep_channels": {name: list(units) for name, units in self.keep_channels.items()},
            "sizes": dict(self.sizes),
            "notes": _plain(self.notes),
            "added_biases": list(self.added_biases),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "plan") -> "Plan":
        """The plan that `to_dict` wrote.

        Args:
            values: result of `to_dict`, perhaps through JSON.
            source: what to call it in an error, such as the file name.

        Raises:
            InputError: another format or version, a field missing or damaged.
        """
        found = (values.get("format"), values.get("version")) if isinstance(values, Mapping) else None
        if found != (FORMAT, VERSION):
            raise InputError(
                f"{source} is no plan of format {FORMAT} {VERSION} (found {found}); write it with Plan.save"
            )
        values = {"added_biases": [], **values}
        try:
            return cls(*(_typed(values, key, kind) for key, kind in _FIELDS.items()))
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{source} is damaged: {type(error).__name__} {error}; write it again with Plan.save"
            ) from error

    @checked
    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON with its checksum, whole or not at all."""
        write_json(path, sealed(self.to_dict()))

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan written by `save`.

        Raises:
            InputError: the file is missing, unreadable, damaged or no plan.
        """
        values = read_json(path, remedy="give a file written by Plan.save")
        plan = cls.from_dict(values, str(path))
        check_seal(values, path)
        return plan


_FIELDS = {"drop_blocks": list, "keep_channels": dict, "sizes": dict, "notes": dict, "added_biases": list}


def _has_share(plan: Plan) -> bool:
    return isinstance(plan.notes.get("achieved"), float)


def _typed(values: Mapping[str, Any], key: str, kind: Any) -> Any:
    value = values[key]
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {type(value).__name__}, not {kind.__name__}")
    whole = {
        "keep_channels": lambda: [unit for units in value.values() for unit in units],
        "sizes": lambda: list(value.values()),
    }.get(key, list)()
    if not all(type(number) is int for number in whole):
        raise TypeError(f"{key} holds something other than whole numbers")
    if kind is list and not all(isinstance(name, str) for name in value):
        raise TypeError(f"{key} holds something other than names")
    return value


def _check(plan: Plan) -> None:
    if set(plan.keep_channels) != set(plan.sizes):
        odd = sorted(set(plan.keep_channels) ^ set(plan.sizes))[0]
        raise InputError(f"keep_channels and sizes name different groups ({odd!r} is in one of them only)")
    for name, units in plan.keep_channels.items():
        size = plan.sizes[name]
        if not units or list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= size:
            raise InputError(f"keep_channels[{name!r}] must be ascending units within 0..{size - 1}, at least one")


def _plain(value: Any) -> Any:
    """The value in plain Python types, tuples as lists, numpy and torch scalars as numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item"):
        return value.item()
    return str(value)
