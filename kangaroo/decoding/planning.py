"""What all blocks draft where they run ahead of the host, which cannot choose for each block."""

from __future__ import annotations

from dataclasses import dataclass

from kangaroo.decoding.blocks import PASS_ROWS, DecodeConfig, Verification
from kangaroo.decoding.costs import StepCosts, expected_tokens

LENGTHS = (2, 3, 4, 6)
"""Lengths of learned chains to choose from; each takes captures of its own."""
CLEARLY = 1.03
"""Ratio of speeds from which another plan is taken."""
DECAY = 0.97
"""Share of its past that a figure keeps at each block that shows it."""
IDLE = 0.995
"""Share of its distance from the start that a figure keeps at each other block: what is not tried becomes hopeful."""


@dataclass(frozen=True)
class Plan:
    """What every block drafts; an empty plan is plain decoding.

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
    """A mean over recent blocks, which starts at an optimistic value, counted as some blocks."""

    def __init__(self, start: float, weight: float = 4.0) -> None:
        self._start = (start * weight, weight)
        self._total, self._weight = self._start

    @property
    def value(self) -> float:
        return self._total / self._weight

    def count(self, is_shown: bool, total: float, weight: float = 1.0) -> None:
        """Count a block that shows this figure; at any other the figure drifts back to its start."""
        if is_shown:
            self._total = DECAY * self._total + total
            self._weight = DECAY * self._weight + weight
            return
        first_total, first_weight = self._start
        self._total = first_total + IDLE * (self._total - first_total)
        self._weight = first_weight + IDLE * (self._weight - first_weight)


class Planner:
    """Chooses the plan that is fastest by recent acceptance and measured times.

    A plan's time is measured when its block is captured. Before that it is estimated from step costs, which were
    measured step by step, with the host in them; so estimates are scaled by measured over estimated time of the plans
    that were tried.

    Args:
        config: `source` and `draft_len`, the longest chain.
        costs: for blocks up to that length.
        branches: chains beside the learned one, where they pay.
    """

    def __init__(self, config: DecodeConfig, costs: StepCosts, branches: int) -> None:
        self._costs = costs
        self._times: dict[Plan, float] = {}  # milliseconds of the plans that were tried, reading `_slots`
        self._slots = 0
        self._acceptance = _Mean(0.7)
        self._branched = _Mean(0.35)  # tokens of a block that only branches gave
        self._beside = _Mean(0.25)  # tokens of a block that only a lookup beside learned drafts gave
        self._looked_up = _Mean(0.8)  # accepted tokens of a lookup
        self._plan = Plan()
        lookup = config.source != "learned"
        together = config.source == "hybrid"
        most = min(config.draft_len, PASS_ROWS - 1)
        self._plans = [Plan()]
        if lookup:
            self._plans.append(Plan(looked_up=most))
        if config.source != "lookup":
            for length in LENGTHS:
                for forks in {0, min(branches, length)}:
                    self._add(Plan(length, forks), most)
                    if together:  # as long a lookup as leaves all chains in one tile of our kernels
                        self._add(Plan(length, forks, min(most, PASS_ROWS // (forks + 2) - 1)), most)

    def _add(self, plan: Plan, most: int) -> None:
        """Consider a plan if its lookup is no shorter than its drafts and its rows fit in a tile of our kernels."""
        fits = plan.longest <= most and plan.chains * (plan.longest + 1) <= PASS_ROWS
        if fits and plan.looked_up in (0, plan.longest):
            self._plans.append(plan)

    def plan(self) -> Plan:
        """What to draft in the next block: what was drafted before, unless something else is clearly faster."""
        best = max(self._plans, key=self._speed)
        if self._speed(best) > CLEARLY * self._speed(self._plan):
            self._plan = best
        return self._plan

    def timed(self, plan: Plan, ms: float, slots: int) -> None:
        """Learn how long a block of a plan takes; another number of slots drops all times so far."""
        if slots != self._slots:
            self._times = {}
            self._slots = slots
        self._times[plan] = ms

    def _speed(self, plan: Plan) -> float:
        """Expected tokens a millisecond."""
        return self._tokens(plan) / self._ms(plan)

    def _tokens(self, plan: Plan) -> float:
        """Expected tokens of a block."""
        if not plan.learned:
            return 1.0 + (self._looked_up.value if plan.looked_up else 0.0)
        tokens = expected_tokens(self._acceptance.value, plan.learned)
        tokens += self._branched.value if plan.branches else 0.0
        return tokens + (self._beside.value if plan.looked_up else 0.0)

    def _ms(self, plan: Plan) -> float:
        """Milliseconds of a block."""
        if plan in self._times:
            return self._times[plan]
        found = sum(self._times.values())
        estimated = sum(map(self._estimate, self._times))
        return self._estimate(plan) * (found / estimated if estimated else 1.0)

    def _estimate(self, plan: Plan) -> float:
        if plan.learned:
            return self._costs.block(plan.learned, beside=plan.chains - 1)
        return self._costs.block(0, plan.looked_up)

    def observe(self, verification: Verification) -> None:
        """Count the outcome of a block."""
        main = verification.main_chain
        learned = main.draft.num_learned
        drafted = [chain for chain in (verification, *verification.beside) if chain.draft.num_learned]
        lookup = verification.lookup_chain if learned else main
        best = max((chain.num_accepted for chain in drafted), default=0)
        self._acceptance.count(learned > 0, main.num_accepted, main.num_drafted)
        self._branched.count(learned > 0 and self._plan.branches > 0, best - main.num_accepted)
        beside = self._plan.looked_up > 0
        # An end of the text cuts the chain that wins alone.
        self._beside.count(learned > 0 and beside, max(0, verification.num_accepted - best))
        self._looked_up.count(beside, lookup.num_accepted if lookup else 0)
