"""The one exception that means: the input is wrong, and here is the remedy."""


class InputError(ValueError):
    """Bad input that its giver can mend.

    The message is one line: what is wrong, where, what to do. The command line prints it and exits with 2; every
    other exception is a defect and keeps its traceback.
    """
