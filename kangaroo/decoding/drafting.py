"""What to draft in the next block, and how far: fixed, or chosen by measured acceptance and measured step costs.

Two sources propose tokens: the learned draft, and a lookup of what followed the last tokens where they stood before
(prompt lookup, Saxena 2023). Neither can change an answer; the choice between them is one of time alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kangaroo.decoding.costs import StepCosts, _expected

if TYPE_CHECKING:
    from kangaroo.decoding.blocks import DecodeConfig, Verification

LONGEST_NGRAM = 4
"""Tokens that a lookup compares at most."""


SURE_NGRAM = 2
"""Tokens that must match before a fixed hybrid takes the lookup rather than the learned draft."""


USED, IDLE = 0.95, 0.995
"""What remains of a choice's record at each block, where it was chosen and where it was not: idle choices drift back to
their hopeful start and are tried again."""


SHARED_IDLE = 0.998
"""The same of choices for a batch, whose start is as hopeful as can be and whose records grow by a block a text."""


BINS = 10
"""Bins of confidence whose acceptance is counted."""


class LookupIndex:
    """Where each n-gram of a text was seen last: constant time a token.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        for token in tokens:
            at = len(self.tokens)
            for size in range(1, min(LONGEST_NGRAM, at) + 1):
                self._behind[tuple(self.tokens[at - size :])] = at
            self.tokens.append(token)

    def propose(self, count: int, behind: Sequence[int] = ()) -> tuple[list[int], int]:
        """What followed the longest known ending of the text, last time.

        A continuation that runs into the end of the text repeats itself, as the text would.

        Args:
            count: tokens wanted.
            behind: drafts that stand behind the text, part of its ending.

        Returns:
            `count` tokens, or none, and the length of the ending.
        """
        ending = [*self.tokens[-LONGEST_NGRAM:], *behind][-LONGEST_NGRAM:]
        for size in range(len(ending), 0, -1):
            start = self._behind.get(tuple(ending[-size:]))
            if start is not None:
                known, period = self.tokens, len(self.tokens) + len(behind) - start
                places = (start + step % period for step in range(count))
                return [known[at] if at < len(known) else behind[at - len(known)] for at in places], size
        return [], 0


class Chooser:
    """What each block drafts: as many learned drafts as the settings say, up to one of low confidence, or a lookup.

    A block begins with `begin`, asks `goes_on` behind each learned draft, then for its `tail`, and ends with `learn`. A
    decoding needs one chooser for each of its rows.
    A hybrid looks up where `SURE_NGRAM` tokens match, and drafts elsewhere.

    Args:
        settings: `source`, `draft_len` and `threshold`.
    """

    def __init__(self, settings: DecodeConfig) -> None:
        self.settings = settings
        self._index, self._room, self._drafted = LookupIndex(), 0, list[int]()

    def begin(self, index: LookupIndex, room: int) -> int:
        """Begin a block behind the text of `index` where `room` drafts fit; return how many to draft by learning."""
        self._index, self._room, self._drafted = index, min(self.settings.draft_len, room), []
        if self.settings.source == "learned" or (self.settings.source == "hybrid" and not self.tail()):
            return self._room
        return 0

    def goes_on(self, token: int, confidence: float) -> bool:
        """Whether to draft behind this draft."""
        self._drafted.append(token)
        return confidence >= self.settings.threshold

    def tail(self) -> list[int]:
        """Tokens to verify behind the learned drafts."""
        if self.settings.source == "learned" or self._drafted:
            return []
        proposed, matched = self._index.propose(self._room)
        return proposed if matched >= (SURE_NGRAM if self.settings.source == "hybrid" else 1) else []

    def learn(self, verdict: Verification) -> None:
        """See what became of the block."""


class Scripted(Chooser):
    """Drafts so many by learning, whatever their confidence, then has these verified: to measure, and to test."""

    def __init__(self, learned: int, tail: Sequence[int] = ()) -> None:
        self.learned, self._script = learned, list(tail)

    def begin(self, index: LookupIndex, room: int) -> int:
        """As in `Chooser`."""
        return min(self.learned, room)

    def goes_on(self, token: int, confidence: float) -> bool:
        """As in `Chooser`."""
        return True

    def tail(self) -> list[int]:
        """As in `Chooser`."""
        return self._script


