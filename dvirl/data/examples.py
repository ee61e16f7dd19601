"""Supervised records as tokens and targets."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def make_example(prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """A record's tokens with their targets, int64 `[T, 2]`.

    A token's target is the token after it if that one belongs to the response, else -1.
    """
    tokens = torch.tensor([*prompt, *response])
    targets = torch.full_like(tokens, -1)
    start = len(prompt)
    targets[start - 1 : -1] = tokens[start:]
    return torch.stack([tokens, targets], dim=1)


def collate(examples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and targets `[B, T]` of some examples, padded on the right; the targets of prompts and padding are -1."""
    padded = pad_sequence(list(examples), batch_first=True, padding_value=-1)
    tokens, targets = padded.unbind(dim=-1)
    return tokens.clamp(min=0), targets
