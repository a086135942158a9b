"""What pyproject.toml cannot say: the folder `configs` is installed as the recipes of the package."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = [Path("configs"), *(folder for folder in sorted(Path("configs").iterdir()) if folder.is_dir())]
RECIPES = {".".join(("lit_prune.recipes", *folder.parts[1:])): folder.as_posix() for folder in FOLDERS}

setup(
    packages=[*find_packages(include=["lit_prune*"]), *RECIPES],
    package_dir=RECIPES,
    package_data={"lit_prune": ["py.typed", "**/*.txt", "report/page.*"], "": ["*.yaml"]},
)
