"""Question sets: files in Spec-Bench's layout, self-written prompts, and the settings of commands that read them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dvirl.data.selfwritten import Openers, write_prompts
from dvirl.data.sources import parse_spec_bench, parsed_rows
from dvirl.models.drafters import DrafterOptions, LoadedDrafter
from dvirl.models.loading import LoadedModel
from dvirl.runs.errors import DvirlError, bad_input
from dvirl.runs.settings import has_type, number, several
from kangaroo.decoding.inputs import check_prompt, context_length

HELD_OUT = "held-out.jsonl"
"""Questions that come with a shipped drafter; the default of commands that measure one."""
MINI = Path(__file__).parents[1] / "data/mini_bench.jsonl"
"""Our own packaged set: 24 questions, four of each task."""
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
OTHER_TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
TASKS = dict.fromkeys(MT_BENCH, "mt_bench") | {name: name for name in OTHER_TASKS}
"""Spec-Bench's task of each category."""
OVERALL = "overall"
"""The name of all tasks together."""

PromptSets = dict[str, list[list[int]]]
"""Token ids of prompts, by the name of their set."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class MeasureSettings(DrafterOptions):
    """What a command measures on; the base of such commands' settings."""

    questions: list[str] = several()
    """Question files in Spec-Bench's schema."""
    own: int = number(0, 0)
    """Number of self-written prompts of each kind."""
    max_new_tokens: int = number(128, 1)
    """Most tokens of an answer."""
    seed: int = number(0, 0, 2**63 - 1)
    """Of the self-written prompts."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: str = ""
    """Also write the figures to this JSON file."""


Measured = TypeVar("Measured", bound=MeasureSettings)


# Prompts to measure on


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at equal distances; all of them if there are no more, or if `count` is 0."""
    total = len(items)
    if not 0 < count < total:
        return list(items)
    return [items[round(step * total / count)] for step in range(count)]


def asked_for(config: Measured, drafter: LoadedDrafter) -> Measured:
    """The settings; without question files and own prompts, with the file that comes with the drafter."""
    shipped = drafter.folder / HELD_OUT
    if config.questions or config.own or not shipped.exists():
        return config
    return replace(config, questions=[from_here(shipped)])


def from_here(path: Path) -> str:
    """A path as the working folder sees it, if the path is inside."""
    here = Path.cwd()
    if path.is_relative_to(here):
        path = path.relative_to(here)
    return str(path)


def question_sets(loaded: LoadedModel, config: MeasureSettings) -> PromptSets:
    """Prompts by the name of their set: each file's first turns, and self-written prompts of each kind.

    Args:
        loaded: encodes the questions, and writes its own prompts.
        config: which questions; there must be room for their answers.

    Raises:
        DvirlError: for a malformed file, a question that is too long for the model, or if there is nothing to measure
            on.
    """
    own = config.own
    if not config.questions and not own:
        raise DvirlError("nothing to measure on; expected --questions FILE, or --own of at least 1")
    sets: PromptSets = {}

    def encode(row: Any) -> list[int]:
        prompt = parse_spec_bench(row)[0]
        with bad_input():
            return check_prompt(loaded.chat.encode(prompt.turns), loaded.model, config.max_new_tokens)

    for path in config.questions:
        # Every question counts: "12 + 30" and "12 - 30" are repeats only to `read_prompts`, which training uses.
        sets[path] = [ids for _, ids in parsed_rows(path, encode)]
        if not sets[path]:
            raise DvirlError(f"{path}: no questions found")
    # Kinds are measured apart: a draft that was distilled on one need not know another.
    for kind in Openers().table if own else ():
        sets[f"own {kind}"] = write_prompts(loaded, own, config.seed, Openers([kind]), min(64, 4 * own))
    return sets


# Spec-Bench's questions


@dataclass(frozen=True)
class Question:
    """One question: its id, category and the user's turns."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def task(self) -> str:
        """Spec-Bench's task of the category; a category of another set is a task of its own."""
        return TASKS.get(self.category, self.category or "other")


def prompts_of(
    question: Question, answers: Sequence[str], loaded: LoadedModel, limit: int = 0
) -> list[list[int]]:
    """The prompts of all turns up to the first one without an answer; later turns see the answers before them.

    A prompt is cut from the left where `limit` tokens of answer would not fit the model's context after it.
    """
    room = context_length(loaded.model.config) - limit
    prompts = []
    conversation: list[str] = []
    for turn, answer in zip(question.turns, [*answers, ""], strict=False):
        conversation.append(turn)
        prompts.append(loaded.chat.encode(conversation)[-room:])
        conversation.append(answer)
    return prompts


def read_questions(source: str, any_category: bool = False) -> list[Question]:
    """The questions of a file or hub data set, or of the packaged set by the name "mini".

    Args:
        source: the file, data set or name.
        any_category: accept categories that Spec-Bench does not have.

    Raises:
        DvirlError: for a malformed row, an unknown category or a repeated id, with its file and line.
    """
    questions: dict[int | str, Question] = {}

    def parse(row: Any) -> Question:
        turns = tuple(prompt.turns[0] for prompt in parse_spec_bench(row))
        question_id = row["question_id"]
        category = row.get("category") or ""
        question = Question(question_id, category, turns)
        if not has_type(question_id, int | str) or not f"{question_id}{category}".isprintable():
            raise DvirlError(
                f"'question_id' is {question_id!r:.60}; expected a number or a string, "
                f"and like the category, {category!r:.60}, one that can be printed"
            )
        if question_id in questions:
            raise DvirlError(f"question_id {question_id!r} is there twice")
        if question.task == OVERALL:
            raise DvirlError(
                f"category is {category!r}; expected another, since that means all of them together"
            )
        if category not in TASKS and not any_category:
            raise DvirlError(
                f"category is {category!r}; expected one of {', '.join(TASKS)}, or --any_category"
            )
        return question

    for _, question in parsed_rows(str(MINI) if source == "mini" else source, parse):
        questions[question.question_id] = question
    if not questions:
        raise DvirlError(f"{source}: no questions found")
    return list(questions.values())
