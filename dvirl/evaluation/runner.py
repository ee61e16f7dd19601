"""Spec-Bench evaluation: every way of decoding on every question, by one measure, in one run: `dvirl evaluate`.

Methods alternate question by question, in an order that changes, so that what else the machine does hits all alike. A
run that was cut off goes on where it stopped.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from dvirl import plots
from dvirl.data.examples import make_example
from dvirl.evaluation.accept_trace import accept_events, token_texts
from dvirl.evaluation.acceptance import Draft, open_draft
from dvirl.evaluation.bench import spread
from dvirl.evaluation.inference_baseline import generate_forward, hugging_face, plain_forward
from dvirl.evaluation.inference_dvi import dvi_forward
from dvirl.evaluation.inference_kangaroo import kangaroo_forward
from dvirl.evaluation.inference_pld import pld_forward
from dvirl.evaluation.measure import Answer, in_turn
from dvirl.evaluation.questions import Question, read_questions
from dvirl.evaluation.report import describe, markdown_table, write_report
from dvirl.evaluation.spec_bench import OVERALL, answer_row, answer_table, measures, resume_answers
from dvirl.metrics import verifier_figures, verifier_sums
from dvirl.models.loading import LoadedModel
from dvirl.runs import settings
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import claim, provenance
from dvirl.runs.log import keep_lines, log_line, write_json
from dvirl.runs.processes import Processes
from dvirl.runs.settings import Settings, choice, from_namespace, number
from kangaroo.decoding.blocks import DecodeConfig

GENERATE = "generate"
METHODS = (GENERATE, "plain", "pld", "kangaroo", "fixed", "dvi", "hybrid")

Method = Callable[[Sequence[int]], Answer]
Kept = dict[tuple[str, int], dict[int | str, dict[str, Any]]]
"""Answers by question id, by method and repeat."""


@dataclass(frozen=True)
class EvalSettings(Settings):
    """What is asked, and how it is decoded."""

    questions: str = "mini"
    """Questions in Spec-Bench's schema: a file, a hub id, or mini, the packaged set."""
    any_category: bool = False
    """Take questions of categories that Spec-Bench does not have; each is a task of its own."""
    num_questions: int = number(0, 0)
    """So many of the questions, spread over the set; 0 for all."""
    methods: str = "generate,plain,pld,kangaroo,dvi,hybrid"
    """By commas: generate (Hugging Face's), plain (our loop), pld (prompt lookup), kangaroo (learned drafts up to a
    doubtful one), fixed (so many learned drafts, always), dvi (as many as acceptance and step costs make pay), hybrid
    (dvi, with looked-up drafts where these are better)."""
    reference: str = choice("plain", ("plain", GENERATE))
    """What speed-ups are over."""
    answer_tokens: int = number(128, 2)
    """Length limit of each turn's answer."""
    longest: int = number(8, 1, 64)
    """Drafts of a block at most: pld, dvi, hybrid."""
    kangaroo_steps: int = number(6, 1, 64)
    """Drafts of a block at most: kangaroo; it and the threshold are those of arXiv 2404.18911."""
    fixed_len: int = number(4, 1, 64)
    """Drafts of a block: fixed."""
    kangaroo_threshold: float = number(0.6, 0, 1)
    """Confidence below which a draft is its block's last: kangaroo."""
    repeats: int = number(1, 1, 1000)
    """Times that every question is answered by every method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.methods.split(",")
        if unknown := sorted(set(asked) - set(METHODS)):
            raise DvirlError(f"methods has {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
        if self.reference not in asked or len(set(asked)) < len(asked):
            raise DvirlError(f"methods is {self.methods!r}; expected the reference {self.reference} in it, none twice")


@dataclass(frozen=True)
class EvalConfig(EvalSettings):
    """Everything that an evaluation depends on."""

    draft: str = "smollm2-135m-k2"
    """A shipped drafter, a drafter's folder or a run's."""
    dtype: str = "auto"
    """Of the weights: auto (bfloat16 where the hardware is fast at it), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = number(2, 1, 1024)
    """CPU threads of torch."""
    seed: int = number(0, 0, 2**63 - 1)
    """Of the resampling behind intervals."""
    run_dir: str = "runs/evaluate"
    """Folder of this evaluation: config.yaml, answers/, trace.jsonl, results.json, report.md, report.html, figures."""


# Answering