@dataclass
class _Record:
    """Decayed sums over the blocks of one kind, beside a start that weighs one block."""

    accepted: float
    scored: float
    tokens: float
    cost: float
    blocks: float = 1.0

    @property
    def chance(self) -> float:
        return self.accepted / self.scored

    def gain(self, rate: float) -> float:
        return (self.tokens - rate * self.cost) / self.blocks

    def fade(self, start: _Record, share: float) -> None:
        for name in ("accepted", "scored", "tokens", "cost", "blocks"):
            setattr(self, name, getattr(start, name) + share * (getattr(self, name) - getattr(start, name)))


class Governor(Chooser):
    """Drafts what gains most time, by what was accepted lately and by what steps cost; nothing if nothing gains.

    A block is worth its tokens less those that its time yields elsewhere, at the rate of late (Dinkelbach 1967).
    Records are kept apart by the length of the ending that a lookup knows, since that says most about both sources. A
    learned draft goes on while the next token's chance, by the confidences so far as they have turned out, is worth
    its time; a hybrid then adds what a lookup knows, since rows of a verification cost little. Costs are given, so the
    same costs and texts give the same blocks.

    Args:
        settings: `source` and `draft_len`, the longest block.
        costs: for blocks up to that length.
    """

    def __init__(self, settings: DecodeConfig, costs: StepCosts) -> None:
        super().__init__(settings)
        self.costs, first = costs, min(3, settings.draft_len)
        self._starts: dict[str, _Record] = {}
        for size in range(LONGEST_NGRAM + 1):
            for source, chance, drafts in (("learned", 0.7, first), ("lookup", 0.25 + 0.1 * size, 0)):
                cost = costs.block(drafts, first - drafts)
                self._starts[f"{source} {size}"] = _Record(chance, 1.0, _expected(chance, first), cost)
        self._records = {name: replace(start) for name, start in self._starts.items()}
        self._tokens, self._cost = 4.0, 4.0 * costs.verify[0]
        self._right = [[0.0, 0.0] for _ in range(BINS)]
        self._used, self._matched, self._survival = "", 0, 1.0

    @property
    def rate(self) -> float:
        """Tokens a millisecond of late, at least those of plain steps."""
        return max(self._tokens / self._cost, 1.0 / self.costs.verify[0])

    def begin(self, index: LookupIndex, room: int) -> int:
        """As in `Chooser`: the kind of block that was worth most lately."""
        self._index, self._room, self._drafted = index, min(self.settings.draft_len, room), []
        self._matched = 0 if self.settings.source == "learned" else index.propose(1)[1]
        worth, self._used, self._survival = 1.0 - self.rate * self.costs.verify[0], "", 1.0
        sources = {"hybrid": ("learned", "lookup")}.get(self.settings.source, (self.settings.source,))
        for source in sources if self._room else ():
            gain = self._records[f"{source} {self._matched}"].gain(self.rate)
            if gain > worth and (source == "learned" or self._matched):
                worth, self._used = gain, source
        return self._room if self._used == "learned" else 0

    def goes_on(self, token: int, confidence: float) -> bool:
        """As in `Chooser`: while one more learned draft adds more than its time is worth."""
        self._drafted.append(token)
        accepted, scored = self._right[min(BINS - 1, int(confidence * BINS))]
        self._survival *= (accepted + 4 * confidence) / (scored + 4)
        depth, chance = len(self._drafted), self._records[f"learned {self._matched}"].chance
        if depth >= self._room:
            return False
        if self.settings.source == "hybrid":
            _, matched = self._index.propose(1, self._drafted)
            chance -= self._records[f"lookup {matched}"].chance if matched else 0.0
        time = self.costs.draft + self.costs.verify[depth + 1] - self.costs.verify[depth]
        return self._survival * chance > self.rate * time

    def tail(self) -> list[int]:
        """As in `Chooser`: as much as is worth its rows."""
        depth = len(self._drafted)
        if self.settings.source == "learned" or not self._used:
            return []
        proposed, matched = self._index.propose(self._room - depth, self._drafted)
        self._tail = f"lookup {matched}"
        chance, reached = self._records[self._tail].chance, self._survival
        for count in range(len(proposed)):
            reached *= chance
            if reached < self.rate * (self.costs.verify[depth + count + 1] - self.costs.verify[depth + count]):
                return proposed[:count]
        return proposed

    def learn(self, verdict: Verification) -> None:
        """As in `Chooser`."""
        learned = verdict.draft.num_learned
        looked_up = len(verdict.draft.tokens) - learned
        cost = self.costs.block(learned, looked_up)
        self._tokens, self._cost = 0.98 * self._tokens + verdict.block_len, 0.98 * self._cost + cost
        used = f"{self._used} {self._matched}"
        for name, record in self._records.items():
            record.fade(self._starts[name], USED if name == used else IDLE)
        if self._used:
            self._records[used].tokens += verdict.block_len
            self._records[used].cost += cost
            self._records[used].blocks += 1.0
        if learned:
            record = self._records[used]
            record.accepted += min(verdict.num_accepted, learned)
            record.scored += min(verdict.num_drafted, learned)
            for depth, confidence in enumerate(verdict.draft.confidence[: min(learned, verdict.num_drafted)].tolist()):
                counts = self._right[min(BINS - 1, int(confidence * BINS))]
                counts[:] = 0.99 * counts[0] + (depth < verdict.num_accepted), 0.99 * counts[1] + 1
        if looked_up and verdict.num_drafted > learned:
            self._records[self._tail].accepted += verdict.num_accepted - learned
            self._records[self._tail].scored += verdict.num_drafted - learned


