"""The second input of a drafter with feedback, after the exit states: the verifier's states at the previous positions.

Shapes: B texts, T new tokens, n drafts of a block, D hidden.
"""

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
        self._stand_in: dict[int, Tensor] = {}  # [1, D] of each row within a block

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all texts but these."""
        self._unread = [self._unread[row] for row in rows]

    def take(self, counts: Sequence[int], width: int) -> Tensor:
        """Give away the states for the next `counts` tokens of each row, `[rows, width, D]`, padded on the right.

        The rows of all chains of a text begin with the same tokens. Tokens whose states are not known, since caches
        were cut, get zeros.
        """
        texts = len(self._unread)
        taken = self._nothing.new_zeros(len(counts), width, self._nothing.shape[-1])
        rest = list(self._unread)
        for row, count in enumerate(counts):
            if not count:
                continue
            if row in self._stand_in:
                states = self._stand_in[row]
            else:
                text = row % texts
                states = torch.cat(self._unread[text])
                rest[text] = [states[count:]]
            known = min(count, len(states))
            taken[row, count - known : count] = states[:known]
        self._unread = rest
        return taken

    def go_on(self, own: Tensor, counts: Sequence[int]) -> None:
        """Let the drafter's own states `[rows, n, D]` stand in after the first `counts` drafts of each row."""
        for row, count in enumerate(counts):
            if count:
                self._stand_in[row] = own[row, count - 1 : count]

    def verified(self, hidden: Tensor, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Take the verifier's states of a pass.

        Args:
            hidden: `[rows, T, D]`.
            rows: of each text, that of the chain that it goes on with.
            counts: tokens of each text that it keeps of this pass.
        """
        for unread, row, count in zip(self._unread, rows, counts, strict=True):
            states = hidden[row, :count]
            unread.append(states.clone())  # a captured pass writes over its outputs
        self._stand_in.clear()
