"""Measuring what steps cost: blocks of every length, in turn."""

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
        stages: the model, its caches empty and with room for `context + longest + 2` tokens; with room for two chains
            of a text their verification is timed, too.
        longest: drafts of a block, at most.
        repeats: rounds that count.
        context: tokens in the caches.
    """
    config = DecodeConfig(longest)
    rows = len(stages.deep.cache.lengths)
    index = LookupIndex([token % 7 for token in range(context + 1)])
    prompt = LookupIndex(index.tokens[:-1])
    spec_decode_step(stages, [Text(prompt, context + 1, ScriptedPolicy(0))] * rows, config)

    def block_ms(num_learned: int, num_looked_up: int, num_second: int = 0) -> float:
        stages.truncate([context] * rows)
        policy = ScriptedPolicy(num_learned, index.tokens[:num_looked_up], index.tokens[:num_second])
        text = Text(index, context + longest + 2, policy)
        began = now(stages.passes.device)
        spec_decode_step(stages, [text] * rows, config)
        return 1e3 * (now(stages.passes.device) - began)

    lengths = range(longest + 1)
    forked_lengths = lengths if stages.deep.cache.chains > 1 else []
    rounds: list[tuple[list[float], float, list[float], float]] = []
    for _ in range(repeats + UNCOUNTED_ROUNDS):
        verify_ms = [block_ms(0, count) for count in lengths]
        block_ms(1, 0)  # brings the draft's caches up to the context
        drafts_ms = block_ms(longest, 0) - verify_ms[-1]
        later_ms = drafts_ms / longest
        if stages.recurrent and longest > 2:
            # Of two drafts, since after a single one the host waits before it verifies.
            two_ms = block_ms(2, 0) - verify_ms[2]
            later_ms = (drafts_ms - two_ms) / (longest - 2)
        forked_ms = [block_ms(0, count, count) for count in forked_lengths]
        rounds.append((verify_ms, later_ms, forked_ms, drafts_ms - longest * later_ms))
    verify, draft, forked, first = zip(*rounds[UNCOUNTED_ROUNDS:], strict=True)
    return StepCosts(
        monotone([median(times) for times in zip(*verify, strict=True)]),
        max(0.0, median(draft)),
        monotone([median(times) for times in zip(*forked, strict=True)]),
        max(0.0, median(first)),
    )
