"""Question sets: files in Spec-Bench layout, and the options of commands that read them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvirl.data.selfwritten import Openers, write_prompts
from dvirl.data.sources import parse_spec_bench, parsed_rows, read_prompts
from dvirl.models.drafters import LoadedDrafter
from dvirl.models.loading import LoadedModel
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import has_type

HELD_OUT = "held-out.jsonl"
"""Questions that come with a shipped drafter, measured on where nothing else is asked for."""


def asked_for(args: argparse.Namespace, drafter: LoadedDrafter) -> list[str]:
    """The question files asked for; where nothing is, the one that comes with the drafter, if one does."""
    path = drafter.folder / HELD_OUT
    return args.questions or ([_from_here(path)] if path.exists() and not args.own else [])


def question_sets(loaded: LoadedModel, files: Sequence[str], own: int, seed: int) -> dict[str, list[list[int]]]:
    """Prompts to measure on: each file's first turns under its path, and `own N` self-written ones under each kind.

    Args:
        loaded: encodes, and writes its own.
        files: in Spec-Bench's schema.
        own: self-written prompts of each kind; 0 for none.
        seed: of the self-written ones.

    Raises:
        DvirlError: for a malformed file, or nothing to measure on.
    """
    kinds = list(Openers().table) if own else []
    if not files and not kinds:
        raise DvirlError("nothing to measure on; expected --questions FILE, or --own of at least 1")
    sets = {path: [loaded.chat.encode(p.turns) for p in read_prompts("spec_bench", path)] for path in files}
    for kind in kinds:
        sets[f"own {kind}"] = write_prompts(loaded, own, seed, Openers([kind]), batch=min(64, 4 * own))
    return sets


def parse_measured(parser: argparse.ArgumentParser, argv: Sequence[str], shortest: int = 1) -> argparse.Namespace:
    """Parse a command that measures on question sets, whose options these are for all of them.

    Raises:
        DvirlError: for a number that is too small; answers have `shortest` tokens at least.
    """
    parser.add_argument("--questions", nargs="+", default=[], help="question files in Spec-Bench's schema")
    parser.add_argument("--own", type=int, default=0, help="self-written prompts of each kind; none by default")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="length limit of an answer; 128 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the self-written prompts")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", default="", help="also write the figures to this JSON file")
    args = parser.parse_args(list(argv))
    for name, lowest in (("own", 0), ("max_new_tokens", shortest)):
        if getattr(args, name) < lowest:
            raise DvirlError(f"{name} is {getattr(args, name)}; expected at least {lowest}")
    return args


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


MINI = Path(__file__).parents[1] / "data/mini_bench.jsonl"
"""Twenty-four questions of our own, four of each task."""


MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


TASKS = {
    **dict.fromkeys(MT_BENCH, "mt_bench"),
    **{name: name for name in ("translation", "summarization", "qa", "math_reasoning", "rag")},
}
"""The task of each category."""


@dataclass(frozen=True)
class Question:
    """One question: its id, category and the user's turns."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def task(self) -> str:
        """Spec-Bench's task of its category; a category of another set is a task of its own."""
        return TASKS.get(self.category, self.category or "other")


def read_questions(source: str, any_category: bool = False) -> list[Question]:
    """The questions of a file or hub data set, or of the packaged set by the name "mini".

    Args:
        source: where.
        any_category: take categories that Spec-Bench does not have.

    Raises:
        DvirlError: for a malformed row, an unknown category or an id that was there before, with its file and line.
    """
    found: dict[int | str, Question] = {}

    def parse(row: Any) -> Question:
        turns = tuple(prompt.turns[0] for prompt in parse_spec_bench(row))
        one = Question(row["question_id"], row.get("category") or "", turns)
        if not has_type(one.question_id, int | str) or not f"{one.question_id}{one.category}".isprintable():
            said = f"'question_id' is {one.question_id!r:.60}; expected a number or a string"
            raise DvirlError(f"{said}, and like the category, {one.category!r:.60}, one that can be printed")
        if one.question_id in found:
            raise DvirlError(f"question_id {one.question_id!r} is there twice")
        if one.category not in TASKS and not any_category:
            known = ", ".join(TASKS)
            raise DvirlError(f"category is {one.category!r}; expected one of {known}, or --any_category")
        return one

    for _, question in parsed_rows(str(MINI) if source == "mini" else source, parse):
        found[question.question_id] = question
    if not found:
        raise DvirlError(f"{source}: no questions found")
    return list(found.values())
