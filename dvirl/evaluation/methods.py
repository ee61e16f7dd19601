"""The methods of decoding that are compared: one table of their names, and how each of them drafts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from dvirl.evaluation.inference_baseline import generate_forward, hugging_face
from dvirl.evaluation.measure import Answer, timed
from dvirl.models.loading import LoadedModel
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.kangaroo_model import KangarooModel

GENERATE = "generate"
"""Hugging Face's greedy decoding."""
PLAIN = "plain"
"""Our own loop, which also verifies drafts, without any."""
METHODS = (GENERATE, PLAIN, "pld", "kangaroo", "fixed", "dvi", "hybrid")

Method = Callable[[Sequence[int]], Answer]
"""From a prompt's token ids to a timed answer."""


def decode_configs(
    longest: int = 8,
    fixed_len: int = 4,
    kangaroo_steps: int = 6,
    kangaroo_threshold: float = 0.6,
    target: str = "base",
) -> dict[str, DecodeConfig]:
    """How each of our own methods drafts.

    Args:
        longest: most drafts of a block, where the length of blocks follows from acceptance and step costs.
        fixed_len: drafts of every block of `fixed`.
        kangaroo_steps: most drafts of a block of `kangaroo`.
        kangaroo_threshold: confidence below which a draft ends its block (arXiv 2404.18911).
        target: what the deep layers read.
    """
    adaptive = partial(DecodeConfig, longest, target=target, adaptive=True)
    return {
        PLAIN: DecodeConfig(0, target=target),
        # Prompt lookup (Saxena 2023): drafts what followed the same n-gram earlier in the text.
        "pld": adaptive(source="lookup"),
        "kangaroo": DecodeConfig(kangaroo_steps, kangaroo_threshold, target),
        "fixed": DecodeConfig(fixed_len, target=target),
        # The draft that DVI trained, in blocks as long as they pay.
        "dvi": adaptive(),
        "hybrid": adaptive(source="hybrid"),
    }


def decoders(
    names: Sequence[str], configs: Mapping[str, DecodeConfig], model: KangarooModel, loaded: LoadedModel, limit: int
) -> dict[str, Method]:
    """The methods as functions from a prompt to a timed answer.

    Args:
        names: which of them, in this order; GENERATE, or names of `configs`.
        configs: how our own methods draft.
        model: drafts and verifies.
        loaded: the same model with its tokenizer.
        limit: most tokens of an answer.
    """
    methods: dict[str, Method] = {}
    for name in names:
        if name == GENERATE:
            decode = partial(generate_forward, hugging_face(loaded), limit=limit, eos_ids=loaded.eos_ids)
        else:
            decode = partial(timed, model, limit=limit, settings=configs[name], eos_ids=loaded.eos_ids)
        methods[name] = decode
    return methods
