"""What a drafter with feedback reads beside the exit states: the verifier's states of the positions before.

Shapes: B texts, T new tokens, n drafts of a block, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Feedback:
    """The states of the positions before the tokens that the drafter of each text has not read.

    After a verification these are the verifier's. Within a block, where it has not been yet, the drafter's own state
    stands in for the position of each draft; when the block is verified, the drafter reads its tokens once more.

    Args:
        num_texts: B.
        like: a tensor of the dtype and device, its last dimension D.
    """

    def __init__(self, num_texts: int, like: Tensor) -> None:
        self._nothing = like.new_zeros(1, like.shape[-1])
        self.clear(num_texts)

    def clear(self, num_texts: int) -> None:
        """Begin with empty texts; before their first token there is no state."""
        self._unread = [[self._nothing] for _ in range(num_texts)]  # [T, D] each
        self._own: list[Tensor | None] = [None] * num_texts  # [1, D]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all texts but these."""
        self._unread = [self._unread[row] for row in rows]
        self._own = [self._own[row] for row in rows]

    def take(self, counts: Sequence[int], width: int) -> Tensor:
        """Give away the states for the next `counts` tokens of each text, `[B, width, D]`, padded on the right.

        Tokens whose states are not known, since caches were cut, get zeros.
        """
        taken = self._nothing.new_zeros(len(counts), width, self._nothing.shape[-1])
        for row, count in enumerate(counts):
            if not count:
                continue
            own = self._own[row]
            states = torch.cat(self._unread[row]) if own is None else own
            known = min(count, len(states))
            taken[row, count - known : count] = states[:known]
            self._unread[row] = [states[known:]]
        return taken

    def go_on(self, own: Tensor, counts: Sequence[int]) -> None:
        """Let the drafter's own states `[B, n, D]` stand in after the first `counts` drafts of each text."""
        for row, count in enumerate(counts):
            if count:
                self._own[row] = own[row, count - 1 : count]

    def verified(self, hidden: Tensor, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Take the verifier's states of a pass.

        Args:
            hidden: `[rows, T, D]`.
            rows: of each text, that of the chain that it goes on with.
            counts: tokens of each text that it keeps of this pass.
        """
        for text, (row, count) in enumerate(zip(rows, counts, strict=True)):
            self._unread[text].append(hidden[row, :count].clone())  # a captured pass writes over its outputs
            self._own[text] = None
