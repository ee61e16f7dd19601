"""Triton kernels for a decoder layer over a cache: six a layer, in tiles of sixteen rows.

A row is one token of one text. Rows always stand in tiles of sixteen and keys in chunks of 64 slots, whatever a pass
reads, and what a row computes depends on its own tokens alone. So a token gets the same bits in plain decoding, among
drafts and among other texts.

    1  norm, queries, keys and values           [M, D]     -> [M, (H + 2 G) E]
    2  rotary, cache, attention over a chunk               -> partial sums of each chunk
    3  merge of the chunks                                 -> [M, H E]
    4  output, residual                         [M, H E]   -> [M, D]
    5  norm, gate and up, activation            [M, D]     -> [M, I]
    6  down, residual                           [M, I]     -> [M, D]

The weight of a norm is multiplied into the weights after it, and its scale is applied after the product. Letters:
M rows, D hidden, I feed-forward width, H query heads, G key/value heads, E head size, B texts, T tokens of a text.
A kernel takes every pointer and size by itself: Triton knows no records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kangaroo.adapter import DecoderLayer
from kangaroo.decoding.cache import FixedShape, KVCache

ROWS = 16
"""Rows of a tile: the least that tensor cores multiply."""
CHUNK = 64
"""Slots whose keys one program reads."""
HEAD_BLOCK = 128
"""Tokens of the vocabulary whose logits one program computes."""
EVERYTHING = 1 << 30
"""A window that no text fills."""


@triton.jit(do_not_specialize=["rows"])
def _project(
    x, weight, bias, residual, out, rows, eps,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The product x @ weight.T of `[rows, K]` and `[N, K]`; after a norm, plus a bias, plus a residual as asked for.

    With a gate the weights are `[2, N, K]`, gate and up, and the result is silu(gate) * up.
    """
    tile = tl.program_id(1)
    row = tile * 16 + tl.arange(0, 16)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
    total = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    total_up = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((16,), dtype=tl.float32)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for start in range(0, K, BLOCK_K):
        k = start + inner
        inside = (row[:, None] < rows) & (k[None, :] < K)
        values = tl.load(x + row[:, None] * K + k[None, :], mask=inside, other=0.0)
        wanted = (column[None, :] < N) & (k[:, None] < K)
        place = column[None, :] * K + k[:, None]
        total = tl.dot(
            values, tl.load(weight + place, mask=wanted, other=0.0), total, input_precision=precision
        )
        if GATE:
            up = tl.load(weight + N * K + place, mask=wanted, other=0.0)
            total_up = tl.dot(values, up, total_up, input_precision=precision)
        if NORM:
            exact = values.to(tl.float32)
            squares += tl.sum(exact * exact, axis=1)
    if PDL:
        gdc_launch_dependents()
    if NORM:
        scale = 1.0 / tl.sqrt(squares / K + eps)
        total *= scale[:, None]
        total_up *= scale[:, None]
    _write(total, total_up, bias, residual, out, row, column, rows, N, GATE, BIAS, ADD)


