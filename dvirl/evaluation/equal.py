"""Are answers with drafts those without, and where they part, is it a tie? `dvirl check`, of a draft or two files."""

import argparse
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dvirl.data.sources import parsed_rows, read_prompts, read_rows
from dvirl.evaluation.acceptance import open_draft
from dvirl.evaluation.questions import parse_measured, question_sets
from dvirl.evaluation.spec_bench import parse_answer
from dvirl.models.loading import DEFAULT_MODEL, LoadedModel, load, resolve_dtype
from dvirl.rollout import verifier_states
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json
from kangaroo.decoding.blocks import SOURCES, DecodeConfig
from kangaroo.kangaroo_model import KangarooModel

VERDICTS = ("tie", "stop rule", "error")

LogitsAfter = Callable[[Sequence[int]], Tensor]
"""The reference model's float32 logits `[V]` behind some tokens."""


@dataclass(frozen=True)
class Difference:
    """Where one answer parts from its reference.

    Attributes:
        question: which answer.
        position: tokens on which both agree.
        reference, candidate: the token ids there, None behind an answer's end.
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
    exponent = math.floor(math.log2(max(abs(value), torch.finfo(dtype).tiny)))
    return float(2.0**exponent * torch.finfo(dtype).eps)


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
        limit: length limit of an answer.
        eos_ids: tokens that end one.
        dtype: of the decoders, whose resolution counts as a tie.
        logits_after: asked for the logits behind the tokens that both share; None if there is no model.
    """
    if list(reference) == list(candidate):
        return None
    pairs = zip(reference, candidate, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(candidate)))
    tokens = [answer[at] if at < len(answer) else None for answer in (reference, candidate)]
    gap = step = None
    best = -1
    if logits_after is not None and None not in tokens:
        logits = logits_after(reference[:at])
        best, top = int(logits.argmax()), float(logits.max())
        gap, step = top - min(float(logits[token]) for token in tokens), resolution(dtype, top)
    verdict, reason = "error", "the tokens differ and are no tie"
    if None in tokens:
        ended = reference[at - 1] in eos_ids if at else False
        short = "candidate" if tokens[1] is None else "reference"
        verdict, reason = "error", f"the {short} is truncated"
        if ended or at >= limit:
            verdict, reason = "stop rule", "one goes on behind the end-of-sequence token" if ended else "length limits"
    elif gap is None or step is None:
        reason = "the tokens differ, and without the model's questions a tie cannot be shown"
    elif gap <= step:
        verdict, reason = "tie", f"both are within one step of {str(dtype).removeprefix('torch.')} of the best logit"
    elif best in eos_ids and best in tokens:
        verdict, reason = "stop rule", "one goes on where the end of the sequence was due"
    elif any(token in eos_ids for token in tokens):
        reason = "one ends where the sequence goes on"
    return Difference(question, at, tokens[0], tokens[1], gap, step, verdict, reason)


@torch.no_grad()
def last_logits(model: KangarooModel, prompt: Sequence[int], shared: Sequence[int], target: str = "base") -> Tensor:
    """The verifier's logits `[V]` behind a prompt and the answer so far, computed without a cache."""
    base = model.base_model
    ids = torch.tensor([[*prompt, *shared]], device=base.lm_head.weight.device)
    states = verifier_states(base, ids, ["lora_S"] if target == "base" else [])
    logits: Tensor = base.lm_head(states[0, -1]).float()
    return logits


# Two decoders


@dataclass(frozen=True)
class Report:
    """What a comparison found: answers compared, identical ones, and the differences."""

    answers: int
    identical: int
    differences: list[Difference]

    def count(self, verdict: str) -> int:
        """Differences with a verdict."""
        return sum(one.verdict == verdict for one in self.differences)


def compare_decoders(
    model: KangarooModel,
    prompts: dict[str, list[list[int]]],
    limit: int,
    settings: DecodeConfig,
    eos_ids: Sequence[int],
) -> Report:
    """Decode with drafts and without, and judge each difference by the same model in float32.

    Args:
        model: drafts and verifies; left in float32.
        prompts: token ids, by the name of their set.
        limit: length limit of an answer.
        settings: how to draft; its reference drafts nothing.
        eos_ids: tokens that end an answer.
    """
    dtype = model.head_model.weight.dtype
    alone = DecodeConfig(draft_len=0, target=settings.target, deterministic=settings.deterministic)
    named = [(f"{name} {index}", prompt) for name, part in prompts.items() for index, prompt in enumerate(part)]
    answers: list[tuple[list[int], list[int]]] = []
    with model.base_model.folded():
        for _, prompt in tqdm(named, desc="decoding twice", unit="prompt", leave=False):
            first, second = (model.generate(prompt, limit, how, eos_ids).tokens for how in (alone, settings))
            answers.append((first, second))
    model.float()
    found = [
        compare(name, *pair, limit, eos_ids, dtype, partial(last_logits, model, prompt, target=settings.target))
        for (name, prompt), pair in zip(named, answers, strict=True)
    ]
    differences = [one for one in found if one is not None]
    return Report(len(named), len(named) - len(differences), differences)


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
    return Difference(question, 0, None, None, None, None, "error", reason)


