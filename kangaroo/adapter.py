"""Attention, rotary cache, masks, key/value cache and the Kangaroo adapter: parts of the slim decoder.

Letters in shapes: B batch, T positions of this pass, S cache slots, H query heads, G key/value heads,
E head size, D hidden. A cache slot *is* an absolute position, so a query at position p sees the slots 0…p
and nothing else has to be masked: padding and rejected drafts sit in later slots until they are overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

if TYPE_CHECKING:
    from kangaroo.decoding.fused import Stack

DRAFTERS = ("none", "adapter", "layer")


class LlamaRotaryEmbedding(nn.Module):
    """Rotary position factors (Su et al. 2021), tabulated in float32 and grown on demand.

    The table is a plain attribute, not a buffer: casting the model to bfloat16 must not round the angles.

    Args:
        dim: head size E, even.
        max_position_embeddings: positions tabulated at first.
        base: `rope_theta`.
        scaling_factor: linear position scaling; 1 leaves positions as they are.
    """

    def __init__(
        self, dim: int, max_position_embeddings: int = 2048, base: float = 10000.0, scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.dim, self.base, self.scaling_factor = dim, base, scaling_factor
        self._set_cos_sin_cache(max_position_embeddings, torch.device("cpu"), torch.float32)

    def _set_cos_sin_cache(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
        """Tabulate cos and sin for positions 0…seq_len-1, each `[seq_len, E]`."""
        inverse = 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))
        positions = torch.arange(seq_len, dtype=torch.float32) / self.scaling_factor
        angles = torch.outer(positions, inverse)
        angles = torch.cat((angles, angles), dim=-1)
        self.max_seq_len_cached = seq_len
        self.cos_cached = angles.cos().to(device, dtype)
        self.sin_cached = angles.sin().to(device, dtype)

    def forward(self, position_ids: Tensor, highest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cos and sin `[B, 1, T, E]` at `position_ids [B, T]`, whose largest entry is `highest`."""
        if highest >= self.max_seq_len_cached or self.cos_cached.device != position_ids.device:
            length = max(self.max_seq_len_cached, 2 * highest if highest >= self.max_seq_len_cached else 0)
            self._set_cos_sin_cache(length, position_ids.device, torch.float32)
        return (
            self.cos_cached[position_ids].to(dtype).unsqueeze(1),
            self.sin_cached[position_ids].to(dtype).unsqueeze(1),
        )


