"""The process as a whole: it ends with the one that started it, and keeps the memory that it has."""

import ctypes
import os
import signal
import sys
from contextlib import suppress

PARENT = "LIT_PRUNE_PARENT"
"""Environment variable: number of the process without which this one has nothing to do."""
SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of prctl.h
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
NEVER = 2**31 - 1


def end_with_parent() -> None:
    """Has the system send SIGTERM when the process named by `PARENT` ends, even by a kill; on Linux only."""
    parent = os.environ.get(PARENT, "")
    if sys.platform != "linux" or not parent.isdigit() or int(parent) != os.getppid():
        return
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).prctl(SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM)
        if os.getppid() != int(parent):  # it ended in between
            os.kill(os.getpid(), signal.SIGTERM)


def keep_freed_memory() -> None:
    """Has glibc's `malloc` keep freed memory for the next tensor, until the process ends; elsewhere nothing happens.

    By default it gives large blocks back to the system and, when the next tensor is written, takes them anew page by
    page: up to a third of a step on the CPU, and how much depends on where the heap happens to end. For a program, not
    for a library to call; what the process holds stays at its peak.
    """
    if sys.platform != "linux":
        return
    with suppress(AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, NEVER)
        library.mallopt(MMAP_MAX, 0)
