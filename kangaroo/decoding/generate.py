"""Decoding whole responses: block by block with drafts, or plainly in a large batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kangaroo.decoding.ahead import plan_ahead, run_ahead
from kangaroo.decoding.blocks import DecodeConfig, Verification
from kangaroo.decoding.cache import KVCache
from kangaroo.decoding.passes import Outputs
from kangaroo.decoding.speculate import Text, spec_decode_step
from kangaroo.decoding.stages import Stages

Sampler = Callable[[Tensor], Tensor]
"""Picks tokens `[B]` from float32 logits `[B, V]`."""

COMPACT_BELOW = 0.75
"""Share of unfinished rows below which finished ones are dropped from a batch."""
COMPACT_CAPTURED_BELOW = 0.5
"""The same where passes are captured, again for every number of rows."""
PROMPTS_TOGETHER = {"cpu": 8, "cuda": 512}
"""Prompts of a large batch that are read at once, by the kind of device."""
LOOK_EVERY = 16
"""Tokens between looks at which rows are finished, on a device that a look would make wait."""

Arguments = ParamSpec("Arguments")
Step = TypeVar("Step")


class Turns:
    """The lock by which threads that decode with one model take turns; a copy of the model has its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()  # a lock cannot be copied


def in_turns(
    decode: Callable[Arguments, Iterator[Step]],
) -> Callable[Arguments, Generator[Step, None, None]]:
    """A method that decodes step by step, each step in one turn: adapters are switched and weights kept in it."""

    @wraps(decode)
    def steps(*given: Arguments.args, **named: Arguments.kwargs) -> Generator[Step, None, None]:
        lock = given[0].base_model.turns.lock  # type: ignore[attr-defined]
        found: Any = decode(*given, **named)
        try:
            while True:
                with lock:
                    step = next(found, None)
                if step is None:
                    return
                yield step
        finally:
            with lock:
                found.close()

    return steps


@dataclass(frozen=True)
class Decoded:
    """One decoded response.

    Attributes:
        tokens: the response, its end-of-sequence token included if it came.
        blocks: one verification a block; the first is the prefill's, without drafts.
    """

    tokens: list[int]
    blocks: list[Verification]


def decode_texts(
    stages: Stages, texts: Sequence[Text], config: DecodeConfig, eos_ids: Sequence[int]
) -> Iterator[dict[int, Verification]]:
    """Decode texts together until all are over; each advances as far as its own drafts are accepted.

    Args:
        stages: the model, its caches empty.
        texts: prompts, to which the responses are appended.
        config: how to draft and verify.
        eos_ids: tokens that end a response.

    Yields:
        After each step what the texts commit, by their place in `texts`; nothing for texts that are over. The first
        verifications are the prefill's.
    """
    stages.keep_states = config.keep_states
    running = dict(enumerate(texts))
    while any(text.room for text in running.values()):
        for results in _next_blocks(stages, list(running.values()), config):
            committed = {}
            for place, result in zip(running, results, strict=True):
                if result:
                    committed[place] = result.cut_at_end(eos_ids)
            yield committed
            for place, verification in committed.items():
                _commit(running[place], verification, eos_ids)
        # Texts that are over leave the batch; where passes are captured, half of it at a time, so that few are.
        left = [row for row, text in enumerate(running.values()) if text.room]
        most = len(running) // 2 if stages.passes.graphs else len(running) - 1
        if 0 < len(left) <= most:
            stages.keep(left)
            running = {place: text for place, text in running.items() if text.room}


def _next_blocks(
    stages: Stages, texts: Sequence[Text], config: DecodeConfig
) -> Iterable[list[Verification | None]]:
    """As many blocks as can run ahead of the host, or one."""
    plan = plan_ahead(stages, texts, config)
    if plan is None:
        return [spec_decode_step(stages, texts, config)]
    threshold = texts[0].policy.config.threshold if plan.learned else 0.0
    return run_ahead(stages, texts, plan, config, threshold)


