"""Measuring what steps cost: blocks of every length, in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
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


class _Watched(ScriptedPolicy):
    """A policy that notes when each learned draft was there.

    Args:
        num_learned: as in `ScriptedPolicy`.
        device: of the model.

    Attributes:
        times: in seconds, of each text one after the other.
    """

    def __init__(self, num_learned: int, device: torch.device) -> None:
        super().__init__(num_learned)
        self.times: list[float] = []
        self._device = device

    def keep_drafting(self, token: int, confidence: float, made: int = 0) -> bool:
        self.times.append(now(self._device))
        return super().keep_drafting(token, confidence, made)


class _Blocks:
    """Times blocks after a context.

    Args:
        stages: the model.
        longest: drafts of a block, at most.
        context: tokens in the caches.
    """

    def __init__(self, stages: Stages, longest: int, context: int) -> None:
        self.stages = stages
        self.longest = longest
        self.context = context
        self.rows = len(stages.deep.cache.lengths)
        self.index = LookupIndex([token % 7 for token in range(context + 1)])
        self.config = DecodeConfig(longest)
        prompt = LookupIndex(self.index.tokens[:-1])
        spec_decode_step(stages, [Text(prompt, context + 1, ScriptedPolicy(0))] * self.rows, self.config)

    def ms(self, num_learned: int, num_looked_up: int, num_second: int = 0) -> float:
        """Milliseconds of a block of these drafts."""
        tokens = self.index.tokens
        return self._run(ScriptedPolicy(num_learned, tokens[:num_looked_up], tokens[:num_second]))

    def _run(self, policy: ScriptedPolicy) -> float:
        stages = self.stages
        stages.truncate([self.context] * self.rows)
        texts = [Text(self.index, self.context + self.longest + 2, policy)] * self.rows
        began = now(stages.passes.device)
        spec_decode_step(stages, texts, self.config)
        return 1e3 * (now(stages.passes.device) - began)

    def drafts_ms(self, verify_ms: Sequence[float]) -> tuple[float, float]:
        """Milliseconds of a later draft, and those that the first one costs beyond it.

        Args:
            verify_ms: of blocks of n drafts that cost nothing.
        """
        longest = self.longest
        if (
            self.stages.drafts_at_once(longest) == 1 and longest > 1
        ):  # the host sees each draft when it is there
            policy = _Watched(longest, self.stages.passes.device)
            began = now(self.stages.passes.device)
            self._run(policy)
            seen = policy.times[:: self.rows]
            later_ms = 1e3 * median(after - before for before, after in pairwise(seen))
            return later_ms, 1e3 * (seen[0] - began) - later_ms
        all_ms = self.ms(longest, 0) - verify_ms[-1]
        if not (self.stages.recurrent and longest > 2):
            return all_ms / longest, 0.0
        # Of two drafts, since after a single one the host waits before it verifies.
        two_ms = self.ms(2, 0) - verify_ms[2]
        later_ms = (all_ms - two_ms) / (longest - 2)
        return later_ms, all_ms - longest * later_ms


def measure_costs(stages: Stages, longest: int, repeats: int, context: int) -> StepCosts:
    """Time blocks of all lengths after `context` tokens, in turn; medians, fitted so that they never fall.

    Args:
        stages: the model, its caches empty and with room for `context + longest + 2` tokens; with room for two chains
            of a text their verification is timed, too.
        longest: drafts of a block, at most.
        repeats: rounds that count.
        context: tokens in the caches.
    """
    blocks = _Blocks(stages, longest, context)
    lengths = range(longest + 1)
    rounds: list[tuple[list[float], list[float], float, float]] = []
    for _ in range(repeats + UNCOUNTED_ROUNDS):
        verify_ms = [blocks.ms(0, count) for count in lengths]
        blocks.ms(1, 0)  # brings the draft's caches up to the context
        forked_ms = [blocks.ms(0, count, count) for count in lengths] if stages.deep.cache.chains > 1 else []
        rounds.append((verify_ms, forked_ms, *blocks.drafts_ms(verify_ms)))
    verify, forked, draft, first = zip(*rounds[UNCOUNTED_ROUNDS:], strict=True)
    return StepCosts(
        monotone([median(times) for times in zip(*verify, strict=True)]),
        max(0.0, median(draft)),
        monotone([median(times) for times in zip(*forked, strict=True)]),
        max(0.0, median(first)),
    )
