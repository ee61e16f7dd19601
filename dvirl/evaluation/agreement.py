"""How often a draft's argmax is the verifier's token on greedy answers, in one pass: `dvirl agreement DRAFTER`."""

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from dvirl.evaluation.questions import _from_here, asked_for, parse_measured, question_sets
from dvirl.models.drafters import load_drafter
from dvirl.rollout import Responses, draft_logits_at, response_index
from dvirl.runs.checkpoint import DRAFTER
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json
from dvirl.scale.corpus import answer
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

BINS = 15
"""Bins of equal width for the expected calibration error (Guo et al. 2017)."""


BATCH = 32
"""Answers drafted on at once."""


@dataclass(frozen=True)
class Agreement:
    """What the draft knows of the verifier's greedy answers.

    Attributes:
        rate: share of response positions, the first of each answer left out, where the draft's argmax is the
            verifier's token; a token outside the draft vocabulary is a miss.
        confidence: mean of the draft's largest probability there.
        ece: expected calibration error of that probability against agreement, 15 bins.
        covered: share of those tokens that the draft vocabulary holds.
        positions: how many there are.
        answers: the rate of each answer, in the order of the prompts; NaN for an answer of one token.
    """

    rate: float
    confidence: float
    ece: float
    covered: float
    positions: int
    answers: tuple[float, ...]


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error: the bins' gaps between mean confidence and accuracy, weighted by their sizes.

    Args:
        confidence: `[N]`, 0 to 1.
        right: `[N]`, 1.0 where the prediction was right, else 0.0.
    """
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, device=confidence.device).index_add_(0, bins, confidence - right)
    return float(gaps.abs().sum() / max(1, len(confidence)))


@torch.no_grad()
def _draft(model: KangarooModel, responses: Responses) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, agreement and coverage at each position, `[M]` each."""
    device = model.head_model.weight.device
    rows, positions = response_index(responses.prompt_lens, responses.response_lens)
    own = responses.tokens[rows, responses.prompt_lens[rows] + positions].long().to(device)
    rows, positions, prompt_lens = rows.to(device), positions.to(device), responses.prompt_lens.to(device)
    logits, _ = draft_logits_at(model, responses.tokens.to(device), prompt_lens, rows, positions)
    confidence, index = logits.softmax(dim=-1).max(dim=-1)
    return confidence, (model.token_ids(index) == own).float(), (model.draft_index(own) >= 0).float()


def measure_agreement(model: KangarooModel, responses: Responses) -> Agreement:
    """See where the draft would have said what the verifier said.

    Args:
        model: drafts.
        responses: the verifier's greedy answers (`corpus.answer`).
    """
    order = (responses.prompt_lens + responses.response_lens).argsort()
    with model.base_model.folded():
        parts = [_draft(model, responses.take(rows)) for rows in torch.split(order, BATCH)]
    confidence, right, covered = (torch.cat(values) for values in zip(*parts, strict=True))
    counts = (responses.response_lens[order] - 1).clamp(min=0)
    means = torch.stack([part.mean() for part in torch.split(right.cpu(), counts.tolist())])
    return Agreement(
        rate=float(right.mean()),
        confidence=float(confidence.mean()),
        ece=calibration_error(confidence, right) if len(right) else math.nan,
        covered=float(covered.mean()),
        positions=len(right),
        answers=tuple(means[order.argsort().cpu()].tolist()),
    )


@torch.no_grad()
def logit_lens(base: EarlyExitLlamaForCausalLM, responses: Responses) -> pd.DataFrame:
    """What final norm and head, put behind each layer, make of its states (nostalgebraist's logit lens, 2020).

    Args:
        base: the model.
        responses: whose tokens, the first of each answer left out, are to be predicted.

    Returns:
        A row for every layer (0 is the embedding) and position: `layer`, `question_id` (the response's row), `rank` of
        the last layer's token among this layer's, from 1, and `accepted`, 1 where that rank is 1.
    """
    rows, positions = response_index(responses.prompt_lens, responses.response_lens)
    before = responses.prompt_lens[rows] + positions - 1
    states = base(responses.tokens.long(), output_hidden_states=True).hidden_states
    *lower, last = (one[rows, before] for one in states)
    token = base.lm_head(last).argmax(dim=-1, keepdim=True)
    found = []
    for layer, one in enumerate([*map(base.model.norm, lower), last]):
        logits = base.lm_head(one)
        rank = 1 + (logits > logits.gather(1, token)).sum(dim=1).cpu()
        about = {"layer": layer, "question_id": rows.cpu(), "rank": rank, "accepted": (rank == 1).long()}
        found.append(pd.DataFrame(about))
    return pd.concat(found, ignore_index=True)


def _sha256(path: Path) -> str | None:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.exists() else None


def main(argv: Sequence[str]) -> dict[str, Agreement]:
    """Measure a drafter in float32, print a table, and write the figures if asked to.

    Raises:
        DvirlError: for a drafter, file or setting that does not fit.
    """
    default = "Without --questions and --own: the drafter's own questions."
    parser = argparse.ArgumentParser(prog="dvirl agreement", description=__doc__, epilog=default)
    parser.add_argument("drafter", help="name of a shipped drafter, or a folder such as RUN_DIR/drafter")
    args = parse_measured(parser, argv, shortest=2)
    drafter = load_drafter(args.drafter, dtype="float32", device=args.device)
    loaded, found = drafter.loaded, {}
    args.questions = asked_for(args, drafter)
    sets = question_sets(loaded, args.questions, args.own, args.seed)
    for name, prompts in tqdm(sets.items(), desc="answering", unit="set", leave=False):
        found[name] = measure_agreement(drafter.model, answer(loaded, prompts, args.max_new_tokens, BATCH))
    width = max(map(len, found))
    print(" " * width, *(f"{title:>10}" for title in ("agreement", "confidence", "ece", "covered", "positions")))
    for name, one in found.items():
        shares = (f"{share:10.3f}" for share in (one.rate, one.confidence, one.ece, one.covered))
        print(f"{name:{width}}", *shares, f"{one.positions:10d}")
    if args.out:
        paths = [_from_here(drafter.folder / DRAFTER), *args.questions]
        files = {path: _sha256(Path(path)) for path in paths}
        figures = {name: asdict(one) for name, one in found.items()}
        content = {"arguments": vars(args), "files": files, **provenance(loaded), "figures": figures}
        write_json(args.out, content)
    return found
