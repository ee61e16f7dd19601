"""The key/value cache of a stage, the plan of a pass over it, and attention for decoding.

Letters in shapes: B rows (texts), T new tokens of this pass, S cache slots, H query heads, G key/value heads, E head
size. A token's *slot* says where its keys and values are stored, its *position* what rotary sees. In a chain of tokens
both are equal; in a tree of drafts siblings would share a position and need slots of their own. A query sees the slots
up to its own. So nothing has to be erased: padding and rejected drafts stay in later slots until they are overwritten.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from kangaroo.adapter import (
    AttentionPlan,
    LlamaRotaryEmbedding,
    _prepare_decoder_attention_mask,
    for_masked_attention,
    head_dim,
)


@functools.cache
def steps(count: int, device: torch.device) -> Tensor:
    """0, 1, … on a device; kept, since making it again takes a kernel in every captured pass."""
    return torch.arange(count, device=device)


class KVCache:
    """Preallocated keys and values of some layers; rolling back means lowering `lengths`.

    The rows in use are the first ones. A text whose block has several chains of drafts has a row for each while they
    are drafted and verified, row `chain * B + text`. `fork` begins them where the text ends, and `join` goes on from
    the chain that was right.

    Args:
        config: the model's, for heads and sizes.
        devices: of each layer.
        batch_size: texts B.
        capacity: slots of a row.
        like: a tensor of the dtype to use, on the device where passes begin.
        window: how many slots back a query sees, its own included; None for all.
        chains: rows of a text, at most.

    Attributes:
        dtype: of keys, values and the states that they are made from.
        keys, values: one `[B * chains, G, capacity, E]` tensor a layer.
        lengths: slots filled so far, of each row in use.
        shared: of each further chain, the slots of each text that its row holds, too.
    """

    def __init__(
        self,
        config: LlamaConfig,
        devices: Sequence[torch.device],
        batch_size: int,
        capacity: int,
        like: Tensor,
        window: int | None = None,
        chains: int = 1,
    ) -> None:
        self._config = config
        self._devices = devices
        self.batch_size = batch_size
        self.chains = chains
        self.capacity = capacity
        self.window = window
        self.device = like.device
        self.dtype = like.dtype
        self._like = like
        self.heads_per_group = config.num_attention_heads // config.num_key_value_heads
        self.clear()

    @functools.cached_property
    def stores(self) -> list[Tensor]:
        """Keys and values of each device's layers in one tensor, so that slots of all layers are copied at once.

        Shapes `[2, layers, B * chains, G, capacity, E]`.

        They are allocated when they are first used: on a GPU most are replaced by those of an earlier decoding before.
        """
        rows = self.batch_size * self.chains
        groups = self._config.num_key_value_heads
        shape = (rows, groups, self.capacity, head_dim(self._config))
        stores = []
        for device, layers in groupby(self._devices):
            num_layers = len(list(layers))
            stores.append(torch.zeros(2, num_layers, *shape, dtype=self.dtype, device=device))
        return stores

    @functools.cached_property
    def keys(self) -> list[Tensor]:
        """Keys by layer."""
        return [keys for store in self.stores for keys in store[0]]

    @functools.cached_property
    def values(self) -> list[Tensor]:
        """Values by layer."""
        return [values for store in self.stores for values in store[1]]

    def clear(self) -> None:
        """Forget everything; every text is in use again."""
        self.lengths = [0] * self.batch_size
        self.set_shared([0] * self.batch_size)

    @property
    def length(self) -> int:
        """Slots filled in the longest row."""
        return max(self.lengths)

    def advance(self, count: int) -> None:
        """Count `count` more slots as filled in every row."""
        self.lengths = [length + count for length in self.lengths]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget every slot from `lengths` on, row by row."""
        self.lengths = _shorter(self.lengths, lengths)
        self._cut_shared()

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, which move to the front."""
        for stored in self.keys + self.values:
            stored[: len(rows)] = stored[rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.set_shared([0] * len(rows))

    def share(self, chains: int) -> None:
        """Copy every text's slots to the rows of its first `chains` chains."""
        texts = len(self.lengths)
        for chain in range(1, chains):
            shared = self.shared[chain - 1]
            for row, length in enumerate(self.lengths):
                self._copy(row, chain * texts + row, shared[row], length)
            self.shared[chain - 1] = list(self.lengths)

    def fork(self, chains: int) -> None:
        """Give every text a row for each of `chains` chains, with the same slots."""
        self.share(chains)
        self.lengths = self.lengths * chains

    def join(self, lengths: Sequence[int], winners: Sequence[int]) -> None:
        """Go on with one row a text: with what the row of its winning chain has read, up to `lengths`.

        Args:
            lengths: slots to keep, at most, of each text.
            winners: the place of each text's winning chain.
        """
        texts = len(lengths)
        kept = []
        for row, chain in enumerate(winners):
            winner = chain * texts + row
            length = min(lengths[row], self.lengths[winner])
            if chain:
                shared = self.shared[chain - 1]
                self._copy(winner, row, shared[row], length)
            kept.append(length)
        self.lengths = kept
        self._cut_shared()

    def set_shared(self, lengths: Sequence[int]) -> None:
        """Say that the rows of all chains hold the same slots up to `lengths`."""
        self.shared = [list(lengths)] * (self.chains - 1)

    def _cut_shared(self) -> None:
        """No chain shares more slots than the text's own row has."""
        self.shared = [_shorter(shared, self.lengths) for shared in self.shared]

    def _copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copy slots of a row to another, in all layers."""
        if start < stop:
            for store in self.stores:
                store[:, :, target, :, start:stop] = store[:, :, source, :, start:stop]

    def like(self, rows: int, capacity: int) -> KVCache:
        """An empty cache of so many rows for the same layers."""
        return KVCache(self._config, self._devices, rows, capacity, self._like, self.window)

    def copy_prefix(self, source: KVCache, rows: Sequence[int]) -> None:
        """Begin some rows with what those of `source` hold, or all of them with what its only row holds."""
        length = source.length
        for own, other in zip(self.stores, source.stores, strict=True):
            filled = other[..., :length, :].expand(-1, -1, len(rows), -1, -1, -1)
            own[..., :length, :].index_copy_(2, torch.tensor(rows).to(own.device), filled)
        for row in rows:
            self.lengths[row] = length

    def store(self, layer: int, keys: Tensor, values: Tensor, plan: CachedPass) -> tuple[Tensor, Tensor]:
        """Store the keys and values `[B, G, T, E]` of this pass; return the slots that its queries read."""
        rows, _, length, _ = keys.shape
        stored_keys = self.keys[layer]
        stored_values = self.values[layer]
        if rows < len(stored_keys):  # fewer are in use
            stored_keys = stored_keys[:rows]
            stored_values = stored_values[:rows]
        if plan.rows is None:  # all rows write the same slots: one slice
            start = self.lengths[0]
            stop = start + length
            stored_keys[:, :, start:stop] = keys
            stored_values[:, :, start:stop] = values
        else:
            stored_keys[plan.rows, :, plan.slots] = keys.transpose(1, 2)
            stored_values[plan.rows, :, plan.slots] = values.transpose(1, 2)
        return stored_keys[:, :, plan.read], stored_values[:, :, plan.read]


def _shorter(lengths: Sequence[int], others: Sequence[int]) -> list[int]:
    """The smaller one of each pair."""
    return [min(pair) for pair in zip(lengths, others, strict=True)]


@dataclass(frozen=True)
class FixedShape:
    """A pass whose shapes do not depend on how long the texts are, as captured passes need it.

    Attributes:
        starts: `[B]`, the slot of each row's first new token.
        num_slots: slots that every query reads.
        settled: `[B]`, slots that were filled before the running graph began; None for `starts`.
    """

    starts: Tensor
    num_slots: int
    settled: Tensor | None = None

    def after(self, counts: Tensor, passes: int) -> list[FixedShape]:
        """The next passes on the device, of one token each, once every row has read `counts [B]` tokens."""
        later = steps(passes, counts.device)
        starts = self.starts + counts + later[:, None]  # [passes, B]
        settled = self.starts if self.settled is None else self.settled
        return [FixedShape(own, self.num_slots, settled) for own in starts]


@dataclass(frozen=True)
class CachedPass(AttentionPlan):
    """What all layers share in one pass over a cache.

    Attributes:
        cos, sin: rotary factors of the positions, `[B, 1, T, E]`.
        slots: `[B, T]`, where the new tokens are stored.
        rows: `[B, 1]`, 0…B-1, where rows store at slots of their own; None where all store at the same slots.
        read: the slots that queries read.
        mask: boolean `[B, 1, T, S]`; or None: plain causal if `causal`, else everything is seen.
        causal: see `mask`.
        bias: `[B * G, H / G * T, S]`, the mask of a pass of fixed shape: 0 where the query sees the slot, else minus
            infinity; its rows are the T queries of each head of a group.
    """

    slots: Tensor
    rows: Tensor | None
    read: slice
    causal: bool
    bias: Tensor | None

    @functools.cached_property
    def arrays(self) -> tuple[Any, Any, Any]:
        """`slots`, `cos` and `sin` for our own kernels on a CPU, made once for all layers."""
        return self.slots.numpy(), self.cos.squeeze(1).numpy(), self.sin.squeeze(1).numpy()


def plan_cached(
    rotary: LlamaRotaryEmbedding,
    cache: KVCache,
    length: int,
    dtype: torch.dtype,
    fixed: FixedShape | None = None,
    prompt_lens: Sequence[int] = (),
) -> CachedPass:
    """Plan a pass over `length` new tokens a row after what `cache` holds; prompts have `prompt_lens` without padding.

    Raises:
        ValueError: if they do not fit into the cache.
    """
    shortest = min(cache.lengths)
    last = cache.capacity - 1
    highest = cache.length + length - 1
    same_slots = fixed is None and cache.length == shortest
    # Padding of a row may reach beyond the last slot; it then stays in the last one. Tokens must fit.
    if (highest if same_slots else cache.length) > last:
        raise ValueError(f"the sequence needs {highest + 1} cache slots, the cache has {cache.capacity}")
    places = torch.arange(length, device=cache.device)
    rows = None
    slots = (shortest + places)[None]
    if not same_slots:
        highest = min(highest, last)
        starts = fixed.starts if fixed else torch.tensor(cache.lengths, device=cache.device)
        slots = (starts[:, None] + places).clamp(max=last)
        rows = torch.arange(len(starts), device=cache.device)[:, None]
    # Slots before every query's window are not read at all.
    window = cache.window or cache.capacity
    first = max(0, shortest - window + 1)
    read = slice(0, fixed.num_slots) if fixed else slice(first, highest + 1)
    is_prefill = same_slots and shortest == 0
    # No mask is needed where plain causal attention, or everything, is what the queries see.
    needless = same_slots and highest - first < window and (is_prefill or length == 1)
    mask = None
    if not needless:
        slots_read = torch.arange(read.start, read.stop, device=slots.device)
        mask = _prepare_decoder_attention_mask(slots, slots_read, cache.window)
    # A token's slot is its position. A text that is over goes on within its row, on the device, beyond what is read.
    whole = (prompt_lens or [length]) if is_prefill else []
    cos, sin = rotary(slots, last if fixed else highest, dtype, whole)
    is_causal = mask is None and length > 1
    bias = _bias(mask, cache, dtype) if fixed and mask is not None else None
    return CachedPass(cos, sin, mask, slots, rows, read, is_causal, bias)


def _bias(mask: Tensor, cache: KVCache, dtype: torch.dtype) -> Tensor:
    """The mask `[B, 1, T, S]` as a pass of fixed shape adds it, see `CachedPass`."""
    batch, _, length, slots = mask.shape
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    bias = bias.masked_fill(~mask, float("-inf"))
    heads = cache.heads_per_group
    groups = cache.keys[0].shape[1]
    of_heads = bias[:, :, None].expand(batch, groups, heads, length, slots)
    return of_heads.reshape(batch * groups, -1, slots)


def attend_cached(queries: Tensor, keys: Tensor, values: Tensor, plan: CachedPass) -> Tensor:
    """Queries `[B, H, T, E]` on keys and values `[B, G, S, E]`: mixed values `[B, H, T, E]`.

    The queries of one group see the same keys, so they can stand as rows of one small product: a quarter of the time
    of `enable_gqa` for a batch of single tokens in bfloat16 on a CPU.
    """
    batch, heads, length, size = queries.shape
    groups = keys.shape[1]
    if plan.bias is not None:
        grouped = queries.reshape(batch * groups, -1, size)
        seen = keys.reshape(batch * groups, -1, size)
        scores = torch.baddbmm(plan.bias, grouped, seen.transpose(1, 2), alpha=size**-0.5)
        weights = scores.softmax(dim=-1)
        mixed = torch.bmm(weights, values.reshape(seen.shape))
        return mixed.view(queries.shape)
    if length > 1:  # the prefill, or a verification of one text
        keys, values = for_masked_attention(queries, keys, values, plan.mask)
        is_grouped = keys.shape[1] != heads
        return F.scaled_dot_product_attention(
            queries, keys, values, plan.mask, is_causal=plan.causal, enable_gqa=is_grouped
        )
    grouped = queries.view(batch, groups, -1, size)
    if not queries.is_cuda:
        mixed = F.scaled_dot_product_attention(grouped, keys, values, plan.mask)
        return mixed.reshape(queries.shape)
    # cuDNN plans its kernel again for every length that the cache grows to, which takes 30 ms; products do not.
    scores = (grouped * size**-0.5) @ keys.transpose(-1, -2)
    if plan.mask is not None:
        scores = scores.masked_fill(~plan.mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights, values).reshape(queries.shape)