def _commit(text: Text, verification: Verification, eos_ids: Sequence[int]) -> None:
    """Append what was committed, and let the text's policy learn from it."""
    if verification.start > text.prompt_len:  # the prefill drafts nothing
        text.policy.observe(verification, text.index)
    text.index.extend(verification.committed)
    if verification.committed[-1] in eos_ids:
        text.stop = 0  # no room is left: the text is over


class PlainBatch:
    """Texts under plain decoding, one token a step; for batches so large that drafts would not pay.

    Args:
        stages: of which `base` and `deep` run, their caches empty.
        tokens: `[B, P]`, the prompts, padded on the right.
        lengths: `[B]`, the prompts' lengths.

    Attributes:
        rows: `[B]`, the place of each remaining row in the batch.
        last: `[B, D]`, the normed states that the next tokens are chosen from.
        captured: whether the steps after the prompts are captured.
        dtype: of the model's weights, and of the states that are kept.
    """

    def __init__(self, stages: Stages, tokens: Tensor, lengths: Tensor) -> None:
        self._stages = (stages.base, stages.deep)
        self._passes = stages.passes
        self.captured = stages.passes.graphs is not None
        self.dtype = stages.dtype
        self.rows = torch.arange(len(tokens), device=tokens.device)
        self._lengths = lengths.clone()
        self.last = self._read_prompts(tokens, lengths)
        for stage in self._stages:
            stage.cache.lengths = lengths.tolist()  # padding is overwritten
        self._best: tuple[Tensor, Tensor] | None = None

    def _read_prompts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Read the prompts, those of like length together: less padding is read. Their last states `[B, D]`."""
        # Prompts of one chat format begin alike; what they share is read once, if its angles are the same in all.
        stretched = any(stage.rotary.stretches(lengths.tolist()) for stage in self._stages)
        shared = 0 if stretched else common_prefix(tokens, lengths)
        whole = [stage.cache for stage in self._stages]
        prefix = [cache.like(1, shared) for cache in whole]
        if shared:
            self._read(tokens[:1, :shared], prefix)
        together = PROMPTS_TOGETHER.get(tokens.device.type, len(tokens))
        last: list[Tensor] = []
        order = lengths.argsort() if together < len(tokens) else self.rows
        for group in torch.split(order, together):
            own = lengths[group]
            longest = int(own.max())
            caches = whole
            if len(group) < len(tokens):
                caches = [cache.like(len(group), longest) for cache in whole]
            if shared:
                for cache, beginning in zip(caches, prefix, strict=True):
                    cache.copy_prefix(beginning, range(len(group)))
            else:
                self._passes.prompt_lens = own.tolist()
            hidden = self._read(tokens[group, shared:longest], caches)
            if caches is not whole:
                for cache, filled in zip(whole, caches, strict=True):
                    cache.copy_prefix(filled, group.tolist())
                del filled
            last.append(hidden[self.rows[: len(group)], own - shared - 1])
            # What one group has read is given back before the next one reads.
            del caches, hidden
            for stage, cache in zip(self._stages, whole, strict=True):
                stage.cache = cache
        self._passes.prompt_lens = ()
        return torch.cat(last)[order.argsort()]

    def _read(self, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """The normed states `[B, T, D]` of tokens after what some caches hold, which the stages keep."""
        base, deep = self._stages
        base.cache, deep.cache = caches
        return deep(base(tokens))

    def best(self) -> tuple[Tensor, Tensor]:
        """The likeliest next token of every row, and its probability in float32; `[B]` each."""
        if self._best is None:
            tokens, confidence = self._stages[1].best(self.last)
            self._best = tokens[0], confidence
        return self._best

    def sampled(self, sampler: Sampler) -> tuple[Tensor, Tensor]:
        """A sampled next token of every row, and its probability in float32; `[B]` each."""
        logits = self._stages[1].logits(self.last).float()
        chosen = sampler(logits)
        confidence = logits.softmax(dim=-1).gather(1, chosen[:, None])
        return chosen, confidence[:, 0]

    def append(self, tokens: Tensor) -> None:
        """Read the next token `[B]` of every row."""
        base, deep = self._stages

        def read(tokens: Tensor) -> Outputs:
            last = deep(base(tokens))[:, -1]
            if not self.captured or not deep.weights.fused:
                return (last,)
            best, confidence = deep.best(last)  # by our own kernels, as where there are drafts
            return last, best[0], confidence

        caches = [stage.cache for stage in self._stages]
        ones = [1] * len(tokens)
        self.last, *best = self._passes.run(
            "plain", read, caches, ones, tokens[:, None], starts=self._lengths
        )
        self._lengths = self._lengths + 1
        self._best = (best[0], best[1]) if best else None

    def keep(self, alive: Tensor) -> None:
        """Drop the rows that are not alive, `[B]` boolean."""
        self.rows = self.rows[alive]
        self._lengths = self._lengths[alive]
        for stage in self._stages:
            stage.cache.keep(alive.nonzero().flatten().tolist())


def common_prefix(tokens: Tensor, lengths: Tensor) -> int:
    """Length of the prefix that all rows of `tokens [B, P]` share, short of every row's last token."""
    if len(tokens) == 1:
        return 0
    longest = int(lengths.min()) - 1
    differs = tokens[:, :longest] != tokens[:1, :longest]
    places = differs.any(dim=0).nonzero()
    if not len(places):
        return longest
    return int(places[0])


