"""The steps of a block that runs ahead of the host, each as one Triton kernel.

By torch's operators they were some twenty small kernels, 60 µs of a block, and twice as many with several chains. One
program takes one text, so that programs share nothing. Shapes are those of `outcome`; n are the learned drafts of a
chain, W is T rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo.decoding.cache import KVCache
from kangaroo.decoding.drafting import LONGEST_NGRAM
from kangaroo.decoding.outcome import BlockState
from kangaroo.decoding.planning import Plan

POSITIONS = 1024
"""Places of a text that a lookup compares at once."""
NUMBERS = 256
"""Numbers of a slot that one program copies."""


@triton.jit
def _look_up(
    text, length, block, matched, width,
    DRAFTED: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, SURE: tl.constexpr, LONGEST: tl.constexpr,
    BLOCK: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The longest ending of text and drafts that occurred in the text, of equal ones the latest, and what followed."""
    index = tl.program_id(0)
    tokens = text + index * width + LONGEST
    drafts = block + index * T + 1
    # A text that is over may have grown beyond what is read.
    end = tl.minimum(tl.load(length + index), SIZE - 1)
    best = tl.full((), 0, tl.int64)
    for first in range(0, SIZE, BLOCK):
        place = first + tl.arange(0, BLOCK)
        before = place < end
        same = before
        found = tl.zeros((BLOCK,), tl.int64)
        for back in tl.static_range(1, LONGEST + 1):
            ending = drafts if back <= DRAFTED else tokens + end
            last = tl.load(ending + DRAFTED - back)
            same = same & (tl.load(tokens + place - back, mask=before) == last)
            found += same.to(tl.int64)
        best = tl.maximum(best, tl.max(tl.where(before, found * SIZE + place, 0), axis=0))
    start = best % SIZE
    known = best // SIZE
    step = tl.arange(0, W)
    # What follows may reach the end of the text and the drafts, and begins again then.
    place = start + step % tl.maximum(end + DRAFTED - start, 1)
    follows = tl.load(tokens + place, mask=(step < COUNT) & (place < end))
    drafted = tl.load(drafts + place - end, mask=(step < COUNT) & (place >= end))
    follows = tl.where(place < end, follows, drafted)
    follows = tl.where(known >= SURE, follows, -1)
    tl.store(drafts + DRAFTED + step, follows, mask=step < COUNT)
    tl.store(matched + index, known)


@triton.jit
def _first(marked, place, W: tl.constexpr):
    """The first place that is marked, or W."""
    return tl.min(tl.where(marked, place, W), axis=0)


@triton.jit
def _copied(source, to, place, count: tl.constexpr):
    """The first `count` numbers, after writing them elsewhere, too; 1 after these."""
    values = tl.load(source + place, mask=place < count, other=1)
    tl.store(to + place, values, mask=place < count)
    return values


@triton.jit
def _judge(drafts, own, told, place, T: tl.constexpr, W: tl.constexpr):
    """How many drafts of a chain are the verifier's; the host is told the drafts."""
    drafted = _copied(drafts, told, place, T - 1)
    verified = tl.load(own + place, mask=place < T - 1)
    return _first((drafted != verified) | (place >= T - 1), place, W)


@triton.jit
def _accept(
    block, own, certainty, confidence, matched, length, start_at, right, kept, read, text, starts,
    numbers, floats, winners, threshold, most, width,
    CHAINS: tl.constexpr, DRAFTED: tl.constexpr, LONGEST: tl.constexpr, LOOKED_UP: tl.constexpr,
    FED_BACK: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Accept a text's chain that goes furthest, tell the host, and leave the state to the next block."""
    index = tl.program_id(0)
    texts = tl.num_programs(0)
    place = tl.arange(0, W)
    numbers += index * SIZE
    floats += index * SIZE
    before = tl.load(length + index)
    doubtful = W
    for chain in tl.static_range(CHAINS):
        chances = confidence + (chain * texts + index) * DRAFTED
        sure = _copied(chances, floats + chain * DRAFTED, place, DRAFTED)
        if chain == 0:  # a chain ends with its first doubtful draft
            doubtful = _first(~(sure >= threshold), place, W)
    best = -1
    row = index
    for chain in tl.static_range(CHAINS):
        first = (chain * texts + index) * T
        _copied(certainty + first, floats + CHAINS * DRAFTED + chain * T, place, T)
        count = _judge(block + first + 1, own + first, numbers + T + 1 + chain * (T - 1), place, T, W)
        count = tl.minimum(count, doubtful + 1)
        tl.store(numbers + T + 1 + CHAINS * (T - 1) + chain, count)
        if chain == 0 and DRAFTED:  # the last draft was not read; with feedback all are read once more
            tl.store(read + index, before + (0 if FED_BACK else tl.minimum(count, DRAFTED - 1)))
        row = tl.where(count > best, chain * texts + index, row)
        best = tl.maximum(best, count)
    won = _copied(own + row * T, numbers, place, T)
    tl.store(numbers + T, tl.load(matched + index))
    tl.store(text + index * width + LONGEST + before + place, won, mask=(place < T) & LOOKED_UP)
    after = tl.minimum(before + best + 1, most)
    tl.store(length + index, after)
    for chain in tl.static_range(CHAINS):
        own_row = chain * texts + index
        tl.store(kept + own_row * T + place, won, mask=place < T)
        tl.store(right + own_row, best)
        tl.store(start_at + own_row, before)
        tl.store(winners + own_row, row)
        tl.store(block + own_row * T, tl.sum(tl.where(place == best, won, 0), axis=0))
        tl.store(starts + own_row, after - 1)


@triton.jit
def _share(
    store, winners, start_at, slots, rows,
    CHAINS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Copy what the winning row of a text has read in this block, of one layer's keys or values, to its other rows."""
    index = tl.program_id(1)
    texts = tl.num_programs(1)
    size = slots.to(tl.int64) * G * E
    layer = store + tl.program_id(0) * rows * size
    winner = tl.load(winners + index)
    slot = tl.load(start_at + index) - 1 + tl.arange(0, W)
    number = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    place = (number // E * slots + slot[:, None]) * E + number % E
    copied = (tl.arange(0, W) < T)[:, None] & (slot < slots)[:, None] & (number < G * E)[None, :]
    values = tl.load(layer + winner * size + place, mask=copied)
    for chain in tl.static_range(CHAINS):
        row = chain * texts + index
        tl.store(layer + row * size + place, values, mask=copied & (row != winner))


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], warps: int, width: int, **constants: Any
) -> None:
    """Run programs of a kernel; the width is T."""
    device = arguments[0].device
    options = {"num_warps": warps} if device.type == "cuda" else {}  # else Triton's interpreter, in tests
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, T=width, W=triton.next_power_of_2(width), **constants, **options)


