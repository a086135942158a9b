"""Recipes: the configurations that come with the package, in a clone under `configs/`, found by name."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from lit_prune.errors import InputError, did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
SHORT = {"demo": "experiment/digits_demo"}
OPTIONS = ("-c", "--config")


def folder() -> Path:
    """Where the recipes are: in the installed package, or in the clone beside it."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """Names of all recipes, such as `data/cifar10`, sorted."""
    return sorted(file.relative_to(folder()).with_suffix("").as_posix() for file in folder().rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """File of a recipe.

    Args:
        name: `data/cifar10`, or its last part where no other recipe ends so; `configs/` or `recipes/` in front and
            `.yaml` behind may be there.

    Raises:
        InputError: no recipe, or several, of that name.
    """
    plain = re.sub(r"^(\./)?(configs|recipes)/", "", name.replace("\\", "/")).removesuffix(".yaml")
    plain = SHORT.get(plain, plain)
    names = recipe_names()
    found = [known for known in names if known == plain] or [k for k in names if k.rpartition("/")[2] == plain]
    if len(found) == 1:
        return folder() / f"{found[0]}.yaml"
    hint = f"give one of {', '.join(found)}" if found else did_you_mean(plain, [*names, *SHORT])
    raise InputError(f"-c {name}: no such file and no recipe of that name; {hint} (`lit-prune recipes` lists them)")


def with_recipes(args: Sequence[str]) -> list[str]:
    """The command line with the file in the place of each recipe that `-c` names; files that exist come first."""
    found = []
    for before, word in zip(("", *args), args, strict=False):
        option, equals, value = word.partition("=")
        if before in OPTIONS:
            word = _file(word)
        elif option in OPTIONS and equals:
            word = f"{option}={_file(value)}"
        found.append(word)
    return found


def _file(value: str) -> str:
    """A path as it is given, the file of a name; a configuration written out on the command line stays."""
    is_name = re.fullmatch(r"[\w.\-/\\]+", value) is not None
    return str(find_recipe(value)) if is_name and not Path(value).exists() else value


def first_comment(file: Path, longest: int = 82) -> str:
    """What a recipe says about itself first, after its command: a sentence, cut at a word."""
    said = (line.removeprefix("# ") for line in file.read_text(encoding="utf-8").splitlines()[1:4] if line[:2] == "# ")
    return shorten(re.split(r"(?<=\.) ", " ".join(said))[0], longest, placeholder=" ...")


def recipes(names: list[str] = [], to: str | None = None) -> None:  # noqa: B006
    """Lists the recipes that `-c` takes by name, or copies them into a folder to be changed.

    Args:
        names: recipes to list or copy; default: all.
        to: folder that gets a copy of each, under its own name; files that are there stay.
    """
    files = {name: find_recipe(name) for name in names or recipe_names()}
    for name, file in files.items():
        if to is None:
            print(f"{name:36} {first_comment(file)}".rstrip())
        else:
            print(_copy(file, Path(to)))


def _copy(file: Path, to: Path) -> Path:
    target = to / file.relative_to(folder())
    if target.exists():
        raise InputError(f"to: {target} is there already; give another folder, or delete it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
    return target
