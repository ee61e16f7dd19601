"""Blocks that run ahead of the host: the next one starts before the host has seen what the last one committed.

What a block needs of the one before (the text, how many drafts were right, the verifier's states) stays on the device,
where drafts, lookup, verification and acceptance are one captured pass. The host reads each block's outcome while the
next is under way. It can be so where a block does not depend on what the host alone knows: answers all of whose blocks
draft by one `Plan`, greedy ones or sampled ones, for which the noise of every place is on the device. A confidence stop
masks the drafts beyond it, and what is committed beyond a text's limit is cut off.

Shapes: B texts, C chains of a text, n drafts of a chain, D hidden. Rows are chain by chain, as in `KVCache`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

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
from kangaroo.decoding.outcome import NONE, BlockState
from kangaroo.decoding.passes import Outputs, padded, view
from kangaroo.decoding.planning import Plan
from kangaroo.decoding.sampling import Drawn
from kangaroo.decoding.speculate import Text
from kangaroo.decoding.stages import Chain, Stage, Stages

UNDER_WAY = 2
"""Blocks that are started before the host waits for the first of them."""

Results = list[Verification | None]
"""What each text commits; None for texts that are over."""


def plan_ahead(stages: Stages, texts: Sequence[Text], config: DecodeConfig) -> Plan | None:
    """What each block of these texts drafts if the next blocks can run ahead, else None."""
    passes = stages.passes
    if passes.graphs is None or not passes.begun or config.target != "base":
        return None
    if passes.device.type == "cuda" and not has_triton():
        return None
    if config.deterministic or config.keep_states:
        return None
    if config.draft_temperature and not config.temperature:  # drafts by noise that the host has
        return None
    plans = {text.policy.ahead() for text in texts if text.room}
    if len(plans) > 1:
        return None
    plan = plans.pop()
    if plan is None or plan.longest >= PASS_ROWS:
        return None
    return plan


def run_ahead(
    stages: Stages, texts: Sequence[Text], plan: Plan, config: DecodeConfig, threshold: float
) -> Iterator[Results]:
    """Decode blocks of one plan until the texts want other blocks, or half of them are over.

    Args:
        stages, plan: see `plan_ahead`.
        texts: at least one of them is not over.
        config, threshold: how tokens are drawn; confidence below which a draft ends its chain, 0 for none.

    Yields:
        After each block what the texts commit; the caller appends it.

    Raises:
        ValueError: if a logit of the verifier is not finite.
    """
    blocks = _Blocks(stages, len(texts), plan, config, threshold)
    blocks.load(texts)
    under_way: deque[_Sent] = deque()
    goes_on = True
    # Tokens that the texts' blocks committed so far, and the number of these blocks. The first block is made up.
    num_committed = 1
    num_blocks = 1
    while any(text.room for text in texts):
        goes_on = goes_on and _want(texts, plan)
        # Start no block if those under way will probably fill the room that is left.
        expected = len(under_way) * num_committed / num_blocks
        room = max(text.room for text in texts)
        if goes_on and len(under_way) < UNDER_WAY and room > expected:
            longest = max(len(text.tokens) for text in texts)
            most = len(under_way) * (plan.longest + 1)  # tokens of the blocks under way
            under_way.append(blocks.start(longest + most))
            if blocks.timed is not None:
                for text in texts:
                    text.policy.timed(plan, *blocks.timed)
        elif under_way:
            results = blocks.receive(under_way.popleft(), texts)
            for result in results:
                if result:
                    num_committed += result.block_len
                    num_blocks += 1
            yield results
        else:
            blocks.unload(texts)
            return


def _want(texts: Sequence[Text], plan: Plan) -> bool:
    """Whether more than half of several texts are left, and all of these want blocks of this plan."""
    running = [text for text in texts if text.room]
    if len(texts) > 1 and 2 * len(running) <= len(texts):
        return False
    return all(text.policy.ahead() == plan for text in running)


@dataclass(frozen=True)
class _Sent:
    """One block's outcome on its way to the host.

    Attributes:
        numbers: see `_Numbers`.
        arrived: says when they are there; None without a GPU.
        states: `[rows, n, D]`, the exit states that the learned drafts were made from; without any `[B, T, D]`, the
            verifier's.
    """

    numbers: Tensor
    arrived: torch.cuda.Event | None
    states: Tensor


class _Blocks:
    """Blocks of one plan for some texts.

    Args:
        stages: the model; it keeps the state of the blocks.
        num_texts: B.
        plan: what they draft.
        config, threshold: see `run_ahead`.

    Attributes:
        timed: milliseconds that the block started last takes the device, and slots that it reads; None where that was
            not measured.
    """

    def __init__(
        self, stages: Stages, num_texts: int, plan: Plan, config: DecodeConfig, threshold: float
    ) -> None:
        self.stages = stages
        self.plan = plan
        self.config = config
        self.threshold = threshold
        self.key = (num_texts, plan, config.sampling, config.draft_sampling, threshold)
        if self.key not in stages.ahead:  # kept, since captured blocks read and write it
            cache = stages.deep.cache
            feedback_size = stages.hidden_size if stages.feedback else 0
            is_sampled = config.sampling is not None
            state = BlockState.of(cache.keys[0], num_texts, plan, cache.capacity, feedback_size, is_sampled)
            stages.ahead[self.key] = state
        self.state: BlockState = stages.ahead[self.key]
        self.timed: tuple[float, int] | None = None

    @property
    def _reader(self) -> Stage:
        """What begins a block: what drafts or, without learned drafts, the verifier."""
        return self.stages.shallow if self.plan.learned else self.stages.deep

    def load(self, texts: Sequence[Text]) -> None:
        """Begin after some texts as they are."""
        stages, state = self.stages, self.state
        width = self.plan.longest + 1
        unread = self._unread(texts)
        if max(map(len, unread)) > width:  # what drafts has not followed for a while: let it catch up
            stages.read([tokens[:-1] for tokens in unread])
            unread = self._unread(texts)
        counts = list(map(len, unread))
        device = state.own.device
        own = padded(unread, width).to(device)
        start_at = torch.tensor(self._reader.cache.lengths).to(device)
        right = (torch.tensor(counts) - 1).to(device)
        state.begin(own, start_at, right)
        if stages.feedback and self.plan.learned:
            states = stages.feedback.take(counts, width)
            state.hidden.view(-1, *states.shape).copy_(states)
        if self.plan.looked_up:
            before = [NONE] * LONGEST_NGRAM
            rows = [before + text.tokens for text in texts]
            state.text.copy_(padded(rows, state.text.shape[1], NONE))
        if self.config.sampling:
            for row, text in enumerate(texts):
                assert text.noise is not None
                places = slice(text.prompt_len, text.prompt_len + len(text.noise))
                state.noise[row, places] = text.noise.to(device)
        if self.plan.branches:
            for cache in stages.caches():
                cache.share(cache.chains)

    def _unread(self, texts: Sequence[Text]) -> list[list[int]]:
        """The last tokens of each text, which what begins a block has not read; one at least."""
        unread = []
        for text, length in zip(texts, self._reader.cache.lengths, strict=True):
            start = length if text.room else -1
            unread.append(text.tokens[start:])
        return unread

    def start(self, longest: int) -> _Sent:
        """Start the next block; no text is longer than `longest` then."""
        state = self.state
        graphs = self.stages.passes.graphs
        assert graphs is not None
        slots = view(longest + self.plan.longest + 1, self.stages.deep.cache.capacity)
        key = ("block", self.key, slots)
        numbers, states = graphs.in_place(key, lambda: self._block(slots), state.tensors())
        ms = graphs.ms.get(key)
        self.timed = None if ms is None else (ms, slots)
        states = states.clone()  # the next block writes over it
        if not numbers.is_cuda:
            return _Sent(numbers.clone(), None, states)
        if not state.space:
            for _ in range(UNDER_WAY + 1):
                state.space.append(torch.empty_like(numbers, device="cpu").pin_memory())
        state.turn += 1
        space = state.space[state.turn % len(state.space)]
        space.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return _Sent(space, arrived, states)

    def _block(self, slots: int) -> Outputs:
        """Draft, verify and accept, from the state to the state; numbers and states for `_Sent`."""
        stages = self.stages
        caches = stages.caches()
        lengths = [cache.lengths for cache in caches]
        try:
            return self._run(slots)
        finally:
            stages.passes.fixed = None
            for cache, before in zip(caches, lengths, strict=True):
                cache.lengths = before

    def _run(self, slots: int) -> Outputs:
        from kangaroo.decoding.block_kernels import accept, look_up, share

        stages, state, plan = self.stages, self.state, self.plan
        fed_back = bool(stages.feedback)

        # 1. Draft: the learned chain with its branches, and after it what a lookup knows.
        confidence = state.block[..., :0].float()
        states = state.hidden[:, :0]
        if plan.learned:
            chain = self._draft(slots)
            shape = (plan.chains, -1, plan.learned)
            state.block[..., 1 : 1 + plan.learned] = chain.tokens.view(shape)
            confidence = chain.confidence.view(shape)
            states = chain.exit_states
        matched = look_up(state, plan, slots) if plan.looked_up else state.length

        # 2. Verify: the last committed token and each chain. The embedding is the ordinary kernel that must stand
        # between `starts` and our own kernels.
        stages.passes.fixed = FixedShape(state.starts, slots)
        tokens = state.block.clamp(min=0) if plan.looked_up else state.block
        drawn = None
        if self.config.sampling:
            # Before our own kernels, so that nothing stands between these and the head's.
            keys = state.noise_after(state.starts, tokens.shape[-1])
            drawn = Drawn(self.config.sampling, keys)
        hidden = stages.deep(stages.base(tokens.flatten(0, 1)))
        own, certainty = stages.deep.best(hidden, drawn=drawn)

        # 3. Accept: the chain that goes furthest.
        drafts = (confidence, matched)
        verdicts = (own, certainty)
        numbers, winners = accept(state, plan, drafts, verdicts, self.threshold, fed_back)
        if plan.branches:
            for stage in (stages.base, stages.deep):
                share(state, stage.cache, winners)
        if fed_back:
            torch.index_select(stages.fed_back(hidden), 0, winners, out=state.hidden)
            states = states if plan.learned else state.hidden
        return numbers, states

    def _draft(self, slots: int) -> Chain:
        """Learned drafts of all chains; the rows of all read what was committed."""
        stages, state = self.stages, self.state
        feedback = state.hidden if stages.feedback else None
        stages.passes.fixed = FixedShape(state.start_at, slots)
        choose = None
        if self.config.draft_sampling:
            choose = stages.chooser(self.config, state.noise_after(state.length - 1, self.plan.learned))
        texts = len(state.length)
        return stages.chain(state.own, state.right, feedback, self.plan.learned, texts, choose=choose)

    def receive(self, sent: _Sent, texts: Sequence[Text]) -> Results:
        """What a block commits to the texts as they are now."""
        if sent.arrived is not None:
            sent.arrived.synchronize()
        plan = self.plan
        split = plan.longest + 2 + plan.chains * (plan.longest + 1)
        whole = sent.numbers[:, :split].tolist()
        floats = sent.numbers[:, split:].view(torch.float32).tolist()
        results: Results = []
        for row, text in enumerate(texts):
            if not text.room:
                results.append(None)
                continue
            numbers = _Numbers(whole[row], floats[row], plan)
            states = sent.states[row :: len(texts)]
            results.append(self._result(numbers, states, text))
        if not plan.learned and self.stages.feedback:
            # The drafter reads these states when it drafts again.
            counts = [result.num_accepted + 1 if result else 0 for result in results]
            self.stages.feedback.verified(sent.states, range(len(texts)), counts)
        return results

    def _result(self, numbers: _Numbers, states: Tensor, text: Text) -> Verification:
        """One text's block by what `_run` sent; what has no room is cut off."""
        plan = self.plan
        start = len(text.tokens)
        room = text.room - 1  # for drafts
        # Learned drafts count up to the first doubtful one, a lookup after all of them if enough tokens matched.
        limit = min(room, plan.learned)
        num_learned = 0
        doubts = False
        while num_learned < limit and not doubts:
            doubts = not numbers.confidence[0][num_learned] >= self.threshold  # NaN is doubt, too
            num_learned += 1
        num_looked_up = 0
        if not doubts and num_learned == plan.learned and numbers.matched >= plan.sure:
            num_looked_up = min(room - num_learned, plan.looked_up)
        drafts: list[DraftBlock] = []
        accepted: list[int] = []
        chances: list[list[float]] = []
        # Branch b leaves the main chain at draft b; where the main chain is shorter, there is none.
        for chain in range(min(plan.branches, num_learned) + 1):
            unknown = [] if chain else [math.nan] * num_looked_up
            confidence = [*numbers.confidence[chain][:num_learned], *unknown]
            size = len(confidence)
            certainty = numbers.certainty[chain][: size + 1]
            refuse_not_finite(certainty, start)
            tokens = torch.tensor(numbers.chains[chain][:size], dtype=torch.long)
            exit_hidden = states[chain, :num_learned]
            drafts.append(DraftBlock(tokens, torch.tensor(confidence), exit_hidden, chain=chain))
            accepted.append(min(numbers.counts[chain], size))
            chances.append(certainty)
        return settled(start, drafts, accepted, chances, numbers.own[max(accepted)])

    def unload(self, texts: Sequence[Text]) -> None:
        """Let step-by-step decoding go on: say what the caches hold, and what the drafter has not read."""
        stages = self.stages
        starts = self.state.start_at[: len(texts)].tolist()
        right = self.state.right[: len(texts)].tolist()
        verified = [start + count for start, count in zip(starts, right, strict=True)]
        read = self.state.read.tolist()
        counts = [count + 1 for count in right]
        for row, text in enumerate(texts):
            if not text.room:  # nothing is kept of a text that is over
                verified[row] = 0
                read[row] = 0
                counts[row] = 0
        for stage in (stages.base, stages.deep):
            stage.cache.lengths = verified
            if self.plan.branches:
                stage.cache.set_shared(verified)
        if not self.plan.learned:
            return
        for stage in (stages.shallow, stages.drafter):
            stage.cache.lengths = read
        if stages.feedback:
            stages.feedback.verified(self.state.hidden, range(len(texts)), counts)


class _Numbers:
    """What `_run` sends of one text.

    Attributes:
        own: the verifier's tokens after the last committed one and along the winning chain.
        matched: tokens before a lookup that matched.
        chains: tokens of each chain.
        counts: accepted drafts of each chain.
        confidence: in the learned drafts of each chain.
        certainty: the verifier's, of its tokens along each chain.
    """

    def __init__(self, whole: list[int], floats: list[float], plan: Plan) -> None:
        width = plan.longest + 1
        self.own = whole[:width]
        self.matched = whole[width] if plan.looked_up else 0
        self.counts = whole[len(whole) - plan.chains :]
        self.chains = _parts(whole[width + 1 :], plan.longest, plan.chains)
        self.confidence = _parts(floats, plan.learned, plan.chains)
        self.certainty = _parts(floats[plan.learned * plan.chains :], width, plan.chains)


def _parts(values: list[Any], size: int, count: int) -> list[list[Any]]:
    """The first `count` parts of some values, of one size."""
    return [values[part * size : (part + 1) * size] for part in range(count)]
