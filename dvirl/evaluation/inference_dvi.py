"""Decoding with the draft that DVI trained, blocks as long as acceptance and step costs make them pay."""

from collections.abc import Sequence

from dvirl.evaluation.measure import Answer, timed
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.kangaroo_model import KangarooModel


def dvi_forward(
    model: KangarooModel,
    prompt: Sequence[int],
    limit: int,
    eos_ids: Sequence[int],
    draft_len: int = 8,
    source: str = "learned",
    target: str = "base",
) -> Answer:
    """Decode one prompt with learned drafts, `draft_len` at most; with source "hybrid", looked-up ones where better."""
    return timed(model, prompt, limit, DecodeConfig(draft_len, target=target, source=source, adaptive=True), eos_ids)
