"""The made-up run folder for tests of figures and of the page."""

from pathlib import Path

import pytest
from made_up_run import full_run, made_up  # noqa: F401

from lit_prune.report import write_report


@pytest.fixture(scope="session")
def page(full_run: Path) -> str:  # noqa: F811
    """The page of the made-up run."""
    from lit_prune.lab import sections as lab_sections  # noqa: F401  (they register)

    return write_report(full_run).read_text(encoding="utf-8")
