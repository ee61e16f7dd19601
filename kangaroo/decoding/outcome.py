"""What a block that runs ahead of the host leaves to the next one, on the device.

Shapes: B texts, C chains of a text, T tokens of the longest chain with the one before it, D hidden. Rows are chain by
chain, as in `KVCache`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kangaroo.decoding.cache import steps
from kangaroo.decoding.drafting import LONGEST_NGRAM
from kangaroo.decoding.planning import Plan

NONE = -1
"""Stands where there is no token; equal to none."""


@dataclass
class BlockState:
    """What one block leaves to the next.

    The verifier's tokens `own` stand in each text from `start_at` on. The first `right` of them were drafted, one more
    is committed, and nothing that begins a block has read any of them. The rows of all chains begin alike.

    Attributes:
        length: `[B]`, tokens of each text, all that are committed.
        start_at, right: `[C B]`.
        own: `[C B, T]`.
        read: `[B]`, tokens of the text that stand in the caches of what drafts.
        hidden: `[C B, T, D]`, the verifier's states of the positions before, for a drafter with feedback.
        noise: `[B, S]`, for sampled answers what tokens at each place of a text are drawn by, see `gumbel_noise`.
        text: `[B, LONGEST_NGRAM + S]`, `LONGEST_NGRAM` times `NONE`, then the tokens of each text; only with a lookup.
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
    noise: Tensor
    text: Tensor
    block: Tensor
    starts: Tensor
    most: int
    space: list[Tensor] = field(default_factory=list)
    turn: int = 0

    @classmethod
    def of(
        cls,
        like: Tensor,
        num_texts: int,
        plan: Plan,
        capacity: int,
        feedback_size: int,
        is_sampled: bool = False,
    ) -> BlockState:
        """Nothing yet.

        Args:
            like: a tensor of the dtype and device.
            num_texts: B.
            plan: what the blocks draft.
            capacity: slots of a text.
            feedback_size: D of the states that the drafter reads, or 0.
            is_sampled: whether tokens are drawn.
        """
        width = plan.longest + 1
        rows = plan.chains * num_texts
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
            noise=tokens(num_texts, capacity if is_sampled else 0),
            text=tokens(num_texts, LONGEST_NGRAM + slots),
            block=tokens(plan.chains, num_texts, width),
            starts=tokens(rows),
            most=capacity - width,
        )

    def noise_after(self, places: Tensor, count: int) -> Tensor:
        """What the `count` tokens after each place `[C B]` of the texts are drawn by, `[C B, count]`."""
        wanted = places[:, None] + 1 + steps(count, places.device)
        # What has no room is cut off later.
        wanted = wanted.clamp(max=self.noise.shape[1] - 1).view(-1, len(self.noise), count)
        return self.noise.expand(len(wanted), -1, -1).gather(2, wanted).flatten(0, 1)

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
        # The rows of all chains begin alike.
        self.own.view(-1, *own.shape).copy_(own)
        self.start_at.view(-1, texts).copy_(start_at)
        self.right.view(-1, texts).copy_(right)
        torch.clamp(start_at + right + 1, max=self.most, out=self.length)
        self.block[:, :, 0] = own[steps(texts, own.device), right]
        self.starts.view(-1, texts).copy_(self.length - 1)
