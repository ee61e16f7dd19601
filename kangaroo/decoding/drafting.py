"""What to draft in the next block, and how far: fixed, or chosen by measured acceptance and measured step costs.

Two sources propose tokens: the learned draft, and a lookup of what followed the last tokens where they occurred before
in the text (prompt lookup, Saxena 2023) or in earlier texts (as in REST, arXiv 2311.08252). Neither can change an
answer; choosing between them only changes the time it takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kangaroo.decoding.blocks import DecodeConfig, Verification
from kangaroo.decoding.costs import StepCosts
from kangaroo.decoding.planning import Mean, Plan, Planner
from kangaroo.decoding.sampling import count_accepted

LONGEST_NGRAM = 4
"""Tokens that a lookup compares at most."""
REMEMBERED = (2, 3)
"""Tokens that a lookup in earlier texts compares."""
SURE_NGRAM = 2
"""Tokens that must match before a fixed hybrid takes what a lookup knows."""
RATE_DECAY = 0.95
"""Share of the tokens and costs so far that the recent speed keeps at each block."""
CONFIDENCE_DECAY = 0.99
"""Share of its counts that a bin of confidence keeps at each draft in it."""
BINS = 10
"""Bins of confidence in which acceptance is counted."""
PRIOR_DRAFTS = 4
"""Drafts by which a bin's own confidence counts before any were scored in it."""


class _Followers:
    """How often each token followed an n-gram, and the one that did so most often, the latest among equals."""

    def __init__(self) -> None:
        self.best = -1
        self.counts: dict[int, int] = {}

    def add(self, token: int) -> None:
        count = self.counts.pop(token, 0) + 1
        self.counts[token] = count  # the last one in their order is the latest
        if count >= self.counts.get(self.best, 0):
            self.best = token

    def drop(self, token: int) -> None:
        self.counts[token] -= 1
        if not self.counts[token]:
            del self.counts[token]
        if token == self.best and self.counts:
            self.best = max(reversed(self.counts), key=lambda follower: self.counts[follower])


class Memory:
    """What followed pairs and triples of tokens in earlier texts: constant time a token.

    Args:
        capacity: tokens of texts that are remembered, at most; the oldest texts are forgotten first.

    Attributes:
        texts: those that are remembered, the oldest first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.texts: deque[tuple[int, ...]] = deque()
        self._size = 0
        self._followers: dict[tuple[int, ...], _Followers] = {}

    def add(self, text: Sequence[int]) -> None:
        """Remember a text, or as much of its end as there is capacity for."""
        kept = tuple(text[-self.capacity :])
        self.texts.append(kept)
        self._size += len(kept)
        for ngram, token in _ngrams(kept):
            self._followers.setdefault(ngram, _Followers()).add(token)
        while self._size > self.capacity:
            self._forget(self.texts.popleft())

    def _forget(self, text: tuple[int, ...]) -> None:
        self._size -= len(text)
        for ngram, token in _ngrams(text):
            followers = self._followers[ngram]
            followers.drop(token)
            if not followers.counts:
                del self._followers[ngram]

    def propose(self, ending: Sequence[int], count: int) -> tuple[list[int], int]:
        """The likeliest continuation: each token is the one that followed the last ones most often.

        Args:
            ending: the last tokens of a text.
            count: tokens wanted.

        Returns:
            `count` tokens, fewer where nothing is known to follow, and the length of the ending that is known.
        """
        continued = list(ending)
        matched = 0
        while len(continued) < len(ending) + count:
            token, size = self._next(continued)
            if not size:
                break
            matched = matched or size
            continued.append(token)
        return continued[len(ending) :], matched

    def _next(self, text: Sequence[int]) -> tuple[int, int]:
        """What followed the longest known ending most often, and the length of this ending; 0 if none is known."""
        for size in reversed(REMEMBERED):
            ending = tuple(text[-size:])
            if len(ending) == size and ending in self._followers:
                return self._followers[ending].best, size
        return -1, 0


def _ngrams(text: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Every n-gram of a text that a memory compares, with the token after it."""
    for size in REMEMBERED:
        for end in range(size, len(text)):
            yield tuple(text[end - size : end]), text[end]


