"""The made-up run folder for tests of figures and of the page."""

from made_up_run import full_run, made_up  # noqa: F401

from lit_prune.lab import sections as lab_sections  # noqa: F401  (they register with the report)
