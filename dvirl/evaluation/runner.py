"""Spec-Bench evaluation, `dvirl evaluate`: every method of decoding on every question, measured in one run.

Methods alternate question by question in a changing order, so that other load on the machine hits all of them alike. A
run that was cut off goes on where it stopped.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from dvirl import plots
from dvirl.data.examples import make_example
from dvirl.evaluation.measure import Answer, in_turn
from dvirl.evaluation.methods import (
    GENERATE,
    METHODS,
    PLAIN,
    DraftingSettings,
    Method,
    decode_configs,
    decoders,
)
from dvirl.evaluation.questions import OVERALL, Question, prompts_of, read_questions, spread
from dvirl.evaluation.rejections import accept_events, token_texts
from dvirl.evaluation.report import describe, markdown_table, write_report
from dvirl.evaluation.spec_bench import Row, answer_row, answer_table, measures, resume_answers
from dvirl.metrics import verifier_figures, verifier_sums
from dvirl.models.drafters import DEFAULT_DRAFTER, Draft, DrafterOptions, open_draft
from dvirl.models.loading import LoadedModel
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import claim, fingerprint, provenance, run_lock
from dvirl.runs.log import keep_lines, log_line, write_json
from dvirl.runs.processes import Processes
from dvirl.runs.settings import choice, command_line, from_namespace, number
from kangaroo.decoding.inputs import context_length

Answers = dict[tuple[str, int], dict[int | str, Row]]
"""Answers by question id, by method and repeat."""
Asked = tuple[str, int, Question]
"""Method, repeat and question of an answer."""
Line = tuple[str, dict[str, Any]]
"""A file in the folder of the evaluation, and a line to append to it."""
TRACE = "trace.jsonl"


@dataclass(frozen=True)
class EvalSettings(DraftingSettings):
    """The questions, and how they are decoded."""

    questions: str = "mini"
    """Questions in Spec-Bench's schema: a file, a hub id, or mini, the packaged set."""
    any_category: bool = False
    """Take questions of categories that Spec-Bench does not have; each is a task of its own."""
    num_questions: int = number(0, 0)
    """Number of questions, spread over the set; 0 for all."""
    methods: str = "generate,plain,pld,kangaroo,dvi,hybrid"
    """Separated by commas: generate (Hugging Face's), plain (our loop), pld (prompt lookup), kangaroo (learned drafts
    up to the first doubtful one), fixed (a fixed number of learned drafts), dvi (as many learned drafts as pay, by
    acceptance and step costs), hybrid (dvi, with looked-up drafts where these are better)."""
    reference: str = choice(PLAIN, (PLAIN, GENERATE))
    """The method that speed-ups are over."""
    answer_tokens: int = number(128, 2)
    """Most tokens of each turn's answer."""
    longest: int = number(15, 1, 64)
    """Most drafts of a block, for pld, dvi and hybrid."""
    kangaroo_steps: int = number(6, 1, 64)
    """Most drafts of a block, for kangaroo; the default, like that of the threshold, is from arXiv 2404.18911."""
    fixed_len: int = number(4, 1, 64)
    """Drafts of every block, for fixed."""
    kangaroo_threshold: float = number(0.6, 0, 1)
    """Confidence below which a draft ends its block, for kangaroo."""
    repeats: int = number(1, 1, 1000)
    """How often every method answers every question."""
    temperature: float = number(0.0, 0, 100)
    """Above 0 answers are sampled, by all our own methods with the same random numbers; 0 is greedy."""
    top_p: float = number(1.0, 1e-6, 1)
    """Sample only among the fewest tokens that hold this probability."""
    too_long: str = choice("refuse", ("refuse", "skip", "cut"))
    """A question that might outgrow the model's context, each answer at its longest, is an error (refuse), left out
    (skip), or cut from the left (cut)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.methods.split(",")
        unknown = sorted(set(asked) - set(METHODS))
        if unknown:
            raise DvirlError(f"methods has {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
        if self.reference not in asked or len(set(asked)) < len(asked):
            raise DvirlError(
                f"methods is {self.methods!r}; expected the reference {self.reference} in it, none twice"
            )
        if self.top_p < 1 and not self.temperature:
            raise DvirlError(f"top_p is {self.top_p}; expected a temperature above 0 beside it")


@dataclass(frozen=True)
class EvalConfig(EvalSettings, DrafterOptions):
    """Everything that an evaluation depends on."""

    draft: str = DEFAULT_DRAFTER
    """Name of a shipped drafter, or folder of a drafter, of a run, or of a whole Llama that drafts."""
    dtype: str = "auto"
    """Of the weights: auto (bfloat16 where the hardware is fast at it), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, or balanced: the layers spread over all cards."""
    threads: int = number(2, 1, 1024)
    """CPU threads of torch."""
    seed: int = number(0, 0, 2**63 - 1)
    """Seed of the bootstrap for intervals, and of sampled answers."""
    run_dir: str = "runs/evaluate"
    """Folder of this evaluation: config.yaml, answers/, trace.jsonl, results.json, report.md, report.html, figures."""


# Answering


def questions_that_fit(
    questions: Sequence[Question], loaded: LoadedModel, limit: int, too_long: str
) -> tuple[list[Question], list[int | str]]:
    """The questions to ask, and the ids of those whose turns might not all fit the model's context.

    A question needs room for its last prompt, with an answer of `limit` tokens to every turn.

    Args:
        questions: the questions.
        loaded: encodes them.
        limit: most tokens of an answer.
        too_long: "skip" leaves such a question out, "cut" keeps it, to be cut from the left, "refuse" is an error.

    Raises:
        DvirlError: if one does not fit and that is refused, or none is left.
    """
    context = context_length(loaded.model.config)
    if limit >= context:
        raise DvirlError(f"answer_tokens is {limit}; expected less than the model's context, {context}")
    asked = []
    longer: list[int | str] = []
    for question in questions:
        turns = [turn for user in question.turns for turn in (user, "")][:-1]
        need = len(loaded.chat.encode(turns)) + limit * len(question.turns)
        if need > context:
            longer.append(question.question_id)
        if need <= context or too_long == "cut":
            asked.append(question)
        elif too_long == "refuse":
            raise DvirlError(
                f"question {question.question_id}: up to {need} tokens with its answers; expected at most the "
                f"model's context, {context} (or --too_long skip, or cut)"
            )
    if not asked:
        raise DvirlError(f"none of {len(questions)} questions fits the model's context, {context}")
    return asked, longer


def answer_question(
    question: Question, decode: Method, loaded: LoadedModel, limit: int
) -> tuple[list[str], list[Answer]]:
    """Answer every turn of a question; return the texts and the timed answers."""
    texts: list[str] = []
    answers: list[Answer] = []
    for _ in question.turns:
        answer = decode(prompts_of(question, texts, loaded, limit)[-1])
        answers.append(answer)
        texts.append(loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True))
    return texts, answers


def _read_answers(config: EvalConfig) -> Answers:
    answers: Answers = {}
    for repeat in range(config.repeats):
        for name in config.methods.split(","):
            answers[name, repeat] = resume_answers(Path(config.run_dir, _answer_file(name, repeat)))
    return answers


def _answer_file(name: str, repeat: int) -> str:
    return f"answers/{name}-{repeat + 1}.jsonl"


def missing(
    questions: Sequence[Question], names: Sequence[str], repeats: int, answers: Answers
) -> list[Asked]:
    """Every answer that is missing, in the order in which they are to be given."""
    return [
        (name, repeat, question)
        for repeat in range(repeats)
        for index, question in enumerate(questions)
        for name in in_turn(names, index + repeat)
        if question.question_id not in answers[name, repeat]
    ]


@torch.no_grad()
def answer_all(draft: Draft, questions: Sequence[Question], config: EvalConfig) -> tuple[Answers, float]:
    """Answer the questions that the folder has no answers to; each answer is on disk as soon as it is given.

    Returns:
        All answers, and the fraction of the time that was not spent decoding; NaN if nothing was left to answer.
    """
    loaded = draft.loaded
    base = draft.model.base_model
    limit = config.answer_tokens
    run = _methods(draft, config)
    processes = Processes(loaded.model.device.type)
    kept = _read_answers(config)
    folder = Path(config.run_dir)
    if processes.first:
        (folder / "answers").mkdir(exist_ok=True)
        # The trace of answers that the answer files lack is dropped: they are given and traced again.
        keep_lines(
            folder / TRACE,
            lambda line: line["question_id"] in kept.get((line["method"], line["repeat"]), ()),
        )
    words = cache(token_texts(loaded.tokenizer))
    left = missing(processes.share(questions), list(run), config.repeats, kept)
    with base.merged(), draft.model.with_int8_draft(config.int8_draft):
        for decode in run.values() if left else ():
            answer_question(questions[0], decode, loaded, limit)  # warms up
        start = time.perf_counter()
        decoded_s = -base.capture_s  # capturing CUDA graphs is part of decoding, not of the overhead
        # Processes that have fewer answers to give still take part in every gathering.
        for index in tqdm(range(processes.largest(len(left))), desc="answering", unit="answer", leave=False):
            lines: list[Line] = []
            if index < len(left):
                lines, seconds = _answer_lines(left[index], run, loaded, config, words)
                decoded_s += seconds
            for file, line in processes.gathered(lines):
                if processes.first:
                    log_line(folder / file, line)
        overhead = 1 - (decoded_s + base.capture_s) / (time.perf_counter() - start)
    return _read_answers(config), overhead if left else math.nan


def _methods(draft: Draft, config: EvalConfig) -> dict[str, Method]:
    """The methods asked for."""
    configs = decode_configs(
        config.longest,
        config.fixed_len,
        config.kangaroo_steps,
        config.kangaroo_threshold,
        target=draft.target,
        temperature=config.temperature,
        top_p=config.top_p,
    )
    return decoders(config.methods.split(","), configs, draft, config.answer_tokens, config.seed)


def _answer_lines(
    asked: Asked,
    run: dict[str, Method],
    loaded: LoadedModel,
    config: EvalConfig,
    words: Callable[[int], str],
) -> tuple[list[Line], float]:
    """Answer a question; return what to write of it, the answer after its trace, and the seconds of decoding."""
    method, repeat, question = asked
    # Sampled answers are independent draws: of every question, turn and repeat, the same ones for all methods.
    draws = random.Random(f"{config.seed} {repeat} {question.question_id!r}")
    texts, answers = answer_question(
        question, lambda prompt: run[method](prompt, seed=draws.getrandbits(62)), loaded, config.answer_tokens
    )
    lines = []
    for turn, answer in enumerate(answers):
        events = accept_events(
            answer.blocks,
            words,
            method=method,
            question_id=question.question_id,
            category=question.category,
            turn=turn,
            repeat=repeat,
        )
        lines.append((TRACE, events))
    row = answer_row(question, f"{loaded.name}-{method}", texts, answers)
    return [*lines, (_answer_file(method, repeat), row)], sum(answer.wall_s for answer in answers)


# Judging


def drifted(
    draft: Draft,
    questions: Sequence[Question],
    answers: dict[int | str, Row],
    limit: int,
) -> pd.DataFrame:
    """How far the verifier is from the untouched model on given answers, pooled by task and overall.

    Returns:
        `drift_kl` and `drift_tokens` of `metrics.verifier_figures`, by task.
    """
    sums: dict[str, Tensor] = {}
    for question in questions:
        choice = answers[question.question_id]["choices"][0]
        prompts = prompts_of(question, choice["turns"], draft.loaded, limit)
        for turn in zip(prompts, choice["tokens"], strict=True):
            found = verifier_sums(draft.loaded.model, [make_example(*turn)], draft.target)
            for task in (question.task, OVERALL):
                sums[task] = sums.get(task, 0) + found
    rows = [{"task": task, **verifier_figures(total)} for task, total in sums.items()]
    return pd.DataFrame(rows)[["task", "drift_kl", "drift_tokens"]]


def evaluate(draft: Draft, config: EvalConfig) -> pd.DataFrame:
    """Answer, measure, and write answers, trace, results, report and figures into `run_dir`.

    Args:
        draft: drafts and verifies.
        config: everything else.

    Returns:
        `spec_bench.measures` with the drift, by task and method. Each of several processes answers some of the
        questions; the first one writes and measures, and the others return an empty table.

    Raises:
        DvirlError: for bad questions, an unreadable answer file, or a folder of another evaluation or in use.
    """
    folder = Path(config.run_dir)
    questions = spread(read_questions(config.questions, config.any_category), config.num_questions)
    questions, longer = questions_that_fit(questions, draft.loaded, config.answer_tokens, config.too_long)
    first = Processes(config.device).first
    with run_lock(folder) if first else nullcontext():
        if first:
            # The same names may mean other questions, or a draft that has been trained since.
            claim(folder, config, draft.loaded, draft=draft.fingerprint(), questions=fingerprint(questions))
        answers, overhead = answer_all(draft, questions, config)
    if not first:
        return pd.DataFrame()
    figures = measures(answer_table(answers), config.reference, config.seed)
    # All methods share one verifier: its drift is measured once, on the reference's answers.
    reference = answers[config.reference, 0]
    figures = figures.merge(drifted(draft, questions, reference, config.answer_tokens))
    content = {
        "arguments": asdict(config),
        **provenance(draft.loaded),
        "capture_s": draft.model.base_model.capture_s,
        "overhead": overhead,
        "too_long": longer,
        "figures": figures.to_dict("records"),
    }
    write_json(folder / "results.json", content)
    _report(folder, config, content, figures)
    return figures


def _report(folder: Path, config: EvalConfig, content: dict[str, Any], figures: pd.DataFrame) -> None:
    """Write report.md, report.html and the figure."""
    plots.speedups(figures, config.reference, save=folder / "speedup.png")
    by_task = figures.pivot(index="method", columns="task", values="speedup")
    by_task = by_task.loc[config.methods.split(","), list(figures.task.unique())]
    last = figures.task.iloc[-1]  # all tasks, or the only one
    overall = figures[figures.task == last].drop(columns="task")
    parts = [
        describe(content),
        _circumstances(config, content["too_long"]),
        markdown_table(overall.set_index("method")),
        f"Speed-up over {config.reference} by task:",
        markdown_table(by_task),
        "![Speed-up by task and method](speedup.png)",
    ]
    write_report(folder / "report", f"{config.draft} on {config.questions}", parts)


def _circumstances(config: EvalConfig, longer: Sequence[int | str]) -> str:
    """How answers were chosen, and which questions did not fit the context, in sentences."""
    text = "Answers are greedy."
    if config.temperature:
        text = f"Answers are sampled at temperature {config.temperature}, top_p {config.top_p}, seed {config.seed}."
    if longer:
        what = "left out" if config.too_long == "skip" else "cut from the left where it was needed"
        text += f" Too long for the model's context, and {what}: {', '.join(map(str, longer))}."
    return text


parse_args = command_line(EvalConfig, "dvirl evaluate", "Evaluate a draft by Spec-Bench's measures.")
"""Settings from flags; see `settings.parse_args`."""


def main(args: Any) -> pd.DataFrame:
    """Evaluate, and print the table and where the results are.

    Args:
        args: settings, or a namespace with some of their names.

    Raises:
        DvirlError: for bad input.
    """
    config = from_namespace(EvalConfig, args)
    torch.set_num_threads(config.threads)
    processes = Processes(config.device)
    processes.announce()
    draft = open_draft(config.draft, config.dtype, config.device, config.model_name, config.exit_layer)
    figures = evaluate(draft, config)
    if processes.first:
        run_dir = config.run_dir
        print((Path(run_dir) / "report.md").read_text(encoding="utf-8"))
        print(f"report: {run_dir}/report.html\nresults: {run_dir}/results.json")
        print(f"answers: {run_dir}/answers\ntrace: {run_dir}/trace.jsonl (dvirl trace draws it)")
    return figures
