"""Blocks that run ahead of the host: the next one starts before the host has seen what the last one committed.

What a block needs of the one before (the verifier's tokens, how many drafts were right, its states) stays on the
device, where drafts, verification and acceptance are one captured pass. The host reads each block's outcome while the
next is under way. It can be so where a block does not depend on what the host alone knows: greedy answers, and a fixed
number of learned drafts or none. A confidence stop masks the drafts beyond it.

Shapes: B texts, n drafts of a block, D hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.decoding.blocks import PASS_ROWS, DecodeConfig, DraftBlock, Verification, refuse_not_finite
from kangaroo.decoding.cache import FixedShape
from kangaroo.decoding.passes import view
from kangaroo.decoding.speculate import Text
from kangaroo.decoding.stages import Stage, Stages

UNDER_WAY = 2
"""Blocks that are started before the host waits for the first of them."""

Results = list[Verification | None]
"""What each text commits; None for texts that are over."""


def drafts_ahead(stages: Stages, texts: Sequence[Text], config: DecodeConfig) -> int | None:
    """Drafts of each block of these texts if the next blocks can run ahead, else None."""
    if stages.passes.graphs is None or not stages.passes.begun or config.target != "base":
        return None
    if config.temperature or config.draft_temperature or config.deterministic or config.keep_states:
        return None
    counts = {text.policy.ahead() for text in texts}
    count = counts.pop()
    if counts or count is None or count > PASS_ROWS or not _has_room(texts, count, 0):
        return None
    return count


def _reader(stages: Stages, count: int) -> Stage:
    """What begins a block: what drafts or, without drafts, the verifier."""
    return stages.shallow if count else stages.deep


def _has_room(texts: Sequence[Text], count: int, under_way: int) -> bool:
    """Whether one more block has all its drafts, whatever those under way commit."""
    most = under_way * (count + 1)
    return all(text.room - most > count for text in texts)


def run_ahead(stages: Stages, texts: Sequence[Text], count: int, threshold: float) -> Iterator[Results]:
    """Decode blocks of `count` drafts until a text is over, has too little room, or wants other blocks.

    Args:
        stages: the model, see `drafts_ahead`.
        texts: none of them over.
        count: drafts of a block.
        threshold: as in `DecodeConfig`.

    Yields:
        After each block what the texts commit, one entry a text; the caller appends it.

    Raises:
        ValueError: if a logit of the verifier is not finite.
    """
    key = (len(texts), count, threshold)
    if key not in stages.ahead:
        stages.ahead[key] = _Blocks(stages, *key)
    blocks: _Blocks = stages.ahead[key]
    blocks.load(texts)
    looks: deque[_Look] = deque()
    goes_on = True
    while any(text.room for text in texts):
        goes_on = goes_on and all(text.policy.ahead() == count for text in texts)
        if goes_on and len(looks) < UNDER_WAY and _has_room(texts, count, len(looks)):
            longest = max(len(text.tokens) for text in texts) + len(looks) * (count + 1)
            looks.append(blocks.start(longest))
        elif looks:
            yield blocks.look(looks.popleft(), texts)
        else:
            blocks.unload(texts)
            return


@dataclass(frozen=True)
class _Look:
    """One block's outcome on its way to the host.

    Attributes:
        numbers: see `_Blocks`.
        arrived: says when they are there; None without a GPU.
        states: `[B, n, D]`, the exit states that the drafts were made from; without drafts `[B, 1, D]`, the verifier's.
    """

    numbers: Tensor
    arrived: torch.cuda.Event | None
    states: Tensor


class _Blocks:
    """Blocks of one shape. Their state is what the last one left.

    The verifier's tokens `own [B, n + 1]` stand in each text from `start [B]` on; the first `right [B]` of them were
    drafted, one more is committed, and nothing that drafts has read any of them. `hidden [B, n + 1, D]` are the states
    of the positions before, for a drafter with feedback.
    """

    def __init__(self, stages: Stages, num_texts: int, count: int, threshold: float) -> None:
        like = stages.deep.cache.keys[0]
        self.stages = stages
        self.count = count
        self.threshold = threshold
        width = count + 1
        self.start_at = torch.zeros(num_texts, dtype=torch.long, device=like.device)
        self.right = torch.zeros_like(self.start_at)
        self.own = torch.zeros(num_texts, width, dtype=torch.long, device=like.device)
        size = stages.hidden_size if stages.feedback is not None else 0
        self.hidden = torch.zeros(num_texts, width, size, dtype=like.dtype, device=like.device)
        self._space: list[Tensor] = []  # on the host, for the numbers of blocks under way
        self._turn = 0

    def load(self, texts: Sequence[Text]) -> None:
        """Begin after some texts as they are."""
        stages = self.stages
        width = self.count + 1
        unread = self._unread(texts)
        if max(map(len, unread)) > width:  # what drafts has not followed for a while: let it catch up
            stages.read([tokens[:-1] for tokens in unread])
            unread = self._unread(texts)
        lengths = _reader(stages, self.count).cache.lengths
        counts = [len(tokens) for tokens in unread]
        self.own.copy_(torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in unread]))
        self.start_at.copy_(torch.tensor(lengths))
        self.right.copy_(torch.tensor(counts) - 1)
        if stages.feedback is not None and self.count:
            self.hidden.copy_(stages.feedback.take(counts, width))

    def _unread(self, texts: Sequence[Text]) -> list[list[int]]:
        """The tokens of each text that what begins a block has not read."""
        lengths = _reader(self.stages, self.count).cache.lengths
        return [text.tokens[length:] for text, length in zip(texts, lengths, strict=True)]

    def start(self, longest: int) -> _Look:
        """Start the next block; no text is longer than `longest` then."""
        stages = self.stages
        assert stages.passes.graphs is not None
        slots = view(longest + self.count + 1, stages.deep.cache.capacity)
        key = ("block", len(self.own), self.count, self.threshold, slots)
        state = (self.start_at, self.right, self.own, self.hidden)
        numbers, exits = stages.passes.graphs.in_place(key, lambda: self._block(slots), state)
        return self._sent(numbers, exits.clone())

    def _sent(self, numbers: Tensor, exits: Tensor) -> _Look:
        """Send numbers to the host without waiting."""
        if not numbers.is_cuda:
            return _Look(numbers.clone(), None, exits)
        if not self._space:
            self._space = [
                torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True) for _ in range(UNDER_WAY + 1)
            ]
        space = self._space[self._turn % len(self._space)]
        self._turn += 1
        space.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return _Look(space, arrived, exits)

    def _block(self, slots: int) -> tuple[Tensor, ...]:
        """Draft, verify and accept, from the state to the state: the numbers `[B, 4 n + 3]` and exit states."""
        stages = self.stages
        passes = stages.passes
        rows = torch.arange(len(self.own), device=self.own.device)
        length = self.start_at + self.right + 1
        tokens = self.own[rows, self.right][:, None]  # the last committed token
        caches = stages.caches()
        lengths = [cache.lengths for cache in caches]
        exits = self.own.new_zeros(len(self.own), 0, stages.hidden_size)
        try:
            if self.count:
                passes.fixed = FixedShape(self.start_at, slots)
                feedback = self.hidden if stages.feedback is not None else None
                chain = stages.chain(self.own, self.right, feedback, self.count)
                exits = chain.exit_states
                tokens = torch.cat([tokens, chain.tokens], dim=1)
            passes.fixed = FixedShape(length - 1, slots)
            hidden = stages.deep(stages.base(tokens))
            own, certainty = stages.deep.best(hidden)
            if not self.count and self.hidden.shape[-1]:
                exits = hidden
        finally:
            passes.fixed = None
            for cache, before in zip(caches, lengths, strict=True):
                cache.lengths = before
        numbers = [own.double(), certainty.double()]
        right = torch.zeros_like(self.right)
        if self.count:
            right = self._count_right(chain.tokens, chain.confidence, own)
            numbers += [chain.tokens.double(), chain.confidence.double()]
        self.start_at.copy_(length)
        self.right.copy_(right)
        self.own.copy_(own)
        if self.hidden.shape[-1]:
            self.hidden.copy_(hidden)
        return torch.cat([*numbers, right.double()[:, None]], dim=1), exits

    def _count_right(self, drafts: Tensor, confidence: Tensor, own: Tensor) -> Tensor:
        """Accepted drafts of each text, `[B]`: while they are the verifier's, up to the first doubtful one."""
        agrees = drafts == own[:, :-1]
        if self.threshold:
            sure = confidence.double() >= self.threshold
            agrees[:, 1:] &= sure[:, :-1].long().cumprod(dim=1).bool()
        return agrees.long().cumprod(dim=1).sum(dim=1)

    def look(self, look: _Look, texts: Sequence[Text]) -> Results:
        """What a block commits to the texts as they are now."""
        if look.arrived is not None:
            look.arrived.synchronize()
        found = look.numbers.tolist()
        if not self.count and self.stages.feedback is not None:
            # The drafter reads these states when it drafts again.
            self.stages.feedback.verified(look.states, range(len(texts)), [1] * len(texts))
        return [self._result(found[row], look.states[row], text) for row, text in enumerate(texts)]

    def _result(self, numbers: list[float], exit_hidden: Tensor, text: Text) -> Verification | None:
        if not text.room:
            return None
        count = self.count
        start = len(text.tokens)
        own = [int(token) for token in numbers[: count + 1]]
        certainty = numbers[count + 1 : 2 * count + 2]
        drafts = [int(token) for token in numbers[2 * count + 2 : 3 * count + 2]]
        confidence = numbers[3 * count + 2 : -1]
        right = int(numbers[-1])
        kept = 0  # drafts up to the first doubtful one
        while kept < count and (not kept or confidence[kept - 1] >= self.threshold):
            kept += 1
        refuse_not_finite(certainty[: kept + 1], start)
        draft = DraftBlock(
            torch.tensor(drafts[:kept], dtype=torch.long),
            torch.tensor(confidence[:kept]),
            exit_hidden[:kept] if count else torch.empty(0, self.stages.hidden_size),
        )
        return Verification(
            start=start,
            committed=tuple(own[: right + 1]),
            num_drafted=min(kept, right + 1),
            num_accepted=right,
            draft=draft,
            verifier_confidence=torch.tensor(certainty[: kept + 1]),
        )

    def unload(self, texts: Sequence[Text]) -> None:
        """Let step-by-step decoding go on: say what the caches hold, and what the drafter has not read."""
        stages = self.stages
        starts = self.start_at.tolist()
        right = self.right.tolist()
        over = [not text.room for text in texts]
        verified = [
            0 if done else start + count for done, start, count in zip(over, starts, right, strict=True)
        ]
        for stage in (stages.base, stages.deep):
            stage.cache.lengths = verified
        if not self.count:
            return
        # What drafts has not read the last draft; with feedback it reads all once more.
        most = 0 if stages.feedback is not None else self.count - 1
        reads = zip(over, starts, right, strict=True)
        read = [0 if done else start + min(count, most) for done, start, count in reads]
        for stage in (stages.shallow, stages.drafter):
            stage.cache.lengths = read
        if stages.feedback is not None:
            counts = [count + 1 if text.room else 0 for count, text in zip(right, texts, strict=True)]
            stages.feedback.verified(self.hidden, range(len(texts)), counts)
