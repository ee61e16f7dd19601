"""Are answers with drafts the same as without, and is each difference a tie? `dvirl check`, of a draft or two files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dvirl.data.sources import parsed_rows
from dvirl.evaluation.measure import timed
from dvirl.evaluation.questions import (
    MeasureSettings,
    PromptSets,
    Question,
    prompts_of,
    question_sets,
    read_questions,
)
from dvirl.evaluation.report import command_record, write_out
from dvirl.evaluation.spec_bench import parse_answer
from dvirl.models.drafters import open_draft
from dvirl.models.loading import DEFAULT_MODEL, LoadedModel, load, resolve_dtype
from dvirl.rollout import refuse_stretched, verifier_states
from dvirl.runs import settings
from dvirl.runs.errors import DvirlError, bad_input
from dvirl.runs.settings import choice, number, positional, several
from kangaroo.decoding.blocks import SOURCES, DecodeConfig
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

VERDICTS = ("tie", "stop rule", "error")

LogitsAfter = Callable[[Sequence[int]], Tensor]
"""From the first tokens of an answer to the reference model's next float32 logits `[V]`."""


@dataclass(frozen=True)
class Difference:
    """Where one answer differs from its reference.

    Attributes:
        question: which answer.
        position: number of tokens on which both agree.
        reference, candidate: the next token id of each; None after an answer's end.
        gap: how far the less likely of the two is below the reference model's best, in float32 logits; None if one is
            missing or there is no model to ask.
        resolution: the step between neighbouring numbers of the decoders' dtype at that best logit.
        verdict: tie (the gap is within one such step), stop rule (one ended and the other went on, by an
            end-of-sequence token that was due or at the length limit), or error.
        reason: the verdict in words.
    """

    question: str
    position: int
    reference: int | None
    candidate: int | None
    gap: float | None
    resolution: float | None
    verdict: str
    reason: str


def resolution(dtype: torch.dtype, value: float) -> float:
    """The step from a number to the next one that the dtype can hold."""
    limits = torch.finfo(dtype)
    # Steps double at every power of 2 in any dtype, so their ratio to those of a Python number is constant.
    return math.ulp(max(abs(value), limits.tiny)) * limits.eps / math.ulp(1.0)


def compare(
    question: str,
    reference: Sequence[int],
    candidate: Sequence[int],
    limit: int,
    eos_ids: Sequence[int],
    dtype: torch.dtype,
    logits_after: LogitsAfter | None,
) -> Difference | None:
    """How a candidate's answer differs from the reference's, or None if it does not.

    Args:
        question: what to call the answer.
        reference, candidate: token ids, the end-of-sequence token included.
        limit: most tokens of an answer.
        eos_ids: tokens that end one.
        dtype: of the decoders; logits within one step of it are a tie.
        logits_after: gives the logits after the tokens that both share; None if there is no model.
    """
    # None stands after an answer's end.
    for position, (first, second) in enumerate(zip_longest(reference, candidate)):  # noqa: B007
        if first != second:
            break
    else:
        return None
    shared = reference[:position]
    gap = step = None
    if first is None or second is None:
        verdict, reason = _judge_end(shared, "reference" if first is None else "candidate", limit, eos_ids)
    elif logits_after is None:
        verdict = "error"
        reason = "the tokens differ, and without the model's questions a tie cannot be shown"
    else:
        logits = logits_after(shared)
        best = float(logits.max())
        # Rounding can exchange tokens whose exact logits are closer than a step, and no others.
        gap = best - float(logits[[first, second]].min())
        step = resolution(dtype, best)
        if gap <= step:
            verdict = "tie"
            reason = f"both are within one step of {str(dtype).removeprefix('torch.')} of the best logit"
        else:
            verdict, reason = _judge_tokens(first, second, int(logits.argmax()), eos_ids)
    return Difference(question, position, first, second, gap, step, verdict, reason)


def _judge_end(
    shared: Sequence[int],
    shorter: str,
    limit: int,
    eos_ids: Sequence[int],
) -> tuple[str, str]:
    """Verdict and reason where one answer has ended and the other goes on."""
    if shared and shared[-1] in eos_ids:
        return "stop rule", "one goes on after the end-of-sequence token"
    if len(shared) >= limit:
        return "stop rule", "length limits"
    return "error", f"the {shorter} is truncated"


def _judge_tokens(
    first: int,
    second: int,
    best: int,
    eos_ids: Sequence[int],
) -> tuple[str, str]:
    """Verdict and reason where two tokens differ and are no tie."""
    if best in eos_ids and best in (first, second):
        return "stop rule", "one goes on where the end of the sequence was due"
    if first in eos_ids or second in eos_ids:
        return "error", "one ends where the sequence goes on"
    return "error", "the tokens differ and are no tie"


