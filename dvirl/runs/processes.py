"""Several processes on one run, started by `accelerate launch` or torchrun; one alone is the plain case.

All processes hold the same weights, buffer, counters and random generators, and so come to the same decisions. What
takes time is shared out: each answers its share of the prompts, and takes the gradient of its share of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dvirl.buffer import TrainingBatch
from dvirl.rollout import Rollout
from dvirl.runs.errors import DvirlError

Made = TypeVar("Made")


class Processes:
    """The processes of this run. What one of them calls all must call, in the same order.

    Args:
        device: "cpu" keeps them off an accelerator that is there.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
        first: whether this is the first, which alone writes files and speaks.

    Raises:
        DvirlError: from any call by which they meet, if one of them has ended.
    """

    def __init__(self, device: str = "auto") -> None:
        state = PartialState(cpu=device == "cpu")
        self.rank, self.count, self.first = state.process_index, state.num_processes, state.process_index == 0
        self._device = state.device

    def share(self, items: Sequence[Made]) -> Sequence[Made]:
        """This process's share of a sequence: one of every `count`."""
        return items[self.rank :: self.count]

    def share_of(self, batch: TrainingBatch) -> TrainingBatch:
        """This process's share of a batch's responses, with their records; there may be none."""
        return batch if self.count == 1 else batch.every(self.count, self.rank)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Say it in one sentence if the others are not there any more."""
        try:
            yield
        except RuntimeError as error:
            lost = f"process {self.rank} of {self.count} has lost another ({' '.join(str(error).split())[:200]})"
            raise DvirlError(f"{lost}; what was saved last is whole, go on from there") from error

    def once(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, for all."""
        made = [make() if self.first else None]
        with self._meeting():
            found: list[Made] = broadcast_object_list(made)
        return found[0]

    def gathered(self, items: list[Made]) -> list[Made]:
        """The items of all."""
        with self._meeting():
            found: list[Made] = gather_object(items)
        return found

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return number if self.count == 1 else int(self._all(torch.tensor([number], device=self._device)).max())

    def sum(self, own: Tensor) -> Tensor:
        """The sum of all processes' tensors, which are of one shape."""
        with self._meeting():
            total: Tensor = reduce(own, "sum") if self.count > 1 else own
        return total

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients in all processes; one that has none counts as zero."""
        if self.count == 1:
            return
        own = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        vector_to_parameters(self.sum(parameters_to_vector(own)), own)
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient

    def rollouts(self, own: Rollout, count: int) -> Rollout:
        """All `count` responses, in the prompts' order, of which each process has its share's."""
        if self.count == 1:
            return own
        wide = torch.tensor([own.tokens.shape[1], own.verifier_hidden.shape[1]], device=self._device)
        width, reach = self._all(wide).view(-1, 2).amax(dim=0).tolist()
        shapes = {
            "tokens": [width],
            "prompt_lens": [],
            "response_lens": [],
            "verifier_hidden": [reach, own.verifier_hidden.shape[2]],
            "verifier_confidence": [reach],
        }
        rows = {name: self._rows(getattr(own, name), count, shape) for name, shape in shapes.items()}
        return Rollout(**rows, max_new_tokens=own.max_new_tokens)

    def _rows(self, own: Tensor, count: int, shape: list[int]) -> Tensor:
        """`[count, *shape]` in the prompts' order, of rows of which each process has its share's, padded with zeros."""
        most = -(-count // self.count)
        padded = own.new_zeros(most, *shape)
        padded[tuple(map(slice, own.shape))] = own
        return self._all(padded).view(self.count, most, *shape).transpose(0, 1).flatten(0, 1)[:count]

    def _all(self, own: Tensor) -> Tensor:
        """All processes' tensors, which are of one shape, along the first dimension."""
        with self._meeting():
            found: Tensor = gather(own)
        return found
