"""The steps of a block that runs ahead of the host, each as one Triton kernel; `outcome` has them by torch's operators.

One program takes one text, so that nothing is shared between programs. Shapes and letters are those of `outcome`, W is
T rounded up to a power of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo.decoding.cache import KVCache
from kangaroo.decoding.drafting import LONGEST_NGRAM
from kangaroo.decoding.planning import Plan

if TYPE_CHECKING:
    from kangaroo.decoding.outcome import BlockState, Drafts, Verdicts

POSITIONS = 1024
"""Places of a text that a lookup compares at once."""
NUMBERS = 256
"""Numbers of a slot that one program copies."""


@triton.jit
def _look_up(
    text, length, block, matched, width,
    SIZE: tl.constexpr, COUNT: tl.constexpr, SURE: tl.constexpr, LONGEST: tl.constexpr, T: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The longest ending of a text that occurred before, of equal ones the latest, and what followed it."""
    index = tl.program_id(0)
    tokens = text + index * width + LONGEST
    # A text that is over may have grown beyond what is read.
    end = tl.minimum(tl.load(length + index), SIZE - 1)
    best = tl.full((), 0, tl.int64)
    for first in range(0, SIZE, BLOCK):
        place = first + tl.arange(0, BLOCK)
        same = place < end
        found = tl.zeros((BLOCK,), tl.int64)
        for back in tl.static_range(1, LONGEST + 1):
            same = same & (tl.load(tokens + place - back, mask=same, other=0) == tl.load(tokens + end - back))
            found += same.to(tl.int64)
        score = tl.where(place < end, found * SIZE + place, 0)
        best = tl.maximum(best, tl.max(score, axis=0))
    start = best % SIZE
    known = best // SIZE
    step = tl.arange(0, W)
    wanted = step < COUNT
    # What follows may reach the end of the text, and begins again then.
    follows = tl.load(tokens + start + step % tl.maximum(end - start, 1), mask=wanted, other=-1)
    follows = tl.where(known >= SURE, follows, -1)
    tl.store(block + index * T + 1 + step, follows, mask=wanted)
    tl.store(matched + index, known)


@triton.jit
def _first(marked, place, none):
    """The first place that is marked."""
    return tl.min(tl.where(marked, place, none), axis=0)


@triton.jit
def _accept(
    block, own, certainty, confidence, matched, length, start_at, right, kept, read, text, starts,
    numbers, winners, threshold, most, width,
    CHAINS: tl.constexpr, LEARNED: tl.constexpr, DRAFTED: tl.constexpr, ROWS: tl.constexpr, LONGEST: tl.constexpr,
    LOOKED_UP: tl.constexpr, FED_BACK: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Accept one text's chain that goes furthest; of all CHAINS the first LEARNED have DRAFTED learned drafts."""
    index = tl.program_id(0)
    texts = tl.num_programs(0)
    place = tl.arange(0, W)
    drafts: tl.constexpr = T - 1
    size: tl.constexpr = T + 1 + CHAINS * T
    floats: tl.constexpr = LEARNED * DRAFTED + CHAINS * T
    told = numbers + index * (size + floats)
    before = tl.load(length + index)
    # Up to the first doubtful draft.
    sure = tl.load(confidence + index * DRAFTED + place, mask=place < DRAFTED, other=0.0)
    doubtful = _first((place < DRAFTED) & ~(sure >= threshold), place, W)
    best = -1
    winner = 0
    main = 0
    for chain in tl.static_range(CHAINS):
        row = chain * texts + index
        drafted = tl.load(block + row * T + 1 + place, mask=place < drafts, other=-1)
        verified = tl.load(own + row * T + place, mask=place < drafts, other=-1)
        wrong = (drafted != verified) | (place >= drafts)
        if chain < LEARNED:
            wrong = wrong | (place > doubtful)
        count = _first(wrong, place, W)
        if chain == 0:
            main = count
        winner = tl.where(count > best, chain, winner)
        best = tl.maximum(best, count)
        tl.store(told + T + 1 + chain * drafts + place, drafted.to(tl.int32), mask=place < drafts)
        tl.store(told + T + 1 + CHAINS * drafts + chain, count.to(tl.int32))
        chance = tl.load(certainty + row * T + place, mask=place < T, other=0.0)
        to = told + size + LEARNED * DRAFTED + chain * T + place
        tl.store(to, chance.to(tl.int32, bitcast=True), mask=place < T)
    for chain in tl.static_range(LEARNED):
        row = chain * texts + index
        chance = tl.load(confidence + row * DRAFTED + place, mask=place < DRAFTED, other=0.0)
        to = told + size + chain * DRAFTED + place
        tl.store(to, chance.to(tl.int32, bitcast=True), mask=place < DRAFTED)
    row = winner * texts + index
    won = tl.load(own + row * T + place, mask=place < T, other=-1)
    tl.store(told + place, won.to(tl.int32), mask=place < T)
    tl.store(told + T, tl.load(matched + index).to(tl.int32))
    # Leave all to the next block.
    after = tl.minimum(before + best + 1, most)
    tl.store(length + index, after)
    if LEARNED:  # the last draft was not read; with feedback all are read once more
        tl.store(read + index, before + (0 if FED_BACK else tl.minimum(main, DRAFTED - 1)))
    if LOOKED_UP:
        tl.store(text + index * width + LONGEST + before + place, won, mask=place < T)
    last = tl.sum(tl.where(place == best, won, 0), axis=0)
    for chain in tl.static_range(CHAINS):
        tl.store(block + (chain * texts + index) * T, last)
        tl.store(starts + chain * texts + index, after - 1)
    for part in tl.static_range(ROWS):
        tl.store(start_at + part * texts + index, before)
        tl.store(right + part * texts + index, best)
        tl.store(winners + part * texts + index, row)
        tl.store(kept + (part * texts + index) * T + place, won, mask=place < T)


@triton.jit
def _share(
    store, winners, start_at, slots, rows,
    CHAINS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy what the winning row of a text has read in this block, of one layer's keys or values, to its other rows."""
    part = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1)
    texts = tl.num_programs(1)
    winner = tl.load(winners + index)
    slot = tl.load(start_at + index) - 1 + tl.arange(0, W)
    number = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (number // E * slots + slot[:, None]) * E + number % E
    copied = (tl.arange(0, W) < T)[:, None] & (slot < slots)[:, None] & (number < G * E)[None, :]
    layer = store + part * rows * G * slots * E
    values = tl.load(layer + winner * G * slots * E + inside, mask=copied, other=0.0)
    for chain in tl.static_range(CHAINS):
        row = chain * texts + index
        tl.store(layer + row.to(tl.int64) * G * slots * E + inside, values, mask=copied & (row != winner))


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], warps: int, width: int, **constants: Any
) -> None:
    """Run programs of a kernel, `width` being T."""
    sizes = {"T": width, "W": triton.next_power_of_2(width), **constants}
    device = arguments[0].device
    if device.type != "cuda":  # Triton's interpreter, in tests
        kernel[grid](*arguments, **sizes)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, num_warps=warps, **sizes)


