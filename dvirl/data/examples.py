"""Supervised records as tokens and targets."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def make_example(prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """`[T, 2]`: a record's tokens, and behind each the next one where that is the response's, else -1."""
    targets = [*[-1] * (len(prompt) - 1), *response, -1]
    return torch.tensor([[*prompt, *response], targets]).T


def collate(examples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and targets `[B, T]` of some examples, padded on the right; prompts and padding are no targets."""
    padded = pad_sequence(list(examples), batch_first=True, padding_value=-1)
    return padded[..., 0].clamp(min=0), padded[..., 1]
