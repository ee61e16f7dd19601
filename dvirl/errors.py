"""The one error that a user can cause: bad input, said in one sentence."""


class DvirlError(ValueError):
    """Bad input or a missing resource; the message says what, where and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """
