"""What a run says of itself goes to stdout, a line each; stderr holds nothing but the one line of a failure."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOGGERS = ("lightning", "lightning.fabric", "lightning.pytorch", "pytorch_lightning", "lightning_fabric")
SILENT = (
    "Tip: For seamless cloud",
    "already configured with model summary",
    "`weights_only` was not set",
    "`isinstance(treespec, LeafSpec)` is deprecated",
)
"""Advertisements, and what a library says of its own calls: not about the run."""


@contextmanager
def narrated_on_stdout() -> Iterator[None]:
    """Lightning's log and Python's warnings are printed to stdout while the block lasts."""
    handlers = [handler for name in LOGGERS for handler in logging.getLogger(name).handlers]
    streams = [handler for handler in handlers if type(handler) is logging.StreamHandler]
    before = [handler.stream for handler in streams]
    for handler in streams:
        handler.stream = sys.stdout
        handler.addFilter(_is_about_the_run)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            yield
    finally:
        for handler, stream in zip(streams, before, strict=True):
            handler.stream = stream
            handler.removeFilter(_is_about_the_run)


def _is_about_the_run(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in SILENT)


def _print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line for a warning about the run; deprecations are for the libraries' own developers."""
    text = " ".join(str(message).split())
    if not issubclass(category, DeprecationWarning | FutureWarning) and not any(words in text for words in SILENT):
        print(f"warning: {text}")
