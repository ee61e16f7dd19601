"""Measuring what steps cost: blocks of every length, in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
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
HOST = torch.device("cpu")


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Watched(ScriptedPolicy):
    """A policy that notes in `times` when each learned draft was there, in seconds."""

    times: list[float]

    def keep_drafting(self, token: int, confidence: float, made: int = 0) -> bool:
        self.times.append(now(HOST))
        return True


@dataclass
class _Blocks:
    """Blocks of up to `longest` drafts after `context` tokens, to be timed."""

    stages: Stages
    longest: int
    context: int

    def __post_init__(self) -> None:
        self.rows = len(self.stages.deep.cache.lengths)
        self.tokens = [token % 7 for token in range(self.context + 1)]
        self._step(Text(LookupIndex(self.tokens[:-1]), self.context + 1, ScriptedPolicy(0)))

    def _step(self, text: Text) -> None:
        spec_decode_step(self.stages, [text] * self.rows, DecodeConfig(self.longest))

    def ms(self, policy: ScriptedPolicy) -> float:
        """Milliseconds of the block that a policy wants."""
        device = self.stages.passes.device
        self.stages.truncate([self.context] * self.rows)
        text = Text(LookupIndex(self.tokens), self.context + self.longest + 2, policy)
        began = now(device)
        self._step(text)
        return 1e3 * (now(device) - began)

    def verifying_ms(self, count: int) -> float:
        """Of a block of drafts that cost nothing."""
        return self.ms(ScriptedPolicy(0, self.tokens[:count]))

    def drafts_ms(self, verify_ms: Sequence[float]) -> tuple[float, float]:
        """Of a later learned draft, and what the first one takes beyond it; `verify_ms` is by number of drafts."""
        longest = self.longest
        if (
            self.stages.drafts_at_once(longest) == 1 and longest > 1
        ):  # the host sees each draft when it is there
            policy = _Watched(longest)
            policy.times = [now(HOST)]
            self.ms(policy)
            first, *later = (1e3 * (end - start) for start, end in pairwise(policy.times[:: self.rows]))
            return median(later), first - median(later)
        all_ms = self.ms(ScriptedPolicy(longest)) - verify_ms[-1]
        if not (self.stages.recurrent and longest > 2):
            return all_ms / longest, 0.0
        # Of two drafts, since after a single one the host waits before it verifies.
        two_ms = self.ms(ScriptedPolicy(2)) - verify_ms[2]
        later_ms = (all_ms - two_ms) / (longest - 2)
        return later_ms, all_ms - longest * later_ms


def measure_costs(stages: Stages, longest: int, repeats: int, context: int) -> StepCosts:
    """Time blocks of all lengths after `context` tokens, in turn; medians, fitted so that they never fall.

    Args:
        stages: the model, its caches empty and with room for `context + longest + 2` tokens.
        longest: drafts of a block, at most.
        repeats: rounds that count.
        context: tokens in the caches.
    """
    blocks = _Blocks(stages, longest, context)
    lengths = range(longest + 1)
    rounds: list[tuple[list[float], float, float]] = []
    for _ in range(repeats + UNCOUNTED_ROUNDS):
        verify_ms = [blocks.verifying_ms(count) for count in lengths]
        blocks.ms(ScriptedPolicy(1))  # brings the draft's caches up to the context
        drafts_ms = blocks.drafts_ms(verify_ms)
        rounds.append((verify_ms, *drafts_ms))
    verify, draft, first = zip(*rounds[UNCOUNTED_ROUNDS:], strict=True)
    return StepCosts(
        monotone([median(times) for times in zip(*verify, strict=True)]),
        max(0.0, median(draft)),
        max(0.0, median(first)),
    )
