"""Decoding with early exit, one prompt at a time, and its acceptance statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tqdm import tqdm

from dvirl.evaluation.measure import Answer, tally, timed
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.inputs import Ends, Ids
from kangaroo.kangaroo_model import KangarooModel


@dataclass(frozen=True)
class Acceptance:
    """What the step-by-step decoder did on some prompts; rates are pooled over verifications.

    Attributes:
        accept_rate: accepted over scored drafts; NaN if nothing was drafted.
        mat: mean number of tokens that a verification commits, without the prefill; NaN without verifications.
        tok_per_s: mean over prompts of new tokens over wall seconds.
        num_drafted, num_accepted, num_blocks, num_tokens: the counts of these rates.
        responses: the decoded token ids.
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
    prompt: Ids,
    max_new_tokens: int,
    settings: DecodeConfig,
    eos_ids: Ends = (),
) -> Answer:
    """Decode one prompt by the clock, with early exit, drafter and threshold.

    The blocks' `block_len` are the accept lengths of the published Kangaroo (arXiv 2404.18911): 1 for the prefill,
    then the accepted drafts and the verifier's own token. A draft below `threshold` is the last of its block, and is
    verified too. The end of an answer differs from the published code in three ways, on purpose. That code stops as
    soon as fewer than `draft_len + 1` tokens have room, where shorter blocks fill the limit here. It reads on after
    an end-of-sequence token that the prefill gives. It cuts prompt and response at 2,048 tokens together.

    Raises:
        DvirlError: for a prompt that cannot be read or leaves no room for the answer, or logits that are not finite.
    """
    return timed(model, prompt, max_new_tokens, settings, eos_ids)


def measure_acceptance(
    model: KangarooModel,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    settings: DecodeConfig,
    eos_ids: Ends = (),
) -> Acceptance:
    """Decode every prompt step by step, and pool the acceptance statistics.

    Args:
        model: drafts and verifies.
        prompts: token ids; lists or tensors, `[T]` or `[1, T]`.
        max_new_tokens: most tokens of a response.
        settings: how to draft and verify.
        eos_ids: tokens that end a response, or one such token, or None.

    Raises:
        DvirlError: as `kangaroo_forward` does.
    """
    progress = tqdm(prompts, desc="decoding", unit="prompt", leave=False)
    with model.base_model.merged():
        answers = [kangaroo_forward(model, prompt, max_new_tokens, settings, eos_ids) for prompt in progress]
    counts = tally(answers)
    return Acceptance(
        accept_rate=counts.accept_rate,
        mat=counts.mat,
        tok_per_s=fmean(answer.tok_per_s for answer in answers),
        num_drafted=counts.drafted,
        num_accepted=counts.accepted,
        num_blocks=counts.blocks,
        num_tokens=sum(len(answer.tokens) for answer in answers),
        responses=[answer.tokens for answer in answers],
    )
