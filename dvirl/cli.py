"""The command line: `dvirl COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from dvirl.errors import DvirlError

USAGE = """usage: dvirl COMMAND [options]

commands:
  train             train a draft while it generates (dvirl train --help lists all settings)
  sgp               fine-tune the shallow layers on supervised records (dvirl sgp --help lists all settings)
  distill           train a draft at scale on self-written text (dvirl distill --help lists all settings)
  prompts           let a model write prompts of its own into a question file
  agreement         how often a drafter's argmax is the verifier's token, and how well it knows that
  check             are answers with drafts those without, token for token, and where not, is it a tie
  bench             how fast every way of decoding is, side by side, by the clock
  cost              what drafting costs here, from which acceptance on it pays, and what to set
  study             run an experiment of several variants and seeds from a YAML file (configs/study-*.yaml)
  acceptance        decode a run's held-out prompts step by step, before and after training
  average-adapters  average the adapters or checkpoints of several clients, weighted by tokens
  fetch             fetch the default model into the cache, once, and print its folder
"""


def _run(module: str) -> Callable[[Sequence[str]], object]:
    """The command of a module, which is imported when it is called: its `main`, behind its `parse_args` if any."""

    def run(argv: Sequence[str]) -> object:
        entry = import_module(module)
        return entry.main(entry.parse_args(argv) if hasattr(entry, "parse_args") else argv)

    return run


def _fetch(argv: Sequence[str]) -> None:
    from dvirl.embedded import EMBEDDED, ensure_embedded
    from dvirl.models import DEFAULT_MODEL

    name = argv[0] if argv else DEFAULT_MODEL
    if name not in EMBEDDED:
        raise DvirlError(f"fetch knows {', '.join(EMBEDDED)}, not {name!r}")
    print(ensure_embedded(name))


COMMANDS: dict[str, Callable[[Sequence[str]], object]] = {
    "train": _run("dvirl.train_dvi"),
    "sgp": _run("dvirl.train_sgp"),
    "distill": _run("dvirl.distill"),
    "prompts": _run("dvirl.magpie"),
    "agreement": _run("dvirl.evaluation.agreement"),
    "check": _run("dvirl.evaluation.equal"),
    "bench": _run("dvirl.evaluation.bench"),
    "cost": _run("dvirl.evaluation.cost"),
    "study": _run("dvirl.study"),
    "acceptance": _run("dvirl.evaluation.acceptance"),
    "average-adapters": _run("dvirl.federated"),
    "fetch": _fetch,
}


def guarded(command: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Run a command; bad input is one sentence on standard error and exit code 2."""
    try:
        command(argv)
    except DvirlError as error:
        print(f"dvirl: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"dvirl: unknown command {arguments[0]!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return guarded(COMMANDS[arguments[0]], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
