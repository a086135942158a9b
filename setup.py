"""What pyproject.toml cannot say: `configs` is installed as the recipes of the package, which knows its commit."""

import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

FOLDERS = [Path("configs"), *(folder for folder in sorted(Path("configs").iterdir()) if folder.is_dir())]
RECIPES = {".".join(("lit_prune.recipes", *folder.parts[1:])): folder.as_posix() for folder in FOLDERS}


def write_commit(folder: str) -> None:
    """Writes the clone's commit into the package below a folder; what is built outside a clone keeps what it has."""
    if Path(".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout
        Path(folder, "lit_prune", "commit.txt").write_text(commit)


class WheelWithCommit(build_py):
    """Says in the wheel which commit it was built from."""

    def run(self) -> None:
        """Builds, then writes the commit; an editable install reads it from its clone."""
        super().run()
        if not self.editable_mode:
            write_commit(self.build_lib)


class ArchiveWithCommit(sdist):
    """Says in the archive which commit it was made of, for the wheels that are built from it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Lays the files out, then writes the commit among them."""
        super().make_release_tree(base_dir, files)
        write_commit(base_dir)


setup(
    cmdclass={"build_py": WheelWithCommit, "sdist": ArchiveWithCommit},
    packages=[*find_packages(include=["lit_prune*"]), *RECIPES],
    package_dir=RECIPES,
    package_data={"lit_prune": ["py.typed", "**/*.txt", "report/page.*"], "": ["*.yaml"]},
)
