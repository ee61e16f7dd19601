"""What the steps of decoding cost on this machine, and from which acceptance on drafting pays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepCosts:
    """Times of one block, by the number of its drafts.

    Attributes:
        verify: milliseconds of a verification of n drafts that cost nothing; `verify[0]` is a plain step.
        draft: milliseconds of drafting one token.
        first: milliseconds that the first draft of a block costs beyond the later ones, by a recurrent drafter.
    """

    verify: tuple[float, ...]
    draft: float
    first: float = 0.0

    def block(self, learned: int, looked_up: int = 0) -> float:
        """Milliseconds of a block of one chain that has this many drafts."""
        verifying = self.verify[learned + looked_up]
        return verifying + learned * self.draft + (self.first if learned else 0.0)

    def speedup(self, acceptance: float, count: int) -> float:
        """Speed of blocks of `count` learned drafts over plain steps, each draft accepted with the same chance."""
        return expected_tokens(acceptance, count) * self.verify[0] / self.block(count)

    def break_even(self, count: int) -> float:
        """The acceptance at which blocks of `count` learned drafts begin to pay; infinite if they never do."""
        if self.speedup(1.0, count) < 1.0:
            return math.inf
        low = 0.0
        high = 1.0
        for _ in range(40):  # bisection: the speed-up grows with acceptance
            middle = (low + high) / 2
            if self.speedup(middle, count) >= 1.0:
                high = middle
            else:
                low = middle
        return high


def expected_tokens(acceptance: float, count: int) -> float:
    """Tokens that a block of `count` drafts commits on average, each accepted with the same chance."""
    return sum(acceptance**depth for depth in range(count + 1))


def monotone(times: Sequence[float]) -> tuple[float, ...]:
    """The least-squares fit to some times that never falls: noise must not make a longer block look cheaper."""
    # Importing it takes half a second, which most commands need not wait for.
    from scipy.optimize import isotonic_regression

    return tuple(isotonic_regression(list(times)).x.tolist())
