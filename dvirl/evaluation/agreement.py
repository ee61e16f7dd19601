"""How often a draft's argmax is the verifier's token on greedy answers, in one pass: `dvirl agreement DRAFTER`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvirl.corpus import Responses
from dvirl.rollout import draft_logits_at, response_index
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
    """

    rate: float
    confidence: float
    ece: float
    covered: float
    positions: int


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
    return Agreement(
        rate=float(right.mean()),
        confidence=float(confidence.mean()),
        ece=calibration_error(confidence, right),
        covered=float(covered.mean()),
        positions=len(right),
    )