@torch.no_grad()
def last_logits(
    base: EarlyExitLlamaForCausalLM,
    prompt: Sequence[int],
    shared: Sequence[int],
    target: str = "base",
) -> Tensor:
    """The verifier's logits `[V]` after a prompt and the answer so far, computed without a cache.

    Raises:
        DvirlError: as `refuse_stretched` does.
    """
    refuse_stretched(base.rotary, len(prompt) + len(shared))
    ids = torch.tensor([[*prompt, *shared]], device=base.lm_head.weight.device)
    states = verifier_states(base, ids, ["lora_S"] if target == "base" else [])
    logits: Tensor = base.lm_head(states[0, -1]).float()
    return logits


@dataclass(frozen=True)
class Report:
    """The result of a comparison: the number of answers compared and of identical ones, and the differences."""

    answers: int
    identical: int
    differences: list[Difference]

    def count(self, verdict: str) -> int:
        """The number of differences with a verdict."""
        return sum(difference.verdict == verdict for difference in self.differences)


# Two decoders


def compare_decoders(
    model: KangarooModel,
    prompts: PromptSets,
    limit: int,
    how: DecodeConfig,
    eos_ids: Sequence[int],
) -> Report:
    """Decode with drafts and without, and judge each difference by the same model in float32.

    Args:
        model: drafts and verifies; it is in float32 afterwards.
        prompts: token ids, by the name of their set.
        limit: most tokens of an answer.
        how: how to draft; the reference drafts nothing.
        eos_ids: tokens that end an answer.
    """
    dtype = model.head_model.weight.dtype
    plain = DecodeConfig(draft_len=0, target=how.target, deterministic=how.deterministic)
    answered = []
    with model.base_model.merged():
        for name, part in prompts.items():
            progress = tqdm(part, desc=f"decoding {name} twice", unit="prompt", leave=False)
            for index, prompt in enumerate(progress):
                reference = timed(model, prompt, limit, plain, eos_ids).tokens
                candidate = timed(model, prompt, limit, how, eos_ids).tokens
                answered.append((f"{name} {index}", prompt, reference, candidate))
    model.float()  # the judge is more exact than the decoders
    differences = []
    for question, prompt, reference, candidate in answered:
        after = partial(last_logits, model.base_model, prompt, target=how.target)
        found = compare(question, reference, candidate, limit, eos_ids, dtype, after)
        if found:
            differences.append(found)
    return Report(len(answered), len(answered) - len(differences), differences)


# Two files


def read_answers(path: str) -> tuple[dict[str, dict[str, Any]], list[Difference]]:
    """The answer to each question of a file in Spec-Bench's layout, by question id, and the repeated ids.

    Raises:
        DvirlError: for a row of another layout, with its file and line.
    """
    answers: dict[str, dict[str, Any]] = {}
    repeated: list[Difference] = []
    for _, row in parsed_rows(path, parse_answer):
        name = str(row["question_id"])
        if name in answers:
            repeated.append(_whole(name, "answered twice"))
        answers[name] = row["choices"][0]
    return answers, repeated


def _whole(question: str, reason: str) -> Difference:
    """A difference of the whole answer."""
    return Difference(question, 0, None, None, None, None, "error", reason)


def compare_files(
    reference: str,
    candidate: str,
    questions: Sequence[str],
    loaded: LoadedModel,
    dtype: torch.dtype,
    limit: int,
) -> Report:
    """Compare two answer files turn by turn; after a difference later turns are left out.

    Token ids are compared where both files have them, as ours do, and else the texts, encoded again.

    Args:
        reference, candidate: answer files in Spec-Bench's layout.
        questions: the question files that they answer, for telling ties; may be empty.
        loaded: the model that answered, in float32.
        dtype: that it answered in.
        limit: most tokens of an answer.
    """
    own, repeated = read_answers(reference)
    theirs, repeated_theirs = read_answers(candidate)
    known = [question for path in questions for question in read_questions(path, True)]
    asked = {str(question.question_id): question for question in known}
    missing = [_whole(name, "missing") for name in own if name not in theirs]
    differences = [*repeated, *repeated_theirs, *missing]
    differences += [_whole(name, "extra, the reference has none") for name in theirs if name not in own]
    both = [name for name in own if name in theirs]
    different = {found.question for found in differences}
    for name in tqdm(both, desc="comparing", unit="answer", leave=False):
        # 1) Answers of other lengths differ as a whole.
        turns = own[name]["turns"]
        if (num_turns := len(theirs[name]["turns"])) != len(turns):
            differences.append(_whole(name, f"{num_turns} turns, the reference has {len(turns)}"))
            different.add(name)
            continue
        # 2) The first turn that differs changes the prompts of those after it.
        pairs = zip(*_turn_ids([own[name], theirs[name]], loaded, limit), strict=True)
        for turn, (first, second) in enumerate(pairs):
            after = _logits_after(loaded, asked.get(name), turns[:turn])
            found = compare(f"{name}, turn {turn + 1}", first, second, limit, loaded.eos_ids, dtype, after)
            if found:
                differences.append(found)
                different.add(name)
                break
    return Report(len(own | theirs), len(set(both) - different), differences)


