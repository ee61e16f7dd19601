"""Decoding by the clock, every method in one process: `dvirl bench DRAFTER` (`make bench`).

Methods alternate question by question in a changing order, so that other load on the machine hits all of them alike.
Figures are medians over questions of ratios on the same question. Each method answers two questions before the clock
counts; the time in which CUDA graphs are captured is reported apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import fmean, median
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from dvirl.evaluation.measure import Answer, tally
from dvirl.evaluation.methods import (
    GENERATE,
    PLAIN,
    DraftingSettings,
    answer_in_turn,
    decode_configs,
    decoders,
)
from dvirl.evaluation.questions import MeasureSettings, PromptSets, asked_for, question_sets, spread
from dvirl.evaluation.report import write_out
from dvirl.models.drafters import DEFAULT_DRAFTER, Draft, LoadedDrafter, load_drafter
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance
from dvirl.runs.settings import command_line, number, positional
from kangaroo.decoding.blocks import DecodeConfig

WAYS = {PLAIN: PLAIN, "lookup": "pld", "learned, 4": "fixed", "learned": "dvi", "hybrid": "hybrid"}
"""The names of our own methods in this table, and the methods."""
BATCHED = (PLAIN, "learned, 4", "hybrid")
"""Those that are also timed with several texts at once."""
WARM_UP = 2
"""Number of questions that every method answers before the clock counts."""


def ways(longest: int) -> dict[str, DecodeConfig]:
    """How each method drafts, besides Hugging Face's `generate`; `longest` is the most drafts of a block."""
    configs = decode_configs(longest)
    return {name: configs[method] for name, method in WAYS.items()}


@dataclass(frozen=True)
class Speed:
    """One method on one set of questions.

    Attributes:
        tok_per_s: mean over questions of new tokens over wall seconds, the prefill included (Spec-Bench).
        over_plain: median over questions of the speed over plain decoding's on the same question.
        mat: mean number of tokens that a verification commits, without the prefill; None for Hugging Face's.
        accept_rate: accepted over scored drafts; None without drafts.
        equal: number of answers that are plain decoding's, token for token.
        questions: number of questions.
    """

    tok_per_s: float
    over_plain: float
    mat: float | None
    accept_rate: float | None
    equal: int
    questions: int


@torch.no_grad()
def compare(
    drafter: Draft,
    sets: Mapping[str, Sequence[Sequence[int]]],
    limit: int,
    longest: int,
    names: Sequence[str] = (GENERATE, *WAYS),
) -> Iterator[tuple[str, dict[str, Speed]]]:
    """Time every method on every set, and yield each set when it is done.

    Args:
        drafter: with its model.
        sets: prompts by the name of their set.
        limit: most tokens of an answer.
        longest: most drafts of a block.
        names: of the methods, plain decoding among them.
    """
    model = drafter.model
    run = decoders(names, ways(longest), drafter, limit)
    with model.base_model.merged():
        for prompt in next(iter(sets.values()))[:WARM_UP]:
            for decode in run.values():
                decode(prompt)
        for name, prompts in sets.items():
            answers = answer_in_turn(run, prompts, name)
            yield name, {way: _speed(given, answers[PLAIN]) for way, given in answers.items()}


def _speed(answers: Sequence[Answer], plain: Sequence[Answer]) -> Speed:
    counts = tally(answers)
    pairs = list(zip(answers, plain, strict=True))
    return Speed(
        tok_per_s=fmean(answer.tok_per_s for answer in answers),
        over_plain=median(answer.tok_per_s / base.tok_per_s for answer, base in pairs),
        mat=counts.mat if counts.blocks else None,
        accept_rate=counts.accept_rate if counts.drafted else None,
        equal=sum(answer.tokens == base.tokens for answer, base in pairs),
        questions=len(answers),
    )


def over_plain(draft: Draft, prompts: Sequence[Sequence[int]], limit: int, longest: int = 8) -> Speed:
    """Time the learned draft, in blocks as long as they pay, in turn with plain decoding.

    Args:
        draft: with its model.
        prompts: token ids; the first ones also warm up.
        limit: most tokens of an answer.
        longest: most drafts of a block.
    """
    ((_, speeds),) = compare(draft, {"by the clock": prompts}, limit, longest, (PLAIN, "learned"))
    return speeds["learned"]


def _batch_rate(
    drafter: LoadedDrafter, batches: Sequence[list[list[int]]], limit: int, how: DecodeConfig
) -> float:
    """Tokens a second of some batches, one after the other; the time of capturing CUDA graphs is left out."""
    model = drafter.model
    start = model.now() - model.base_model.capture_s
    tokens = 0
    for batch in batches:
        decoded = model.generate_batch(batch, limit, how, drafter.loaded.eos_ids)
        tokens += sum(len(answer.tokens) for answer in decoded)
    return tokens / (model.now() - model.base_model.capture_s - start)


