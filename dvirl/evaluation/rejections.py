"""Where drafts are rejected, by the trace of an evaluation: `dvirl trace FILE`."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from dvirl import plots
from dvirl.evaluation.accept_trace import FACETS, accept_events, accept_rates, events_table, read_trace
from dvirl.rollout import Rollout, draft_rollout, score_drafts
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import write_json
from kangaroo.decoding.blocks import DecodeConfig, DraftBlock, Verification
from kangaroo.decoding.sampling import choose_tokens
from kangaroo.kangaroo_model import KangarooModel


def judged_events(
    model: KangarooModel, rollout: Rollout, settings: DecodeConfig, words: Callable[[int], str],
    about: Sequence[Mapping[str, Any]],
) -> pd.DataFrame:  # fmt: skip
    """The accept events that decoding step by step would give on greedy answers, by one pass of the draft.

    Args:
        model: drafts.
        rollout: the verifier's answers.
        settings: draft_len and threshold.
        words, about: as in `accept_events`; what to note of each answer.
    """
    drafts, lines = draft_rollout(model, rollout), []
    index, confidence = (
        torch.split(one.cpu(), (rollout.response_lens - 1).tolist()) for one in choose_tokens(drafts[0])
    )
    judged = zip(rollout.responses(), score_drafts(model, rollout, drafts, settings).blocks, strict=True)
    for row, (answer, blocks) in enumerate(judged):
        found = [Verification(0, (answer[0],), 0, 0, DraftBlock(*[torch.empty(0)] * 3), torch.empty(0))]
        for one in blocks:
            scored = slice(one.start - 1, one.start - 1 + one.num_drafted)
            tokens = model.token_ids(index[row][scored].to(rollout.tokens.device))
            draft = DraftBlock(tokens, confidence[row][scored], torch.empty(0))
            committed = tuple(answer[one.start : one.start + one.block_len])
            found.append(Verification(one.start, committed, one.num_drafted, one.num_accepted, draft, torch.empty(0)))
        lines.append(accept_events(found, words, **about[row]))
    return events_table([line for line in lines if line["at"]])


def main(argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Print where each method's drafts are rejected, by position in the block, token class and category.

    Intervals are of 95 %, by bootstrap over questions; `rejects` is the share of all rejects.

    Raises:
        DvirlError: for bad input.
    """
    parser = argparse.ArgumentParser(prog="dvirl trace", description=__doc__)
    parser.add_argument("trace", help="JSONL file of accept events, an answer a line")
    parser.add_argument("--method", nargs="+", help="only these; all by default")
    parser.add_argument("--figure", default="", help="also draw them into this file (PNG or SVG)")
    parser.add_argument("--out", default="", help="also write them to this JSON file")
    args = parser.parse_args(list(argv))
    events = read_trace(args.trace)
    known = list(events.method.unique())
    if not known or set(args.method or known) - set(known):
        raise DvirlError(f"{args.trace}: expected drafts of {args.method or 'a method'}; it has {known or 'none'}")
    events = events[events.method.isin(args.method or known)]
    figures: dict[str, dict[str, Any]] = {}
    for name, own in events.groupby("method", sort=False):
        print(f"{name!s}: {own.accepted.mean():.3f} of {len(own)} scored drafts accepted")
        tables = {by: accept_rates(own, by) for by in FACETS}
        print(*(table.to_string(float_format="{:.3f}".format) for table in tables.values()), sep="\n")
        figures[str(name)] = {by: table.reset_index().to_dict("records") for by, table in tables.items()}
    if args.out:
        write_json(args.out, {"arguments": vars(args), "figures": figures})
    if args.figure:
        plots.rejections(events, args.figure)
    return figures
