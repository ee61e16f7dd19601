"""Blocks that run ahead of the host: the next one starts before the host has seen what the last one committed.

What a block needs of the one before (the text, how many drafts were right, the verifier's states) stays on the device,
where drafts, lookup, verification and acceptance are one captured pass. The host reads each block's outcome while the
next is under way. It can be so where a block does not depend on what the host alone knows: greedy answers, all of whose
blocks draft by one `Plan`. A confidence stop masks the drafts beyond it, and what is committed beyond a text's limit is
cut off.

Shapes: B texts, C chains of a text, n drafts of a chain, D hidden. Rows are chain by chain, as in `KVCache`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.decoding.blocks import (
    PASS_ROWS,
    DecodeConfig,
    DraftBlock,
    Verification,
    refuse_not_finite,
    settled,
)
from kangaroo.decoding.cache import FixedShape
from kangaroo.decoding.drafting import LONGEST_NGRAM
from kangaroo.decoding.passes import view
from kangaroo.decoding.planning import Plan
from kangaroo.decoding.speculate import Text
from kangaroo.decoding.stages import Stage, Stages

UNDER_WAY = 2
"""Blocks that are started before the host waits for the first of them."""
NONE = -1
"""Stands where there is no token; equal to none."""

Results = list[Verification | None]
"""What each text commits; None for texts that are over."""


def plan_ahead(stages: Stages, texts: Sequence[Text], config: DecodeConfig) -> Plan | None:
    """What each block of these texts drafts if the next blocks can run ahead, else None."""
    if stages.passes.graphs is None or not stages.passes.begun or config.target != "base":
        return None
    if config.temperature or config.draft_temperature or config.deterministic:
        return None
    plans = {text.policy.ahead() for text in texts if text.room}
    plan = plans.pop()
    if plans or plan is None or plan.longest >= PASS_ROWS:
        return None
    return plan


def run_ahead(stages: Stages, texts: Sequence[Text], plan: Plan, threshold: float) -> Iterator[Results]:
    """Decode blocks of one plan until the texts want other blocks, or half of them are over.

    Args:
        stages: the model, see `plan_ahead`.
        texts: at least one of them is not over.
        plan: what the blocks draft.
        threshold: as in `DecodeConfig`.

    Yields:
        After each block what the texts commit, one entry a text; the caller appends it.

    Raises:
        ValueError: if a logit of the verifier is not finite.
    """
    key = (len(texts), plan, threshold)
    if key not in stages.ahead:
        stages.ahead[key] = _Blocks(stages, *key)
    blocks: _Blocks = stages.ahead[key]
    blocks.load(texts)
    looks: deque[_Look] = deque()
    goes_on = True
    while any(text.room for text in texts):
        room = [text.room for text in texts if text.room]
        goes_on = goes_on and (len(texts) == 1 or 2 * len(room) > len(texts))
        goes_on = goes_on and all(text.policy.ahead() == plan for text in texts if text.room)
        # Each block under way commits a token at least.
        if goes_on and len(looks) < UNDER_WAY and max(room) > len(looks):
            longest = max(len(text.tokens) for text in texts) + len(looks) * (plan.longest + 1)
            looks.append(blocks.start(longest))
        elif looks:
            yield blocks.look(looks.popleft(), texts)
        else:
            blocks.unload(texts)
            return


def look_up(text: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`LookupIndex.propose` on the device.

    Args:
        text: `[B, LONGEST_NGRAM + S]`, after `LONGEST_NGRAM` times `NONE` the tokens of each text, fewer than S.
        lengths: `[B]`, of the texts.
        count: tokens wanted.

    Returns:
        Tokens `[B, count]`, and how many matched before them, `[B]`; without a match the tokens mean nothing.
    """
    rows = torch.arange(len(text), device=text.device)
    before = text.unfold(1, LONGEST_NGRAM, 1)[
        :, :-1
    ]  # [B, S, LONGEST_NGRAM], the tokens before each position
    ending = before[rows, lengths.clamp(max=before.shape[1] - 1)]
    equal = before == ending[:, None]
    matched = equal.flip(-1).cumprod(dim=-1).sum(dim=-1)
    position = torch.arange(before.shape[1], device=text.device)
    # The longest match, and of these the last one.
    score = torch.where(position < lengths[:, None], matched * len(position) + position, 0)
    best = score.amax(dim=1)
    start = best % len(position)
    steps = torch.arange(count, device=text.device) % (lengths - start).clamp(min=1)[:, None]
    return text.gather(1, LONGEST_NGRAM + start[:, None] + steps), best // len(position)


