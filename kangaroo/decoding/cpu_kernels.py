"""Decoding in float32 on a CPU, written in Numba: products of few rows, and decoder layers made of them.

A product of few rows takes as long as its weight takes to read. Libraries use the time that is left for computing less
well than they could: oneDNN takes a third longer for six rows than for one. Here six rows take hardly longer than one.
And a layer is one call, where torch's operators for what is not a product take as long as half of the products.

A weight is stored in *panels* of sixteen outputs. A *tile* has the sums of up to six rows and one panel in the
processor's registers, and adds to them input by input (GotoBLAS, Goto and van de Geijn 2008). Nothing that is computed
for a row depends on other rows, nor on the number of threads: a row gives the same bits alone and among others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor, nn

from kangaroo.adapter import DecoderLayer
from kangaroo.decoding.cache import CachedPass, KVCache

LANES = 8
"""Numbers of a vector, as AVX2 has them; for narrower registers the compiler takes several."""
VECTORS = 2
"""Vectors of a panel's outputs."""
WIDTH = LANES * VECTORS
TALLEST = 6
"""Rows of a tile, at most: twelve sums, two vectors of weights and an input fit into sixteen registers."""
NUMBER = 4
"""Bytes of a number."""
CHUNK = 256
"""Inputs that all tiles of a panel add before any goes on: 16 KB of the panel, half of the first cache."""
PIECE = 256
"""Numbers of a row that a thread gates at a time."""

forked = False
"""Whether this process was forked: threads do not survive that, and GNU's OpenMP ends a process that then asks for
them."""


def _after_fork() -> None:
    global forked
    forked = True


os.register_at_fork(after_in_child=_after_fork)


# Products: a tile, instruction by instruction, since its sums must not leave the registers

FLOAT, INDEX, FLAG = ir.FloatType(), ir.IntType(64), ir.IntType(32)
VECTOR = ir.VectorType(FLOAT, LANES)
BYTES = ir.IntType(8).as_pointer()


@intrinsic
def _add_tile(typing, rows, memory):
    """`(rows, (states, width, panel, soon, step, sums, outputs, depth))`, for Numba.

    Adds states `[rows, depth]` times a panel `[depth, WIDTH]` to sums `[rows, WIDTH]`, all three addresses of float32
    numbers. Rows of states are `width` numbers apart, those of sums `outputs`. Meanwhile memory from the address `soon`
    on is fetched, `step` bytes an input.
    """

    def generate(context, build, signature, arguments):
        memory = cgutils.unpack_tuple(build, arguments[1])
        done = build.append_basic_block("done")
        switch = build.switch(arguments[0], done)
        for count in range(1, TALLEST + 1):
            with build.goto_block(build.append_basic_block(f"rows_{count}")):
                switch.add_case(ir.Constant(INDEX, count), build.block)
                _write_tile(build, count, *memory)
                build.branch(done)
        build.position_at_end(done)
        return context.get_dummy_value()

    return numba.void(numba.intp, numba.types.UniTuple(numba.intp, 8)), generate


def _write_tile(build, rows, states, width, panel, soon, step, sums, outputs, depth):
    """Write the instructions of `_add_tile` for this many rows."""
    fma = ir.FunctionType(VECTOR, [VECTOR] * 3)
    multiply_add = cgutils.get_or_insert_function(build.module, fma, f"llvm.fma.v{LANES}f32")
    fetch = ir.FunctionType(ir.VoidType(), [BYTES, FLAG, FLAG, FLAG])
    prefetch = cgutils.get_or_insert_function(build.module, fetch, "llvm.prefetch.p0i8")
    for_reading, keep, data = [ir.Constant(FLAG, value) for value in (0, 3, 1)]
    places = []
    for row in range(rows):
        places += _vectors_at(build, sums, build.mul(outputs, ir.Constant(INDEX, row)))
    # The compiler keeps these in registers.
    own = [cgutils.alloca_once(build, VECTOR) for _ in places]
    for place, total in zip(places, own, strict=True):
        build.store(_load(build, place), total)
    with cgutils.for_range(build, depth) as loop:
        fetched = build.add(soon, build.mul(loop.index, step))
        build.call(prefetch, [build.inttoptr(fetched, BYTES), for_reading, keep, data])
        start = build.mul(loop.index, ir.Constant(INDEX, WIDTH))
        weights = [_load(build, place) for place in _vectors_at(build, panel, start)]
        for row in range(rows):
            place = build.add(build.mul(width, ir.Constant(INDEX, row)), loop.index)
            number = build.load(build.gep(build.inttoptr(states, FLOAT.as_pointer()), [place]))
            everywhere = _in_all_lanes(build, number)
            for weight, total in zip(weights, own[row * VECTORS :], strict=False):
                added = build.call(multiply_add, [everywhere, weight, build.load(total)])
                build.store(added, total)
    for place, total in zip(places, own, strict=True):
        build.store(build.load(total), place).align = NUMBER