def methods(draft: Draft, how: EvalSettings) -> dict[str, Method]:
    """The ways of decoding asked for, each from a prompt to an answer by the clock."""
    model, target, eos_ids = draft.model, draft.target, draft.loaded.eos_ids
    stopping = DecodeConfig(how.kangaroo_steps, how.kangaroo_threshold, target)
    ours = {
        "plain": partial(plain_forward, target=target),
        "pld": partial(pld_forward, draft_len=how.longest, target=target),
        "kangaroo": partial(kangaroo_forward, settings=stopping),
        "fixed": partial(kangaroo_forward, settings=DecodeConfig(how.fixed_len, target=target)),
        "dvi": partial(dvi_forward, draft_len=how.longest, target=target),
        "hybrid": partial(dvi_forward, draft_len=how.longest, target=target, source="hybrid"),
    }
    asked = how.methods.split(",")
    theirs = hugging_face(draft.loaded) if GENERATE in asked else None

    def decode(name: str, prompt: Sequence[int]) -> Answer:
        if name == GENERATE:
            assert theirs is not None
            return generate_forward(theirs, prompt, how.answer_tokens, eos_ids)
        return ours[name](model, prompt, how.answer_tokens, eos_ids=eos_ids)

    return {name: partial(decode, name) for name in asked}


def prompts_of(question: Question, answers: Sequence[str], loaded: LoadedModel) -> list[list[int]]:
    """The prompt of every turn up to the first that has no answer yet; later ones see the answers before them."""
    count = min(len(question.turns), len(answers) + 1)
    said = [text for both in zip(question.turns, answers, strict=False) for text in both]
    return [loaded.chat.encode([*said[: 2 * turn], question.turns[turn]]) for turn in range(count)]


def refuse_longer(questions: Sequence[Question], loaded: LoadedModel, limit: int) -> None:
    """See that the user's turns of each question, and one answer of `limit` tokens, fit into the model's context.

    Raises:
        DvirlError: if those of a question do not.
    """
    for one in questions:
        _refuse_longer(one, prompts_of(one, [""] * (len(one.turns) - 1), loaded)[-1], loaded, limit)


def _refuse_longer(question: Question, prompt: Sequence[int], loaded: LoadedModel, limit: int) -> None:
    context = loaded.model.config.max_position_embeddings
    if len(prompt) + limit > context:
        asked = f"question {question.question_id}: a prompt of {len(prompt)} tokens and {limit} of answer"
        raise DvirlError(f"{asked}; expected at most the model's context, {context}")


def answer_question(
    question: Question, decode: Method, loaded: LoadedModel, limit: int
) -> tuple[list[str], list[Answer]]:
    """Text and measure of every turn's answer.

    Raises:
        DvirlError: if, behind the answers so far, another of `limit` tokens would outgrow the model's context.
    """
    texts: list[str] = []
    answers: list[Answer] = []
    for _ in question.turns:
        prompt = prompts_of(question, texts, loaded)[-1]
        _refuse_longer(question, prompt, loaded, limit)
        answers.append(decode(prompt))
        texts.append(loaded.tokenizer.decode(answers[-1].tokens, skip_special_tokens=True))
    return texts, answers


def missing(
    questions: Sequence[Question], names: Sequence[str], repeats: int, kept: Kept
) -> list[tuple[str, int, Question]]:
    """Method, repeat and question of every answer that is not there yet, in the order in which they are to be given."""
    return [
        (name, repeat, question)
        for repeat in range(repeats)
        for at, question in enumerate(questions)
        for name in in_turn(names, at + repeat)
        if question.question_id not in kept[name, repeat]
    ]


