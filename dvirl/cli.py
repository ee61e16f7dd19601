"""The command line: `dvirl COMMAND`."""

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from dvirl.runs.errors import guarded

COMMANDS = {
    "train": ("train_dvi", "train a draft while it generates (--help lists all settings)"),
    "sgp": ("train_sgp", "fine-tune the shallow layers on supervised records (--help lists all settings)"),
    "distill": ("scale.distill", "train a draft at scale on self-written text (--help lists all settings)"),
    "prompts": ("data.selfwritten", "let a model write prompts of its own into a question file"),
    "chat": ("chat", "talk to a model in the terminal, while its draft learns from the conversation"),
    "agreement": (
        "evaluation.agreement",
        "how often a drafter's argmax is the verifier's token, and how well it knows that",
    ),
    "check": (
        "evaluation.equal",
        "are answers with drafts those without, token for token, and where not, is it a tie",
    ),
    "bench": ("evaluation.bench", "how fast every way of decoding is, side by side, by the clock"),
    "trace": (
        "evaluation.rejections",
        "where drafts are rejected: by position, token class and category of a trace",
    ),
    "cost": (
        "evaluation.cost",
        "what drafting costs here, from which acceptance on it pays, and what to set",
    ),
    "evaluate": ("evaluation.runner", "judge a draft by Spec-Bench's measures, beside decoding without it"),
    "experiment": ("run_dvi_experiment", "train a draft and evaluate it before and after, with a report"),
    "sgp-experiment": ("run_sgp_experiment", "the same for shallow-gradient fine-tuning"),
    "sgp-eval": (
        "evaluation.sgp_eval",
        "figures of a checkpoint, or of a run before and after training",
    ),
    "study": (
        "experiments.runner",
        "run an experiment of several variants and seeds from a YAML file (configs/study-*.yaml)",
    ),
    "average-adapters": (
        "scale.averaging",
        "average the adapters or checkpoints of several clients, weighted by tokens",
    ),
    "export": ("models.export", "write a draft as a plain Llama for other engines, as a folder or GGUF"),
    "sweep": (
        "experiments.sweep",
        "run a grid of notebooks or commands from a YAML file in parallel (configs/sweep-*.yaml)",
    ),
    "fetch": ("models.embedded", "fetch the default model into the cache, once, and print its folder"),
}
"""Module and help of each command; `main` of the module gets what its `parse_args`, if it has one, returns."""


def _run(command: str, argv: Sequence[str]) -> None:
    """Run a command; its module is imported only now."""
    # Imported here and not above, so that `dvirl --help` is quick.
    module, _ = COMMANDS[command]
    entry = import_module(f"dvirl.{module}")
    entry.main(entry.parse_args(argv) if hasattr(entry, "parse_args") else argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return the exit code."""
    # Flags belong to the commands; only --help may stand before one.
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("", "-h", "--help"):
        print("usage: dvirl COMMAND [options]\n\ncommands:")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:16}  {text}")
        return 0 if command else 2
    if command not in COMMANDS:
        print(f"dvirl: unknown command {command!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return guarded(partial(_run, command), arguments)


if __name__ == "__main__":
    sys.exit(main())
