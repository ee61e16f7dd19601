"""The methods of decoding that are compared: one table of their names, and how each of them drafts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from dvirl.evaluation.inference_baseline import generate_forward, hugging_face
from dvirl.evaluation.measure import Answer, in_turn, timed
from dvirl.models.drafters import Draft
from dvirl.runs.settings import Settings
from kangaroo.decoding.blocks import DecodeConfig

GENERATE = "generate"
"""Hugging Face's greedy decoding."""
PLAIN = "plain"
"""Our own loop, which also verifies drafts, without any."""
BRANCHES = 1
"""Chains beside the learned one, where they pay and blocks run ahead of the host."""

Method = Callable[..., Answer]
"""From a prompt's token ids, and a `seed` if it is not to be the one asked for, to a timed answer."""


@dataclass(frozen=True)
class DraftingSettings(Settings):
    """How all methods compute their drafts."""

    int8_draft: bool = True
    """On a CPU, draft by an exit head in 8 bits, which is faster; float32 answers stay the same."""


def decode_configs(
    longest: int = 15,
    fixed_len: int = 4,
    kangaroo_steps: int = 6,
    kangaroo_threshold: float = 0.6,
    **shared: Any,
) -> dict[str, DecodeConfig]:
    """How each of our own methods drafts.

    Args:
        longest: most drafts of a block, where the length of blocks follows from acceptance and step costs.
        fixed_len: drafts of every block of `fixed`.
        kangaroo_steps: most drafts of a block of `kangaroo`.
        kangaroo_threshold: confidence below which a draft ends its block (arXiv 2404.18911).
        shared: settings that all of them have, such as target and temperature.
    """
    adaptive = partial(DecodeConfig, longest, adaptive=True, branches=BRANCHES, **shared)
    return {
        PLAIN: DecodeConfig(0, **shared),
        # Prompt lookup (Saxena 2023): drafts what followed the same n-gram earlier in the text.
        "pld": adaptive(source="lookup"),
        # Kangaroo's second exit: a doubtful draft ends its block.
        "kangaroo": DecodeConfig(kangaroo_steps, kangaroo_threshold, **shared),
        "fixed": DecodeConfig(fixed_len, **shared),
        # The draft that DVI trained, in blocks as long as they pay.
        "dvi": adaptive(),
        # Learned drafts, and after them what a lookup knows, as far as each pays.
        "hybrid": adaptive(source="hybrid"),
    }


METHODS = (GENERATE, *decode_configs())
"""Every method's name."""


def decoders(
    names: Sequence[str],
    configs: Mapping[str, DecodeConfig],
    draft: Draft,
    limit: int,
    seed: int = 0,
) -> dict[str, Method]:
    """The methods as functions from a prompt to a timed answer.

    Args:
        names: which of them, in this order; GENERATE, or names of `configs`.
        configs: how our own methods draft, PLAIN among them if GENERATE is asked for.
        draft: drafts and verifies.
        limit: most tokens of an answer.
        seed: of sampled answers.
    """
    methods: dict[str, Method] = {}
    for name in names:
        if name == GENERATE:
            decode = partial(generate_forward, hugging_face(draft.loaded), settings=configs[PLAIN])
        else:
            decode = partial(timed, draft.model, settings=configs[name])
        methods[name] = partial(decode, limit=limit, eos_ids=draft.loaded.eos_ids, seed=seed)
    return methods


def answer_in_turn(
    run: Mapping[str, Method], prompts: Sequence[Sequence[int]], progress: str
) -> dict[str, list[Answer]]:
    """Answer every prompt by every method, in a changing order.

    Args:
        run: the methods by name.
        prompts: token ids.
        progress: text of the progress bar.

    Returns:
        The answers of each method, in the order of the prompts.
    """
    answers: dict[str, list[Answer]] = {name: [] for name in run}
    for turn, prompt in enumerate(tqdm(prompts, desc=progress, unit="question", leave=False)):
        for name in in_turn(list(run), turn):
            answers[name].append(run[name](prompt))
    return answers
