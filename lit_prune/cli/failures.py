"""How a command ends that does not succeed, in one line on stderr; what a run says of itself goes to stdout."""

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lit_prune.cli.parsing import causes, one_line
from lit_prune.errors import InputError
from lit_prune.files import one_reason

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
LOGGERS = ("lightning", "lightning.fabric", "lightning.pytorch", "pytorch_lightning", "lightning_fabric")
SILENT = (
    "Tip: For seamless cloud",
    "already configured with model summary",
    "`weights_only` was not set",
    "`isinstance(treespec, LeafSpec)` is deprecated",
)
"""Advertisements, and what a library says of its own calls: not about the run."""


@contextmanager
def one_line_failures() -> Iterator[None]:
    """Turns what the user can mend into one line on stderr and exit code 2; a defect keeps its traceback.

    Ctrl-C ends with 130, SIGTERM with 143, whatever the verb was doing.
    """
    try:
        with ended_by_sigterm(), one_line_of_threads():
            yield
    except KeyboardInterrupt:
        end("interrupted; the same command goes on from where it stopped", INTERRUPTED)
    except SystemExit as stop:
        chain = list(causes(stop))
        if any(isinstance(cause, KeyboardInterrupt) for cause in chain):  # Lightning makes an exit of it
            end("interrupted; the same command goes on from where it stopped", INTERRUPTED)
        if stop.code == TERMINATED or type(stop).__name__ == "SIGTERMException":
            end("ended by SIGTERM; the same command goes on from where it stopped", TERMINATED)
        raise
    except BrokenPipeError:  # the reader of our output has seen enough: no failure, see `__main__.command`
        raise
    except Exception as error:
        line = explanation(error)
        if line is None:
            raise
        end(line, BAD_INPUT)


def end(line: str, code: int) -> None:
    """Prints one line on stderr and exits. SystemExit: always, with `code`."""
    print(f"error: {one_line(line)}", file=sys.stderr)
    raise SystemExit(code) from None


def explanation(error: BaseException) -> str | None:
    """What is wrong and who can mend it, in a sentence; None where it is a defect of the program.

    Bad input says so itself; the rest is what the system refuses (files, disk, memory) and settings that Lightning
    refuses.
    """
    chain = list(causes(error))
    given = next((cause for cause in chain if isinstance(cause, InputError)), None)
    if given is not None:
        return str(given)
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno is not None:
            place = f"{cause.filename}: " if cause.filename is not None else ""
            return f"{place}{one_reason(cause)}; give another folder or file, or make room"
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return f"not enough memory ({cause}); give smaller batches or a smaller network"
        if type(cause).__name__ == "MisconfigurationException":
            return f"trainer: {cause}"
        if isinstance(cause, UnicodeDecodeError):
            return f"a file is no UTF-8 text ({cause}); convert it"
    return None


@contextmanager
def one_line_of_threads() -> Iterator[None]:
    """As `one_line_failures`, of threads in the background, such as a logger's writer, which end without an exit."""
    before = threading.excepthook

    def say(failure: threading.ExceptHookArgs) -> None:
        line = explanation(failure.exc_value) if failure.exc_value is not None else None
        if line is None:
            before(failure)
        else:
            print(f"warning: in the background: {one_line(line)}", file=sys.stderr)

    threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) while the block lasts, so that what is open is closed and children are ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


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
