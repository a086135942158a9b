"""Parsers whose errors are one line, and what changed between two parsed configurations."""

import re
from collections.abc import Iterator
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lit_prune.cli import yaml_text as _strict_yaml  # noqa: F401  (it registers with jsonargparse)
from lit_prune.errors import InputError

MACHINE_KEYS = ("accelerator", "devices", "num_nodes", "strategy", "enable_progress_bar", "enable_model_summary")


class OneLineErrors:
    """What makes the errors of a parser one line."""

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Raises the cause of a parse error as an InputError of one line. InputError: always."""
        chain = list(causes(ex))
        given = next((cause for cause in chain if isinstance(cause, InputError)), None)
        key = re.match(r'Parser key "([^"]+)"', message)
        if given is not None:
            raise given
        if key and chain:
            said = one_line(str(chain[-1]))
            foreign = "subclass of ImageData" in said or key[1] == "model"
            raise InputError(f"--{key[1]}: {said}{OWN if foreign else ''}")
        missing = re.fullmatch(r"the following arguments are required: (.*(?:model|data).*)", message)
        if missing:
            names = ", ".join(f"--{re.sub(r'^[a-z]+[.](?=model|data)', '', name)}" for name in missing[1].split(", "))
            raise InputError(
                f"{names} missing; give them, or -c with a file that has them: a recipe (`lit-prune recipes` lists "
                "them) or the config.yaml of a run folder"
            )
        raise InputError(one_line(message) + (OWN if re.search(r"model\.(class_path|init_args)", message) else ""))


OWN = (
    "; the command line trains this package's LitClassifier on its ImageData: give a network of your own by "
    "--model.backbone package.module:callable; a LightningModule or DataModule of your own is trained from Python, "
    "with the callbacks (docs/own_module.md)"
)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, outermost first, each once: jsonargparse raises from rings."""
    met: set[int] = set()
    while error is not None and id(error) not in met:
        met.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def one_line(message: str, longest: int = 400) -> str:
    """A message of several lines as one, cut where it is longer than anybody reads."""
    line = " ".join(str(message).split())
    return line if len(line) <= longest else f"{line[:longest]} ..."


class FunctionParser(OneLineErrors, ArgumentParser):
    """Parser of the verbs that are a function each."""


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of settings that differ, other than those that only say where the run happens."""
    changed = []
    for key in {**old, **new}:
        name = f"{prefix}{key}"
        machine = prefix == "trainer." and key in MACHINE_KEYS
        if machine or name in ("run_dir", "ckpt_path", "correct_stages", "trainer.default_root_dir"):
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += changed_keys(before, after, f"{name}.")
        elif before != after:
            changed.append(name)
    return changed


def differ_in_stages(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether nothing but the stages of a callback tells the callbacks of two configurations apart."""
    before, after = (_without_stages(config.get("trainer", {}).get("callbacks")) for config in (old, new))
    return before == after


def _without_stages(callbacks: Any) -> list[Any]:
    return [_without_own_stages(one) if isinstance(one, dict) else one for one in callbacks or []]


def _without_own_stages(callback: dict[str, Any]) -> dict[str, Any]:
    arguments = callback.get("init_args") or {}
    return {**callback, "init_args": {key: value for key, value in arguments.items() if key != "stages"}}


def import_paths(settings: Any) -> set[str]:
    """Every text among settings that may be the import path of a class or a function."""
    if isinstance(settings, dict):
        return {path for value in settings.values() for path in import_paths(value)}
    if isinstance(settings, list | tuple):
        return {path for value in settings for path in import_paths(value)}
    return {settings} if isinstance(settings, str) and re.fullmatch(r"\w+([.:]\w+)+", settings) else set()
