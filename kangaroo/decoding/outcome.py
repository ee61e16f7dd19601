"""What a block that runs ahead of the host reads of the one before, and what it leaves to the next.

On CUDA each of these steps is one kernel of `kangaroo.decoding.block_kernels`, where Triton can be had; here they are
by torch's operators, some twenty small kernels for the same numbers.

Shapes: B texts, C chains of a text, n learned drafts of a chain, T tokens of the longest chain with the one before it,
D hidden, R rows that begin a block: those of all learned chains, or one a text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from kangaroo.decoding.cache import KVCache, steps
from kangaroo.decoding.drafting import LONGEST_NGRAM
from kangaroo.decoding.planning import Plan

NONE = -1
"""Stands where there is no token; equal to none."""


@dataclass
class BlockState:
    """What one block leaves to the next.

    The verifier's tokens `own` stand in each text from `start_at` on. The first `right` of them were drafted, one more
    is committed, and nothing that begins a block has read any of them. The rows of all learned chains begin alike.

    Attributes:
        length: `[B]`, tokens of each text, all that are committed.
        start_at, right: `[R]`.
        own: `[R, T]`.
        read: `[B]`, tokens of the text that stand in the caches of what drafts.
        hidden: `[R, T, D]`, the verifier's states of the positions before, for a drafter with feedback.
        text: as in `look_up`.
        block: `[C, B, T]`, what is verified: the last committed token, then each chain, `NONE` after its end.
        starts: `[C B]`, the slot of the last committed token, for the rows of all chains.
        most: tokens that a text may have before a block; one that is over goes on within its row for nothing.
        space: on the host, for the numbers of blocks under way.
        turn: blocks so far.
    """

    length: Tensor
    start_at: Tensor
    right: Tensor
    own: Tensor
    read: Tensor
    hidden: Tensor
    text: Tensor
    block: Tensor
    starts: Tensor
    most: int
    space: list[Tensor] = field(default_factory=list)
    turn: int = 0

    @classmethod
    def of(cls, like: Tensor, num_texts: int, plan: Plan, capacity: int, feedback_size: int) -> BlockState:
        """Nothing yet.

        Args:
            like: a tensor of the dtype and device.
            num_texts: B.
            plan: what the blocks draft.
            capacity: slots of a text.
            feedback_size: D of the states that the drafter reads, or 0.
        """
        width = plan.longest + 1
        rows = max(1, plan.learned_chains) * num_texts
        slots = capacity if plan.looked_up else 0

        def tokens(*shape: int) -> Tensor:
            return torch.full(shape, NONE, device=like.device)

        return cls(
            length=tokens(num_texts),
            start_at=tokens(rows),
            right=tokens(rows),
            own=tokens(rows, width),
            read=tokens(num_texts),
            hidden=like.new_zeros(rows, width, feedback_size),
            text=tokens(num_texts, LONGEST_NGRAM + slots),
            block=tokens(plan.chains, num_texts, width),
            starts=tokens(plan.chains * num_texts),
            most=capacity - width,
        )

    def tensors(self) -> list[Tensor]:
        """All that a block reads and writes."""
        return [part for part in vars(self).values() if isinstance(part, Tensor)]

    def begin(self, own: Tensor, start_at: Tensor, right: Tensor) -> None:
        """Begin the next block after tokens `own [B, T]` of which none was read, from `start_at [B]` on.

        Args:
            own: the tokens.
            start_at: where they stand in each text.
            right: `[B]`, as above.
        """
        texts = len(self.length)
        for part, value in ((self.own, own), (self.start_at, start_at), (self.right, right)):
            part.view(-1, *value.shape).copy_(value)
        torch.clamp(start_at + right + 1, max=self.most, out=self.length)
        self.block[:, :, 0] = own[steps(texts, own.device), right]
        self.starts.view(-1, texts).copy_(self.length - 1)


@dataclass(frozen=True)
class Drafts:
    """What a block drafted beside its tokens.

    Attributes:
        confidence: `[L, B, n]`, in the drafts of each learned chain.
        matched: `[B]`, tokens that matched before a lookup; without one they mean nothing.
    """

    confidence: Tensor
    matched: Tensor


@dataclass(frozen=True)
class Verdicts:
    """What the verifier says along each chain.

    Attributes:
        own: `[C, B, T]`, its tokens.
        certainty: `[C, B, T]`, its probability of them.
    """

    own: Tensor
    certainty: Tensor


def by_kernels(tensor: Tensor) -> bool:
    """Whether our own kernels take the steps of a block on the device of a tensor."""
    return tensor.is_cuda and has_triton()


def look_up(state: BlockState, plan: Plan, slots: int) -> Tensor:
    """Write what a lookup knows into the last chain, as `LookupIndex.propose` finds it on the host.

    `state.text` is `[B, LONGEST_NGRAM + S]`: `LONGEST_NGRAM` times `NONE`, then the tokens of each text.

    Args:
        state: its text and length are read.
        plan: how many tokens are wanted, and how many must match.
        slots: no text is longer.

    Returns:
        How many tokens matched before, `[B]`.
    """
    if by_kernels(state.text):
        from kangaroo.decoding import block_kernels

        return block_kernels.look_up(state, plan, slots)
    text = state.text[:, : LONGEST_NGRAM + slots]
    # The tokens before each position, [B, S, LONGEST_NGRAM].
    before = text.unfold(1, LONGEST_NGRAM, 1)[:, :-1]
    size = before.shape[1]
    lengths = state.length.clamp(max=size - 1)  # a text that is over may have grown beyond what is read
    ending = before[steps(len(text), text.device), lengths]
    matched = (before == ending[:, None]).flip(-1).cumprod(dim=-1).sum(dim=-1)
    position = steps(size, text.device)
    # The longest match, and of these the last one.
    score = torch.add(position, matched, alpha=size) * (position < lengths[:, None])
    best = score.amax(dim=1)
    start = best % size
    turn = steps(plan.looked_up, text.device) % (lengths - start).clamp(min=1)[:, None]
    found = text[:, LONGEST_NGRAM:].gather(1, start[:, None] + turn)
    matched = best // size
    state.block[-1, :, 1 : 1 + plan.looked_up] = found.where(matched[:, None] >= plan.sure, NONE)
    return matched


def accept(
    state: BlockState, plan: Plan, drafts: Drafts, verdicts: Verdicts, threshold: float, fed_back: bool
) -> tuple[Tensor, Tensor]:
    """Accept the chain that goes furthest, and leave the state to the next block.

    Args:
        state: the tokens of all chains are read from it.
        plan: what the block drafted.
        drafts, verdicts: of this block.
        threshold: confidence below which a learned draft ends its chain; 0 for none.
        fed_back: whether the drafter reads all tokens once more, since it reads the verifier's states.

    Returns:
        The numbers for the host `[B, …]` int32: the winning chain's `own`, `matched`, the tokens of each chain, the
        accepted drafts of each chain, and as the bits of float32 all `confidence` and all `certainty`, so that one
        transfer serves both kinds. And the rows of the winning chains, `[R]`.
    """
    if by_kernels(state.block):
        from kangaroo.decoding import block_kernels

        return block_kernels.accept(state, plan, drafts, verdicts, threshold, fed_back)
    texts = len(state.length)
    rows = steps(texts, state.length.device)
    # Accepted drafts: while they are the verifier's, up to the first doubtful one.
    agrees = state.block[..., 1:] == verdicts.own[..., :-1]
    if threshold and plan.learned:
        sure = drafts.confidence[0].double() >= threshold
        goes_on = sure[:, :-1].cumprod(dim=1).bool()
        agrees[: plan.learned_chains, :, 1 : plan.learned] &= goes_on
    counts = agrees.cumprod(dim=2).sum(dim=2)  # [C, B]
    winner = counts.argmax(dim=0)
    own = verdicts.own[winner, rows]
    whole = [own, drafts.matched[:, None], *state.block[..., 1:], *counts[..., None]]
    floats = torch.cat([*drafts.confidence, *verdicts.certainty], 1)
    numbers = torch.cat([torch.cat(whole, 1).int(), floats.view(torch.int32)], 1)
    before = state.length.clone()
    if plan.learned:  # the last draft was not read; with feedback all are read once more
        torch.add(before, 0 if fed_back else counts[0].clamp(max=plan.learned - 1), out=state.read)
    if plan.looked_up:
        places = before[:, None] + steps(own.shape[1], own.device)
        state.text[:, LONGEST_NGRAM:].scatter_(1, places, own)
    state.begin(own, before, counts.amax(dim=0))
    return numbers, (winner * texts + rows).repeat(len(state.own) // texts)


def share(state: BlockState, cache: KVCache, winners: Tensor) -> None:
    """Give the rows of all chains what the winning chain's row `winners [R]` has read in this block."""
    if by_kernels(winners):
        from kangaroo.decoding import block_kernels

        block_kernels.share(state, cache, winners)
        return
    texts = len(state.length)
    first = state.start_at[:texts] - 1
    slots = first[:, None] + steps(state.own.shape[1], first.device)
    cache.share_from(winners[:texts, None], slots)