def _logits_after(
    loaded: LoadedModel, question: Question | None, answers: Sequence[str]
) -> LogitsAfter | None:
    """The model's logits in the turn after these answers; None if its question is not known."""
    if question is None or len(question.turns) <= len(answers):
        return None
    return partial(last_logits, loaded.model, prompts_of(question, answers, loaded)[-1])


def _turn_ids(answers: Sequence[dict[str, Any]], loaded: LoadedModel, limit: int) -> list[list[list[int]]]:
    """The token ids of every turn of each answer."""
    # Texts only stand in for ids: different ids may decode to the same text.
    if all(len(answer.get("tokens") or ()) == len(answer["turns"]) for answer in answers):
        return [answer["tokens"] for answer in answers]
    ids = []
    for answer in answers:
        ids.append([_encode(text, loaded, limit) for text in answer["turns"]])
    return ids


def _encode(text: str, loaded: LoadedModel, limit: int) -> list[int]:
    """Token ids of an answer's text, with an end unless it is as long as answers may be."""
    ids = loaded.chat.encode_response(text)
    return ids if len(ids) >= limit else [*ids, *loaded.eos_ids[:1]]


# The command


@dataclass(frozen=True)
class CheckConfig(MeasureSettings):
    """Settings of `dvirl check`."""

    draft: str = positional("")
    """Name of a shipped drafter, or folder of a drafter, of a run, or of a whole Llama that drafts."""
    answers: list[str] = several(count=2)
    """Two answer files to compare instead: the reference, and the candidate."""
    draft_len: int = number(4, 0)
    """Most tokens drafted before a verification."""
    threshold: float = number(0.0, 0, 1)
    """Confidence below which drafting stops."""
    source: str = choice("learned", SOURCES)
    """What drafts."""
    adaptive: bool = False
    """Choose each block by acceptance and step costs."""
    deterministic: bool = False
    """Run passes of one size, in both decoders."""
    model_name: str = ""
    """Model under the draft, its own by default; with --answers the model that gave them, smollm2-135m by default."""
    dtype: str = "auto"
    """Of the decoders: auto, float32, bfloat16 or float16."""


def _check(config: CheckConfig) -> tuple[Report, dict[str, str]]:
    """The report, and a description of the model that answered."""
    if bool(config.draft) == bool(config.answers):
        raise DvirlError("give either a draft to check or --answers REFERENCE CANDIDATE")
    if config.answers:
        loaded = load(config.model_name or DEFAULT_MODEL, "float32", config.device)
        dtype = resolve_dtype(config.dtype, loaded.model.device)
        reference, candidate = config.answers
        report = compare_files(reference, candidate, config.questions, loaded, dtype, config.max_new_tokens)
        return report, loaded.description()
    with bad_input():
        how = DecodeConfig(
            config.draft_len,
            config.threshold,
            source=config.source,
            adaptive=config.adaptive,
            deterministic=config.deterministic,
        )
    draft = open_draft(config.draft, config.dtype, config.device, config.model_name, config.exit_layer)
    loaded = draft.loaded
    described = loaded.description()  # in the dtype of the decoders; the judge is in float32
    prompts = question_sets(loaded, config)
    return compare_decoders(draft.model, prompts, config.max_new_tokens, how, loaded.eos_ids), described


def main(argv: Sequence[str]) -> Report:
    """Compare, print every difference and a summary, and write them if asked to.

    Raises:
        DvirlError: for bad input.
        SystemExit: with code 1, after the report, if a difference is an error.
    """
    about = "Compare answers with drafts and without; the exit code is 1 if any difference is an error."
    config = settings.parse_args(CheckConfig, "dvirl check", about, argv)
    report, model = _check(config)
    for found in report.differences:
        gap = "" if found.gap is None else f", gap {found.gap:.3g} of {found.resolution:.3g}"
        print(f"{found.question}: {found.verdict} at token {found.position}{gap}: {found.reason}")
    counts = ", ".join(f"{report.count(verdict)} {verdict}" for verdict in VERDICTS)
    print(f"{report.identical} of {report.answers} answers are identical; differences: {counts}")
    write_out(config, **command_record("check", argv), model=model, report=asdict(report))
    if report.count("error"):
        raise SystemExit(1)
    return report
