"""Spec-Bench's answer files and figures (Xia et al. 2024, arXiv 2401.07851).

Published answer files are read in more than one way. In ours `accept_lengths` holds what each verification committed,
its own token included and the prefill left out, so that its mean is `mat`. `decoding_steps` counts the verifier's
passes, the prefill included.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dvirl.data.sources import parsed_rows
from dvirl.evaluation.measure import Answer, tally
from dvirl.evaluation.questions import OVERALL, Question
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_text, write_text
from dvirl.runs.settings import has_type

SUMMED = ("new_tokens", "wall_time", "num_drafted", "num_accepted")
"""What our answers count in every turn."""
TURN_LISTS: dict[str, Any] = {
    **dict.fromkeys((*SUMMED, "decoding_steps"), list[float]),
    "nll": list[float | None],
    "tokens": list[list[int]],
}
"""What our answers say of every turn, and the type of each list."""
DRAWS = 2000
"""Number of bootstrap samples of the questions for an interval."""

Row = dict[str, Any]
"""The answer to one question, as a line of an answer file has it."""


def answer_row(
    question: Question,
    model_id: str,
    texts: Sequence[str],
    answers: Sequence[Answer],
) -> Row:
    """The answer to all turns of a question, in Spec-Bench's layout and with token ids and counts of drafts."""
    tallies = [tally([answer]) for answer in answers]
    choice: dict[str, Any] = {
        "index": 0,
        "turns": texts,
        "decoding_steps": [len(answer.accept_lengths) + 1 for answer in answers],
        "new_tokens": [len(answer.tokens) for answer in answers],
        "wall_time": [answer.wall_s for answer in answers],
        "prefill_time": [answer.prefill_s for answer in answers],
        "accept_lengths": [length for answer in answers for length in answer.accept_lengths],
        "drafts": [drafts for answer in answers for drafts in answer.drafts],
        "num_drafted": [counts.drafted for counts in tallies],
        "num_accepted": [counts.accepted for counts in tallies],
        "nll": [answer.nll for answer in answers],
        "tokens": [answer.tokens for answer in answers],
    }
    return {
        "question_id": question.question_id,
        "category": question.category,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "choices": [choice],
        "tstamp": time.time(),
    }