class LookupIndex:
    """Where each n-gram of a text occurred last: constant time a token.

    Args:
        tokens: the text so far.
        memory: earlier texts, as a second place to look.
    """

    def __init__(self, tokens: Sequence[int] = (), memory: Memory | None = None) -> None:
        self._memory = memory
        self.tokens: list[int] = []
        self._next_position: dict[tuple[int, ...], int] = {}  # n-gram -> the position right after it
        self._indexed = 0  # tokens whose n-grams are known; the rest follow when they are asked for
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        self.tokens.extend(tokens)

    def _catch_up(self) -> None:
        for end in range(self._indexed, len(self.tokens)):
            longest = min(LONGEST_NGRAM, end)
            for size in range(1, longest + 1):
                ngram = tuple(self.tokens[end - size : end])
                self._next_position[ngram] = end
        self._indexed = len(self.tokens)

    def propose(self, count: int, drafts: Sequence[int] = ()) -> tuple[list[int], int]:
        """What followed the longest known ending of the text, last time.

        A continuation that runs into the end of the text repeats itself, as the text would. Where earlier texts know
        a longer ending than the text itself, they continue it.

        Args:
            count: tokens wanted.
            drafts: tokens after the text that belong to its ending.

        Returns:
            `count` tokens, fewer from earlier texts, or none; and the length of the ending, to which
            `LONGEST_NGRAM` is added for one of earlier texts.
        """
        self._catch_up()
        # The longest ending that occurred before says most about what follows.
        ending = [*self.tokens[-LONGEST_NGRAM:], *drafts][-LONGEST_NGRAM:]
        size = len(ending)
        while size and tuple(ending[-size:]) not in self._next_position:
            size -= 1
        if self._memory is not None and size < max(REMEMBERED):
            remembered, known = self._memory.propose(ending, count)
            if known > size:
                return remembered, LONGEST_NGRAM + known
        if not size:
            return [], 0
        start = self._next_position[tuple(ending[-size:])]
        return self._continue_from(start, count, drafts), size

    def _continue_from(self, start: int, count: int, drafts: Sequence[int]) -> list[int]:
        """`count` tokens of text and drafts from position `start` on, again from there at the end."""
        length = len(self.tokens)
        period = length + len(drafts) - start
        continuation = []
        for step in range(count):
            position = start + step % period
            if position < length:
                continuation.append(self.tokens[position])
            else:
                continuation.append(drafts[position - length])
        return continuation


