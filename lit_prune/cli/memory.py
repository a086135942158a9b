"""Memory of the process as a whole."""

import ctypes
import sys
from contextlib import suppress

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
NEVER = 2**31 - 1


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
