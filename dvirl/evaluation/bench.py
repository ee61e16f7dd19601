"""Decoding by the clock, every way in one process: `dvirl bench DRAFTER` (`make bench`).

Ways alternate question by question and in changing order, so that what else the machine does hits all alike; figures
are medians over questions of ratios taken on the same question. Each way answers two questions before the clock counts;
the time that CUDA takes to capture passes is reported apart.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from dvirl.evaluation.inference_baseline import generate_forward, hugging_face
from dvirl.evaluation.measure import Answer, in_turn, timed
from dvirl.evaluation.questions import asked_for, parse_measured, question_sets
from dvirl.models.drafters import LoadedDrafter, load_drafter
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.costs import StepCosts

GENERATE, PLAIN = "generate", "plain"
BATCHED = (PLAIN, "learned, 4", "hybrid")
"""The ways that are timed with several texts at once."""
WARM_UP = 2
"""Questions of the first set that every way answers before the clock counts."""


def ways(longest: int) -> dict[str, DecodeConfig]:
    """The ways of decoding compared, besides Hugging Face's `generate`."""
    return {
        PLAIN: DecodeConfig(0),
        "lookup": DecodeConfig(longest, source="lookup", adaptive=True),
        "learned, 4": DecodeConfig(4),
        "learned": DecodeConfig(longest, adaptive=True),
        "hybrid": DecodeConfig(longest, source="hybrid", adaptive=True),
    }


@dataclass(frozen=True)
class Speed:
    """One way on one set of questions.

    Attributes:
        tok_per_s: mean over questions of new tokens over wall seconds, the prefill included (Spec-Bench).
        over_plain: median over questions of the speed over plain decoding's on the same question.
        over_ideal: median over questions of the time that the blocks should have taken, by the step costs measured
            before the set, over the time they took, prefill excluded; None for Hugging Face's.
        mat: tokens a verification commits, prefill excluded; None for Hugging Face's.
        accept_rate: accepted over scored drafts; None without drafts.
        equal: answers that are plain decoding's, token for token.
        questions: how many there are.
    """

    tok_per_s: float
    over_plain: float
    over_ideal: float | None
    mat: float | None
    accept_rate: float | None
    equal: int
    questions: int


def ideal_s(answer: Answer, costs: StepCosts) -> float:
    """Seconds that the blocks of an answer should have taken, the prefill left out."""
    return sum(costs.block(*drafts) for drafts in answer.drafts) / 1e3


@torch.no_grad()
def compare(
    drafter: LoadedDrafter, sets: dict[str, list[list[int]]], limit: int, longest: int
) -> Iterator[tuple[str, dict[str, Speed]]]:
    """Time every way on every set, and yield each set when it is done.

    Args:
        drafter: with its model.
        sets: prompts by the name of their set.
        limit: length limit of an answer.
        longest: drafts of a block at most.
    """
    model, loaded = drafter.model, drafter.loaded
    theirs, eos_ids = hugging_face(loaded), loaded.eos_ids
    run: dict[str, Callable[[list[int]], Answer]] = {
        GENERATE: lambda prompt: generate_forward(theirs, prompt, limit, eos_ids)
    }
    for name, how in ways(longest).items():
        run[name] = partial(timed, model, limit=limit, settings=how, eos_ids=eos_ids)
    with model.base_model.folded():
        first = next(iter(sets.values()))
        for prompt in first[:WARM_UP]:
            for decode in run.values():
                decode(prompt)
        for name, prompts in sets.items():
            costs = model.measure_costs(longest)
            answers: dict[str, list[Answer]] = {way: [] for way in run}
            for turn, prompt in enumerate(tqdm(prompts, desc=name, unit="question", leave=False)):
                for way in in_turn(list(run), turn):
                    answers[way].append(run[way](prompt))
            yield name, {way: _speed(given, answers[PLAIN], costs) for way, given in answers.items()}


@torch.no_grad()
def batched(
    drafter: LoadedDrafter, prompts: list[list[int]], limit: int, rows: int, longest: int
) -> dict[str, dict[str, float]]:
    """Tokens a second with so many texts at once, and one after the other, in turn on the same prompts; medians."""
    model, eos_ids = drafter.model, drafter.loaded.eos_ids
    groups = [prompts[start : start + rows] for start in range(0, len(prompts) - rows + 1, rows)]
    if not groups:
        raise DvirlError(f"rows is {rows}; expected at most the {len(prompts)} questions")

    def rate(group: list[list[int]], how: DecodeConfig, together: bool) -> float:
        began, captured = model.now(), model.base_model.capture_s
        parts = [group] if together else [[prompt] for prompt in group]
        decoded = [one for part in parts for one in model.generate_batch(part, limit, how, eos_ids)]
        wall_s = model.now() - began - (model.base_model.capture_s - captured)
        return sum(len(one.tokens) for one in decoded) / wall_s

    found: dict[str, dict[str, float]] = {}
    with model.base_model.folded():
        for way in BATCHED:
            how = ways(longest)[way]
            rate(groups[0], how, True)  # warms up
            both = [(rate(group, how, True), rate(group, how, False)) for group in tqdm(groups, way, leave=False)]
            found[way] = {
                f"batch {rows} tok_per_s": median(wide for wide, _ in both),
                "batch 1 tok_per_s": median(one for _, one in both),
                "over batch 1": median(wide / one for wide, one in both),
            }
    return found


