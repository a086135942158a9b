"""`python -m lit_prune VERB ...` and the installed command `lit-prune VERB ...`."""

import os
import sys


def command() -> None:
    """Carries out the command line of this process; whatever the verb returns, success is exit code 0."""
    from lit_prune.cli.main import main

    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    command()