def look_up(state: BlockState, plan: Plan, slots: int) -> Tensor:
    """As `outcome.look_up`."""
    _, texts, width = state.block.shape
    matched = torch.empty_like(state.length)
    arguments = (state.text, state.length, state.block[-1], matched, state.text.shape[1])
    sizes = {
        "SIZE": slots,
        "COUNT": plan.looked_up,
        "SURE": plan.sure,
        "LONGEST": LONGEST_NGRAM,
        "BLOCK": POSITIONS,
    }
    _launch(_look_up, (texts,), arguments, 4, width, **sizes)
    return matched


def accept(
    state: BlockState, plan: Plan, drafts: Drafts, verdicts: Verdicts, threshold: float, fed_back: bool
) -> tuple[Tensor, Tensor]:
    """As `outcome.accept`."""
    chains, texts, width = state.block.shape
    count = width + 1 + chains * 2 * width + plan.learned_chains * plan.learned
    numbers = torch.empty(texts, count, dtype=torch.int32, device=state.length.device)
    winners = torch.empty_like(state.start_at)
    read = (state.block, verdicts.own, verdicts.certainty, drafts.confidence, drafts.matched)
    kept = (state.length, state.start_at, state.right, state.own, state.read, state.text, state.starts)
    scalars = (at_least(threshold), state.most, state.text.shape[1])
    sizes = {
        "CHAINS": chains,
        "LEARNED": plan.learned_chains,
        "DRAFTED": plan.learned,
        "LONGEST": LONGEST_NGRAM,
    }
    sizes |= {"ROWS": len(state.own) // texts, "LOOKED_UP": plan.looked_up, "FED_BACK": fed_back}
    # One warp: the state is read before any of it is written over.
    _launch(_accept, (texts,), (*read, *kept, numbers, winners, *scalars), 1, width, **sizes)
    return numbers, winners


def share(state: BlockState, cache: KVCache, winners: Tensor) -> None:
    """As `outcome.share`."""
    chains, texts, width = state.block.shape
    for store in cache.stores:
        parts, layers, rows, groups, slots, size = store.shape
        grid = (parts * layers, texts, -(-groups * size // NUMBERS))
        sizes = {"CHAINS": chains, "G": groups, "E": size, "BLOCK": NUMBERS}
        _launch(_share, grid, (store, winners, state.start_at, slots, rows), 4, width, **sizes)


def at_least(threshold: float) -> float:
    """The least float32 number that is no smaller: confidences are compared as float32."""
    rounded = torch.tensor(threshold, dtype=torch.float32)
    if rounded.double() < threshold:
        rounded = rounded.nextafter(torch.tensor(torch.inf))
    return float(rounded)
