"""What the steps of decoding cost on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class StepCosts:
    """What decoding costs on this machine.

    Attributes:
        verify: milliseconds of a verification of n drafts that cost nothing; `verify[0]` is a plain step.
        draft: milliseconds of drafting one token.
    """

    verify: tuple[float, ...]
    draft: float

    def block(self, learned: int, looked_up: int = 0) -> float:
        """Milliseconds of a block of so many drafts."""
        return self.verify[learned + looked_up] + learned * self.draft

    def speedup(self, acceptance: float, count: int) -> float:
        """Speed of learned drafts over plain steps, each draft accepted with the same chance."""
        return _expected(acceptance, count) * self.verify[0] / self.block(count)

    def break_even(self, count: int) -> float:
        """The acceptance from which on blocks of `count` learned drafts pay; infinite if they never do."""
        if self.speedup(1.0, count) < 1.0:
            return math.inf
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.speedup(middle, count) >= 1.0 else (middle, high)
        return high


def growing(times: Sequence[float]) -> tuple[float, ...]:
    """The numbers nearest to these, by squares, of which none is below the one before (pool adjacent violators)."""
    pools: list[list[float]] = []
    for time in times:
        pools.append([time])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return tuple(fmean(pool) for pool in pools for _ in pool)


def _expected(chance: float, count: int) -> float:
    """Tokens that a block of `count` drafts commits, each accepted with the same chance."""
    return sum(chance**depth for depth in range(count + 1))