@dataclass(frozen=True)
class _Look:
    """One block's outcome on its way to the host.

    Attributes:
        numbers: see `_Blocks._block`.
        arrived: says when they are there; None without a GPU.
        states: `[rows, n, D]`, the exit states that the learned drafts were made from; without any `[B, T, D]`, the
            verifier's.
    """

    numbers: Tensor
    arrived: torch.cuda.Event | None
    states: Tensor


class _Blocks:
    """Blocks of one plan. Their state is what the last one left.

    The verifier's tokens `own [B, T]` stand in each text from `start_at [B]` on; the first `right [B]` of them were
    drafted, one more is committed, and nothing that begins a block has read any of them. The first `read [B]` tokens
    of the text stand in the caches of what drafts. `hidden [B, T, D]` are the verifier's states of the positions
    before, for a drafter with feedback; `text` is as in `look_up`.
    """

    def __init__(self, stages: Stages, num_texts: int, plan: Plan, threshold: float) -> None:
        like = stages.deep.cache.keys[0]
        self.stages = stages
        self.plan = plan
        self.threshold = threshold
        width = plan.longest + 1
        self.start_at = torch.zeros(num_texts, dtype=torch.long, device=like.device)
        self.right = torch.zeros_like(self.start_at)
        self.read = torch.zeros_like(self.start_at)
        self.own = torch.zeros(num_texts, width, dtype=torch.long, device=like.device)
        size = stages.hidden_size if stages.feedback is not None else 0
        self.hidden = torch.zeros(num_texts, width, size, dtype=like.dtype, device=like.device)
        slots = stages.deep.cache.capacity if plan.looked_up else 0
        self.text = torch.zeros(num_texts, LONGEST_NGRAM + slots, dtype=torch.long, device=like.device)
        self._space: list[Tensor] = []  # on the host, for the numbers of blocks under way
        self._turn = 0

    @property
    def _reader(self) -> Stage:
        """What begins a block: what drafts or, without learned drafts, the verifier."""
        return self.stages.shallow if self.plan.learned else self.stages.deep

    def load(self, texts: Sequence[Text]) -> None:
        """Begin after some texts as they are."""
        stages = self.stages
        width = self.plan.longest + 1
        unread = self._unread(texts)
        if max(map(len, unread)) > width:  # what drafts has not followed for a while: let it catch up
            stages.read([tokens[:-1] for tokens in unread])
            unread = self._unread(texts)
        lengths = self._reader.cache.lengths
        counts = [len(tokens) for tokens in unread]
        self.own.copy_(_padded(unread, width, 0))
        self.start_at.copy_(torch.tensor(lengths))
        self.right.copy_(torch.tensor(counts) - 1)
        if stages.feedback is not None and self.plan.learned:
            self.hidden.copy_(stages.feedback.take(counts, width))
        if self.plan.looked_up:
            self.text.copy_(
                _padded([[NONE] * LONGEST_NGRAM + text.tokens for text in texts], self.text.shape[1], NONE)
            )
        verifying = [stages.base, stages.deep] if self.plan.chains > 1 else []
        drafting = [stages.shallow, stages.drafter] if self.plan.learned_chains > 1 else []
        for stage in verifying + drafting:
            stage.cache.share(stage.cache.chains)

    def _unread(self, texts: Sequence[Text]) -> list[list[int]]:
        """The last tokens of each text, which what begins a block has not read; one at least."""
        lengths = self._reader.cache.lengths
        return [
            text.tokens[length:] if text.room else text.tokens[-1:]
            for text, length in zip(texts, lengths, strict=True)
        ]

    def start(self, longest: int) -> _Look:
        """Start the next block; no text is longer than `longest` then."""
        stages = self.stages
        assert stages.passes.graphs is not None
        slots = view(longest + self.plan.longest + 1, stages.deep.cache.capacity)
        key = ("block", len(self.own), self.plan, self.threshold, slots)
        state = (self.start_at, self.right, self.read, self.own, self.hidden, self.text)
        numbers, states = stages.passes.graphs.in_place(key, lambda: self._block(slots), state)
        return self._sent(numbers, states.clone())

    def _sent(self, numbers: Tensor, states: Tensor) -> _Look:
        """Send numbers to the host without waiting."""
        if not numbers.is_cuda:
            return _Look(numbers.clone(), None, states)
        if not self._space:
            self._space = [
                torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True) for _ in range(UNDER_WAY + 1)
            ]
        space = self._space[self._turn % len(self._space)]
        self._turn += 1
        space.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return _Look(space, arrived, states)

    def _block(self, slots: int) -> tuple[Tensor, ...]:
        """Draft, verify and accept, from the state to the state.

        Returns:
            For the host, `[B, …]`: the verifier's tokens `T` and the winning chain; of each chain its tokens `n`, the
            verifier's confidence `T` and the accepted drafts; the confidence of learned chains `n` each; the tokens
            that matched before a lookup. Then the states of `_Look`.
        """
        stages = self.stages
        caches = stages.caches()
        lengths = [cache.lengths for cache in caches]
        try:
            return self._run(slots)
        finally:
            stages.passes.fixed = None
            for cache, before in zip(caches, lengths, strict=True):
                cache.lengths = before

    def _run(self, slots: int) -> tuple[Tensor, ...]:
        stages, plan = self.stages, self.plan
        texts = len(self.own)
        rows = torch.arange(texts, device=self.own.device)
        # A text that is over goes on within its row for nothing.
        most = stages.deep.cache.capacity - plan.longest - 1
        length = (self.start_at + self.right + 1).clamp(max=most)

        # 1. Draft: the learned chain and its branches, and what a lookup knows.
        chains: list[Tensor] = []  # [B, n] each
        confidence = self.own.new_zeros(plan.learned_chains, texts, plan.learned).double()
        states = self.own.new_zeros(0, 0)
        if plan.learned:
            many = plan.learned_chains
            stages.passes.fixed = FixedShape(self.start_at.repeat(many), slots)
            feedback = self.hidden.repeat(many, 1, 1) if stages.feedback is not None else None
            drafts = stages.chain(
                self.own.repeat(many, 1), self.right.repeat(many), feedback, plan.learned, texts
            )
            chains += drafts.tokens.view(many, texts, -1)
            confidence = drafts.confidence.view(many, texts, -1).double()
            states = drafts.exit_states
        matched = torch.zeros_like(length)
        if plan.looked_up:
            place = (
                LONGEST_NGRAM + self.start_at[:, None] + torch.arange(self.own.shape[1], device=rows.device)
            )
            self.text.scatter_(1, place, self.own)
            found, matched = look_up(self.text[:, : LONGEST_NGRAM + slots], length, plan.looked_up)
            chains.append(found.where(matched[:, None] >= plan.sure, NONE))

        # 2. Verify: the last committed token and each chain.
        last = self.own[rows, self.right][:, None]
        longest = torch.full((plan.chains, texts, plan.longest), NONE, device=rows.device)
        for chain, tokens in enumerate(chains):
            longest[chain, :, : tokens.shape[1]] = tokens
        read = torch.cat([last.expand(plan.chains, texts, 1), longest.clamp(min=0)], dim=2)
        stages.passes.fixed = FixedShape((length - 1).repeat(plan.chains), slots)
        hidden = stages.deep(stages.base(read.flatten(0, 1)))
        best, certainty = stages.deep.best(hidden)
        own = best.view(plan.chains, texts, -1)

        # 3. Accept: the chain that goes furthest.
        counts = self._count_right(longest, confidence, own)
        winner = counts.argmax(dim=0)
        right = counts[winner, rows]
        hidden = hidden.view(plan.chains, texts, *hidden.shape[1:])[winner, rows]
        if plan.chains > 1:
            for stage in (stages.base, stages.deep):
                stage.cache.share_from(winner, length - 1, plan.longest + 1)

        self.start_at.copy_(length)
        self.right.copy_(right)
        self.own.copy_(own[winner, rows])
        if plan.learned:  # the last draft was not read; with feedback all are read once more
            drafted = 0 if stages.feedback is not None else counts[0].clamp(max=plan.learned - 1)
            self.read.copy_(length + drafted)
        if self.hidden.shape[-1]:
            self.hidden.copy_(hidden)
            states = states if plan.learned else hidden
        parts = [
            self.own,
            winner[:, None],
            *longest,
            *certainty.view(own.shape),
            *counts[..., None],
            *confidence,
        ]
        return torch.cat([part.double() for part in [*parts, matched[:, None]]], dim=1), states

    def _count_right(self, chains: Tensor, confidence: Tensor, own: Tensor) -> Tensor:
        """Accepted drafts of each chain, `[C, B]`: while they are the verifier's, up to the first doubtful one."""
        agrees = chains == own[..., :-1]
        if self.threshold and self.plan.learned:
            count = self.plan.learned
            sure = confidence[0] >= self.threshold
            goes_on = sure[:, :-1].long().cumprod(dim=1).bool()
            agrees[: self.plan.learned_chains, :, 1:count] &= goes_on
        return agrees.long().cumprod(dim=2).sum(dim=2)

    def look(self, look: _Look, texts: Sequence[Text]) -> Results:
        """What a block commits to the texts as they are now."""
        if look.arrived is not None:
            look.arrived.synchronize()
        numbers = look.numbers.tolist()
        results = [self._result(numbers[row], look.states, row, text) for row, text in enumerate(texts)]
        if not self.plan.learned and self.stages.feedback is not None:
            # The drafter reads these states when it drafts again.
            counts = [result.num_accepted + 1 if result else 0 for result in results]
            self.stages.feedback.verified(look.states, range(len(texts)), counts)
        return results

    def _result(self, numbers: list[float], states: Tensor, row: int, text: Text) -> Verification | None:
        """One text's block by what `_block` sent; what has no room is cut off."""
        if not text.room:
            return None
        plan = self.plan
        width = plan.longest + 1
        start = len(text.tokens)
        take = _Reader(numbers)
        own = take.tokens(width)
        take.tokens(1)
        chains = [take.tokens(plan.longest) for _ in range(plan.chains)]
        certainty = [take.numbers(width) for _ in range(plan.chains)]
        counts = [take.tokens(1)[0] for _ in range(plan.chains)]
        confidence = [take.numbers(plan.learned) for _ in range(plan.learned_chains)]
        has_lookup = plan.looked_up > 0 and take.tokens(1)[0] >= plan.sure
        most = text.room - 1
        # Drafts up to the first doubtful one.
        kept = min(1, most, plan.learned)
        while kept < min(most, plan.learned) and confidence[0][kept - 1] >= self.threshold:
            kept += 1
        drafts: list[DraftBlock] = []
        accepted: list[int] = []
        chances: list[list[float]] = []
        for chain in range(plan.chains):
            is_learned = chain < plan.learned_chains
            size = kept if is_learned else min(plan.looked_up, most) * has_lookup
            # A branch that was to leave the main chain after its end is none, nor is a lookup without a match.
            if chain and (chain > kept if is_learned else not size):
                continue
            refuse_not_finite(certainty[chain][: size + 1], start)
            count = min(counts[chain], size)
            draft = DraftBlock(
                torch.tensor(chains[chain][:size], dtype=torch.long),
                torch.tensor(confidence[chain][:kept] if is_learned else [float("nan")] * size),
                states[chain * len(self.own) + row, :kept]
                if is_learned
                else torch.empty(0, self.stages.hidden_size),
                chain=chain,
            )
            drafts.append(draft)
            accepted.append(count)
            chances.append(certainty[chain][: size + 1])
        return settled(start, drafts, accepted, chances, own[max(accepted)])

    def unload(self, texts: Sequence[Text]) -> None:
        """Let step-by-step decoding go on: say what the caches hold, and what the drafter has not read."""
        stages = self.stages
        starts = self.start_at.tolist()
        right = self.right.tolist()
        over = [not text.room for text in texts]
        lengths = zip(over, starts, right, strict=True)
        verified = [0 if done else start + count for done, start, count in lengths]
        for stage in (stages.base, stages.deep):
            stage.cache.lengths = verified
            if self.plan.chains > 1:
                stage.cache.set_shared(verified)
        if not self.plan.learned:
            return
        read = [0 if done else length for done, length in zip(over, self.read.tolist(), strict=True)]
        for stage in (stages.shallow, stages.drafter):
            stage.cache.lengths = read
            stage.cache.truncate(read)
        if stages.feedback is not None:
            counts = [count + 1 if text.room else 0 for count, text in zip(right, texts, strict=True)]
            stages.feedback.verified(self.hidden, range(len(texts)), counts)


class _Reader:
    """Takes numbers one part after another."""

    def __init__(self, values: list[float]) -> None:
        self._values = values
        self._place = 0

    def numbers(self, count: int) -> list[float]:
        self._place += count
        return self._values[self._place - count : self._place]

    def tokens(self, count: int) -> list[int]:
        return [int(number) for number in self.numbers(count)]


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