def parse_answer(row: Any) -> Row:
    """Check that a row is an answer: it has a question id, and the texts of its turns.

    Raises:
        DvirlError: if it is not.
    """
    try:
        question_id = row["question_id"]
        choice = row["choices"][0]
        turns = choice["turns"]
        tokens = choice.get("tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DvirlError("expected question_id and choices[0].turns, an answer of Spec-Bench") from error
    typed = has_type(question_id, int | str) and has_type(turns, list[str])
    if not typed or not has_type(tokens, list[list[int]] | None):
        raise DvirlError(
            "expected question_id, a number or text; turns, a list of strings; tokens, lists of ids"
        )
    return dict(row)


def _parse_own_answer(row: Any) -> Row:
    choice = parse_answer(row)["choices"][0]
    for name, kind in TURN_LISTS.items():
        values = choice.get(name)
        if not has_type(values, kind) or len(values) != len(choice["turns"]):
            raise DvirlError(f"choices[0].{name} is {values!r:.60}; expected a list, an entry a turn")
    named = has_type(row.get("category"), str)
    if not named or not has_type(choice.get("accept_lengths"), list[int]):
        raise DvirlError("expected a text 'category' and choices[0].accept_lengths, a list of numbers")
    return dict(row)


def resume_answers(path: Path) -> dict[int | str, Row]:
    """The answers in a file, by question id. A torn last line, of an evaluation that was cut off, is dropped.

    Raises:
        DvirlError: if another line is not an answer of ours, or a question is answered twice.
    """
    if not path.exists():
        return {}
    text = read_text(path)
    if text and not text.endswith("\n"):  # the process died while it wrote
        write_text(path, text[: text.rfind("\n") + 1])
    answers: dict[int | str, Row] = {}
    for where, row in parsed_rows(str(path), _parse_own_answer):
        question_id = row["question_id"]
        if question_id in answers:
            raise DvirlError(f"{where}: question_id {question_id!r} is answered twice")
        answers[question_id] = row
    return answers


def answer_table(files: Mapping[tuple[str, int], Mapping[int | str, Row]]) -> pd.DataFrame:
    """One row for each answer: method, repeat, question_id, category, task, and the sums over its turns.

    Args:
        files: answers by question id, by method and repeat.
    """
    rows = []
    for (method, repeat), answers in files.items():
        for question_id, row in answers.items():
            choice = row["choices"][0]
            rows.append(
                {
                    "method": method,
                    "repeat": repeat,
                    "question_id": question_id,
                    "category": row["category"],
                    "task": Question(question_id, row["category"], ()).task,
                    **{name: sum(choice[name]) for name in SUMMED},
                    "committed": sum(choice["accept_lengths"]),
                    "blocks": len(choice["accept_lengths"]),
                    # Other decoders give no likelihoods; a missing one leaves the sum undefined.
                    "nll": np.array(choice["nll"], dtype=float).sum(),
                    "tokens": str(choice["tokens"]),
                }
            )
    table = pd.DataFrame(rows)
    return table.assign(tok_per_s=table.new_tokens / table.wall_time)


def measures(table: pd.DataFrame, reference: str, seed: int = 0) -> pd.DataFrame:
    """Spec-Bench's figures of every method, for each task and overall.

    Args:
        table: from `answer_table`; every method has the same questions and repeats.
        reference: the method that speed-ups are over; its answers are from the same run.
        seed: of the bootstrap.

    Returns:
        A row for each task and method. `mat` is pooled over verifications, `accept_rate` over scored drafts.
        `tok_per_s` is the mean of the answers' rates, and `speedup` the ratio of these means; its interval, `low` to
        `high`, holds 95 of 100 bootstrap samples of the questions, and `speedup_std` is over repeats. `ppl` is the
        perplexity of the answers under the verifier that gave them. `identical` counts the answers that are the
        reference's in the same repeat, token for token.
    """
    figures = {}
    for task, part in table.groupby("task", sort=False):
        figures[str(task)] = _measures_of(part, reference, seed)
    if len(figures) > 1:
        figures[OVERALL] = _measures_of(table, reference, seed)
    return pd.concat(figures, names=["task", "method"]).reset_index()


def _measures_of(table: pd.DataFrame, reference: str, seed: int) -> pd.DataFrame:
    """The figures of every method, by method."""
    groups = table.groupby("method", sort=False)
    sums = groups.sum(numeric_only=True)
    rates = groups.tok_per_s.mean()
    by_repeat = table.pivot_table("tok_per_s", "repeat", "method")  # means
    by_question = table.pivot_table("tok_per_s", "question_id", "method")
    # The same samples for both sides of a ratio: a question that is slow is slow for every method.
    size = len(by_question)
    samples = np.random.default_rng(seed).integers(size, size=(DRAWS, size))
    sampled = by_question.to_numpy()[samples].mean(axis=1)  # [DRAWS, methods]
    speedups = pd.DataFrame(sampled, columns=by_question.columns)
    speedups = speedups.div(speedups[reference], axis=0)
    tokens = table.pivot(index=["question_id", "repeat"], columns="method", values="tokens")
    figures = {
        "questions": size,
        "mat": sums.committed / sums.blocks,
        "accept_rate": sums.num_accepted / sums.num_drafted,  # NaN if nothing was drafted
        "tok_per_s": rates,
        "speedup": rates / rates[reference],
        "low": speedups.quantile(0.025),
        "high": speedups.quantile(0.975),
        "speedup_std": by_repeat.div(by_repeat[reference], axis=0).std(),
        "ppl": np.exp(groups.nll.sum(skipna=False) / sums.new_tokens),
        "identical": tokens.eq(tokens[reference], axis=0).sum(),
    }
    return pd.DataFrame(figures, index=rates.index)