def _vectors_at(build, matrix, start):
    """Addresses of the `WIDTH` numbers from a place of a matrix on, vector by vector."""
    first = build.gep(build.inttoptr(matrix, FLOAT.as_pointer()), [start])
    places = [build.gep(first, [ir.Constant(INDEX, LANES * which)]) for which in range(VECTORS)]
    return [build.bitcast(place, VECTOR.as_pointer()) for place in places]


def _load(build, place):
    """The vector there."""
    loaded = build.load(place)
    loaded.align = NUMBER
    return loaded


def _in_all_lanes(build, number):
    """A vector that has a number in every lane."""
    nothing = ir.Constant(VECTOR, ir.Undefined)
    first_lane = build.insert_element(nothing, number, ir.Constant(FLAG, 0))
    return build.shuffle_vector(first_lane, nothing, ir.Constant(ir.VectorType(FLAG, LANES), [0] * LANES))


@numba.njit(nogil=True, cache=True)
def _multiply_panel(states, rows, width, panel, sums, outputs):
    """Add states `[rows, width]` times a panel `[width, WIDTH]` to sums `[rows, WIDTH]`; see `_add_tile`."""
    tiles = -(-rows // TALLEST)
    # Each tile fetches its share of the next chunk, so that reading it takes no time of its own.
    step = NUMBER * WIDTH // tiles
    for start in range(0, width, CHUNK):
        depth = min(CHUNK, width - start)
        weights = panel + NUMBER * WIDTH * start
        for tile in range(tiles):
            row = rows * tile // tiles
            count = rows * (tile + 1) // tiles - row
            inputs = states + NUMBER * (width * row + start)
            soon = weights + NUMBER * WIDTH * CHUNK + step * depth * tile
            own = sums + NUMBER * outputs * row
            _add_tile(count, (inputs, width, weights, soon, step, own, outputs, depth))


@numba.njit(nogil=True, cache=True)
def _multiply(states, panels, sums):
    """Add states `[R, D]` times panels `[P, D, WIDTH]` to sums `[R, P * WIDTH]`."""
    rows, width = states.shape
    for which in range(len(panels)):
        panel = panels.ctypes.data + NUMBER * WIDTH * width * which
        own = sums.ctypes.data + NUMBER * WIDTH * which
        _multiply_panel(states.ctypes.data, rows, width, panel, own, sums.shape[1])


@numba.njit(nogil=True, cache=True, parallel=True)
def _multiply_in_threads(states, panels, sums):
    """The same on several threads, a run of panels each."""
    rows, width = states.shape
    for which in numba.prange(len(panels)):
        panel = panels.ctypes.data + NUMBER * WIDTH * width * which
        own = sums.ctypes.data + NUMBER * WIDTH * which
        _multiply_panel(states.ctypes.data, rows, width, panel, own, sums.shape[1])


class PanelProduct:
    """`x -> x @ weight.T + bias` of float32 states on a CPU; no gradients.

    Args:
        weight: `[N, D]`, which is copied.
        bias: `[N]`.

    Attributes:
        panels: `[N / WIDTH, D, WIDTH]`, the last one filled up with zeros.
        bias: where the sums begin, as many numbers as the panels have outputs.
        num_outputs: N.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.num_outputs, depth = weight.shape
        num_panels = -(-self.num_outputs // WIDTH)
        filled_up = torch.zeros(num_panels * WIDTH, depth)
        filled_up[: self.num_outputs] = weight
        panels = filled_up.view(num_panels, WIDTH, depth).transpose(1, 2).contiguous()
        self.panels = panels.numpy()
        self.bias = np.zeros(num_panels * WIDTH, np.float32)
        if bias is not None:
            self.bias[: self.num_outputs] = bias.numpy()

    def __call__(self, states: Tensor) -> Tensor:
        """`[…, D]` to `[…, N]`."""
        rows = _rows(states)
        sums = np.broadcast_to(self.bias, (len(rows), len(self.bias))).copy()
        if forked:
            _multiply(rows, self.panels, sums)
        else:
            _use_threads()
            _multiply_in_threads(rows, self.panels, sums)
        result = torch.from_numpy(sums)
        if len(self.bias) > self.num_outputs:
            result = result[:, : self.num_outputs].contiguous()
        return result.view(*states.shape[:-1], self.num_outputs)


def _rows(states: Tensor) -> Any:
    """States `[…, D]` as a matrix of Numpy."""
    return np.ascontiguousarray(states.detach().numpy().reshape(-1, states.shape[-1]))


def _use_threads() -> None:
    """As many as torch uses."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@numba.njit(nogil=True, cache=True)
def _normed(states, weight, eps):
    """Rows `[R, D]` over their root mean squares, times a weight `[D]`."""
    rows, size = states.shape
    normed = np.empty_like(states)
    for row in range(rows):
        squares = 0.0
        for place in range(size):
            squares += states[row, place] * states[row, place]
        scale = np.float32(1 / math.sqrt(squares / size + eps))
        for place in range(size):
            normed[row, place] = states[row, place] * scale * weight[place]
    return normed


@numba.njit(nogil=True, cache=True)
def _rotate(head, cos, sin):
    """Rotate a query or key `[E]` in place; see `kangaroo.adapter.apply_rotary`."""
    half = len(head) // 2
    for place in range(half):
        first, second = head[place], head[place + half]
        head[place] = first * cos[place] - second * sin[place]
        head[place + half] = second * cos[place + half] + first * sin[place + half]


# Sums may be taken in another order, always the same one for a number of slots; so they fill vectors.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _attend(query, keys, values, mixed):
    """Mix values `[S, E]` by the softmax of a query's products with keys `[S, E]`."""
    slots, size = keys.shape
    weights = np.empty(slots, np.float32)
    scale = np.float32(1 / math.sqrt(size))
    highest = np.float32(-np.inf)
    for slot in range(slots):
        product = np.float32(0)
        for place in range(size):
            product += query[place] * keys[slot, place]
        weights[slot] = product * scale
        highest = max(highest, weights[slot])
    total = np.float32(0)
    for slot in range(slots):
        weights[slot] = math.exp(weights[slot] - highest)
        total += weights[slot]
    for place in range(size):
        mixed[place] = 0
    fours = slots // 4 * 4  # sums that are read and written for each slot would wait for one another
    for slot in range(0, fours, 4):
        first, second, third, fourth = weights[slot], weights[slot + 1], weights[slot + 2], weights[slot + 3]
        for place in range(size):
            sums = first * values[slot, place] + second * values[slot + 1, place]
            mixed[place] += sums + third * values[slot + 2, place] + fourth * values[slot + 3, place]
    for slot in range(fours, slots):
        for place in range(size):
            mixed[place] += weights[slot] * values[slot, place]
    for place in range(size):
        mixed[place] /= total


@numba.njit(nogil=True, cache=True, parallel=True)
def _attend_in_threads(queries, slots, keys, values, window, mixed):
    """Mixed values `[R, H * E]` of queries in the first columns of `[R, …]`; the rest as in `_attention`."""
    groups, size = keys.shape[1], keys.shape[3]
    heads = mixed.shape[1] // size
    length = slots.shape[1]
    for each in numba.prange(len(mixed) * heads):
        row, head = each // heads, each % heads
        text, group = row // length, head // (heads // groups)
        slot = slots[text % len(slots), row % length]
        first = max(0, slot + 1 - window)
        own = slice(head * size, (head + 1) * size)
        _attend(
            queries[row, own],
            keys[text, group, first : slot + 1],
            values[text, group, first : slot + 1],
            mixed[row, own],
        )


@numba.njit(nogil=True, cache=True, parallel=True)
def _gated_in_threads(gate_up, gated):
    """`silu(gate) * up` of `[R, I]` and `[R, I]` side by side."""
    rows, size = gated.shape
    pieces = -(-size // PIECE)
    for each in numba.prange(rows * pieces):
        row, start = each // pieces, each % pieces * PIECE
        for place in range(start, min(start + PIECE, size)):
            gate = gate_up[row, place]
            gated[row, place] = gate / (1 + math.exp(-gate)) * gate_up[row, size + place]


@numba.njit(nogil=True, cache=True)
def _product(states, panels, bias):
    """Rows `[R, D]` times panels, and the bias."""
    sums = np.empty((len(states), len(bias)), np.float32)
    for row in range(len(states)):
        sums[row] = bias
    _multiply_in_threads(states, panels, sums)
    return sums


@numba.njit(nogil=True, cache=True)
def _attention(hidden, norm, eps, qkv, out, slots, angles, keys, values, window):
    """The attention half of a layer: `hidden + out(attend(rotate(q), rotate(k), v))`, `[R, D]`.

    Args:
        hidden: `[R, D]`, the T tokens of each of B texts.
        norm, eps: of the norm before.
        qkv, out: panels with biases.
        slots: `[B, T]`, where the tokens are stored; `[1, T]` if that is the same in all texts.
        angles: cosines and sines, `[B, T, E]` or `[1, T, E]` each.
        keys, values: `[B, G, S, E]` or with more rows; they are written.
        window: how many slots back a query sees, its own included.
    """
    groups, size = keys.shape[1], keys.shape[3]
    length = slots.shape[1]
    projected = _product(_normed(hidden, norm, eps), *qkv)
    rotated = projected.shape[1] // size - groups  # heads of queries and keys
    heads = rotated - groups
    cos, sin = angles
    for row in range(len(hidden)):
        text, place = row // length, row % length
        own = text % len(slots)
        for head in range(rotated):
            _rotate(projected[row, head * size : (head + 1) * size], cos[own, place], sin[own, place])
        for group in range(groups):
            for number in range(size):
                keys[text, group, slots[own, place], number] = projected[row, (heads + group) * size + number]
                values[text, group, slots[own, place], number] = projected[
                    row, (rotated + group) * size + number
                ]
    mixed = np.empty((len(hidden), heads * size), np.float32)
    _attend_in_threads(projected, slots, keys, values, window, mixed)
    return hidden + _product(mixed, *out)


@numba.njit(nogil=True, cache=True)
def _feed_forward(hidden, norm, eps, gate_up, down):
    """The other half: `hidden + down(silu(gate) * up)`, `[R, D]`; the rest as in `_attention`."""
    both = _product(_normed(hidden, norm, eps), *gate_up)
    gated = np.empty((len(hidden), both.shape[1] // 2), np.float32)
    _gated_in_threads(both, gated)
    return hidden + _product(gated, *down)


class PanelLayer:
    """A decoder layer by the kernels of this file.

    Args:
        layer: for its norms.
        products: of queries, keys and values, of what attention mixed, and, where there is a feed-forward half, of gate
            and up, and down.
    """

    def __init__(self, layer: DecoderLayer, products: Sequence[PanelProduct]) -> None:
        parts = [(product.panels, product.bias) for product in products]
        self._attention = (*_weights_of(layer.input_layernorm), *parts[:2])
        self._feed_forward = None
        if layer.feed_forward:
            self._feed_forward = (*_weights_of(layer.post_attention_layernorm), *parts[2:])

    @property
    def can_run(self) -> bool:
        """Whether this process may start threads."""
        return not forked

    def __call__(self, hidden: Tensor, plan: CachedPass, cache: KVCache, layer: int) -> Tensor:
        """As `CachedLayer`."""
        _use_threads()
        angles = (plan.cos.squeeze(1).numpy(), plan.sin.squeeze(1).numpy())
        keys, values = cache.keys[layer].numpy(), cache.values[layer].numpy()
        seen = (plan.slots.numpy(), angles, keys, values, cache.window or cache.capacity)
        states = _attention(_rows(hidden), *self._attention, *seen)
        if self._feed_forward is not None:
            states = _feed_forward(states, *self._feed_forward)
        return torch.from_numpy(states).view(hidden.shape)


def _weights_of(norm: nn.RMSNorm) -> tuple[Any, float | None]:
    """Its weight as it is now, and its epsilon."""
    return norm.weight.detach().clone().numpy(), norm.eps


def own_layer(layer: DecoderLayer, products: Sequence[Any]) -> PanelLayer | None:
    """The layer with its products, as in `PanelLayer`, if these kernels compute it."""
    norms = [layer.input_layernorm]
    if layer.feed_forward:
        norms.append(layer.post_attention_layernorm)
        if layer.mlp.hidden_act not in ("silu", "swish"):
            return None
    whole = all(isinstance(each, PanelProduct) and each.num_outputs % WIDTH == 0 for each in products)
    return PanelLayer(layer, products) if whole and all(norm.eps is not None for norm in norms) else None


def works() -> bool:
    """Whether this processor multiplies and adds in one instruction, and several threads may use Numba at once."""
    features = binding.get_host_cpu_features()
    if numba.config.DISABLE_JIT or not (features.get("fma") or features.get("neon")):
        return False
    numbers = torch.arange(2.0 * CHUNK + 7).sin()
    weight, states = numbers * torch.arange(40.0)[:, None], numbers.flip(0) * torch.arange(9.0)[:, None]
    if not torch.allclose(PanelProduct(weight)(states), states @ weight.T, rtol=1e-3, atol=0.1):
        return False
    # It is known once a parallel function has run. That layer allows one thread of Python only.
    return bool(numba.threading_layer() != "workqueue")
