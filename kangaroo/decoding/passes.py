"""How the passes of one decoding run: as they are, padded to one shape, or captured once as CUDA graphs.

Steps of a small model are mostly the starting of kernels; a CUDA graph starts them all at once. It needs shapes that do
not depend on the length of the text: then tokens are padded, and every query reads a fixed number of cache slots.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kangaroo.decoding.cache import FixedShape, KVCache
from kangaroo.decoding.layers import OWN_PROMPT_ON_CPU

Outputs = tuple[Tensor, ...]
"""What a pass gives."""
Pass = Callable[..., Outputs]

WARM_UPS = 3
"""Runs before a capture, in which libraries choose their kernels and allocate what they keep."""
SHORTEST_VIEW = 256
"""Slots that a captured pass reads at least."""
PADDING_STEP = 8
"""Captured passes of more than two tokens have a multiple of this many, so that few shapes are captured."""
PROMPT_STEPS = {512: 64, 2048: 256}
"""The same for passes of more than two of these steps, which read prompts, by their tokens at most. Longer prompts are
read as they are."""
TIMED_REPLAYS = 5
"""Replays over which the time of a captured pass is measured."""
OWN_PROMPT = 192
"""Tokens of a prompt that our own kernels on CUDA read, at most."""
OWN_PROMPT_WORK = 3 * 2**28
"""The same, times the weights of a layer: our kernels read these again for every 16 tokens, so where they are large a
library is faster, which reads them once. (On an H200 that took 2 ms for up to 500 tokens, also for layers 2.8 times as
large as the default model's.)"""


def view(needed: int, capacity: int) -> int:
    """Slots that a pass of fixed shape reads: the power of two that holds what is needed, up to the capacity."""
    power = 1 << (needed - 1).bit_length()
    return min(capacity, max(SHORTEST_VIEW, power))


def padded(rows: Sequence[Sequence[int]], width: int, filler: int = 0) -> Tensor:
    """Token ids `[rows, width]` on the host, a filler after each row's own."""
    whole = []
    for row in rows:
        padding = [filler] * (width - len(row))
        whole.append([*row, *padding])
    return torch.tensor(whole)


class Passes:
    """Runs the passes of one decoding.

    Args:
        device: of the model.
        positions: positions of every pass after the prefill; 0 for as many as there are tokens.
        graphs: replays captured passes; None runs them as they are.

    Attributes:
        fixed: the shape of the pass that is running; None where it reads what is filled. Stages look at it.
        begun: whether the prompts are in the caches.
        prompt_lens: tokens of each row of the pass that is running, without its padding; empty outside of passes.
        own_kernels: whether our own kernels on CUDA compute all layers, and a position has the same angles in every
            text. Then prompts can be read by captured passes, too. Otherwise they are read as they are.
        own_prompt: tokens of a prompt that our own kernels on CUDA read, at most.
        own_on_cpu: whether our own kernels on a CPU compute the layers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.positions = 0
        self.graphs: CudaGraphs | None = None
        self.fixed: FixedShape | None = None
        self.begun = False
        self.prompt_lens: Sequence[int] = ()
        self.own_kernels = False
        self.own_prompt = OWN_PROMPT
        self.own_on_cpu = False

    def takes_prompt(self, longest: int) -> bool:
        """Whether prompts of up to this many tokens are read by a captured pass."""
        return self.graphs is not None and self.own_kernels and longest <= max(PROMPT_STEPS)

    def read_alone(self, longest: int) -> bool:
        """Whether prompts of up to this many tokens are read one by one.

        A library rounds by the shape of a batch, our kernels do not.
        """
        if self.own_on_cpu:
            return longest > OWN_PROMPT_ON_CPU
        return self.graphs is not None and not (self.own_kernels and longest <= self.own_prompt)

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids `[B, T]` on the host, zeros after each row's own."""
        longest = max(1, *map(len, rows))
        return padded(rows, self.width(longest, len(rows)))

    def width(self, longest: int, rows: int) -> int:
        """Positions T of a pass over some rows, the longest of which has this many tokens."""
        takes_prompt = self.takes_prompt(longest)
        is_fixed = self.graphs or self.positions
        if not is_fixed or not (self.begun or takes_prompt):
            return longest
        if longest > 2 * PADDING_STEP and takes_prompt:
            step = next(step for most, step in PROMPT_STEPS.items() if longest <= most)
            longest = step * math.ceil(longest / step)
        elif longest > 2:  # one row has room for eight drafts; two of eight tokens are a tile of our kernels
            spare = 1 if rows == 1 else 0
            num_steps = math.ceil((longest - spare) / PADDING_STEP)
            longest = PADDING_STEP * num_steps + spare
        return max(self.positions, longest)

    def run(
        self,
        name: Hashable,
        function: Pass,
        caches: Sequence[KVCache],
        counts: Sequence[int],
        *inputs: Tensor,
        ahead: int = 0,
        starts: Tensor | None = None,
    ) -> Outputs:
        """Run a pass that adds `counts` tokens, row by row, to some equally long caches.

        Args:
            name: tells captured passes apart.
            function: the pass; its stages write to the caches.
            caches: those that it writes to.
            counts: tokens of each row; the next pass overwrites what padding wrote.
            inputs: tensors on the host or the device, the first one `[B, T, …]`.
            ahead: tokens that it reads after its inputs, each chosen on the device; they are not counted.
            starts: `[B]`, the caches' lengths on the device, for passes that the host does not wait for.

        Returns:
            What the function returns, on the device, until the next pass.
        """
        # The prefill by a library reads and writes what it needs; every other pass can have a fixed shape.
        before = caches[0].lengths
        width = inputs[0].shape[1]
        is_prompt = not caches[0].length
        is_fixed = self.takes_prompt(width) if is_prompt else self.graphs or self.positions
        if is_fixed:
            slots = view(max(before) + width + ahead, caches[0].capacity)
            if self.positions and not is_prompt:
                slots = caches[0].capacity
            if starts is None:
                starts = torch.tensor(before)
            by_library = is_prompt and width > self.own_prompt
            key = ((name, by_library), slots)  # later passes can be as wide as a prompt
            outputs = self._run_fixed(key, function, caches, starts, *inputs, by_library=by_library)
        else:
            outputs = self._run_as_it_is(function, counts, inputs)
        # Count each row's own tokens only: the next pass overwrites its padding.
        for cache in caches:
            cache.lengths = [start + count for start, count in zip(before, counts, strict=True)]
        return outputs

    def _run_as_it_is(self, function: Pass, counts: Sequence[int], inputs: Sequence[Tensor]) -> Outputs:
        """Run a pass over as many tokens as there are."""
        self.prompt_lens = counts
        try:
            with torch.autocast(self.device.type, enabled=False):  # a caller's would round what is kept
                return function(*(tensor.to(self.device) for tensor in inputs))
        finally:
            self.prompt_lens = ()

    def _run_fixed(
        self,
        key: tuple[Hashable, int],
        function: Pass,
        caches: Sequence[KVCache],
        starts: Tensor,
        *inputs: Tensor,
        by_library: bool = False,
    ) -> Outputs:
        """Run a pass whose shapes do not depend on the caches' lengths, captured if possible.

        The key is its name with the slots that it reads. A pass over prompts by a library reads its own tokens alone.
        """
        before = caches[0].lengths
        _, slots = key

        def fixed(starts: Tensor, *tensors: Tensor) -> Outputs:
            for cache in caches:  # a capture runs the function more than once
                cache.lengths = before
            self.fixed = None if by_library else FixedShape(starts, slots)
            try:
                return function(*tensors)
            finally:
                self.fixed = None

        with torch.autocast(self.device.type, enabled=False):
            if self.graphs:
                return self.graphs(key, fixed, starts, *inputs)
            return fixed(starts.to(self.device), *(tensor.to(self.device) for tensor in inputs))


@dataclass(frozen=True)
class _Captured:
    """A captured pass and the memory that it reads and writes.

    Attributes:
        graph: replays it.
        inputs: what it reads.
        pinned: for inputs that come from the host, where they are put together there.
        staging: all of them, on the host and on the device: one copy serves all.
        outputs: what it writes.
        copied: says when the device has the inputs of the last replay.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    pinned: list[Tensor | None]
    staging: tuple[Tensor, Tensor]
    outputs: Outputs
    copied: torch.cuda.Event


class CudaGraphs:
    """Captured passes over the same caches and weights.

    Args:
        seconds: where to note how long each capture took, warm-up included.

    Attributes:
        ms: milliseconds of a replay of each pass that was captured in place, by its key.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.ms: dict[Hashable, float] = {}
        self._captured: dict[Hashable, _Captured] = {}
        self._in_place: dict[Hashable, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._pool: Any = None
        self._seconds = seconds

    def __call__(self, key: Hashable, run: Pass, *inputs: Tensor) -> Outputs:
        """`run(*inputs)`, by replaying what was captured for this key and these shapes.

        The next replay writes over the outputs.
        """
        # A captured graph reads and writes fixed memory: copy inputs in, replay.
        shapes = [tensor.shape for tensor in inputs]
        key = (key, *shapes)
        if key not in self._captured:
            self._captured[key] = self._capture(run, inputs)
        captured = self._captured[key]
        captured.copied.synchronize()  # the host may be ahead of the device
        for static, pinned, tensor in zip(captured.inputs, captured.pinned, inputs, strict=True):
            if pinned is None:
                static.copy_(tensor)
            else:
                pinned.copy_(tensor)
        host, device = captured.staging
        device.copy_(host, non_blocking=True)
        captured.copied.record()
        captured.graph.replay()
        return captured.outputs

    def in_place(self, key: Hashable, run: Callable[[], Outputs], state: Sequence[Tensor]) -> Outputs:
        """`run()`, which reads and writes `state`, by replaying what was captured for this key.

        The next replay writes over the outputs.
        """
        if key not in self._in_place:
            kept = [tensor.clone() for tensor in state]

            def again() -> Outputs:
                for tensor, value in zip(state, kept, strict=True):
                    tensor.copy_(value)
                return run()

            began = self._begin()
            self._in_place[key] = self._record(again, run)
            self.ms[key] = _replay_ms(self._in_place[key][0])
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)
            self._end(began)
        graph, outputs = self._in_place[key]
        graph.replay()
        return outputs

    def _begin(self) -> float:
        torch.cuda.synchronize()  # what is still running is not part of a capture
        return time.perf_counter()

    def _end(self, began: float) -> None:
        torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - began)

    def _record(
        self, warm_up: Callable[[], Any], run: Callable[[], Outputs]
    ) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        """Run some times, then capture."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                warm_up()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        self._pool = graph.pool()
        return graph, outputs

    def _capture(self, run: Pass, inputs: tuple[Tensor, ...]) -> _Captured:
        began = self._begin()
        total = sum(map(_host_bytes, inputs))
        host = torch.empty(total, dtype=torch.uint8).pin_memory()
        device = host.cuda()
        static: list[Tensor] = []
        pinned: list[Tensor | None] = []
        offset = 0
        for tensor in inputs:
            if tensor.device.type == "cpu":
                stop = offset + tensor.nbytes
                on_host = host[offset:stop].view(tensor.dtype).view(tensor.shape)
                on_device = device[offset:stop].view(tensor.dtype).view(tensor.shape)
                pinned.append(on_host.copy_(tensor))
                static.append(on_device)
                offset += _host_bytes(tensor)
            else:
                pinned.append(None)
                static.append(tensor.clone())
        device.copy_(host)
        graph, outputs = self._record(lambda: run(*static), lambda: run(*static))
        self._end(began)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return _Captured(graph, static, pinned, (host, device), outputs, copied)


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one of several replays that follow one another."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    began.record()
    for _ in range(TIMED_REPLAYS):
        graph.replay()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / TIMED_REPLAYS


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: an old graph that it finds cannot be freed during a capture, which then fails."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _host_bytes(tensor: Tensor) -> int:
    """Bytes that a host tensor takes among others, each of which begins at a multiple of 16; 0 for others."""
    if tensor.device.type != "cpu":
        return 0
    return 16 * math.ceil(tensor.nbytes / 16)
