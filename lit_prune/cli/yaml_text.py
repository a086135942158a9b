"""YAML that is read as it is meant: no key twice, no aliases that multiply, no surprise in the encoding."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from lit_prune.errors import InputError

LARGEST = 100_000
"""Values of a configuration, each alias counted as often as it is used."""
_read = get_loader("yaml")  # jsonargparse's own reading of numbers and dates


class YamlError(yaml.YAMLError):
    """YAML that is well-formed and yet refused; the message is one line."""


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        YamlError: a key is given twice, aliases multiply to more than `LARGEST` values, or it is nested too deeply.
    """
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if root is not None and _size(root, {}) > LARGEST:
            raise YamlError(f"its aliases multiply to more than {LARGEST} values; write them out")
        return _read(text)
    except RecursionError:
        raise YamlError("it is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. InputError: it cannot be read, or as `load_yaml`."""
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); restore or delete it") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, aliases counted again; a node inside itself has more than any limit."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = LARGEST + 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size = 1 + sum(_size(key, known) + _size(value, known) for key, value in node.value)
    else:
        size = 1 + sum(_size(item, known) for item in node.value) if isinstance(node, yaml.SequenceNode) else 1
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen and key.value != "<<":
            raise YamlError(f"key {key.value!r} is given twice (line {key.start_mark.line + 1}); delete one")
        seen.add(name)


set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
