"""What all blocks draft where they run ahead of the host, which cannot choose for each block."""

from collections.abc import Sequence
from dataclasses import dataclass

from kangaroo.decoding.blocks import PASS_ROWS, DecodeConfig, Verification
from kangaroo.decoding.costs import expected_tokens
from kangaroo.decoding.sampling import count_accepted

LENGTHS = (2, 3, 4, 6)
"""Lengths of learned chains to choose from; each takes captures of its own."""
BEFORE_LOOKUPS = (3, 4)
"""The same where a lookup follows, which makes up for a chain that is too short. With more plans a wrong one was held
more often."""
CLEARLY = 1.06
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
        looked_up: tokens of a lookup after the learned chain.
        sure: tokens that must match before a lookup counts.
    """

    learned: int = 0
    branches: int = 0
    looked_up: int = 0
    sure: int = 1

    @property
    def longest(self) -> int:
        """Tokens of the longest chain."""
        return self.learned + self.looked_up

    @property
    def chains(self) -> int:
        """All chains; plain decoding has an empty one."""
        return 1 + self.branches


def hoped(plan: Plan) -> float:
    """How long a block of a plan is hoped to take, in plain steps: a little less than measured on one H200."""
    lookup = 0.08 if plan.looked_up else 0.0
    return 1.0 + 0.1 * plan.learned + 0.06 * (plan.chains - 1) + lookup


class Mean:
    """A mean over recent blocks, which starts at an optimistic value, counted as some blocks."""

    def __init__(self, start: float, weight: float = 4.0) -> None:
        self._start = (start * weight, weight)
        self._total, self._weight = self._start

    @property
    def value(self) -> float:
        """The mean."""
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


class _Continuations:
    """How far lookups are right, from what was committed after each, whether or not it was verified.

    Of a lookup that is right in all committed tokens it is not known how far it would have gone; it counts at the
    tokens that are known (as in the estimator of Kaplan and Meier 1958). Where a learned draft ended the block by
    being wrong, lookups are wrong more often, too, so there it counts as wrong.

    Args:
        longest: tokens of a lookup, at most.
    """

    def __init__(self, longest: int) -> None:
        # The chance of each token, where those before it are right. A hopeful start.
        self._chances = [Mean(0.8 if depth else 0.4) for depth in range(longest)]

    def count(self, proposed: Sequence[int], committed: Sequence[int], may_go_on: bool) -> None:
        """Count a lookup beside what was committed in its place.

        Args:
            proposed: the lookup.
            committed: tokens from there on.
            may_go_on: whether it is unknown beyond them; else its first token there counts as wrong.
        """
        right = count_accepted(proposed, committed)
        known = right + 1  # the first wrong token is known, too
        if may_go_on:
            known = min(known, len(committed))
        for depth, chance in enumerate(self._chances[:known]):
            chance.count(True, float(depth < right))

    def expected(self, count: int) -> float:
        """Expected right tokens of the first `count`."""
        tokens = 0.0
        survival = 1.0
        for chance in self._chances[:count]:
            survival *= chance.value
            tokens += survival
        return tokens


def _learned_plans(config: DecodeConfig, longest: int) -> list[Plan]:
    """The plans with learned drafts, up to `longest` drafts in all."""
    plans = []
    if config.source == "hybrid":
        lengths = [length for length in BEFORE_LOOKUPS if length < longest] or [max(1, longest - 1)]
        plans = [Plan(length, looked_up=longest - length) for length in lengths]
    if config.source == "learned" or (plans and config.temperature):  # lookups are seldom what is drawn
        for length in LENGTHS:
            if length <= longest:
                plans.append(Plan(length))
                branched = Plan(length, min(config.chains - 1, length))
                if branched.branches and branched.chains * (length + 1) <= PASS_ROWS:
                    plans.append(branched)
    return plans


class Planner:
    """Chooses the plan that is fastest by recent acceptance and measured times.

    A plan's time is measured when its block is captured. Before that it is hoped to be short, so that every plan that
    might pay is tried. What a lookup gives is mostly known from the text without trying it.

    Args:
        config: `source`, `draft_len`, the longest chain, and `branches`.

    Attributes:
        longest: tokens of a chain, at most.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self._times: dict[int, dict[Plan, float]] = {0: {}}  # milliseconds, by the slots that blocks read
        self._slots = 0
        self._acceptance = Mean(0.7)
        self._branched = Mean(0.35)  # tokens of a block that only branches gave
        self._plan = Plan()
        self._is_due = True  # whether something was learned since the plan was chosen
        self.longest = min(config.draft_len, PASS_ROWS - 1)
        self._plans = [Plan(), *_learned_plans(config, self.longest)]
        if config.source != "learned":
            self._plans.append(Plan(looked_up=self.longest))
        # Of a lookup after a number of right drafts.
        self._continuations = {plan.learned: _Continuations(self.longest) for plan in self._plans}

    def plan(self) -> Plan:
        """What to draft in the next block: what was drafted before, unless something else is clearly faster."""
        if not self._is_due:
            return self._plan
        self._is_due = False
        times = self._times[self._slots]
        # Milliseconds of a plain step, for plans that were not tried.
        scale = 1.0
        if times:
            scale = sum(times.values()) / sum(map(hoped, times))

        def speed(plan: Plan) -> float:
            """Expected tokens a millisecond."""
            ms = times.get(plan) or scale * hoped(plan)
            return self._tokens(plan) / ms

        best = max(self._plans, key=speed)
        if speed(best) > CLEARLY * speed(self._plan):
            self._plan = best
        return self._plan

    def timed(self, plan: Plan, ms: float, slots: int) -> None:
        """Learn how long a block of a plan takes that reads so many slots, as the next ones will."""
        times = self._times.setdefault(slots, {})
        self._is_due = self._is_due or slots != self._slots or times.get(plan) != ms
        self._slots = slots
        times[plan] = ms

    def _tokens(self, plan: Plan) -> float:
        """Expected tokens of a block."""
        chance = self._acceptance.value
        tokens = expected_tokens(chance, plan.learned)
        if plan.branches:
            tokens += self._branched.value
        if plan.looked_up:
            tokens += chance**plan.learned * self._continuations[plan.learned].expected(plan.looked_up)
        return tokens

    def count_lookup(
        self, depth: int, proposed: Sequence[int], committed: Sequence[int], may_go_on: bool
    ) -> None:
        """Count what a lookup knew after `depth` right drafts, verified or not; see `_Continuations.count`."""
        if depth in self._continuations:
            self._continuations[depth].count(proposed, committed, may_go_on)

    def observe(self, verification: Verification) -> None:
        """Count the outcome of a block."""
        self._is_due = True
        main = verification.main_chain
        learned = main.draft.num_learned
        accepted = min(main.num_accepted, learned)
        self._acceptance.count(learned > 0, accepted, min(main.num_drafted, learned))
        gain = max(0, verification.num_accepted - main.num_accepted)
        self._branched.count(bool(verification.beside), gain)
