"""Decoding by Hugging Face's `generate`, the baseline that is not ours."""

import time
from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM

from dvirl.evaluation.measure import Answer
from dvirl.models.loading import LoadedModel, source


def hugging_face(loaded: LoadedModel) -> LlamaForCausalLM:
    """Load the untouched model with Hugging Face's class, in the same dtype on the same device."""
    model = LlamaForCausalLM.from_pretrained(
        source(loaded.name), config=loaded.model.config, torch_dtype=loaded.model.dtype
    )
    return model.to(loaded.model.device).eval()


def generate_forward(
    model: LlamaForCausalLM, prompt: Sequence[int], limit: int, eos_ids: Sequence[int]
) -> Answer:
    """Decode one prompt greedily with `generate` and its cache.

    Args:
        model: Hugging Face's.
        prompt: token ids.
        limit: most tokens of the answer.
        eos_ids: tokens that end it.
    """
    prompt_ids = torch.tensor([list(prompt)], device=model.device)
    ends = list(eos_ids)
    start = time.perf_counter()
    output = model.generate(
        prompt_ids,
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    tokens = output[0, len(prompt) :].tolist()  # waits for the device
    return Answer(tokens, time.perf_counter() - start)
