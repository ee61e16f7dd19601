"""Spec-Bench's files and measures (Xia et al. 2024, arXiv 2401.07851): questions, answers, and what answers tell.

Two lists of a published answer are read in more than one way; ours are: `accept_lengths` has what each verification
committed, its own token included and the prefill left out, so that their mean is `mat`; `decoding_steps` counts the
verifier's passes, the prefill included.
"""

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dvirl.data.sources import parsed_rows
from dvirl.evaluation.measure import Answer
from dvirl.evaluation.questions import Question
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_text, write_text
from dvirl.runs.settings import has_type

OVERALL = "overall"


A_TURN = dict.fromkeys(("new_tokens", "wall_time", "decoding_steps", "num_drafted", "num_accepted"), list[float])
A_TURN |= dict[str, Any](nll=list[float | None], tokens=list[list[int]])
"""What our answers say of every turn."""


DRAWS = 2000
"""Resamples of the questions behind an interval."""


def answer_row(question: Question, model_id: str, texts: Sequence[str], answers: Sequence[Answer]) -> dict[str, Any]:
    """The answer to all turns of a question, in Spec-Bench's layout and with token ids and counts of drafts."""
    choice = {
        "index": 0,
        "turns": list(texts),
        "decoding_steps": [len(one.accept_lengths) + 1 for one in answers],
        "new_tokens": [len(one.tokens) for one in answers],
        "wall_time": [one.wall_s for one in answers],
        "prefill_time": [one.prefill_s for one in answers],
        "accept_lengths": [length for one in answers for length in one.accept_lengths],
        "drafts": [drafts for one in answers for drafts in one.drafts],
        "num_drafted": [one.num_drafted for one in answers],
        "num_accepted": [one.num_accepted for one in answers],
        "nll": [one.nll for one in answers],
        "tokens": [one.tokens for one in answers],
    }
    named = {"question_id": question.question_id, "category": question.category, "answer_id": uuid.uuid4().hex}
    return {**named, "model_id": model_id, "choices": [choice], "tstamp": time.time()}


def parse_answer(row: Any) -> dict[str, Any]:
    """An answer row as it is, if it is one: a question id, and the texts of its turns.

    Raises:
        DvirlError: if it is none.
    """
    try:
        key, turns, tokens = row["question_id"], row["choices"][0]["turns"], row["choices"][0].get("tokens")
    except (KeyError, IndexError, TypeError) as error:
        raise DvirlError("expected question_id and choices[0].turns, an answer of Spec-Bench") from error
    if not (has_type(key, int | str) and has_type(turns, list[str]) and has_type(tokens, list[list[int]] | None)):
        raise DvirlError("expected question_id, a number or text; turns, a list of strings; tokens, lists of ids")
    return dict(row)


def resume_answers(path: Path) -> dict[int | str, dict[str, Any]]:
    """The answers that a file holds, by question id; a torn last line, of an evaluation that was cut off, is dropped.

    Raises:
        DvirlError: for any other line that is no answer of ours, or a question that is answered twice.
    """
    if not path.exists():
        return {}
    text = read_text(path)
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])
    found: dict[int | str, dict[str, Any]] = {}
    for where, row in parsed_rows(str(path), _parse_own):
        if row["question_id"] in found:
            raise DvirlError(f"{where}: question_id {row['question_id']!r} is answered twice")
        found[row["question_id"]] = row
    return found


def _parse_own(row: Any) -> dict[str, Any]:
    choice = parse_answer(row)["choices"][0]
    for name, kind in A_TURN.items():
        if not has_type(choice.get(name), kind) or len(choice[name]) != len(choice["turns"]):
            raise DvirlError(f"choices[0].{name} is {choice.get(name)!r:.60}; expected a list, an entry a turn")
    if not has_type(choice.get("accept_lengths"), list[int]) or not has_type(row.get("category"), str):
        raise DvirlError("expected a text 'category' and choices[0].accept_lengths, a list of numbers")
    return dict(row)


def answer_table(files: Mapping[tuple[str, int], Mapping[int | str, dict[str, Any]]]) -> pd.DataFrame:
    """A row for each answer: method, repeat, question_id, category, task, and the sums over its turns.

    Args:
        files: answers by question id, by method and repeat.
    """
    rows = []
    for (method, repeat), answers in files.items():
        for key, row in answers.items():
            choice = row["choices"][0]
            sums = {name: sum(choice[name]) for name in ("new_tokens", "wall_time", "num_drafted", "num_accepted")}
            sums["nll"] = math.nan if None in choice["nll"] else sum(choice["nll"])
            lengths = choice["accept_lengths"]
            about = {"method": method, "repeat": repeat, "question_id": key, "category": row["category"]}
            task = Question(key, row["category"], ()).task
            said = {"said": str(choice["tokens"]), "committed": sum(lengths), "blocks": len(lengths)}
            rows.append({**about, "task": task, **sums, **said})
    return pd.DataFrame(rows).assign(tok_per_s=lambda table: table.new_tokens / table.wall_time)


def measures(table: pd.DataFrame, reference: str, seed: int = 0) -> pd.DataFrame:
    """Spec-Bench's figures of every method, for each task and overall.

    Args:
        table: as `answer_table` gives it, every method with the same questions and repeats.
        reference: the method that speed-ups are over; its answers are of the same run.
        seed: of the resampling.

    Returns:
        A row for each task and method: `mat`, pooled over verifications; `accept_rate`, pooled over scored drafts;
        `tok_per_s`, the mean of the answers' rates; `speedup`, the ratio of these means, with the interval `low` to
        `high` that holds it in 95 of 100 resamples of the questions; `speedup_std` over repeats; `ppl`, the
        perplexity of the answers under the verifier that gave them; and `identical`, answers that are those of the
        reference in the same repeat, token for token.
    """
    rows = []
    tasks = {task: part for task, part in table.groupby("task", sort=False)}
    for task, part in [*tasks.items(), *([(OVERALL, table)] if len(tasks) > 1 else [])]:
        rates = part.pivot(index="question_id", columns=["method", "repeat"], values="tok_per_s")
        draws = np.random.default_rng(seed).integers(len(rates), size=(DRAWS, len(rates)))
        base = rates[reference].to_numpy()
        said = part.set_index(["question_id", "repeat"]).said
        plain = said[part.method.eq(reference).to_numpy()]
        for method, own in part.groupby("method", sort=False):
            rate = rates[method].to_numpy()
            again = rate.mean(axis=1)[draws].mean(axis=1) / base.mean(axis=1)[draws].mean(axis=1)
            each = rate.mean(axis=0) / base.mean(axis=0)
            sums = own[["num_drafted", "num_accepted", "committed", "blocks", "new_tokens", "nll"]].sum(skipna=False)
            rows.append(
                {
                    "task": task,
                    "method": method,
                    "questions": len(rates),
                    "mat": sums.committed / sums.blocks if sums.blocks else np.nan,
                    "accept_rate": sums.num_accepted / sums.num_drafted if sums.num_drafted else np.nan,
                    "tok_per_s": rate.mean(),
                    "speedup": rate.mean() / base.mean(),
                    "low": np.quantile(again, 0.025),
                    "high": np.quantile(again, 0.975),
                    "speedup_std": each.std(ddof=1) if len(each) > 1 else np.nan,
                    "ppl": np.exp(sums.nll / sums.new_tokens),
                    "identical": said[part.method.eq(method).to_numpy()].eq(plain).sum(),
                }
            )
    return pd.DataFrame(rows)