@torch.no_grad()
def batched(
    drafter: LoadedDrafter,
    prompts: list[list[int]],
    limit: int,
    rows: int,
    longest: int,
) -> dict[str, dict[str, float]]:
    """Tokens a second of `rows` texts at once, and of the same texts one after the other; medians over groups.

    Args:
        drafter: with its model.
        prompts: token ids; those that do not fill a group are left out.
        limit: most tokens of an answer.
        rows: number of texts at once, at most as many as there are prompts.
        longest: most drafts of a block.
    """
    groups = [prompts[start : start + rows] for start in range(0, len(prompts) - rows + 1, rows)]
    names = (f"batch {rows} tok_per_s", "batch 1 tok_per_s", "over batch 1")
    figures: dict[str, dict[str, float]] = {}
    with drafter.model.base_model.merged():
        for way in BATCHED:
            how = ways(longest)[way]
            _batch_rate(drafter, groups[:1], limit, how)  # warms up
            rates = []
            for group in tqdm(groups, way, leave=False):
                together = _batch_rate(drafter, [group], limit, how)
                alone = _batch_rate(drafter, [[prompt] for prompt in group], limit, how)
                rates.append((together, alone, together / alone))
            figures[way] = dict(zip(names, pd.DataFrame(rates).median(), strict=True))
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Figures by name, one method a line."""
    rows = pd.DataFrame.from_dict(figures, orient="index")
    return str(rows.to_string(float_format="{:.2f}".format, na_rep=""))


def make_wrong(drafter: LoadedDrafter) -> None:
    """Let each row of the exit head mean its neighbour's token."""
    ids = drafter.model.draft_ids
    if ids is None:
        raise DvirlError(
            f"{drafter.folder} drafts any token; expected a draft with a draft vocabulary for --hostile"
        )
    drafter.model.draft_ids = ids.roll(1)


@dataclass(frozen=True)
class BenchConfig(MeasureSettings, DraftingSettings):
    """Settings of `dvirl bench`."""

    drafter: str = positional(DEFAULT_DRAFTER)
    """Name of a shipped drafter, or folder of a drafter or of a whole Llama that drafts."""
    num_questions: int = number(16, 0)
    """Number of questions of each file, spread over it; 0 for all."""
    draft_len: int = number(8, 1)
    """Most drafts of a block, for adaptive methods."""
    dtype: str = "auto"
    """Of the weights: auto (bfloat16 where the hardware is fast at it), float32, bfloat16 or float16."""
    threads: int = number(2, 1, 1024)
    """CPU threads of torch."""
    rows: int = number(0, 0)
    """Also time this number of texts at once; 0 for none."""
    hostile: bool = False
    """Make learned drafts wrong, to see what drafting costs then."""


parse_args = command_line(
    BenchConfig,
    "dvirl bench",
    "Time every method of decoding side by side, by the clock.",
)
"""Settings from flags; see `settings.parse_args`."""


def _chosen(config: BenchConfig, drafter: LoadedDrafter) -> PromptSets:
    """The prompts to time, by the name of their set; as many as are asked for at once, or more."""
    sets = question_sets(drafter.loaded, asked_for(config, drafter))
    sets = {name: spread(prompts, config.num_questions) for name, prompts in sets.items()}
    total = sum(map(len, sets.values()))
    if config.rows > total:
        raise DvirlError(f"rows is {config.rows}; expected at most the {total} questions")
    return sets


def main(config: BenchConfig) -> dict[str, dict[str, Speed]]:
    """Time plain decoding, Hugging Face's, prompt lookup, the learned draft and both together; print and write it.

    Raises:
        DvirlError: for bad input.
    """
    torch.set_num_threads(config.threads)
    drafter = load_drafter(
        config.drafter, None, config.dtype, config.device, config.model_name, config.exit_layer
    )
    model = drafter.model
    model.int8_draft = config.int8_draft
    if config.hostile:
        make_wrong(drafter)
    sets = _chosen(config, drafter)
    with model.base_model.merged():
        costs = model.step_costs(max(4, config.draft_len))
    times = " ".join(f"{ms:.1f}" for ms in costs.verify)
    print(
        f"milliseconds of a step that verifies 0, 1, 2, … drafts: {times}; of drafting one: {costs.draft:.1f}"
    )
    print(f"blocks of four drafts beat plain decoding above an acceptance of {costs.break_even(4):.2f}")
    figures: dict[str, dict[str, Any]] = {}
    content = {**provenance(drafter.loaded), "costs": asdict(costs), "figures": figures}

    def keep() -> None:
        write_out(config, **content, capture_s=model.base_model.capture_s)

    # Each set is on disk as soon as it is done: a long bench may be cut off.
    found: dict[str, dict[str, Speed]] = {}
    for name, speeds in compare(drafter, sets, config.max_new_tokens, config.draft_len):
        found[name] = speeds
        figures[name] = {way: asdict(speed) for way, speed in speeds.items()}
        print(f"{name}\n{table(figures[name])}", flush=True)
        keep()
    if config.rows:
        prompts = [*chain(*sets.values())]
        content["batched"] = batched(drafter, prompts, config.max_new_tokens, config.rows, config.draft_len)
        print(table(content["batched"]))
        keep()
    return found
