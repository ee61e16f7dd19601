"""Decoding without drafts: Hugging Face's `generate`, and our own loop, one token a pass."""

import time
from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM

from dvirl.evaluation.measure import Answer, timed
from dvirl.models.loading import LoadedModel, source
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.kangaroo_model import KangarooModel


def hugging_face(loaded: LoadedModel) -> LlamaForCausalLM:
    """The untouched model as Hugging Face loads it, of the same dtype on the same device."""
    theirs = LlamaForCausalLM.from_pretrained(
        source(loaded.name), config=loaded.model.config, torch_dtype=loaded.model.dtype
    )
    return theirs.to(loaded.model.device).eval()


def generate_forward(theirs: LlamaForCausalLM, prompt: Sequence[int], limit: int, eos_ids: Sequence[int]) -> Answer:
    """Decode one prompt by Hugging Face's greedy `generate`, its cache on."""
    ids, ends = torch.tensor([list(prompt)], device=theirs.device), list(eos_ids)
    began = time.perf_counter()
    out = theirs.generate(ids, max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    tokens = out[0, len(prompt) :].tolist()  # waits for the device
    return Answer(tokens, time.perf_counter() - began)


def plain_forward(
    model: KangarooModel, prompt: Sequence[int], limit: int, eos_ids: Sequence[int], target: str = "base"
) -> Answer:
    """Decode one prompt greedily by our loop, the same that verifies drafts, without any."""
    return timed(model, prompt, limit, DecodeConfig(0, target=target), eos_ids)