@torch.no_grad()
def answer_all(draft: Draft, questions: Sequence[Question], how: EvalSettings, folder: Path) -> tuple[Kept, float]:
    """Answer what the folder has no answer to yet; every answer is on disk as soon as it is there.

    Returns:
        All answers, and the share of the time that decoding did not take; NaN if nothing was left to answer.
    """
    loaded, run, base = draft.loaded, methods(draft, how), draft.model.base_model
    together = Processes(loaded.model.device.type)
    files = {(name, turn): folder / f"answers/{name}-{turn + 1}.jsonl" for turn in range(how.repeats) for name in run}
    kept: Kept = {key: resume_answers(path) for key, path in files.items()}
    trace, limit, words = folder / "trace.jsonl", how.answer_tokens, cache(token_texts(loaded.tokenizer))
    if together.first:
        keep_lines(trace, lambda line: line["question_id"] in kept.get((line["method"], line["repeat"]), ()))
        (folder / "answers").mkdir(exist_ok=True)
    left = missing(together.share(questions), list(run), how.repeats, kept)
    with base.folded():
        for name in run if left else ():
            answer_question(questions[0], run[name], loaded, limit)  # warms up
        began, decoded_s = time.perf_counter(), -base.capture_s
        rounds = tqdm(range(together.largest(len(left))), desc="answering", unit="answer", leave=False)
        for at in rounds:
            lines: list[tuple[Path, dict[str, Any]]] = []
            if at < len(left):
                name, repeat, question = left[at]
                texts, answers = answer_question(question, run[name], loaded, limit)
                about: Any = {"method": name, "question_id": question.question_id, "category": question.category}
                lines = [
                    (trace, accept_events(one.blocks, words, **about, turn=turn, repeat=repeat))
                    for turn, one in enumerate(answers)
                ]
                lines.append((files[name, repeat], answer_row(question, f"{loaded.name}-{name}", texts, answers)))
                decoded_s += sum(one.wall_s for one in answers)
            for path, line in together.gathered(lines):
                if together.first:
                    log_line(path, line)
        decoded_s, spent_s = decoded_s + base.capture_s, time.perf_counter() - began
    kept = {key: resume_answers(path) for key, path in files.items()}
    return kept, 1 - decoded_s / spent_s if left else math.nan


# Judging


def drifted(draft: Draft, questions: Sequence[Question], answers: dict[int | str, dict[str, Any]]) -> pd.DataFrame:
    """How far the verifier is from the untouched model on given answers, pooled by task and overall.

    Returns:
        `drift_kl` and `drift_tokens` of `drift.verifier_figures`, by task.
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    for question in questions:
        choice = answers[question.question_id]["choices"][0]
        pairs = zip(prompts_of(question, choice["turns"], draft.loaded), choice["tokens"], strict=True)
        for pair in pairs:
            found = verifier_sums(draft.loaded.model, [make_example(*pair)], draft.target)
            for name in (question.task, OVERALL):
                sums[name] += found
    rows = [{"task": name, **verifier_figures(one)} for name, one in sums.items()]
    return pd.DataFrame(rows)[["task", "drift_kl", "drift_tokens"]]


def evaluate(draft: Draft, config: EvalConfig) -> pd.DataFrame:
    """Answer, measure, and write answers, trace, results, report and figures into `run_dir`.

    Args:
        draft: what drafts and verifies.
        config: everything else.

    Returns:
        `spec_bench.measures`, by task and method. Several processes answer a share of the questions each; the first
        writes and judges, and the others return an empty table.

    Raises:
        DvirlError: for bad questions, an answer file that cannot be read, or a folder of another evaluation.
    """
    folder = Path(config.run_dir)
    questions = spread(read_questions(config.questions, config.any_category), config.num_questions)
    refuse_longer(questions, draft.loaded, config.answer_tokens)
    first = Processes(config.device).first
    if first:
        claim(folder, config, draft.loaded)
    kept, overhead = answer_all(draft, questions, config, folder)
    if not first:
        return pd.DataFrame()
    found = measures(answer_table(kept), config.reference, config.seed)
    found = found.merge(drifted(draft, questions, kept[config.reference, 0]))
    content = {
        "arguments": asdict(config),
        **provenance(draft.loaded),
        "date": time.strftime("%Y-%m-%d"),
        "capture_s": draft.model.base_model.capture_s,
        "overhead": overhead,
        "figures": found.to_dict("records"),
    }
    write_json(folder / "results.json", content)
    plots.speedups(found, config.reference, folder / "speedup.png")
    wide = found.pivot(index="method", columns="task", values="speedup")
    wide = wide.loc[config.methods.split(","), list(dict.fromkeys(found.task))]
    overall = found[found.task == found.task.iloc[-1]].drop(columns="task")
    parts = [
        describe(content),
        markdown_table(overall.set_index("method")),
        f"Speed-up over {config.reference} by task:",
        markdown_table(wide),
        "![Speed-up by task and method](speedup.png)",
    ]
    write_report(folder / "report", f"{config.draft} on {config.questions}", parts)
    return found


parse_args = partial(settings.parse_args, EvalConfig, "dvirl evaluate", "Evaluate a draft by Spec-Bench's measures.")
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
    together = Processes(config.device)
    found = evaluate(open_draft(config.draft, config.dtype, config.device), config)
    if not together.first:
        return found
    print((Path(config.run_dir) / "report.md").read_text(encoding="utf-8"))
    print(f"report: {config.run_dir}/report.html\nresults: {config.run_dir}/results.json")
    print(f"answers: {config.run_dir}/answers\ntrace: {config.run_dir}/trace.jsonl (dvirl trace draws it)")
    return found