class Shared:
    """One choice for all texts of a batch: they share each pass, so that one text's long block is paid for by all.

    Every choice, a source and a length, has a decayed record of what a text commits by it and of its cost; the one that
    is worth most is taken, as a `Governor` does. A choice is tried if it would pay were all drafts right.

    Args:
        settings: `source` and `draft_len`, the longest block.
        costs: of steps of so many texts.
    """

    def __init__(self, settings: DecodeConfig, costs: StepCosts) -> None:
        self.costs, self.choice, self._stale = costs, ("", 0), True
        self._starts = {("", 0): _Record(1.0, 1.0, 1.0, costs.verify[0])}
        for source in ("learned", "lookup") if settings.source == "hybrid" else (settings.source,):
            for count in sorted({size for size in (1, 2, 4, 8, settings.draft_len) if 0 < size <= settings.draft_len}):
                self._starts[source, count] = _Record(1.0, 1.0, count + 1.0, self._price(source, count))
        self._records = {choice: replace(start) for choice, start in self._starts.items()}
        self._tokens, self._cost = 4.0, 4.0 * costs.verify[0]

    def _price(self, source: str, count: int) -> float:
        return self.costs.block(count, 0) if source == "learned" else self.costs.block(0, count)

    def pick(self) -> tuple[str, int]:
        """The choice of this pass, the same for all texts until one has learned from it."""
        if self._stale:
            rate = max(self._tokens / self._cost, 1.0 / self.costs.verify[0])
            self.choice = max(self._records, key=lambda choice: self._records[choice].gain(rate))
            for choice, record in self._records.items():
                record.fade(self._starts[choice], USED if choice == self.choice else SHARED_IDLE)
            self._stale = False
        return self.choice

    def learn(self, verdict: Verification) -> None:
        """Count what a text has committed by the choice."""
        cost = self._price(*self.choice)
        self._tokens, self._cost = 0.98 * self._tokens + verdict.block_len, 0.98 * self._cost + cost
        record = self._records[self.choice]
        record.tokens += verdict.block_len
        record.cost += cost
        record.blocks += 1.0
        self._stale = True


class Sharer(Chooser):
    """One text's part in a shared choice."""

    def __init__(self, settings: DecodeConfig, shared: Shared) -> None:
        super().__init__(settings)
        self.shared = shared

    def begin(self, index: LookupIndex, room: int) -> int:
        """As in `Chooser`."""
        source, count = self.shared.pick()
        self._index, self._room, self._drafted = index, min(count, room), []
        return self._room if source == "learned" else 0

    def goes_on(self, token: int, confidence: float) -> bool:
        """As in `Chooser`: up to the length that all share."""
        return True

    def tail(self) -> list[int]:
        """As in `Chooser`."""
        return self._index.propose(self._room)[0] if self.shared.choice[0] == "lookup" else []

    def learn(self, verdict: Verification) -> None:
        """As in `Chooser`."""
        self.shared.learn(verdict)
