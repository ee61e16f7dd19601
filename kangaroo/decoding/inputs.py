"""What callers pass to decoding, in the forms in which they have it: prompts and end-of-sequence tokens, checked."""

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

Ids = Sequence[int] | Tensor
"""Token ids: a list or a tensor, `[T]` or `[1, T]`."""
Ends = Ids | int | None
"""End-of-sequence tokens: several, one, or none."""


def token_ids(ids: Any) -> list[int]:
    """Token ids as a list.

    Raises:
        ValueError: for what is not of the type `Ids`.
    """
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(1)  # no whole numbers: refused below
    if tensor.ndim == 2 and len(tensor) == 1:  # a batch of one, as a tokenizer's input_ids are
        tensor = tensor[0]
    # A list without members has no type of its own, and becomes a tensor of floats.
    whole = torch.can_cast(tensor.dtype, torch.long) or not tensor.numel()
    if tensor.ndim != 1 or not whole:
        shown = " ".join(repr(ids).split())
        raise ValueError(f"token ids are {shown:.60}; expected a list or a tensor, [T] or [1, T]")
    return [int(token) for token in tensor.tolist()]


def end_ids(eos_ids: Any) -> list[int]:
    """End-of-sequence tokens as a list.

    Raises:
        ValueError: for what is not of the type `Ends`.
    """
    if eos_ids is None:
        return []
    single = isinstance(eos_ids, int) or getattr(eos_ids, "ndim", 1) == 0
    return token_ids([eos_ids] if single else eos_ids)


def check_seeds(seed: Any, count: int) -> list[int]:
    """One seed for each of `count` prompts, of one for all or of as many, in whatever type of integer they are.

    Raises:
        ValueError: for what is no integer, or another number of them.
    """
    given = seed if isinstance(seed, Sequence) else [seed] * count
    try:
        seeds = [int(operator.index(one)) for one in given]
    except TypeError:
        seeds = []
    if len(seeds) != count:
        raise ValueError(f"seed is {seed!r:.60}; expected an integer, or one for each of {count} prompts")
    return seeds


def context_length(config: LlamaConfig) -> int:
    """Number of positions that a model can read, `sys.maxsize` if there is no limit."""
    scaling = config.rope_scaling or {}
    kind = scaling.get("type")
    if kind == "dynamic":  # the frequencies grow with the text
        return sys.maxsize
    # Linear scaling leaves the number of positions as it was in training; llama3 and yarn state the longer one.
    factor = scaling["factor"] if kind == "linear" else 1
    return int(config.max_position_embeddings * factor)


def check_prompt(ids: Ids, model: PreTrainedModel, max_new_tokens: int = 0) -> list[int]:
    """A prompt as a list of ids that the model can read.

    Args:
        ids: the prompt.
        model: reads it.
        max_new_tokens: tokens of response for which there must be room as well.

    Raises:
        ValueError: for an empty prompt, an id outside the vocabulary, or more tokens than the model's context.
    """
    prompt = token_ids(ids)
    if not prompt:
        raise ValueError("the prompt is empty; expected at least one token")
    vocab_size = len(model.get_input_embeddings().weight)
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"the prompt has the token {token}; expected 0 to {vocab_size - 1}")
    context = context_length(model.config)
    if len(prompt) + max_new_tokens > context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and the response up to {max_new_tokens}; "
            f"expected at most the model's context, {context}"
        )
    return prompt