def compare_files(
    reference: str, candidate: str, questions: Sequence[str], loaded: LoadedModel, dtype: torch.dtype, limit: int
) -> Report:
    """Compare two answer files turn by turn; after a difference later turns are left out.

    Token ids are compared where both files have them, as ours do, and else the texts, encoded again.

    Args:
        reference, candidate: answer files in Spec-Bench's layout.
        questions: the question files that they answer, for telling ties; may be empty.
        loaded: the model that answered, in float32.
        dtype: that it answered in.
        limit: length limit of an answer.
    """
    (own, repeats), (theirs, more) = read_answers(reference), read_answers(candidate)
    asked = {key: turns for path in questions for key, turns in _asked(path).items()}
    model = KangarooModel(loaded.model, EARLY_STOP_LAYER=1)
    differences = [*repeats, *more]
    differences += [_whole(name, "missing") for name in own if name not in theirs]
    differences += [_whole(name, "extra, the reference has no such answer") for name in theirs if name not in own]
    both = [name for name in own if name in theirs]
    for name in tqdm(both, desc="comparing", unit="answer", leave=False):
        found = _compare_turns(name, own[name], theirs[name], asked.get(name), model, loaded, dtype, limit)
        differences += [found] if found else []
    different = {one.question.split(",")[0] for one in differences}
    return Report(len(own | theirs), len([name for name in both if name not in different]), differences)


def _asked(path: str) -> dict[str, list[str]]:
    """The turns of each question, by id."""
    read_prompts("spec_bench", path)  # says what is wrong with a malformed file
    return {str(row["question_id"]): row["turns"] for _, row in read_rows(path) if not isinstance(row, DvirlError)}


def _compare_turns(
    name: str,
    own: dict[str, Any],
    theirs: dict[str, Any],
    turns: Sequence[str] | None,
    model: KangarooModel,
    loaded: LoadedModel,
    dtype: torch.dtype,
    limit: int,
) -> Difference | None:
    texts = [own["turns"], theirs["turns"]]
    if len(texts[0]) != len(texts[1]):
        return _whole(name, f"{len(texts[1])} turns, the reference has {len(texts[0])}")
    exact = all(len(answer.get("tokens") or ()) == len(texts[0]) for answer in (own, theirs))
    for index in range(len(texts[0])):
        first, second = (_ids(answer, index, loaded, limit, exact) for answer in (own, theirs))
        if first == second:
            continue
        after: LogitsAfter | None = None
        if turns is not None and index < len(turns):
            said = [part for both in zip(turns, texts[0][:index], strict=False) for part in both]
            after = partial(last_logits, model, loaded.chat.encode([*said, turns[index]]))
        return compare(f"{name}, turn {index + 1}", first, second, limit, loaded.eos_ids, dtype, after)
    return None


def _ids(answer: dict[str, Any], index: int, loaded: LoadedModel, limit: int, exact: bool) -> list[int]:
    """A turn's token ids: those of the file, or else its text's, with an end unless it is as long as answers may be."""
    if exact:
        return list(answer["tokens"][index])
    ids = loaded.chat.encode_response(answer["turns"][index])
    return ids if len(ids) >= limit else [*ids, *loaded.eos_ids[:1]]


# The command


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dvirl check", description=__doc__, epilog="Exit code 1 if any difference is an error."
    )
    parser.add_argument("draft", nargs="?", help="name of a shipped drafter, a drafter's folder, or a run's folder")
    parser.add_argument(
        "--answers", nargs=2, metavar=("REFERENCE", "CANDIDATE"), help="answer files to compare instead"
    )
    parser.add_argument("--draft_len", type=int, default=4, help="tokens drafted before a verification, at most")
    parser.add_argument("--threshold", type=float, default=0.0, help="confidence below which drafting stops")
    parser.add_argument("--source", default="learned", help=f"what drafts: {', '.join(SOURCES)}")
    parser.add_argument("--adaptive", action="store_true", help="choose each block by acceptance and step costs")
    parser.add_argument("--deterministic", action="store_true", help="passes of one size, in both decoders")
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help="with --answers: the model that gave them")
    parser.add_argument("--dtype", default="auto", help="of the decoders: auto, float32, bfloat16 or float16")
    args = parse_measured(parser, argv)
    if (args.draft is None) == (args.answers is None):
        raise DvirlError("give either a draft to check or --answers REFERENCE CANDIDATE")
    return args


def _check(args: argparse.Namespace) -> tuple[Report, dict[str, Any]]:
    """The report, and what it depends on."""
    if args.answers:
        loaded = load(args.model_name, "float32", args.device)
        dtype = resolve_dtype(args.dtype, loaded.model.device)
        report = compare_files(args.answers[0], args.answers[1], args.questions, loaded, dtype, args.max_new_tokens)
        return report, provenance(loaded)
    try:
        settings = DecodeConfig(
            args.draft_len,
            args.threshold,
            source=args.source,
            adaptive=args.adaptive,
            deterministic=args.deterministic,
        )
    except ValueError as error:
        raise DvirlError(str(error)) from error
    draft = open_draft(args.draft, args.dtype, args.device)
    model, loaded = draft.model, draft.loaded
    where, prompts = provenance(loaded), question_sets(loaded, args.questions, args.own, args.seed)
    return compare_decoders(model, prompts, args.max_new_tokens, settings, loaded.eos_ids), where


def main(argv: Sequence[str]) -> Report:
    """Compare, print every difference and a summary, and write them if asked to.

    Raises:
        DvirlError: for bad input.
        SystemExit: with code 1, behind the report, if a difference is an error.
    """
    args = _parse(argv)
    report, where = _check(args)
    for one in report.differences:
        gap = "" if one.gap is None else f", gap {one.gap:.3g} of {one.resolution:.3g}"
        print(f"{one.question}: {one.verdict} at token {one.position}{gap}: {one.reason}")
    counts = ", ".join(f"{report.count(verdict)} {verdict}" for verdict in VERDICTS)
    print(f"{report.identical} of {report.answers} answers are identical; differences: {counts}")
    if args.out:
        made = {"command": shlex.join(["dvirl", "check", *argv]), "date": time.strftime("%Y-%m-%d")}
        content = {"arguments": vars(args), **made, **where, "report": asdict(report)}
        write_json(args.out, content)
    if report.count("error"):
        raise SystemExit(1)
    return report
