"""What pyproject.toml cannot say: the folder `configs` is installed as the recipes of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lit_prune*"]), "lit_prune.recipes"],
    package_dir={"lit_prune.recipes": "configs"},
    package_data={"lit_prune": ["py.typed", "**/*.txt", "**/*.jinja"], "lit_prune.recipes": ["**/*.yaml"]},
)
