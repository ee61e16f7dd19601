"""Measuring what steps cost: blocks of every length, in turn, on the model at hand."""

from __future__ import annotations

import time
from statistics import median

import torch

from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.costs import StepCosts, monotone
from kangaroo.decoding.drafting import LookupIndex, ScriptedPolicy
from kangaroo.decoding.speculate import Text, spec_decode_step
from kangaroo.decoding.stages import Stages

UNCOUNTED_ROUNDS = 2
"""Rounds before those that count."""


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_costs(stages: Stages, longest: int, repeats: int, context: int) -> StepCosts:
    """Time blocks of all lengths after `context` tokens, in turn; medians, fitted so that they never fall.

    Args:
        stages: the model, its caches empty and with room for `context + longest + 2` tokens.
        longest: drafts of a block, at most.
        repeats: rounds that count.
        context: tokens in the caches.
    """
    config = DecodeConfig(longest)
    rows = len(stages.deep.cache.lengths)
    index = LookupIndex([token % 7 for token in range(context + 1)])
    prompt = LookupIndex(index.tokens[:-1])
    spec_decode_step(stages, [Text(prompt, context + 1, ScriptedPolicy(0))] * rows, config)

    def block_ms(num_learned: int, num_looked_up: int) -> float:
        stages.truncate([context] * rows)
        policy = ScriptedPolicy(num_learned, index.tokens[:num_looked_up])
        began = now(stages.passes.device)
        spec_decode_step(stages, [Text(index, context + longest + 2, policy)] * rows, config)
        return 1e3 * (now(stages.passes.device) - began)

    verify_ms: list[list[float]] = [[] for _ in range(longest + 1)]
    draft_ms: list[float] = []
    for round_ in range(repeats + UNCOUNTED_ROUNDS):
        times = [block_ms(0, count) for count in range(longest + 1)]
        block_ms(1, 0)  # brings the draft's caches up to the context
        drafting = (block_ms(longest, 0) - times[-1]) / longest
        if round_ >= UNCOUNTED_ROUNDS:
            draft_ms.append(drafting)
            for kept, time_ms in zip(verify_ms, times, strict=True):
                kept.append(time_ms)
    return StepCosts(monotone([median(times) for times in verify_ms]), max(0.0, median(draft_ms)))