def _speed(given: Sequence[Answer], plain: Sequence[Answer], costs: StepCosts) -> Speed:
    ratios = [len(a.tokens) / a.wall_s * b.wall_s / len(b.tokens) for a, b in zip(given, plain, strict=True)]
    drafted = sum(one.num_drafted for one in given)
    ideals = [ideal_s(one, costs) / one.decoding_s for one in given if len(one.blocks) > 1]
    lengths = [length for one in given if one.blocks for length in one.accept_lengths]
    return Speed(
        tok_per_s=fmean(len(one.tokens) / one.wall_s for one in given),
        over_plain=median(ratios),
        over_ideal=median(ideals) if ideals else None,
        mat=fmean(lengths) if lengths else None,
        accept_rate=sum(one.num_accepted for one in given) / drafted if drafted else None,
        equal=sum(a.tokens == b.tokens for a, b in zip(given, plain, strict=True)),
        questions=len(given),
    )


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Figures by name, a way a line."""
    rows = pd.DataFrame.from_dict(figures, orient="index")
    return str(rows.to_string(float_format="{:.2f}".format, na_rep=""))


def main(argv: Sequence[str]) -> dict[str, dict[str, Speed]]:
    """Time plain decoding, Hugging Face's, prompt lookup, the learned draft and both together; print and write it.

    Raises:
        DvirlError: for bad input.
    """
    parser = argparse.ArgumentParser(prog="dvirl bench", description=main.__doc__)
    parser.add_argument("drafter", nargs="?", default="smollm2-135m-k2", help="shipped name or folder of a drafter")
    parser.add_argument("--num_questions", type=int, default=16, help="of each file, spread over it; 0 for all")
    parser.add_argument("--draft_len", type=int, default=8, help="drafts of a block at most, of the adaptive ways")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 by default")
    parser.add_argument("--threads", type=int, default=2, help="torch threads; 2 by default")
    parser.add_argument("--rows", type=int, default=0, help="also time so many texts at once; 0, the default, does not")
    parser.add_argument("--hostile", action="store_true", help="let learned drafts be wrong: what drafting costs then")
    args = parse_measured(parser, argv)
    for option, lowest in (("draft_len", 1), ("threads", 1), ("rows", 0)):
        if getattr(args, option) < lowest:
            raise DvirlError(f"{option} is {getattr(args, option)}; expected at least {lowest}")
    torch.set_num_threads(args.threads)
    drafter = load_drafter(args.drafter, dtype=args.dtype, device=args.device)
    if args.hostile:
        if drafter.model.draft_ids is None:
            raise DvirlError(f"{args.drafter} drafts any token; expected one with a draft vocabulary for --hostile")
        drafter.model.draft_ids = drafter.model.draft_ids.roll(1)  # each row of its head now says its neighbour's token
    sets = question_sets(drafter.loaded, asked_for(args, drafter), args.own, args.seed)
    sets = {name: spread(prompts, args.num_questions) for name, prompts in sets.items()}
    with drafter.model.base_model.folded():
        costs = drafter.model.step_costs(max(4, args.draft_len))
    times = " ".join(f"{ms:.1f}" for ms in costs.verify)
    print(f"milliseconds of a step that verifies 0, 1, 2, … drafts: {times}; of drafting one: {costs.draft:.1f}")
    print(f"blocks of four learned drafts pay from an acceptance of {costs.break_even(4):.2f} on")
    content = {"arguments": vars(args), **provenance(drafter.loaded), "costs": asdict(costs)}
    found: dict[str, dict[str, Speed]] = {}
    for name, speeds in compare(drafter, sets, args.max_new_tokens, args.draft_len):
        found[name] = speeds
        content["capture_s"] = drafter.model.base_model.capture_s
        print(f"{name}\n{table({way: asdict(one) for way, one in speeds.items()})}", flush=True)
        content["figures"] = {name: {way: asdict(one) for way, one in speeds.items()} for name, speeds in found.items()}
        if args.out:
            write_json(args.out, content)
    if args.rows:
        everything = [prompt for prompts in sets.values() for prompt in prompts]
        content["batched"] = batched(drafter, everything, args.max_new_tokens, args.rows, args.draft_len)
        print(table(content["batched"]))
        if args.out:
            write_json(args.out, content)
    return found


def spread(prompts: list[Any], count: int) -> list[Any]:
    """`count` of the prompts at equal distances, all if there are no more or `count` is 0."""
    if not 0 < count < len(prompts):
        return prompts
    return [prompts[round(step * len(prompts) / count)] for step in range(count)]