class BlockPolicy:
    """What each block drafts; this one always drafts as many tokens as the settings say.

    A block calls `begin`, then `keep_drafting` after each learned draft, then `look_up`; `observe` sees the outcome.
    Where a look costs as much as a draft, it makes as many drafts as `at_once` says before it asks for each whether to
    go on. Texts that are decoded together need a policy each. With source "hybrid" this one drafts half of the block,
    and if it doubts none of these drafts and `SURE_NGRAM` tokens match, what a lookup knows follows them.

    Args:
        config: `source`, `draft_len`, `threshold` and `target`.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self._start(LookupIndex(), 0)

    def _start(self, index: LookupIndex, room: int) -> None:
        """Nothing is drafted yet in a block after the text of `index`."""
        self._index = index
        self._room = min(self.config.draft_len, room)
        self._drafts: list[int] = []  # learned ones so far
        self._doubts = False  # the last of them

    @property
    def extends(self) -> bool:
        """Whether `look_up` may add to learned drafts."""
        return self.config.num_learned > 0 and self.config.num_looked_up > 0

    @property
    def branches(self) -> int:
        """Chains that leave the learned one."""
        return min(self.config.chains - 1, self.config.num_learned)

    @property
    def _needed(self) -> int:
        """Tokens that must match before a lookup counts."""
        return SURE_NGRAM if self.config.source == "hybrid" else 1

    def ahead(self) -> Plan | None:
        """What every block drafts from now on, if the blocks need nothing else; None if they do."""
        return Plan(self.config.num_learned, self.branches, self.config.num_looked_up, self._needed)

    def begin(self, index: LookupIndex, room: int) -> int:
        """Begin a block after the text of `index` with room for `room` drafts; return how many to draft at most."""
        self._start(index, room)
        return min(self.config.num_learned, room)

    def at_once(self) -> int:
        """Drafts to make before looking at the first of them."""
        return max(1, self._room - len(self._drafts))

    def keep_drafting(self, token: int, confidence: float, made: int = 0) -> bool:
        """Whether to draft another token after this one (Kangaroo's second exit).

        Args:
            token: the draft.
            confidence: in it.
            made: drafts after it that are made already.
        """
        self._drafts.append(token)
        self._doubts = not confidence >= self.config.threshold  # NaN is doubt, too
        return not self._doubts

    def look_up(self) -> list[int]:
        """Tokens to verify after the learned drafts."""
        if not self.config.num_looked_up or self._doubts:
            return []
        count = min(self.config.num_looked_up, self._room - len(self._drafts))
        proposed, matched = self._index.propose(count, self._drafts)
        if matched < self._needed:
            return []
        return proposed

    def observe(self, verification: Verification, index: LookupIndex) -> None:
        """Learn from the outcome of the block."""

    def timed(self, plan: Plan, ms: float, slots: int) -> None:
        """Learn how long blocks of a plan take where they run ahead and read so many slots."""


class ScriptedPolicy(BlockPolicy):
    """Drafts a given number of tokens, whatever their confidence, then has given tokens verified: for measurements.

    Args:
        num_learned: drafts of the shallow layers.
        looked_up: tokens after them.
    """

    def __init__(self, num_learned: int, looked_up: Sequence[int] = ()) -> None:
        super().__init__(DecodeConfig(num_learned))
        self.num_learned = num_learned
        self._looked_up = list(looked_up)

    @property
    def extends(self) -> bool:
        """As in `BlockPolicy`."""
        return bool(self._looked_up)

    def ahead(self) -> Plan | None:
        """As in `BlockPolicy`."""
        return None

    def look_up(self) -> list[int]:
        """As in `BlockPolicy`."""
        return self._looked_up


class AdaptivePolicy(BlockPolicy):
    """Drafts what gains most time, by recent acceptance and by step costs; nothing if nothing gains.

    A token is worth its chance to be committed, less what its time yields elsewhere at the recent speed (the ratio
    objective of Dinkelbach 1967). The chance of the next learned draft is that of all of them lately, times that of the
    drafts before it: their confidences, corrected by how drafts of such confidence turned out. That of a lookup is
    counted by the length of the ending that it knows, and by whether drafts are part of this ending: where a draft is
    what the lookup says, too, both are right far more often. So a hybrid mostly drafts a token and then goes on by what
    is worth more, more drafts or what a lookup knows after them. What a lookup gives is known from the text, whether or
    not it was verified. The same costs and texts give the same blocks. `threshold` does not count here: it is the fixed
    form of the same question.

    Args:
        config: `source` and `draft_len`, the longest block.
        costs: for blocks up to that length.
    """

    def __init__(self, config: DecodeConfig, costs: StepCosts) -> None:
        super().__init__(replace(config, threshold=0.0))
        self.costs = costs
        self._planner = Planner(config)
        self._learned = Mean(0.7)
        # By the length of the ending that the lookup knows, see `LookupIndex.propose`.
        lengths = {length: length for length in range(1, LONGEST_NGRAM + 1)}
        lengths |= {LONGEST_NGRAM + length: length for length in REMEMBERED}
        self._lookups = {known: Mean(0.15 + 0.15 * length) for known, length in lengths.items()}
        self._after_drafts = {known: Mean(0.5 + 0.1 * length) for known, length in lengths.items()}
        self._recent_tokens = 4.0
        self._recent_cost = 4.0 * costs.verify[0]
        # Accepted and scored drafts by bin of confidence.
        self._calibration = [[0.0, 0.0] for _ in range(BINS)]
        # Of the current block: what drafts, and the chance that all its drafts so far are accepted.
        self._source = ""
        self._survival = 1.0

    @property
    def branches(self) -> int:
        """As in `BlockPolicy`: none where the host chooses, which is where rows cost much."""
        return 0

    def ahead(self) -> Plan | None:
        """As in `BlockPolicy`: the plan that is best on average; it changes where another one is clearly better."""
        return self._planner.plan()

    @property
    def rate(self) -> float:
        """Recent tokens a millisecond, at least those of plain steps."""
        return max(self._recent_tokens / self._recent_cost, 1.0 / self.costs.verify[0])

    def begin(self, index: LookupIndex, room: int) -> int:
        """As in `BlockPolicy`: learned drafts or a lookup, whichever gains more."""
        self._start(index, room)
        self._survival = 1.0
        self._source = ""  # a plain step, unless something gains
        matched = 0
        if self.config.source != "learned" and self._room:
            _, matched = index.propose(1)
        gain = 0.0
        if self.config.source != "lookup" and self._room:
            gain = self._drafting_gain(matched)
        if gain > 0.0:
            self._source = "learned"
        if self._lookup_gain(0, self._survival, matched) > gain:
            self._source = "lookup"
        return self._room if self._source == "learned" else 0

    def _run_gain(self, chance: float, depth: int, survival: float, cost: float = 0.0) -> float:
        """What the best number of tokens after `depth` others gains, each right with a chance; in tokens.

        Args:
            chance: of each.
            depth: tokens of the block before them.
            survival: the chance that all of those are right.
            cost: milliseconds of each besides its row.
        """
        gain = best = 0.0
        for length in range(depth, self._room):
            survival *= chance
            gain += survival - self.rate * (self._row_cost(length) + cost)
            best = max(best, gain)
        return best

    def _row_cost(self, depth: int) -> float:
        """Milliseconds that a token after `depth` others adds to the verification of its block."""
        return self.costs.verify[depth + 1] - self.costs.verify[depth]

    def _lookup_gain(self, depth: int, survival: float, matched: int) -> float:
        """What a lookup that knows `matched` tokens gains after `depth` drafts."""
        if not matched:
            return 0.0
        return self._run_gain(self._lookup_chance(depth, matched), depth, survival)

    def _lookup_chance(self, depth: int, matched: int) -> float:
        lookups = self._after_drafts if depth else self._lookups
        return lookups[matched].value

    def _drafting_gain(self, matched: int) -> float:
        """What one more learned draft gains with what is best after it, where a lookup knows `matched` tokens."""
        depth = len(self._drafts)
        chance = self._learned.value
        cost = self._row_cost(depth) + self.costs.draft
        if not depth:
            cost += self.costs.first
        survival = self._survival * chance
        after = self._run_gain(chance, depth + 1, survival, self.costs.draft)
        if 0 < matched <= LONGEST_NGRAM:  # the draft may be what the lookup says
            longer = min(LONGEST_NGRAM, matched + 1)
            after = max(after, self._lookup_gain(depth + 1, survival, longer))
        return survival - self.rate * cost + after

    def at_once(self) -> int:
        """As in `BlockPolicy`: as many as are worth their time if each is accepted as usual."""
        chance = self._learned.value
        survival = self._survival * chance
        length = len(self._drafts) + 1
        while length < self._room:
            survival *= chance
            if survival <= self.rate * (self._row_cost(length) + self.costs.draft):
                break
            length += 1
        return length - len(self._drafts)

    def keep_drafting(self, token: int, confidence: float, made: int = 0) -> bool:
        """As in `BlockPolicy`: while drafts gain more than a lookup after those that there are."""
        self._drafts.append(token)
        # The chance that all drafts so far are accepted: confidences, corrected by past outcomes.
        accepted, scored = self._calibration[_bin(confidence)]
        self._survival *= (accepted + PRIOR_DRAFTS * confidence) / (scored + PRIOR_DRAFTS)
        depth = len(self._drafts)
        if depth >= self._room:
            return False
        if made:  # the next one costs its row alone
            return self._survival * self._learned.value > self.rate * self._row_cost(depth)
        matched = 0
        if self.extends:
            _, matched = self._index.propose(1, self._drafts)
        return self._drafting_gain(matched) > self._lookup_gain(depth, self._survival, matched)

    def look_up(self) -> list[int]:
        """As in `BlockPolicy`: as many tokens as are worth their rows."""
        if self.config.source == "learned" or not self._source:
            return []
        depth = len(self._drafts)
        proposed, matched = self._index.propose(self._room - depth, self._drafts)
        if not proposed:
            return []
        chance = self._lookup_chance(depth, matched)
        survival = self._survival
        for count in range(len(proposed)):
            survival *= chance
            if survival < self.rate * self._row_cost(depth + count):
                return proposed[:count]
        return proposed

    def timed(self, plan: Plan, ms: float, slots: int) -> None:
        """As in `BlockPolicy`."""
        self._planner.timed(plan, ms, slots)

    def observe(self, verification: Verification, index: LookupIndex) -> None:
        """As in `BlockPolicy`."""
        main = verification.main_chain
        learned = main.draft.num_learned
        looked_up = len(main.draft.tokens) - learned
        cost = self.costs.block(learned, looked_up)
        self._recent_tokens = RATE_DECAY * self._recent_tokens + verification.block_len
        self._recent_cost = RATE_DECAY * self._recent_cost + cost
        scored = min(main.num_drafted, learned)
        accepted = min(main.num_accepted, learned)
        self._learned.count(learned > 0, accepted, scored)
        confidences = main.draft.confidence[:scored].tolist()
        for depth, confidence in enumerate(confidences):
            counts = self._calibration[_bin(confidence)]
            counts[0] = CONFIDENCE_DECAY * counts[0] + (depth < accepted)
            counts[1] = CONFIDENCE_DECAY * counts[1] + 1
        self._planner.observe(verification)
        if self.config.source == "learned":
            return
        drafts = main.draft.tokens[:accepted].tolist()
        for depth in range(accepted + 1):  # what a lookup knew after so many right drafts
            following = verification.committed[depth:]
            proposed, matched = index.propose(self._planner.longest, drafts[:depth])
            lookups = self._after_drafts if depth else self._lookups
            _count_lookup(lookups.get(matched), proposed, following)
            if matched > LONGEST_NGRAM:  # earlier texts are not on the device
                proposed = []
            self._planner.count_lookup(depth, proposed, following, accepted == learned)


def _count_lookup(mean: Mean | None, proposed: Sequence[int], committed: Sequence[int]) -> None:
    """Count how far a lookup is right, as far as that is known from what was committed; its first wrong token is."""
    if mean is None or not committed:
        return
    right = count_accepted(proposed, committed)
    mean.count(True, right, min(right + 1, len(proposed), len(committed)))


def _bin(confidence: float) -> int:
    return min(BINS - 1, int(confidence * BINS))
