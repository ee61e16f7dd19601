"""The command line: `dvirl train`, `dvirl acceptance`, `dvirl fetch`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from dvirl.errors import DvirlError

USAGE = """usage: dvirl COMMAND [options]

commands:
  train        train a draft while it generates (dvirl train --help lists all settings)
  acceptance   decode a run's held-out prompts step by step, before and after training
  fetch        fetch the default model into the cache, once, and print its folder
"""


def _train(argv: Sequence[str]) -> None:
    from dvirl.train_dvi import main, parse_args

    main(parse_args(argv))


def _acceptance(argv: Sequence[str]) -> None:
    from dvirl.evaluation.acceptance import main

    main(argv)


def _fetch(argv: Sequence[str]) -> None:
    from dvirl.embedded import EMBEDDED, ensure_embedded
    from dvirl.models import DEFAULT_MODEL

    name = argv[0] if argv else DEFAULT_MODEL
    if name not in EMBEDDED:
        raise DvirlError(f"fetch knows {', '.join(EMBEDDED)}, not {name!r}")
    print(ensure_embedded(name))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "acceptance": _acceptance, "fetch": _fetch}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input is one sentence on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"dvirl: unknown command {arguments[0]!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        COMMANDS[arguments[0]](arguments[1:])
    except DvirlError as error:
        print(f"dvirl: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