@triton.jit
def _write(
    total, total_up, bias, residual, out, row, column, rows,
    N: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Store sums of a product `[16, columns]`, after bias, gate and residual."""
    kept = (row[:, None] < rows) & (column[None, :] < N)
    if BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if GATE:
            total_up += tl.load(bias + N + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if GATE:
        total = total / (1.0 + tl.exp(-total)) * total_up
    place = row[:, None] * N + column[None, :]
    if ADD:
        total += tl.load(residual + place, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _rotated(base, row, row_mask, column, cos, sin, position, E: tl.constexpr):
    """Rows of queries or keys, turned by their positions, `[rows, E]` float32."""
    half: tl.constexpr = E // 2
    partner = tl.where(column < half, column + half, column - half)
    sign = tl.where(column < half, -1.0, 1.0)
    mask = row_mask[:, None] & (column[None, :] < E)
    own = tl.load(base + row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(base + row[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    turn = position[:, None] * E + column[None, :]
    c = tl.load(cos + turn, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=mask, other=0.0).to(tl.float32)
    return own * c + sign[None, :] * other * s


@triton.jit
def _chunk(
    qkv, cos, sin, keys, values, text, group, start, slot, column, T, capacity, writes,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Keys and values of a chunk of slots, `[CHUNK, E]`, from the cache or new; new ones are stored if asked for."""
    width: tl.constexpr = (H + 2 * G) * E
    fresh = slot - start
    is_new = (fresh >= 0) & (fresh < T)
    row = (text * T + fresh) * width
    in_head = column[None, :] < E
    new_key = _rotated(qkv + (H + group) * E, row, is_new, column, cos, sin, slot, E).to(
        keys.dtype.element_ty
    )
    place = (H + G + group) * E + row[:, None] + column[None, :]
    new_value = tl.load(qkv + place, mask=is_new[:, None] & in_head, other=0.0)
    stored = ((text * G + group) * capacity + slot)[:, None] * E + column[None, :]
    is_old = (slot < start)[:, None] & in_head
    old_key = tl.load(keys + stored, mask=is_old, other=0.0)
    old_value = tl.load(values + stored, mask=is_old, other=0.0)
    if writes:
        fits = is_new[:, None] & in_head & (slot < capacity)[:, None]
        tl.store(keys + stored, new_key, mask=fits)
        tl.store(values + stored, new_value, mask=fits)
    key = tl.where(is_new[:, None], new_key, old_key)
    value = tl.where(is_new[:, None], new_value, old_value)
    return key, value


@triton.jit(do_not_specialize=["T", "capacity", "window"])
def _attend(
    qkv, cos, sin, starts, keys, values, partial, statistics, T, capacity, window, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one tile of a text's tokens on one chunk of slots; the new keys and values go into the cache.

    Old and new keys lie in the places of their slots, so that sums are always taken in the same order.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    text = tl.program_id(2) // tl.cdiv(T, 16)
    tile = tl.program_id(2) % tl.cdiv(T, 16)
    group = head // (H // G)
    column = tl.arange(0, E2)
    token = tile * 16 + tl.arange(0, 16)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc_wait()
    start = tl.load(starts + text)
    own = token < T
    place = text * T + token
    position = start + token
    statistic = statistics + (place * H + head) * CHUNKS * 2 + chunk * 2
    if chunk * CHUNK >= start + T:
        return
    query = _rotated(qkv + head * E, place * ((H + 2 * G) * E), own, column, cos, sin, position, E)
    writes = (head % (H // G) == 0) & (tile == 0)
    key, value = _chunk(
        qkv, cos, sin, keys, values, text, group, start, slot, column, T, capacity, writes, H, G, E
    )
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    scores = tl.dot(query.to(key.dtype), tl.trans(key), input_precision=precision) * scale
    seen = (slot[None, :] <= position[:, None]) & (slot[None, :] > position[:, None] - window)
    scores = tl.where(seen, scores, float("-inf"))
    if PDL:
        gdc_launch_dependents()
    highest = tl.max(scores, axis=1)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - finite[:, None])
    mixed = tl.dot(weights.to(value.dtype), value, input_precision=precision)
    tl.store(statistic, highest, mask=own)
    tl.store(statistic + 1, tl.sum(weights, axis=1), mask=own)
    where = (((place * H + head) * CHUNKS + chunk) * E)[:, None] + column[None, :]
    tl.store(partial + where, mixed, mask=own[:, None] & (column[None, :] < E))


@triton.jit(do_not_specialize=["T"])
def _merge(
    partial, statistics, starts, out, T,
    H: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row: the sums of its chunks put together, in the chunks' order."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, E2)
    inside = column < E
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(starts + row // T) + row % T + 1
    place = (row * H + head) * CHUNKS
    every = tl.arange(0, CHUNKS2)  # chunks beyond the row's length hold nothing that it sees
    live_chunks = (every < CHUNKS) & (every * CHUNK < length)
    tops = tl.load(statistics + (place + every) * 2, mask=live_chunks, other=float("-inf"))
    highest = tl.max(tops, axis=0)
    total = 0.0
    mixed = tl.zeros((E2,), dtype=tl.float32)
    # In the chunks' order, however many there are: a sum of all at once would depend on their number.
    for chunk in tl.range(0, CHUNKS, loop_unroll_factor=8):
        live = chunk * CHUNK < length
        local = tl.load(statistics + (place + chunk) * 2, mask=live, other=float("-inf"))
        share = tl.exp(local - highest)
        total += share * tl.load(statistics + (place + chunk) * 2 + 1, mask=live, other=0.0)
        mixed += share * tl.load(partial + (place + chunk) * E + column, mask=inside & live, other=0.0)
    tl.store(out + (row * H + head) * E + column, (mixed / total).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _choose(
    x, weight, highest, index, sums, rows,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
    TWO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The likeliest of `BLOCK_N` tokens of each row, its logit, and the sum of all exponentials below it.

    With `TWO` the runner-up, too, after those of all rows.
    """
    block = tl.program_id(0)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
    logits = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for start in range(0, K, BLOCK_K):
        k = start + inner
        values = tl.load(
            x + row[:, None] * K + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < K), other=0.0
        )
        wanted = (column[None, :] < N) & (k[:, None] < K)
        used = tl.load(weight + column[None, :] * K + k[:, None], mask=wanted, other=0.0)
        logits = tl.dot(values, used, logits, input_precision=precision)
    logits = tl.where(column[None, :] < N, logits, float("-inf"))
    top = tl.max(logits, axis=1)
    best = block * BLOCK_N + tl.argmax(logits, axis=1)
    place = row * tl.num_programs(0) + block
    tl.store(highest + place, top, mask=row < rows)
    tl.store(index + place, best, mask=row < rows)
    tl.store(sums + place, tl.sum(tl.exp(logits - top[:, None]), axis=1), mask=row < rows)
    if TWO:
        rest = tl.where(column[None, :] == best[:, None], float("-inf"), logits)
        place += rows * tl.num_programs(0)
        tl.store(highest + place, tl.max(rest, axis=1), mask=row < rows)
        tl.store(index + place, block * BLOCK_N + tl.argmax(rest, axis=1), mask=row < rows)
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _best(
    highest, index, sums, token, confidence, blocks, BLOCKS: tl.constexpr, TWO: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """The likeliest of all tokens of one row, and its probability; with `TWO` the runner-up, too, after all rows'."""
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    block = tl.arange(0, BLOCKS)
    if PDL:
        gdc_wait()
    tops = tl.load(highest + row * blocks + block, mask=block < blocks, other=float("-inf"))
    top = tl.max(tops, axis=0)
    total = tl.sum(
        tl.load(sums + row * blocks + block, mask=block < blocks, other=0.0) * tl.exp(tops - top), axis=0
    )
    best = tl.argmax(tops, axis=0)
    tl.store(token + row, tl.load(index + row * blocks + best))
    tl.store(confidence + row, 1.0 / total)
    if TWO:
        runners_up = (rows + row) * blocks
        second = tl.load(highest + runners_up + best)
        others = tl.where(block == best, second, tops)
        winner = tl.argmax(others, axis=0)
        place = tl.where(winner == best, runners_up, row * blocks)
        tl.store(token + rows + row, tl.load(index + place + winner))


@cache
def _programmatic(device: torch.device) -> bool:
    """Whether a kernel may be started while the one before it ends (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


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


@dataclass(frozen=True)
class Projection:
    """A product with what stands before and after it; see `_project`.

    Attributes:
        weight: `[N, K]`, or `[2, N, K]` with a gate, the weight of the norm before it multiplied in.
        bias: `[N]`, or `[2 N]` with a gate.
        eps: of the norm before it; None without one.
    """

    weight: Tensor
    bias: Tensor | None = None
    eps: float | None = None

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[M, K]` to `[M, N]`."""
        gate = self.weight.dim() == 3
        width, inner = self.weight.shape[-2:]
        out = states.new_empty(len(states), width)
        exact = states.dtype == torch.float32
        bias = states if self.bias is None else self.bias
        added = states if residual is None else residual
        arguments = (states, self.weight, bias, added, out, len(states), self.eps or 0.0)
        long = inner > 1024
        _launch(
            _project,
            (-(-width // ROWS), _tiles(len(states))),
            arguments,
            warps=2,
            stages=4,
            K=inner,
            N=width,
            BLOCK_N=ROWS,
            BLOCK_K=32 if exact else 256 if long and not gate else 64,
            NORM=self.eps is not None,
            GATE=gate,
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
        length: T.
        chunks: chunks of slots that are read.
        window: how many slots back a query sees.
        partial, statistics: space for the sums of each chunk, `[B T, H, chunks, E]` and `[…, 2]`.
    """

    cos: Tensor
    sin: Tensor
    starts: Tensor
    length: int
    chunks: int
    window: int
    partial: Tensor
    statistics: Tensor


def plan_fused(
    table: tuple[Tensor, Tensor], cache: KVCache, states: Tensor, fixed: FixedShape, num_heads: int
) -> FusedPass:
    """Plan a pass over new tokens `states [B, T, D]`, their positions by the rotary table."""
    batch, length, _ = states.shape
    cos, sin = table
    chunks = -(-fixed.num_slots // CHUNK)
    sums = batch * length * num_heads * chunks
    space = torch.empty(sums * (cos.shape[-1] + 2), device=states.device)
    partial = space[: sums * cos.shape[-1]]
    window = cache.window or EVERYTHING
    return FusedPass(cos, sin, fixed.starts, length, chunks, window, partial, space[len(partial) :])


class FusedLayer:
    """A decoder layer over a cache by six kernels, for passes whose shape is fixed; without gradients.

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
        self._qkv = _joined(layer.input_layernorm, inputs, dtype)
        self._out = _joined(None, [attention.o_proj], dtype)
        self._gate_up: Projection | None = None
        if layer.feed_forward:
            joined = _joined(layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj], dtype)
            self._gate_up = Projection(joined.weight.unflatten(0, (2, -1)), joined.bias, joined.eps)
            self._down = _joined(None, [layer.mlp.down_proj], dtype)

    def __call__(self, hidden: Tensor, plan: FusedPass, keys: Tensor, values: Tensor) -> Tensor:
        """`[B T, D]` to `[B T, D]`; keys and values `[B, G, capacity, E]` gain those of the new tokens."""
        rows = len(hidden)
        texts = len(plan.starts)
        exact = hidden.dtype == torch.float32
        shape = {"H": self.heads, "E": self.size, "E2": triton.next_power_of_2(self.size)}
        shape |= {"CHUNK": CHUNK, "CHUNKS": plan.chunks}
        qkv = self._qkv(hidden)
        grid = (plan.chunks, self.heads, texts * _tiles(plan.length))
        arguments = (qkv, plan.cos, plan.sin, plan.starts, keys, values, plan.partial, plan.statistics)
        scalars = (plan.length, keys.shape[2], plan.window, self.size**-0.5)
        _launch(_attend, grid, (*arguments, *scalars), 4, 1, G=self.groups, EXACT=exact, **shape)
        mixed = hidden.new_empty(rows, self.heads * self.size)
        parts = (plan.partial, plan.statistics, plan.starts, mixed, plan.length)
        _launch(_merge, (rows, self.heads), parts, 1, 1, CHUNKS2=triton.next_power_of_2(plan.chunks), **shape)
        hidden = self._out(mixed, hidden)
        if self._gate_up is None:  # Kangaroo's adapter has no feed-forward half
            return hidden
        return self._down(self._gate_up(hidden), hidden)


def _joined(
    norm: torch.nn.RMSNorm | None, projections: Sequence[torch.nn.Linear], dtype: torch.dtype
) -> Projection:
    """The joined projections, with the norm before them."""
    weight = torch.cat([linear.weight.detach() for linear in projections]).float()
    biases = [linear.bias.detach().to(dtype) for linear in projections if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    if norm is None:
        return Projection(weight.to(dtype), bias)
    return Projection((weight * norm.weight.detach().float()).to(dtype), bias, norm.eps)


def best_tokens(states: Tensor, head: Tensor, two: bool = False) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row of normed states `[M, D]`, by a head `[V, D]`, and its probability `[M]`.

    Args:
        states: the rows.
        head: the head's weight.
        two: find the runners-up, too.

    Returns:
        Tokens `[1, M]`, or `[2, M]` with the runners-up; probabilities of the likeliest.
    """
    rows = len(states)
    vocab, inner = head.shape
    blocks = -(-vocab // HEAD_BLOCK)
    count = 2 if two else 1
    highest = torch.empty(count, rows, blocks, device=states.device)
    sums = torch.empty(rows, blocks, device=states.device)
    index = torch.empty(count, rows, blocks, dtype=torch.long, device=states.device)
    tokens = torch.empty(count, rows, dtype=torch.long, device=states.device)
    confidence = torch.empty(rows, device=states.device)
    exact = states.dtype == torch.float32
    arguments = (states, head, highest, index, sums, rows)
    shape = {"K": inner, "N": vocab, "BLOCK_N": HEAD_BLOCK, "BLOCK_K": 32 if exact else 64, "EXACT": exact}
    _launch(_choose, (blocks, _tiles(rows)), arguments, 4, 3, TWO=two, **shape)
    parts = (highest, index, sums, tokens, confidence, blocks)
    _launch(_best, (rows,), parts, 4, 1, BLOCKS=triton.next_power_of_2(blocks), TWO=two)
    return tokens, confidence


def supports(layer: DecoderLayer, dtype: torch.dtype, most: int) -> bool:
    """Whether these kernels compute the layer, and faster than a library would.

    Args:
        layer: the layer.
        dtype: to compute in.
        most: numbers in a weight; a library reads larger ones as fast.
    """
    sizes = [layer.self_attn.q_proj.weight.numel()]
    if layer.feed_forward:
        sizes.append(layer.mlp.gate_proj.weight.numel())
        if layer.mlp.hidden_act not in ("silu", "swish"):
            return False
    return (
        dtype in (torch.bfloat16, torch.float32) and layer.self_attn.head_dim >= ROWS and max(sizes) <= most
    )
