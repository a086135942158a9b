"""The command line: `lit-prune VERB -c RECIPE [--key value ...]`, the same as `python train.py VERB ...`."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lit_prune.cli import listing, recipes, verbs
from lit_prune.cli.failures import narrated_on_stdout, one_line_failures
from lit_prune.cli.parsing import FunctionParser
from lit_prune.processes import end_with_parent, keep_freed_memory
from lit_prune.version import version_line

FUNCTIONS: dict[str, Callable[..., Any]] = {  # verbs that are a function each; the others need a model and data
    "choices": listing.choices,
    "demo": verbs.demo,
    "export": verbs.export,
    "latency": verbs.latency,
    "recipes": recipes.recipes,
    "report": verbs.report,
    "suite": verbs.suite,
}


def run(args: Sequence[str]) -> Any:
    """Carries out one command line; see `main`."""
    verb = args[0] if args else ""
    if verb == "--version":
        return print(f"lit-prune {version_line()}")
    if verb in ("-h", "--help") or not args:
        return print(listing.verb_list(FUNCTIONS))
    if verb == "predict" and any(word.split("=")[0] == "--compact" for word in args):
        return call(verbs.predict, verb, with_files_as(args[1:], "--images"))
    if verb in FUNCTIONS:
        return call(FUNCTIONS[verb], verb, recipes.with_recipes(args[1:]))
    from lit_prune.cli.prune_cli import build_cli

    return build_cli(args)


def with_files_as(args: Sequence[str], option: str) -> list[str]:
    """The command line with the words that belong to no option, such as `a.jpg b.jpg`, as the list of `option`."""
    rest, files, takes = [], [], False
    for word in args:
        if word.startswith("-") or takes:
            rest.append(word)
        else:
            files.append(word)
        takes = word.startswith("--") and "=" not in word and word != "--help"
    return rest if not files else [*rest, option, json.dumps(files)]


def call(function: Callable[..., Any], verb: str, args: Sequence[str]) -> Any:
    """Calls the function of a verb with what the command line, and the file of `-c`, say."""
    description = (function.__doc__ or "").partition("\n")[0]
    parser = FunctionParser(prog=f"lit-prune {verb}", description=description)
    parser.add_argument("-c", "--config", action="config", help="YAML file with these arguments.")
    parser.add_function_arguments(function, as_positional=False)
    asked = parser.parse_args(list(args)).as_dict()
    return function(**{name: value for name, value in asked.items() if name != "config"})


def main(args: Sequence[str] | None = None) -> Any:
    """Runs one command; bad input is one line on stderr and exit code 2.

    Args:
        args: the command line without the program's name; None reads it from the process.

    Returns:
        The command's CLI object (None for the verbs that only read a folder).
    """
    keep_freed_memory()
    end_with_parent()
    with narrated_on_stdout(), one_line_failures():
        return run(sys.argv[1:] if args is None else args)
