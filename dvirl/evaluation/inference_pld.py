"""Prompt lookup decoding (Saxena 2023): drafts copied from what stands in the prompt and the answer already."""

from collections.abc import Sequence

from dvirl.evaluation.measure import Answer, timed
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.kangaroo_model import KangarooModel


def pld_forward(
    model: KangarooModel,
    prompt: Sequence[int],
    limit: int,
    eos_ids: Sequence[int],
    draft_len: int = 8,
    target: str = "base",
) -> Answer:
    """Decode one prompt with what followed its last n-gram before as draft, `draft_len` tokens at most.

    The length of each block is chosen by acceptance and step costs, as with learned drafts; no trained draft is read.
    """
    return timed(model, prompt, limit, DecodeConfig(draft_len, target=target, source="lookup", adaptive=True), eos_ids)