def look_up(state: BlockState, plan: Plan, slots: int) -> Tensor:
    """Write what a lookup knows after the learned drafts of each main chain, as `LookupIndex.propose` finds it.

    Args:
        state: its text, length and learned drafts are read.
        plan: how many tokens are wanted, and how many must match.
        slots: no text is longer.

    Returns:
        How many tokens matched, `[B]`.
    """
    _, texts, width = state.block.shape
    matched = torch.empty_like(state.length)
    arguments = (state.text, state.length, state.block, matched, state.text.shape[1])
    sizes = {
        "DRAFTED": plan.learned,
        "SIZE": slots,
        "COUNT": plan.looked_up,
        "SURE": plan.sure,
        "LONGEST": LONGEST_NGRAM,
    }
    _launch(_look_up, (texts,), arguments, 4, width, BLOCK=POSITIONS, **sizes)
    return matched


def accept(
    state: BlockState,
    plan: Plan,
    drafts: tuple[Tensor, Tensor],
    verdicts: tuple[Tensor, Tensor],
    threshold: float,
    fed_back: bool,
) -> tuple[Tensor, Tensor]:
    """Accept the chain that goes furthest, and leave the state to the next block.

    Args:
        state: the tokens of all chains are read from it.
        plan: what the block drafted.
        drafts: confidence in the learned ones `[C, B, n]`, and tokens that matched before a lookup `[B]`.
        verdicts: the verifier's tokens along each chain `[C, B, T]`, and its probability of them.
        threshold: confidence below which a learned draft ends its chain; 0 for none.
        fed_back: whether the drafter reads all tokens once more, since it reads the verifier's states.

    Returns:
        What the host reads in one transfer, `[B, …]` int32 (see `ahead._Numbers`; confidences and probabilities are the
        bits of float32), and the rows of the winning chains, `[C B]`.
    """
    chains, texts, width = state.block.shape
    whole = width + 1 + chains * width
    size = whole + chains * (plan.learned + width)
    numbers = torch.empty(texts, size, dtype=torch.int32, device=state.length.device)
    winners = torch.empty_like(state.start_at)
    left = (state.length, state.start_at, state.right, state.own, state.read, state.text, state.starts)
    told = (numbers, numbers.view(torch.float32)[:, whole:], winners)
    arguments = (state.block, *verdicts, *drafts, *left, *told, at_least(threshold), state.most)
    sizes = {
        "CHAINS": chains,
        "DRAFTED": plan.learned,
        "LONGEST": LONGEST_NGRAM,
        "LOOKED_UP": plan.looked_up > 0,
        "FED_BACK": fed_back,
        "SIZE": size,
    }
    # One warp: the state is read before any of it is written over.
    _launch(_accept, (texts,), (*arguments, state.text.shape[1]), 1, width, **sizes)
    return numbers, winners


def share(state: BlockState, cache: KVCache, winners: Tensor) -> None:
    """Give all rows of each text, which later plans may use, what the row `winners [C B]` has read in this block."""
    _, texts, width = state.block.shape
    for store in cache.stores:
        parts, layers, rows, groups, slots, size = store.shape
        grid = (parts * layers, texts, triton.cdiv(groups * size, NUMBERS))
        arguments = (store, winners, state.start_at, slots, rows)
        _launch(_share, grid, arguments, 4, width, CHAINS=cache.chains, G=groups, E=size, BLOCK=NUMBERS)


def at_least(threshold: float) -> float:
    """The least float32 number that is no smaller: confidences are compared as float32."""
    rounded = torch.tensor(threshold, dtype=torch.float32)
    if rounded.double() < threshold:
        rounded = rounded.nextafter(torch.tensor(torch.inf))
    return float(rounded)
