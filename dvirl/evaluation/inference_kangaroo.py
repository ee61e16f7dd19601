"""Decoding with early exit, one question at a time, and what it measures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from dvirl.evaluation.measure import Answer, timed
from kangaroo.decoding.blocks import DecodeConfig, Verification
from kangaroo.kangaroo_model import KangarooModel


@dataclass(frozen=True)
class Acceptance:
    """What the step-by-step decoder did on some prompts; rates are pooled over their verifications.

    Attributes:
        accept_rate: accepted over scored drafts; NaN if nothing was drafted.
        mat: mean tokens that a verification commits, its own included, the prefill excluded; NaN without any.
        tok_per_s: mean over prompts of new tokens over wall seconds.
        num_drafted, num_accepted, num_blocks, num_tokens: the counts behind them.
        responses: what was decoded.
    """

    accept_rate: float
    mat: float
    tok_per_s: float
    num_drafted: int
    num_accepted: int
    num_blocks: int
    num_tokens: int
    responses: list[list[int]]


def kangaroo_forward(
    model: KangarooModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    settings: DecodeConfig,
    eos_ids: Sequence[int] = (),
) -> Answer:
    """Decode one prompt by the clock, with early exit, drafter and threshold.

    The blocks' `block_len` are the accept lengths of the published Kangaroo (arXiv 2404.18911): the prefill's 1, then
    accepted drafts and the verifier's own token; a draft below `threshold` is its block's last, and verified too.
    Three ends differ on purpose. Published decoding stops as soon as fewer than `draft_len + 1` tokens have room,
    where shorter blocks here fill the limit; it reads on behind an end-of-sequence token that the prefill gives; and
    it cuts prompt and response at 2,048 tokens together.
    """
    return timed(model, prompt, max_new_tokens, settings, eos_ids)


def measure_acceptance(
    model: KangarooModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: DecodeConfig,
    eos_ids: Sequence[int] = (),
    show_progress: bool = True,
) -> Acceptance:
    """Decode every prompt step by step and pool what verification said.

    Args:
        model: drafts and verifies.
        prompts: token ids.
        max_new_tokens: length limit of a response.
        settings: how to draft and verify.
        eos_ids: tokens that end a response.
        show_progress: draw a progress bar.
    """
    blocks: list[Verification] = []
    rates: list[float] = []
    responses: list[list[int]] = []
    with model.base_model.folded():
        for prompt in tqdm(prompts, desc="decoding", unit="prompt", disable=not show_progress, leave=False):
            answer = kangaroo_forward(model, prompt, max_new_tokens, settings, eos_ids)
            blocks += answer.blocks[1:]
            rates.append(len(answer.tokens) / answer.wall_s)
            responses.append(answer.tokens)
    drafted, accepted = sum(b.num_drafted for b in blocks), sum(b.num_accepted for b in blocks)
    return Acceptance(
        accept_rate=accepted / drafted if drafted else math.nan,
        mat=sum(b.block_len for b in blocks) / len(blocks) if blocks else math.nan,
        tok_per_s=sum(rates) / len(rates) if rates else math.nan,
        num_drafted=drafted,
        num_accepted=accepted,
        num_blocks=len(blocks),
        num_tokens=sum(len(response) for response in responses),
        responses=responses,
    )
