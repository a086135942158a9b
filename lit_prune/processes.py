"""A process that another one started ends when that one does, however it ended."""

import ctypes
import os
import signal
import sys
from contextlib import suppress

PARENT = "LIT_PRUNE_PARENT"
"""Environment variable: number of the process without which this one has nothing to do."""
SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of prctl.h


def end_with_parent() -> None:
    """Has the system send SIGTERM when the process named by `PARENT` ends, even by a kill; on Linux only."""
    parent = os.environ.get(PARENT, "")
    if sys.platform != "linux" or not parent.isdigit() or int(parent) != os.getppid():
        return
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).prctl(SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM)
        if os.getppid() != int(parent):  # it ended in between
            os.kill(os.getpid(), signal.SIGTERM)
