"""What all blocks draft where they run ahead of the host, which cannot choose for each block."""

from __future__ import annotations

from dataclasses import dataclass

from kangaroo.decoding.blocks import PASS_ROWS, DecodeConfig, Verification
from kangaroo.decoding.costs import StepCosts, expected_tokens

LENGTHS = (2, 3, 4, 6)
"""Lengths of learned chains to choose from; each takes captures of its own."""
WIDEST = 7
"""Drafts of a chain beside others, at most: with the token before them half a tile of our kernels."""
CLEARLY = 1.03
"""Ratio of speeds from which another plan is taken."""
DECAY = 0.97
"""Share of its sums that a figure keeps at each block that shows it."""
IDLE = 0.995
"""The same at each block that does not show it: it drifts back to its start, and is tried again."""


@dataclass(frozen=True)
class Plan:
    """What every block drafts; nothing is plain decoding.

    Attributes:
        learned: tokens of the learned chain.
        branches: chains beside it, as in `DecodeConfig`.
        looked_up: tokens of a lookup, in a chain of their own.
        sure: tokens that must match before a lookup counts.
    """

    learned: int = 0
    branches: int = 0
    looked_up: int = 0
    sure: int = 1

    @property
    def longest(self) -> int:
        """Tokens of the longest chain."""
        return max(self.learned, self.looked_up)

    @property
    def learned_chains(self) -> int:
        """Chains of learned drafts."""
        return 1 + self.branches if self.learned else 0

    @property
    def chains(self) -> int:
        """All chains; plain decoding has an empty one."""
        return max(1, self.learned_chains + (self.looked_up > 0))


class _Mean:
    """A mean over recent blocks, which begins with a hopeful figure that weighs some blocks."""

    def __init__(self, start: float, weight: float = 4.0) -> None:
        self._start = (start * weight, weight)
        self._total, self._weight = self._start

    @property
    def value(self) -> float:
        return self._total / self._weight

    def add(self, total: float, weight: float = 1.0) -> None:
        self._total = DECAY * self._total + total
        self._weight = DECAY * self._weight + weight

    def idle(self) -> None:
        total, weight = self._start
        self._total = total + IDLE * (self._total - total)
        self._weight = weight + IDLE * (self._weight - weight)


class Planner:
    """Chooses the plan that is fastest by recent acceptance and measured step costs.

    Args:
        config: `source` and `draft_len`, the longest chain.
        costs: for blocks up to that length.
        branches: chains beside the learned one.
    """

    def __init__(self, config: DecodeConfig, costs: StepCosts, branches: int) -> None:
        self._costs = costs
        self._acceptance = _Mean(0.7)
        self._more = _Mean(0.3)  # tokens of a block that only the other chains gave
        self._looked_up = _Mean(0.8)  # accepted tokens of a lookup
        self._plan = Plan()
        lookup = config.source != "learned"
        together = config.source == "hybrid"
        chains = branches + together
        most = min(config.draft_len, WIDEST if chains else PASS_ROWS - 1)
        self._plans = [Plan()]
        if lookup:
            self._plans.append(Plan(looked_up=min(config.draft_len, PASS_ROWS - 1)))
        if config.source != "lookup":
            beside = most if together else 0
            self._plans += [Plan(length, branches, beside) for length in LENGTHS if length <= most]

    def plan(self) -> Plan:
        """What to draft in the next block: what was drafted before, unless something else is clearly faster."""
        best = max(self._plans, key=self._speed)
        if self._speed(best) > CLEARLY * self._speed(self._plan):
            self._plan = best
        return self._plan

    def _speed(self, plan: Plan) -> float:
        """Expected tokens a millisecond."""
        if plan.learned:
            tokens = expected_tokens(self._acceptance.value, plan.learned)
            tokens += self._more.value if plan.chains > 1 else 0.0
            cost = self._costs.block(plan.learned, beside=plan.chains - 1)
        else:
            tokens = 1.0 + (self._looked_up.value if plan.looked_up else 0.0)
            cost = self._costs.block(0, plan.looked_up)
        return tokens / cost

    def observe(self, verification: Verification) -> None:
        """Count the outcome of a block."""
        main = verification.main_chain
        learned = main.draft.num_learned
        if learned:
            self._acceptance.add(main.num_accepted, main.num_drafted)
        else:
            self._acceptance.idle()
        if learned and self._plan.chains > 1:
            self._more.add(verification.num_accepted - main.num_accepted)
        else:
            self._more.idle()
        if self._plan.looked_up:
            lookup = verification.lookup_chain if learned else main
            self._looked_up.add(lookup.num_accepted if lookup else 0)
        else:
            self._looked_up.idle()
