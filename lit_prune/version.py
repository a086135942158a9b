"""Which lit_prune this is: its version, and the commit where that can be known."""

import subprocess
from contextlib import suppress
from pathlib import Path

from lit_prune import __version__

CLONE = Path(__file__).resolve().parents[1]
BUILT = Path(__file__).with_name("commit.txt")  # setup.py writes it into wheels and archives


def commit() -> str | None:
    """Commit of the clone that runs, or that the wheel or archive was made from; `-dirty` where files differed.

    None where nothing knows it, as in an archive that a forge made.
    """
    if (CLONE / ".git").exists():  # otherwise git would name the commit of a repository around the environment
        command = ["git", "-C", str(CLONE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        return None
    return (BUILT.read_text().strip() if BUILT.exists() else "") or None


def version_line() -> str:
    """Version and, where it is known, commit."""
    found = commit()
    return __version__ if found is None else f"{__version__} ({found})"
