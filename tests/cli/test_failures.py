"""How a command ends: one line for what its user can mend, also where a thread in the background met it."""

import errno
import os
import signal
import threading
import time

import pytest

from lit_prune.cli.failures import one_line_failures


def in_a_thread(error: BaseException) -> None:
    def run() -> None:
        raise error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_a_full_disk_in_the_background_is_a_line_and_a_defect_keeps_its_traceback(capsys):
    before = threading.excepthook
    with one_line_failures():
        in_a_thread(OSError(errno.ENOSPC, "No space left on device", "events.out"))
        assert capsys.readouterr().err.splitlines() == [
            "warning: in the background: events.out: the disk is full; give another folder or file, or make room"
        ]
    assert threading.excepthook is before


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("10 GiB"), 2, "not enough memory"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(capsys, error, code, words):
    with pytest.raises(SystemExit) as exit_, one_line_failures():
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == code and len(lines) == 1 and words in lines[0]


def test_sigterm_is_a_line_and_143_whatever_was_going_on(capsys):
    with pytest.raises(SystemExit) as exit_, one_line_failures():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 143 and len(lines) == 1 and lines[0].startswith("error: ended by SIGTERM")
