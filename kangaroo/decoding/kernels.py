"""Triton kernels for a decoder layer over a cache: five a layer, in tiles of sixteen rows.

A row is one token of one text. Rows always stand in tiles of sixteen and keys in chunks of 64 slots, whatever a pass
reads, and what a row computes depends on its own tokens alone. So a token gets the same bits in plain decoding, among
drafts and among other texts.

    1  norm, queries, keys and values, rotary, cache   [M, D]     -> [M, H E]
    2  attention (over several spans of slots: their sums, and a kernel that merges these)
    3  output, residual                                [M, H E]   -> [M, D]
    4  norm, gate and up, activation                   [M, D]     -> [M, I]
    5  down, residual                                  [M, I]     -> [M, D]

The weight of a norm is multiplied into the weights after it, and its scale is applied after the product. Where the card
can start a kernel before the one before it has ended (programmatic dependent launch), products and attention begin at
once, read what no kernel of the running graph changes, and wait only then. `starts` and `settled` are read before
waiting, too: an ordinary kernel must stand between what writes them and ours.

Letters: M rows, D hidden, I feed-forward width, H query heads, G key/value heads, E head size, B texts, T tokens of a
text, S parts of a sum. A kernel takes every pointer and size by itself: Triton knows no records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kangaroo.adapter import DecoderLayer
from kangaroo.decoding.cache import FixedShape, KVCache
from kangaroo.decoding.sampling import Drawn

ROWS = 16
"""Rows of a tile: the least that tensor cores multiply."""
CHUNK = 64
"""Slots whose attention is summed together."""
HEAD_BLOCK = 128
"""Tokens of the vocabulary whose logits one program computes."""
WARPS = 4
"""Warps of a program that computes products; each takes a part of every sum."""
SPAN_BYTES = 64 * 1024
"""Keys that a program reads at most; values take as many."""
ROOMY = 160 * 1024
"""Shared memory that a program needs for that; cards with less halve it."""
HELD_BYTES = 48 * 1024
"""Weights that a program reads before it waits for the kernel before, at most; they stay in its registers."""
EVERYTHING = 1 << 30
"""A window that no text fills."""


@triton.jit
def _at(row, column, width):
    """Offsets of the elements of some rows and columns of a matrix."""
    return row[:, None] * width + column[None, :]


@triton.jit
def _both(of_row, of_column):
    """A mask of rows and columns."""
    return of_row[:, None] & of_column[None, :]


@triton.jit
def _states(x, row, live, k, K: tl.constexpr):
    """Indices `k [S, k]` of some rows of states `[rows, K]`: `[S, rows, k]`; 0 in rows that are not live."""
    inside = live[None, :, None] & (k < K)[:, None, :]
    return tl.load(x + row[None, :, None] * K + k[:, None, :], mask=inside, other=0.0)


@triton.jit
def _weights(weight, column, k, N: tl.constexpr, K: tl.constexpr):
    """The same indices of some columns of a product, rows of its weight `[N, K]`: `[S, k, columns]`."""
    inside = (k < K)[:, :, None] & (column < N)[None, None, :]
    return tl.load(weight + column[None, None, :] * K + k[:, :, None], mask=inside, other=0.0)


@triton.jit
def _places(step, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """The indices along K of a block of them, in S parts `[S, BLOCK_K / S]`."""
    part: tl.constexpr = BLOCK_K // S
    return step * BLOCK_K + tl.arange(0, S)[:, None] * part + tl.arange(0, part)[None, :]


@triton.jit
def _held(
    weight,
    column,
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
):
    """The first blocks of some columns of a weight. No kernel changes them: they are read while the one before ends."""
    pieces = ()
    for step in tl.static_range(HELD):
        pieces += (_weights(weight, column, _places(step, S, BLOCK_K), N, K),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _product(
    x, row, live, weight, held, column, total,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Add x @ weight.T to `total [S, 16, columns]`, whose S parts each take a part of every block of K.

    With one sum each step would wait for the one before; so each warp has its own.

    Returns:
        The sums, and the squares of x, `[16]`.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    squares = tl.zeros((16,), dtype=tl.float32)
    read = ()
    for step in tl.static_range(HELD):
        read += (_states(x, row, live, _places(step, S, BLOCK_K), K),)  # type: ignore[assignment]
    for step in tl.static_range(HELD):
        total = tl.dot(read[step], held[step], total, input_precision=precision)
        squares += _squares(read[step])
    for step in range(HELD, tl.cdiv(K, BLOCK_K)):
        k = _places(step, S, BLOCK_K)
        values = _states(x, row, live, k, K)
        total = tl.dot(values, _weights(weight, column, k, N, K), total, input_precision=precision)
        squares += _squares(values)
    return total, squares


@triton.jit
def _squares(values):
    exact = values.to(tl.float32)
    return tl.sum(tl.sum(exact * exact, axis=2), axis=0)


@triton.jit
def _begin(rows, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    """The rows and columns of a program, and which rows there are; the next kernel may start from here on."""
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < rows
    if PDL:
        gdc_launch_dependents()
    return row, column, live


@triton.jit(do_not_specialize=["rows"])
def _project(
    x, weight, bias, residual, out, rows, eps,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr,
    S: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The product x @ weight.T of `[rows, K]` and `[N, K]`; after a norm, plus a bias, plus a residual as asked for.

    With a gate the weights of gate and up take turns, and the result is silu(gate) * up, `[rows, N / 2]`.
    """
    row, column, live = _begin(rows, BLOCK_N, PDL)
    held = _held(weight, column, N, K, S, BLOCK_K, HELD)
    width: tl.constexpr = N // 2 if GATE else N
    left: tl.constexpr = BLOCK_N // 2 if GATE else BLOCK_N
    to = tl.program_id(0) * left + tl.arange(0, left)
    place = _at(row, to, width)
    kept = _both(live, to < width)
    if PDL:
        gdc_wait()
    if ADD:
        added = tl.load(residual + place, mask=kept, other=0.0).to(tl.float32)
    total = tl.zeros((S, 16, BLOCK_N), dtype=tl.float32)
    total, squares = _product(x, row, live, weight, held, column, total, N, K, S, BLOCK_K, HELD, EXACT)
    total = tl.sum(total, axis=0)
    if NORM:
        total *= (1.0 / tl.sqrt(squares / K + eps))[:, None]
    if BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if GATE:
        gate, up = tl.split(tl.reshape(total, (16, left, 2)))
        total = gate / (1.0 + tl.exp(-gate)) * up
    if ADD:
        total += added
    tl.store(out + place, total.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows", "T", "capacity"])
def _qkv(
    x, weight, bias, cos, sin, starts, queries, keys, values, rows, T, capacity, eps,
    K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr, S: tl.constexpr,
    BIAS: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, queries, keys and values, rotary; keys and values go into the cache.

    In the weights `[(H + 2 G) E, K]` of a head the two numbers that rotary turns together stand side by side.
    """
    N: tl.constexpr = (H + 2 * G) * E  # noqa: N806
    row, column, live = _begin(rows, BLOCK_N, PDL)
    held = _held(weight, column, N, K, S, BLOCK_K, HELD)
    pair = tl.program_id(0) * BLOCK_N + 2 * tl.arange(0, BLOCK_N // 2)
    head = pair // E
    place = pair % E // 2
    text = row // T
    slot = tl.load(starts + text, mask=live, other=0) + row % T
    fits = live & (slot < capacity)
    turned = _both(fits, head < H + G)
    angle = _at(slot, place, E)
    c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    total = tl.zeros((S, 16, BLOCK_N), dtype=tl.float32)
    total, squares = _product(x, row, live, weight, held, column, total, N, K, S, BLOCK_K, HELD, EXACT)
    total = tl.sum(total, axis=0) * (1.0 / tl.sqrt(squares / K + eps))[:, None]
    if BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    first, second = tl.split(tl.reshape(total, (16, BLOCK_N // 2, 2)))
    kind = queries.dtype.element_ty
    left = (first * c - second * s).to(kind)
    right = (second * c + first * s).to(kind)
    to = _at(row, head * E + place, H * E)
    _store_pairs(queries + to, left, right, E, _both(live, head < H))
    to = _at(text * G, (head - H) % G, 1) * capacity + slot[:, None]
    to = to * E + place[None, :]
    _store_pairs(keys + to, left, right, E, turned & (head >= H)[None, :])
    _store_pairs(values + to, left, right, E, _both(fits, (head >= H + G) & (pair < N)))


@triton.jit
def _store_pairs(to, left, right, E: tl.constexpr, kept):
    tl.store(to, left, mask=kept)
    tl.store(to + E // 2, right, mask=kept)


@triton.jit(do_not_specialize=["rows"])
def _fuse(
    x, tokens, feedback, weight, out, rows,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr,
    S: tl.constexpr, LOOKED_UP: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The sum of two products, of x and of feedback `[rows, K]`, with weights `[2, N, K]`.

    With `LOOKED_UP` x is a table of embeddings, and its rows are those of the tokens.
    """
    row, column, live = _begin(rows, BLOCK_N, PDL)
    other = weight + N * K
    held = _held(weight, column, N, K, S, BLOCK_K, HELD)
    held_other = _held(other, column, N, K, S, BLOCK_K, HELD)
    if PDL:
        gdc_wait()
    from_row = row
    if LOOKED_UP:
        from_row = tl.load(tokens + row, mask=live, other=0)
    total = tl.zeros((S, 16, BLOCK_N), dtype=tl.float32)
    total, _ = _product(feedback, row, live, other, held_other, column, total, N, K, S, BLOCK_K, HELD, EXACT)
    total, _ = _product(x, from_row, live, weight, held, column, total, N, K, S, BLOCK_K, HELD, EXACT)
    kept = _both(live, column < N)
    place = _at(row, column, N)
    tl.store(out + place, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=kept)


@triton.jit
def _norm(x, weight, out, eps, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The root-mean-square norm of a row."""
    place = tl.arange(0, BLOCK)
    inside = place < K
    if PDL:
        gdc_launch_dependents()
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    row = tl.program_id(0) * K + place
    values = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    normed = values / tl.sqrt(tl.sum(values * values, axis=0) / K + eps) * scale
    tl.store(out + row, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "capacity", "window"])
def _attend(
    queries, starts, settled, keys, values, out, partial, statistics, T, capacity, window, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, CHUNK: tl.constexpr,
    SPAN: tl.constexpr, SPANS: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one tile of a text's tokens on a span of chunks of slots; `_merge` combines several spans.

    Slots before `settled [B]` hold what earlier passes wrote: they are read while the kernel before ends.
    """
    span = tl.program_id(0)
    head = tl.program_id(1)
    text = tl.program_id(2) // tl.cdiv(T, 16)
    token = tl.program_id(2) % tl.cdiv(T, 16) * 16 + tl.arange(0, 16)
    column = tl.arange(0, E2)
    in_head = column < E
    slot = (span * SPAN + tl.arange(0, SPAN)[:, None]) * CHUNK + tl.arange(0, CHUNK)[None, :]  # [SPAN, CHUNK]
    own = token < T
    place = text * T + token
    if PDL:
        gdc_launch_dependents()
    start = tl.load(starts + text)
    known = tl.load(settled + text)
    stored = ((text * G + head // (H // G)) * capacity + slot) * E
    key, value = _slots(keys, values, stored, slot < known, column, in_head, 0.0, 0.0)
    if PDL:
        gdc_wait()
    position = start + token
    at = _at(place * H + head, column, E)
    kept = _both(own, in_head)
    query = tl.load(queries + at, mask=kept, other=0.0)
    new = (slot >= known) & (slot < start + T) & (slot < capacity)
    key, value = _slots(keys, values, stored, new, column, in_head, key, value)
    back = position[None, :, None] - slot[:, None, :]
    query = tl.broadcast_to(query[None], (SPAN, 16, E2))
    highest, total, mixed = _mix(query, key, value, (back >= 0) & (back < window), scale, EXACT)
    # The sum is at least 1, that of the highest; 0 only where no slot is seen.
    if SPANS == 1:
        tl.store(out + at, (mixed / tl.maximum(total, 1.0)[:, None]).to(out.dtype.element_ty), mask=kept)
    else:
        part = (place * H + head) * SPANS + span
        tl.store(statistics + part * 2, highest, mask=own)
        tl.store(statistics + part * 2 + 1, total, mask=own)
        tl.store(partial + _at(part, column, E), mixed, mask=kept)


@triton.jit
def _slots(keys, values, stored, wanted, column, in_head, key, value):
    """Keys `[SPAN, E, CHUNK]` and values `[SPAN, CHUNK, E]` of the slots that are wanted, else those given."""
    mask = wanted[:, None, :] & in_head[None, :, None]
    key = tl.load(keys + stored[:, None, :] + column[None, :, None], mask=mask, other=key)
    mask = wanted[:, :, None] & in_head[None, None, :]
    return key, tl.load(values + stored[:, :, None] + column[None, None, :], mask=mask, other=value)


@triton.jit
def _mix(query, key, value, seen, scale, EXACT: tl.constexpr):
    """Attention over chunks of slots: of each row the highest score, the sum of exponentials, the values mixed by it.

    Queries `[SPAN, 16, E]`, keys `[SPAN, E, CHUNK]`, values `[SPAN, CHUNK, E]`; each chunk is summed by itself.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    scores = tl.dot(query, key, input_precision=precision) * scale  # [SPAN, 16, CHUNK]
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.max(scores, axis=2)
    weights = tl.exp(scores - _finite(top)[:, :, None])
    mixed = tl.dot(weights.to(value.dtype), value, input_precision=precision)  # [SPAN, 16, E]
    highest = tl.max(top, axis=0)
    share = tl.exp(top - _finite(highest)[None, :])
    total = tl.sum(share * tl.sum(weights, axis=2), axis=0)
    return highest, total, tl.sum(share[:, :, None] * mixed, axis=0)


@triton.jit
def _finite(top):
    """The largest of scores, 0 where none was seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=["T"])
def _merge(
    partial, statistics, starts, out, T,
    H: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, SLOTS: tl.constexpr, SPANS: tl.constexpr,
    SPANS2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the spans of `SLOTS` slots of one head of one row, in their order."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, E2)
    inside = column < E
    every = tl.arange(0, SPANS2)
    place = (row * H + head) * SPANS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(starts + row // T) + row % T + 1
    seen = (every < SPANS) & (
        every * SLOTS < length
    )  # spans beyond the row's length hold nothing that it sees
    highest = _finite(
        tl.max(tl.load(statistics + (place + every) * 2, mask=seen, other=float("-inf")), axis=0)
    )
    total = 0.0
    mixed = tl.zeros((E2,), dtype=tl.float32)
    # In their order, however many there are: a sum of all at once would depend on their number.
    for span in tl.range(0, SPANS, loop_unroll_factor=8):
        live = span * SLOTS < length
        local = tl.load(statistics + (place + span) * 2, mask=live, other=float("-inf"))
        share = tl.exp(local - highest)
        total += share * tl.load(statistics + (place + span) * 2 + 1, mask=live, other=0.0)
        mixed += share * tl.load(partial + (place + span) * E + column, mask=inside & live, other=0.0)
    tl.store(
        out + (row * H + head) * E + column,
        (mixed / tl.maximum(total, 1.0)).to(out.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _noise(keys, ids, row, column, rows, N: tl.constexpr, NAMED: tl.constexpr):
    """The noise of `gumbel_noise` for some rows and columns, float64; with `NAMED` of the tokens `ids`.

    Numbers are unsigned here, so that zeros are shifted in from the left.
    """
    key = tl.load(keys + row, mask=row < rows, other=0).to(tl.uint64)
    token = column
    if NAMED:
        token = tl.load(ids + column, mask=column < N, other=0)
    bits = key[:, None] + (token.to(tl.uint64) * 0x9E3779B97F4A7C15)[None, :]
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = bits ^ (bits >> 31)
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.0**-52
    return -tl.log(-tl.log(uniform))


@triton.jit
def _head_tile(
    x, weight, row, column, rows,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Logits of some rows and tokens, float32; minus infinity beyond the last token."""
    inner = tl.arange(0, BLOCK_K)
    logits = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for start in range(0, K, BLOCK_K):
        k = start + inner
        values = tl.load(x + _at(row, k, K), mask=_both(row < rows, k < K), other=0.0)
        used = tl.load(weight + tl.trans(_at(column, k, K)), mask=_both(k < K, column < N), other=0.0)
        logits = tl.dot(values, used, logits, input_precision=precision)
    return tl.where(column[None, :] < N, logits, float("-inf"))


@triton.jit(do_not_specialize=["rows"])
def _score(
    x, weight, logits, rows,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The logits of `BLOCK_N` tokens of each row."""
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = _head_tile(x, weight, row, column, rows, K, N, BLOCK_N, BLOCK_K, EXACT)
    tl.store(logits + _at(row.to(tl.int64), column, N), tile, mask=_both(row < rows, column < N))


@triton.jit(do_not_specialize=["rows"])
def _choose(
    x, weight, ids, keys, highest, index, sums, rows, temperature: tl.float64,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
    NAMED: tl.constexpr, DRAWN: tl.constexpr, TWO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best of `BLOCK_N` tokens of each row, its score, and the sum of exp(logit - largest logit).

    Scores are the logits. With `DRAWN` they are those of `Sampling.perturbed`, and after the sums of all rows follow
    the largest logits and the logits of the best tokens. With `TWO` the runner-up, too, after those of all rows.
    """
    block = tl.program_id(0)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    logits = _head_tile(x, weight, row, column, rows, K, N, BLOCK_N, BLOCK_K, EXACT)
    top = tl.max(logits, axis=1)
    scores = logits
    if DRAWN:
        scores = logits.to(tl.float64) / temperature + _noise(keys, ids, row, column, rows, N, NAMED)
    best = tl.minimum(block * BLOCK_N + tl.argmax(scores, axis=1), N - 1)
    place = row * tl.num_programs(0) + block
    tl.store(highest + place, tl.max(scores, axis=1), mask=row < rows)
    tl.store(index + place, best, mask=row < rows)
    tl.store(sums + place, tl.sum(tl.exp(logits - top[:, None]), axis=1), mask=row < rows)
    every = rows * tl.num_programs(0)
    chosen = column[None, :] == best[:, None]
    if DRAWN:
        tl.store(sums + every + place, top, mask=row < rows)
        tl.store(sums + 2 * every + place, tl.sum(tl.where(chosen, logits, 0.0), axis=1), mask=row < rows)
    if TWO:
        rest = tl.where(chosen, float("-inf"), scores)
        place += every
        tl.store(highest + place, tl.max(rest, axis=1), mask=row < rows)
        second = tl.minimum(block * BLOCK_N + tl.argmax(rest, axis=1), N - 1)
        tl.store(index + place, second, mask=row < rows)


@triton.jit
def _best(
    highest, index, sums, ids, token, confidence, blocks,
    BLOCKS: tl.constexpr, NAMED: tl.constexpr, DRAWN: tl.constexpr, VERIFIED: tl.constexpr, TWO: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The best of all tokens of one row; with `TWO` the runner-up, too, after all rows'.

    The confidence is the largest probability, with `VERIFIED` that of the token. With `NAMED` a token is given by its
    id in `ids`.
    """
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    block = tl.arange(0, BLOCKS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tops = tl.load(highest + row * blocks + block, mask=block < blocks, other=float("-inf"))
    logits = tops
    if DRAWN:
        largest = sums + rows * blocks
        logits = tl.load(largest + row * blocks + block, mask=block < blocks, other=float("-inf"))
    top = tl.max(logits, axis=0)
    total = tl.sum(
        tl.load(sums + row * blocks + block, mask=block < blocks, other=0.0) * tl.exp(logits - top), axis=0
    )
    best = tl.minimum(tl.argmax(tops, axis=0), blocks - 1)  # NaN must not give an index out of range
    first = tl.load(index + row * blocks + best)
    if NAMED:
        first = tl.load(ids + first)
    tl.store(token + row, first)
    chance = 1.0 / total
    if VERIFIED:
        chance *= tl.exp(tl.load(sums + (2 * rows + row) * blocks + best) - top)
    tl.store(confidence + row, chance)
    if TWO:
        runners_up = (rows + row) * blocks
        second = tl.load(highest + runners_up + best)
        others = tl.where(block == best, second, tops)
        winner = tl.minimum(tl.argmax(others, axis=0), blocks - 1)
        place = tl.where(winner == best, runners_up, row * blocks)
        after = tl.load(index + place + winner)
        if NAMED:
            after = tl.load(ids + after)
        tl.store(token + rows + row, after)


@cache
def _programmatic(device: torch.device) -> bool:
    """Whether a kernel may be started while the one before it ends (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@cache
def _span_bytes(device: torch.device) -> int:
    """Keys that one program reads on this device, at most."""
    if device.type != "cuda":
        return SPAN_BYTES
    properties = torch.cuda.get_device_properties(device)
    own: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if own < ROOMY:
        return SPAN_BYTES // 2
    return SPAN_BYTES


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], warps: int, stages: int, **constants: Any
) -> None:
    device = arguments[0].device
    if device.type != "cuda":  # Triton's interpreter, in tests
        kernel[grid](*arguments, PDL=False, **constants)
        return
    early = _programmatic(device)
    with torch.cuda.device(device):
        kernel[grid](*arguments, PDL=early, num_warps=warps, num_stages=stages, launch_pdl=early, **constants)


def _tiles(rows: int) -> int:
    return -(-rows // ROWS)


def _pieces(inner: int, columns: int, exact: bool, weights: int = 1) -> dict[str, int]:
    """In which pieces a program reads its columns of weights `[N, inner]`, and how many it holds before it waits."""
    if exact:
        size = 4
        block = 64
    else:
        size = 2
        block = 128 if inner <= 1024 else 256
    num_blocks = -(-inner // block)
    held = HELD_BYTES // (columns * block * size * weights)
    if exact:
        held = min(held, 2)
    return {"BLOCK_N": columns, "BLOCK_K": block, "HELD": min(held, num_blocks), "S": WARPS}


@dataclass(frozen=True)
class Projection:
    """A product with what stands before and after it; see `_project`.

    Attributes:
        weight: `[N, K]`, the weight of the norm before it multiplied in.
        bias: `[N]`.
        eps: of the norm before it; None without one.
        gate: whether its rows are those of gate and up in turn.
    """

    weight: Tensor
    bias: Tensor | None = None
    eps: float | None = None
    gate: bool = False

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[M, K]` to `[M, N]`, with a gate to `[M, N / 2]`."""
        width, inner = self.weight.shape
        columns = 2 * ROWS if self.gate else ROWS
        out = states.new_empty(len(states), width // 2 if self.gate else width)
        exact = states.dtype == torch.float32
        bias = states if self.bias is None else self.bias
        added = states if residual is None else residual
        arguments = (states, self.weight, bias, added, out, len(states), self.eps or 0.0)
        _launch(
            _project,
            (-(-width // columns), _tiles(len(states))),
            arguments,
            warps=WARPS,
            stages=4,
            K=inner,
            N=width,
            **_pieces(inner, columns, exact),
            NORM=self.eps is not None,
            GATE=self.gate,
            BIAS=self.bias is not None,
            ADD=residual is not None,
            EXACT=exact,
        )
        return out


@dataclass(frozen=True)
class FusedPass:
    """What all layers of a stage share in one pass.

    Attributes:
        cos, sin: rotary factors of all positions, float32 `[P, E]`.
        starts: `[B]`, the slot of each text's first new token.
        settled: `[B]`, slots that earlier passes have filled.
        length: T.
        window: how many slots back a query sees.
        span: chunks of slots that one program reads.
        spans: number of spans.
        partial, statistics: space for the sums of several spans, `[B T, H, spans, E]` and `[…, 2]`.
    """

    cos: Tensor
    sin: Tensor
    starts: Tensor
    settled: Tensor
    length: int
    window: int
    span: int
    spans: int
    partial: Tensor
    statistics: Tensor


def plan_fused(
    table: tuple[Tensor, Tensor], cache: KVCache, states: Tensor, fixed: FixedShape, num_heads: int
) -> FusedPass:
    """Plan a pass over new tokens `states [B, T, D]`, their positions by the rotary table."""
    batch, length, _ = states.shape
    cos, sin = table
    size = cos.shape[-1]
    chunks = triton.next_power_of_2(-(-fixed.num_slots // CHUNK))
    chunk_bytes = CHUNK * triton.next_power_of_2(size) * states.element_size()
    most = _span_bytes(states.device) // chunk_bytes
    span = max(1, min(chunks, most))
    spans = chunks // span
    sums = batch * length * num_heads * spans if spans > 1 else 0
    space = torch.empty(sums * (size + 2), device=states.device)
    partial = space[: sums * size]
    statistics = space[len(partial) :]
    window = cache.window or EVERYTHING
    settled = fixed.starts if fixed.settled is None else fixed.settled
    return FusedPass(cos, sin, fixed.starts, settled, length, window, span, spans, partial, statistics)


class FusedLayer:
    """A decoder layer over a cache by our kernels, for passes whose shape is fixed; without gradients.

    Args:
        layer: the layer, its adapters merged or left out.
        dtype: to compute in.
    """

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        self.heads = attention.num_heads
        self.groups = attention.num_groups
        self.size = attention.head_dim
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._qkv = _paired(_joined(layer.input_layernorm, inputs, dtype), self.size)
        self._out = _joined(None, [attention.o_proj], dtype)
        self._gate_up: Projection | None = None
        if layer.feed_forward:
            joined = _joined(layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj], dtype)
            self._gate_up = replace(_paired(joined, len(joined.weight)), gate=True)
            self._down = _joined(None, [layer.mlp.down_proj], dtype)

    def __call__(self, hidden: Tensor, plan: FusedPass, keys: Tensor, values: Tensor) -> Tensor:
        """`[B T, D]` to `[B T, D]`; keys and values `[B, G, capacity, E]` gain those of the new tokens."""
        mixed = self._attend(self._queries(hidden, plan, keys, values), plan, keys, values)
        hidden = self._out(mixed, hidden)
        if self._gate_up is None:  # Kangaroo's adapter has no feed-forward half
            return hidden
        return self._down(self._gate_up(hidden), hidden)

    def _queries(self, hidden: Tensor, plan: FusedPass, keys: Tensor, values: Tensor) -> Tensor:
        """Queries `[B T, H E]`, rotated; keys and values go into the cache."""
        rows, inner = hidden.shape
        weight, bias, eps = self._qkv.weight, self._qkv.bias, self._qkv.eps
        exact = hidden.dtype == torch.float32
        queries = hidden.new_empty(rows, self.heads * self.size)
        read = (hidden, weight, hidden if bias is None else bias, plan.cos, plan.sin, plan.starts)
        scalars = (rows, plan.length, keys.shape[2], eps)
        shape = {"K": inner, "H": self.heads, "G": self.groups, "E": self.size, "EXACT": exact}
        shape |= _pieces(inner, ROWS, exact)
        grid = (-(-len(weight) // ROWS), _tiles(rows))
        written = (queries, keys, values)
        _launch(_qkv, grid, (*read, *written, *scalars), WARPS, 4, BIAS=bias is not None, **shape)
        return queries

    def _attend(self, queries: Tensor, plan: FusedPass, keys: Tensor, values: Tensor) -> Tensor:
        """What attention mixes for each head, `[B T, H E]`."""
        rows = len(queries)
        mixed = torch.empty_like(queries)
        shape = {"H": self.heads, "E": self.size, "E2": triton.next_power_of_2(self.size)}
        grid = (plan.spans, self.heads, len(plan.starts) * _tiles(plan.length))
        arguments = (queries, plan.starts, plan.settled, keys, values, mixed, plan.partial, plan.statistics)
        scalars = (plan.length, keys.shape[2], plan.window, self.size**-0.5)
        spans = {"CHUNK": CHUNK, "SPAN": plan.span, "SPANS": plan.spans}
        exact = queries.dtype == torch.float32
        # A program of 32 KB of keys or less has registers for them with four warps.
        large = plan.span * CHUNK * shape["E2"] * queries.element_size() > SPAN_BYTES // 2
        warps = 2 * WARPS if large else WARPS
        _launch(_attend, grid, (*arguments, *scalars), warps, 1, G=self.groups, EXACT=exact, **shape, **spans)
        if plan.spans > 1:
            parts = (plan.partial, plan.statistics, plan.starts, mixed, plan.length)
            sizes = {"SLOTS": plan.span * CHUNK, "SPANS": plan.spans}
            sizes["SPANS2"] = triton.next_power_of_2(plan.spans)
            _launch(_merge, (rows, self.heads), parts, 1, 1, **shape, **sizes)
        return mixed


def _joined(
    norm: torch.nn.RMSNorm | None, projections: Sequence[torch.nn.Linear], dtype: torch.dtype
) -> Projection:
    """The joined projections, with the norm before them."""
    weight = torch.cat([linear.weight.detach() for linear in projections]).float()
    biases = [linear.bias.detach().to(dtype) for linear in projections if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    if norm is None:
        return Projection(weight.to(dtype), bias)
    scaled = weight * norm.weight.detach().float()
    return Projection(scaled.to(dtype), bias, norm.eps)


def _paired(joined: Projection, size: int) -> Projection:
    """Interleave the first half and the second half of every `size` rows."""

    def interleave(rows: Tensor) -> Tensor:
        halves = rows.view(-1, 2, size // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    bias = None if joined.bias is None else interleave(joined.bias)
    return replace(joined, weight=interleave(joined.weight), bias=bias)


def best_tokens(
    states: Tensor, head: Tensor, two: bool = False, ids: Tensor | None = None, drawn: Drawn | None = None
) -> tuple[Tensor, Tensor]:
    """The token that is chosen after each row of normed states `[M, D]`, by a head `[V, D]`.

    Args:
        states: the rows.
        head: the head's weight.
        two: find the runners-up, too.
        ids: `[V]`, the tokens' ids; None for 0, 1, …
        drawn: how tokens are sampled, from all of them (no cut); None for the likeliest.

    Returns:
        Tokens `[1, M]`, or `[2, M]` with the runners-up; probabilities `[M]` as of `Stage.best`.
    """
    rows = len(states)
    blocks = -(-len(head) // HEAD_BLOCK)
    count = 2 if two else 1
    kind = torch.float64 if drawn else torch.float32
    highest = torch.empty(count, rows, blocks, dtype=kind, device=states.device)
    sums = torch.empty(3 if drawn else 1, rows, blocks, device=states.device)
    index = torch.empty(count, rows, blocks, dtype=torch.long, device=states.device)
    tokens = torch.empty(count, rows, dtype=torch.long, device=states.device)
    confidence = torch.empty(rows, device=states.device)
    names = index if ids is None else ids
    keys = drawn.keys.contiguous() if drawn else index
    temperature = float(drawn.how.temperature) if drawn else 1.0
    arguments = (states, head, names, keys, highest, index, sums, rows, temperature)
    how = {"NAMED": ids is not None, "DRAWN": drawn is not None, "TWO": two}
    _launch(_choose, (blocks, _tiles(rows)), arguments, 4, 3, **_head_shape(states, head), **how)
    parts = (highest, index, sums, names, tokens, confidence, blocks)
    how["VERIFIED"] = drawn is not None and not drawn.is_draft
    _launch(_best, (rows,), parts, 4, 1, BLOCKS=triton.next_power_of_2(blocks), **how)
    return tokens, confidence


def _head_shape(states: Tensor, head: Tensor) -> dict[str, Any]:
    exact = states.dtype == torch.float32
    vocab, inner = head.shape
    return {"K": inner, "N": vocab, "BLOCK_N": HEAD_BLOCK, "BLOCK_K": 32 if exact else 64, "EXACT": exact}


def head_logits(states: Tensor, head: Tensor) -> Tensor:
    """Logits `[M, V]`, float32, of normed states `[M, D]` by a head `[V, D]`; a row's bits are the same among any."""
    rows = len(states)
    logits = torch.empty(rows, len(head), device=states.device)
    grid = (-(-len(head) // HEAD_BLOCK), _tiles(rows))
    _launch(_score, grid, (states, head, logits, rows), 4, 3, **_head_shape(states, head))
    return logits


def normed(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm of states `[…, D]`, with a weight `[D]`."""
    out = torch.empty_like(states)
    size = states.shape[-1]
    rows = states.numel() // size
    block = triton.next_power_of_2(size)
    _launch(_norm, (rows,), (states, weight, out, eps), 4, 1, K=size, BLOCK=block)
    return out


def two_maps(states: Tensor, tokens: Tensor | None, feedback: Tensor, weights: Tensor) -> Tensor:
    """The sum of two maps `[2, D, D]` of two states.

    Args:
        states: `[M, D]`, what the first map reads; with tokens a table `[V, D]` of embeddings.
        tokens: `[M]`, whose embeddings the first map reads.
        feedback: `[M, D]`, what the second map reads.
        weights: of both.

    Returns:
        `[M, D]`.
    """
    out = torch.empty_like(feedback)
    rows, size = feedback.shape
    exact = feedback.dtype == torch.float32
    looked_up = tokens is not None
    arguments = (states, states if tokens is None else tokens, feedback, weights, out, rows)
    shape = {"K": size, "N": size, "LOOKED_UP": looked_up, "EXACT": exact, **_pieces(size, ROWS, exact, 2)}
    _launch(_fuse, (-(-size // ROWS), _tiles(rows)), arguments, 4, 4, **shape)
    return out


def supports(layer: DecoderLayer, dtype: torch.dtype, most: int) -> bool:
    """Whether these kernels compute the layer, and faster than a library would.

    Args:
        layer: the layer.
        dtype: to compute in.
        most: largest number of elements of a weight; a library reads larger ones as fast.
    """
    if dtype not in (torch.bfloat16, torch.float32) or layer.self_attn.head_dim < ROWS:
        return False
    largest = layer.self_attn.q_proj.weight.numel()
    if layer.feed_forward:
        largest = max(largest, layer.mlp.gate_proj.weight.numel())
        if layer.mlp.hidden_act not in ("silu", "swish"):
            return False
    return largest <= most
