"""Which lit_prune this is: its version, and the commit where that can be known."""

import json
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lit_prune import __version__

CLONE = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """Commit of the clone that runs, `-dirty` behind it where files were changed, or the one that pip installed from.

    None for a wheel or an archive, which know their version only.
    """
    if (CLONE / ".git").exists():  # otherwise git would name the commit of a repository around the environment
        command = ["git", "-C", str(CLONE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        return None
    with suppress(PackageNotFoundError, ValueError):
        source = distribution("lit-prune").read_text("direct_url.json") or "{}"
        return json.loads(source).get("vcs_info", {}).get("commit_id")
    return None


def version_line() -> str:
    """Version and, where it is known, commit."""
    found = commit()
    return __version__ if found is None else f"{__version__} ({found})"