@dataclass(frozen=True)
class PlainAnswers:
    """What plain decoding of a batch gives; entries after a row's end mean nothing.

    Attributes:
        tokens: `[B, N]` for N new tokens.
        hidden: `[B, N, D]`, the normed states that each token was chosen from; `[B, N, 0]` if not kept.
        confidence: `[B, N]` float32, the probability of each token.
    """

    tokens: Tensor
    hidden: Tensor
    confidence: Tensor


def decode_plainly(
    batch: PlainBatch, max_new_tokens: int, ends: Tensor, sampler: Sampler | None, keep_states: bool
) -> PlainAnswers:
    """Decode a batch until all rows have ended or reached the limit.

    Args:
        batch: the prompts, read.
        max_new_tokens: N.
        ends: ids of the tokens that end a row.
        sampler: picks tokens; None for greedy.
        keep_states: keep `hidden`.
    """
    count = len(batch.last)
    device = batch.last.device
    tokens = batch.rows.new_zeros(count, max_new_tokens)
    hidden_size = batch.last.shape[1] if keep_states else 0
    hidden = batch.last.new_zeros(count, max_new_tokens, hidden_size, dtype=batch.dtype)
    confidence = torch.zeros(count, max_new_tokens, device=device)
    alive = torch.ones(count, dtype=torch.bool, device=device)
    look_every = 1 if device.type == "cpu" else LOOK_EVERY
    compact_below = COMPACT_CAPTURED_BELOW if batch.captured else COMPACT_BELOW
    for step in range(max_new_tokens):
        chosen, chances = batch.best() if sampler is None else batch.sampled(sampler)
        if keep_states:
            hidden[batch.rows, step] = batch.last.to(batch.dtype)
        confidence[batch.rows, step] = chances
        tokens[batch.rows, step] = chosen
        alive = alive & ~torch.isin(chosen, ends)
        if step + 1 == max_new_tokens:
            break
        # Rows that have ended go on for nothing; drop them once they are many enough to pay for the copy.
        if step % look_every == 0:
            share_alive = float(alive.float().mean())
            if share_alive == 0.0:
                break
            if share_alive < compact_below:
                batch.keep(alive)
                chosen = chosen[alive]
                alive = alive[alive]
        batch.append(chosen)
    return PlainAnswers(tokens, hidden, confidence)