def rotary_for(config: LlamaConfig) -> LlamaRotaryEmbedding:
    """The rotary table of a Llama configuration, `rope_theta` and linear `rope_scaling` honoured.

    Raises:
        ValueError: for a `rope_scaling` other than linear.
    """
    scaling = config.rope_scaling or {}
    kind = scaling.get("type", scaling.get("rope_type", "linear"))
    if kind not in ("linear", "default"):
        raise ValueError(f"rope_scaling type {kind!r} of the model's config is not supported; expected 'linear'")
    head_dim = config.hidden_size // config.num_attention_heads
    return LlamaRotaryEmbedding(
        head_dim, config.max_position_embeddings, getattr(config, "rope_theta", 10000.0), scaling.get("factor", 1.0)
    )


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, heads, T, E]` by the factors `[B, 1, T, E]`."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def _prepare_decoder_attention_mask(position_ids: Tensor, slots: Tensor, window: int | None = None) -> Tensor:
    """Which slots each query sees.

    Args:
        position_ids: `[B, T]`, the queries' absolute positions.
        slots: `[S]` or `[B, S]`, the keys' absolute positions; negative ones are padding and never seen.
        window: how many positions back a query sees, its own included; None for all.

    Returns:
        Boolean `[B, 1, T, S]`, True where the query sees the slot.
    """
    queries = position_ids[:, None, :, None]
    keys = slots[None, None, None, :] if slots.dim() == 1 else slots[:, None, None, :]
    visible = (keys <= queries) & (keys >= 0)
    return visible if window is None else visible & (keys > queries - window)


class KVCache:
    """Preallocated keys and values of some layers; rolling back is setting `length`.

    Attributes:
        keys, values: one `[B, G, capacity, E]` tensor a layer.
        lengths: positions filled so far, row by row.
        stack: what to run on this cache in place of the layers' modules, or None.
        fixed: for passes of one shape wherever they stand: `[B]`, where each row's new positions start, and how many
            slots every query reads. None where a pass reads what is filled.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_layers: int,
        batch_size: int,
        capacity: int,
        like: Tensor,
        window: int | None = None,
    ) -> None:
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (batch_size, config.num_key_value_heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(num_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.capacity, self.window, self.device = capacity, window, like.device
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.stack: Stack | None = None
        self.fixed: tuple[Tensor, int] | None = None
        self.lengths = [0] * batch_size

    @property
    def length(self) -> int:
        """Positions filled in the longest row; setting it, for all rows or each, rolls back."""
        return max(self.lengths)

    @length.setter
    def length(self, length: int | Tensor) -> None:
        self.lengths = [length] * len(self.lengths) if isinstance(length, int) else length.tolist()

    def advance(self, count: int) -> None:
        """Count `count` more positions as filled in every row."""
        self.lengths = [length + count for length in self.lengths]

    def move(self, counts: Tensor) -> None:
        """Let the next pass of fixed shape begin `counts [B]` positions later."""
        assert self.fixed is not None
        self.fixed = self.fixed[0] + counts, self.fixed[1]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]

    def update(self, layer: int, keys: Tensor, values: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Store this pass's keys and values `[B, G, T, E]`; return the slots that its queries read."""
        stored_keys, stored_values = self.keys[layer], self.values[layer]
        if plan.rows is None:
            start = self.lengths[0]
            stored_keys[:, :, start : start + keys.shape[2]] = keys
            stored_values[:, :, start : start + keys.shape[2]] = values
        else:
            stored_keys[plan.rows, :, plan.position_ids] = keys.transpose(1, 2)
            stored_values[plan.rows, :, plan.position_ids] = values.transpose(1, 2)
        return stored_keys[:, :, plan.slots], stored_values[:, :, plan.slots]


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers of one pass share, made once a pass.

    Attributes:
        position_ids: `[B, T]`.
        cos, sin: `[B, 1, T, E]`.
        mask: boolean `[B, 1, T, S]`, or None: plain causal if `causal`, else everything is seen.
        slots: the cache slots read.
        rows: `[B, 1]`, 0…B-1, where each row writes at its own positions; None where all write at the same.
        bias: `[B * G, H / G * T, S]`, 0 where the query sees the slot and minus infinity elsewhere: the mask of
            passes of fixed shape, whose rows are the T queries of each head of a group.
    """

    position_ids: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool
    slots: slice
    rows: Tensor | None = None
    bias: Tensor | None = None


def plan_cached(rotary: LlamaRotaryEmbedding, cache: KVCache, length: int, dtype: torch.dtype) -> AttentionPlan:
    """Plan a pass over `length` new positions behind what `cache` holds.

    Raises:
        ValueError: if they do not fit into the cache.
    """
    steps, rows = torch.arange(length, device=cache.device), None
    lowest, highest = min(cache.lengths), cache.length + length - 1
    even = cache.fixed is None and cache.length == lowest
    if (highest if even else cache.length) >= cache.capacity:
        raise ValueError(f"the sequence needs {highest + 1} cache slots, the cache has {cache.capacity}")
    if even:
        position_ids = (lowest + steps)[None]
    else:  # what pads a row may reach beyond the last slot, and stays in it
        highest = min(highest, cache.capacity - 1)
        starts = cache.fixed[0] if cache.fixed else torch.tensor(cache.lengths, device=cache.device)
        position_ids = (starts[:, None] + steps).clamp(max=cache.capacity - 1)
        rows = torch.arange(len(starts), device=cache.device)[:, None]
    first = 0 if cache.window is None else max(0, lowest - cache.window + 1)
    slots, mask = slice(first, highest + 1) if cache.fixed is None else slice(0, cache.fixed[1]), None
    reach = cache.window is None or highest - first < cache.window
    if not (even and reach and (lowest == 0 or length == 1)):
        seen = torch.arange(slots.start, slots.stop, device=cache.device)
        mask = _prepare_decoder_attention_mask(position_ids, seen, cache.window)
    cos, sin = rotary(position_ids, max(highest, slots.stop - 1), dtype)
    bias = None if cache.fixed is None or mask is None else _bias(mask, cache, dtype)
    return AttentionPlan(position_ids, cos, sin, mask, mask is None and length > 1, slots, rows, bias)


def _bias(mask: Tensor, cache: KVCache, dtype: torch.dtype) -> Tensor:
    batch, _, length, slots = mask.shape
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    per_group = bias[:, :, None].expand(batch, cache.groups, cache.heads // cache.groups, length, slots)
    return per_group.reshape(batch * cache.groups, -1, slots)


def plan_uncached(
    rotary: LlamaRotaryEmbedding, states: Tensor, position_ids: Tensor | None = None, window: int | None = None
) -> AttentionPlan:
    """Plan a pass whose queries see only each other, as training does.

    Args:
        states: `[B, T, …]`, for batch, length, dtype and device.
        position_ids: `[B, T]`, negative at padding; None for 0…T-1, where padding on the right needs no mask.
        window: as in `_prepare_decoder_attention_mask`.
    """
    length = states.shape[1]
    plain = position_ids is None
    if position_ids is None:
        position_ids = torch.arange(length, device=states.device)[None]
    needs_mask = not plain or (window is not None and length > window)
    mask = None
    if needs_mask:
        mask = _prepare_decoder_attention_mask(position_ids, position_ids, window)
        mask = mask | torch.eye(
            length, dtype=torch.bool, device=states.device
        )  # a padding row sees itself, not nothing
    highest = length - 1 if plain else int(position_ids.max())
    cos, sin = rotary(position_ids.clamp(min=0), highest, states.dtype)
    return AttentionPlan(position_ids, cos, sin, mask, mask is None, slice(0, length))


def attend(queries: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> Tensor:
    """Queries `[B, H, T, E]` on keys and values `[B, G, S, E]`: mixed values `[B, H, T, E]`."""
    batch, heads, length, size = queries.shape
    groups = keys.shape[1]
    # The queries of one group see the same keys, so they can stand as rows of one small product: a quarter of
    # the time of enable_gqa for a batch of single tokens in bfloat16 on a CPU.
    if plan.bias is not None:
        folded, seen = queries.reshape(batch * groups, -1, size), keys.reshape(batch * groups, -1, size)
        weights = torch.baddbmm(plan.bias, folded, seen.transpose(1, 2), alpha=size**-0.5).softmax(dim=-1)
        return torch.bmm(weights, values.reshape(seen.shape)).view(queries.shape)
    if queries.is_cuda and length == 1:
        # cuDNN's kernel is planned anew for every length that the cache grows to, 30 ms each; products are not.
        scores = (queries.view(batch, groups, -1, size) * size**-0.5) @ keys.transpose(-1, -2)
        if plan.mask is not None:
            scores = scores.masked_fill(~plan.mask, float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        return torch.matmul(weights, values).reshape(queries.shape)
    if length == 1:
        folded = queries.view(batch, groups, -1, size)
        return F.scaled_dot_product_attention(folded, keys, values, attn_mask=plan.mask).reshape(queries.shape)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=plan.mask, is_causal=plan.causal, enable_gqa=groups != heads
    )


class LlamaAttention(nn.Module):
    """Multi-head attention with grouped queries and rotary positions, Llama's parameter names."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        bias = getattr(config, "attention_bias", False)
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor, plan: AttentionPlan, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Attend from `hidden [B, T, D]` to the slots of the plan; the same shape comes back."""
        batch, length, _ = hidden.shape
        queries = self.q_proj(hidden).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        keys = self.k_proj(hidden).view(batch, length, self.num_groups, self.head_dim).transpose(1, 2)
        values = self.v_proj(hidden).view(batch, length, self.num_groups, self.head_dim).transpose(1, 2)
        queries = apply_rotary(queries, plan.cos, plan.sin)
        keys = apply_rotary(keys, plan.cos, plan.sin)
        if cache is not None:
            keys, values = cache.update(layer, keys, values, plan)
        mixed = attend(queries, keys, values, plan)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return projected


class LlamaMLP(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        projected: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return projected


class DecoderLayer(nn.Module):
    """One Llama decoder layer; without its feed-forward half it is Kangaroo's adapter layer.

    Args:
        config: the model's.
        feed_forward: False leaves out `post_attention_layernorm` and `mlp`.
    """

    def __init__(self, config: LlamaConfig, feed_forward: bool = True) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.feed_forward = feed_forward
        if feed_forward:
            self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(config)

    def forward(self, hidden: Tensor, plan: AttentionPlan, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), plan, cache, layer)
        if self.feed_forward:
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden


class AdapterModel(nn.Module):
    """The drafter between the exit state and the exit head, its last norm (`exit_norm`) included.

    Kangaroo's adapter (arXiv 2404.18911, Sec. 3.1) is one attention layer and two norms. The same class is the
    identity drafter (no layer) and the full-layer drafter (with feed-forward), so that all three are called alike.

    Args:
        config: the model's.
        kind: "none", "adapter" or "layer".
        window: positions back that the drafter's attention sees, its own included; None for all.
        num_layers: layers of that kind; "none" has no layer in any case.
    """

    def __init__(
        self, config: LlamaConfig, kind: str = "adapter", window: int | None = 64, num_layers: int = 1
    ) -> None:
        super().__init__()
        if kind not in DRAFTERS:
            raise ValueError(f"drafter is {kind!r}; expected one of {', '.join(DRAFTERS)}")
        if (window is not None and window < 1) or num_layers < 1:
            raise ValueError(f"adapter window is {window} and num_layers {num_layers}; expected at least 1 each")
        self.config, self.kind, self.window = config, kind, window
        count = 0 if kind == "none" else num_layers
        self.layers = nn.ModuleList(DecoderLayer(config, feed_forward=kind == "layer") for _ in range(count))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = rotary_for(config)

    def new_cache(self, batch_size: int, capacity: int, like: Tensor | None = None) -> KVCache:
        """An empty cache for `capacity` positions of `batch_size` rows, of the parameters' dtype or that of `like`."""
        like = self.norm.weight if like is None else like
        return KVCache(self.config, len(self.layers), batch_size, capacity, like, self.window)

    def forward_early_stop(
        self, inputs_embeds: Tensor, position_ids: Tensor | None = None, past_key_values: KVCache | None = None
    ) -> Tensor:
        """What the exit head reads.

        Args:
            inputs_embeds: `[B, T, D]`, exit states.
            position_ids: `[B, T]` for passes without a cache, as in `plan_uncached`.
            past_key_values: the drafter's cache; the T positions are appended to it.

        Returns:
            `[B, T, D]`, normed.
        """
        hidden, cache = inputs_embeds, past_key_values
        stack = None if cache is None else cache.stack
        if len(self.layers):
            if cache is None:
                plan = plan_uncached(self.rotary, hidden, position_ids, self.window)
            else:
                plan = plan_cached(self.rotary, cache, hidden.shape[1], hidden.dtype)
            layers: Iterable[Any] = self.layers if stack is None else stack.layers
            for index, layer in enumerate(layers):
                hidden = layer(hidden, plan, cache, index)
        if cache is not None:
            cache.advance(inputs_embeds.shape[1])
        normed: Tensor = self.norm(hidden) if stack is None else stack.norm(hidden)
        return normed
