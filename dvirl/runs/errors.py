"""The one error that a user can cause: bad input, said in one sentence."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

PANIC = "PanicException"
"""Class of the errors of libraries in Rust; no class of Python's ordinary errors is above it."""


def guarded(command: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Run a command; bad input is one sentence on standard error and exit code 2."""
    try:
        command(argv)
    except (DvirlError, OSError) as error:
        print(f"dvirl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dvirl: interrupted", file=sys.stderr)
        return 130
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        print(f"dvirl: a tokenizer failed: {error}", file=sys.stderr)
        return 2
    return 0


class DvirlError(ValueError):
    """Bad input or a missing resource; the message says what, where and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


@contextmanager
def bad_input() -> Iterator[None]:
    """Say that a ValueError inside, such as the model's for an argument that does not fit, is the user's to mend.

    Raises:
        DvirlError: with its message.
    """
    try:
        yield
    except ValueError as error:
        raise DvirlError(str(error)) from error
