"""Several processes on one run, started by `accelerate launch` or torchrun; one alone is the plain case.

All processes hold the same weights, buffer, counters and random generators, so they make the same decisions. The slow
work is shared out: each answers its share of the prompts, and computes the gradient of its share of a batch.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, pad_across_processes, reduce
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dvirl.runs.errors import DvirlError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Item = TypeVar("Item")
LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_")
"""How the environment variables begin that `accelerate launch` and torchrun set."""
Record = TypeVar("Record", bound="DataclassInstance")


class Processes:
    """The processes of this run. A method that one of them calls must be called by all, in the same order.

    Args:
        device: "cpu" keeps them off an accelerator.

    Attributes:
        rank: which one this is, from 0.
        count: number of processes.
        first: whether this is the first, which alone writes files and prints.

    Raises:
        DvirlError: from any method in which they meet, if one of them has ended.
    """

    def __init__(self, device: str = "auto") -> None:
        state = PartialState(cpu=device == "cpu")
        self.rank = state.process_index
        self.count = state.num_processes
        self.first = self.rank == 0
        self._device = state.device

    def announce(self) -> None:
        """Print the number of processes where a launcher started them."""
        launched = any(name.startswith(LAUNCHERS) for name in os.environ)
        if self.first and (self.count > 1 or launched):
            alone = self.count == 1 and self._device.type == "cpu"
            hint = "; on a CPU, torchrun --nproc_per_node N starts several" if alone else ""
            print(f"processes: {self.count}{hint}", flush=True)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share of a sequence: one of every `count`."""
        return items[self.rank :: self.count]

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Say it in one sentence if another process has ended."""
        try:
            yield
        except RuntimeError as error:
            raise DvirlError(
                f"process {self.rank} of {self.count} has lost another ({' '.join(str(error).split()):.200}); "
                "what was saved last is whole, go on from there"
            ) from error

    def once(self, make: Callable[[], Item]) -> Item:
        """What the first process makes, for all."""
        items = [make() if self.first else None]
        with self._meeting():
            received: list[Item] = broadcast_object_list(items)
        return received[0]

    def gathered(self, items: list[Item]) -> list[Item]:
        """The items of all processes."""
        with self._meeting():
            return list(gather_object(items))

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return max(self.gathered([number]))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, which have one shape."""
        with self._meeting():
            total: Tensor = reduce(tensor, "sum")
        return total

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients in all processes, or none if no process has one."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        own = gradients[0].new_tensor([each.grad is not None for each in parameters])
        summed = self.sum(torch.cat([parameters_to_vector(gradients), own]))
        vector_to_parameters(summed[: -len(own)], gradients)
        # A gradient of zero would count as a step of the optimizer, and let its moments go on.
        for parameter, gradient, owners in zip(parameters, gradients, summed[-len(own) :], strict=True):
            parameter.grad = gradient if owners else None

    def gather_rows(self, record: Record, count: int) -> Record:
        """Undo `share`: put together the rows that the processes had.

        Args:
            record: a dataclass whose tensors `[R, …]` have this process's rows, at least one; other fields are equal in
                all processes. Shorter tensors are padded with zeros.
            count: number of rows of all processes together.

        Returns:
            The record with tensors `[count, …]`, in the order of the sequence that was shared out.
        """
        if self.count == 1:
            return record
        tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
        with self._meeting():
            for dim in range(max(tensor.ndim for tensor in tensors.values())):
                tensors = pad_across_processes(tensors, dim)
            tensors = gather(tensors)
        # One process's rows stand after another's, [P * R, …]; row i of the whole is row i // P of process i % P.
        for name, tensor in tensors.items():
            by_process = tensor.unflatten(0, (self.count, -1))
            tensors[name] = by_process.transpose(0, 1).flatten(0, 1)[:count]
        return replace(record, **tensors)
