"""Attention, rotary table, masks, decoder layers and the Kangaroo adapter, as training runs them: without a cache.

Letters in shapes: B batch, T positions, S key positions, H query heads, G key/value heads, E head size, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

DRAFTERS = ("none", "adapter", "layer")


ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Ways of scaling rotary positions to a longer context that are computed here, by their names in `rope_scaling`."""


class LlamaRotaryEmbedding(nn.Module):
    """Rotary position factors (Su et al. 2021), tabulated in float32 and grown on demand.

    The table is a plain attribute, not a buffer: casting the model to bfloat16 must not round the angles.

    Args:
        dim: head size E, even.
        max_position_embeddings: positions tabulated at first; with "dynamic" scaling the context of training.
        base: `rope_theta`.
        scaling_factor: by how much the context is longer than in training; 1 leaves positions as they are.
        scaling: how, one of `ROPE_TYPES`, with the parameters of that kind as `rope_scaling` names them.
    """

    def __init__(
        self,
        dim: int,
        max_position_embeddings: int = 2048,
        base: float = 10000.0,
        scaling_factor: float = 1.0,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = base
        self.scaling_factor = scaling_factor
        self.scaling = {"rope_type": "linear", **(scaling or {})}
        self.dynamic = self.scaling["rope_type"] == "dynamic"
        self.trained_context = self.scaling.get("original_max_position_embeddings") or max_position_embeddings
        self._set_cos_sin_cache(max_position_embeddings, torch.device("cpu"), torch.float32)

    def frequencies(self, base: float | Tensor) -> Tensor:
        """Angle by which one position turns each pair of dimensions, `[…, E / 2]`, before any scaling.

        Args:
            base: a number, or one for each position, `[P, 1]`.
        """
        # Pair i turns by base^(-2 i / E).
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        return 1.0 / (base**exponents)

    def _scaled(self, lengths: Tensor) -> tuple[Tensor, float]:
        """Frequencies `[E / 2]`, and the factor on cos and sin.

        If they depend on the text's length, they are `[…, E / 2]` for `lengths […]`.
        """
        if self.dynamic:
            # A text longer than the training's context gets a larger base (NTK-aware scaling). In decoding each token
            # keeps the base that the text's length gave when the token came.
            # In float64, since a vector of float32 powers is rounded otherwise than its last few numbers.
            beyond = (lengths.double() / self.trained_context).clamp(min=1)[..., None]
            stretch = self.scaling_factor * beyond - (self.scaling_factor - 1)
            return self.frequencies(self.base * stretch ** (self.dim / (self.dim - 2))).float(), 1.0
        kind = self.scaling["rope_type"]
        inverse = self.frequencies(self.base)
        kept: Tensor | float = 0.0  # share in which a frequency stays; by linear scaling all are slowed down
        magnitude = 1.0
        if kind == "llama3":
            # Llama 3.1: slow pairs are slowed down, fast ones stay, those between are mixed.
            turns = self.trained_context * inverse / (2 * math.pi)  # over the training's context
            low = self.scaling["low_freq_factor"]
            high = self.scaling["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        elif kind == "yarn":
            kept = self._kept_by_yarn()
            magnitude = self._yarn_attention()
        return kept * inverse + (1 - kept) * inverse / self.scaling_factor, magnitude

    def _kept_by_yarn(self) -> Tensor:
        """Share in which YaRN keeps each pair's frequency (arXiv 2309.00071, Sec. 3.2), `[E / 2]`."""

        def pair_with(turns: float) -> float:
            """The pair that turns so often over the training's context."""
            context = self.trained_context / (turns * 2 * math.pi)
            return self.dim * math.log(context) / (2 * math.log(self.base))

        first = pair_with(self.scaling.get("beta_fast") or 32)
        last = pair_with(self.scaling.get("beta_slow") or 1)
        if self.scaling.get("truncate", True):
            first = math.floor(first)
            last = math.ceil(last)
        first = max(first, 0)
        last = min(last, self.dim - 1)
        width = last - first or 0.001
        pairs = torch.arange(self.dim // 2, dtype=torch.float32, device="cpu")
        return 1 - ((pairs - first) / width).clamp(0, 1)

    def _yarn_attention(self) -> float:
        """YaRN's factor on queries and keys, which lowers the temperature of attention (Sec. 3.3 there)."""

        def magnitude(weight: float) -> float:
            return 0.1 * weight * math.log(self.scaling_factor) + 1 if self.scaling_factor > 1 else 1.0

        given = self.scaling.get("attention_factor")
        if given is not None:
            return float(given)
        upper = self.scaling.get("mscale")
        lower = self.scaling.get("mscale_all_dim")
        return magnitude(upper) / magnitude(lower) if upper and lower else magnitude(1)

    def _factors(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin `[…, E]` of positions in texts of some lengths, float32 `[…]` on the CPU."""
        inverse, magnitude = self._scaled(lengths)
        angles = positions[..., None] * inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * magnitude, angles.sin() * magnitude

    def _set_cos_sin_cache(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
        """Tabulate cos and sin for positions 0…seq_len-1, each `[seq_len, E]`."""
        positions = torch.arange(seq_len, dtype=torch.float32, device="cpu")
        cos, sin = self._factors(positions, positions + 1)
        self.max_seq_len_cached = seq_len
        self.cos_cached = cos.to(device, dtype)
        self.sin_cached = sin.to(device, dtype)

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cos and sin of at least the positions 0…length-1, float32 `[P, E]`."""
        length = max(length, self.max_seq_len_cached)
        if length > self.max_seq_len_cached or self.cos_cached.device != device:
            self._set_cos_sin_cache(length, device, torch.float32)
        return self.cos_cached, self.sin_cached

    def stretches(self, lengths: Sequence[int]) -> bool:
        """Whether the angles of texts that are read at once depend on how long these are."""
        return self.dynamic and max(lengths, default=0) > self.trained_context

    def forward(
        self, position_ids: Tensor, highest: int, dtype: torch.dtype, lengths: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Cos and sin `[B, 1, T, E]`.

        Args:
            position_ids: `[B, T]`, or `[1, T]` if they are the same in all rows.
            highest: the largest of them.
            dtype: of the result.
            lengths: of texts that are read at once from their beginnings: one for each row, or one for all.
        """
        if self.stretches(lengths):
            positions = position_ids.cpu().float()
            own = torch.tensor(lengths, dtype=torch.float32, device="cpu")[:, None]
            cos, sin = self._factors(positions, own)
            return cos.to(position_ids.device, dtype)[:, None], sin.to(position_ids.device, dtype)[:, None]
        # Doubled, so that a growing text does not make a table at every step.
        length = 2 * highest if highest >= self.max_seq_len_cached else 0
        cos, sin = self.table(length, position_ids.device)
        return cos[position_ids].to(dtype).unsqueeze(1), sin[position_ids].to(dtype).unsqueeze(1)


def rotary_for(config: LlamaConfig) -> LlamaRotaryEmbedding:
    """The rotary table of a Llama configuration, `rope_theta`, `head_dim` and `rope_scaling` honoured.

    Raises:
        ValueError: for a `rope_scaling` that is not computed here.
    """
    scaling = dict(config.rope_scaling or {})
    kind = scaling["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_scaling has the type {kind!r}; expected one of {', '.join(ROPE_TYPES)}")
    if kind != "default" and "factor" not in scaling:
        raise ValueError(f"rope_scaling of the type {kind!r} has no factor")
    factor = scaling["factor"] if kind != "default" else 1.0
    context = config.max_position_embeddings
    return LlamaRotaryEmbedding(head_dim(config), context, config.rope_theta, factor, scaling)


def head_dim(config: LlamaConfig) -> int:
    """Size E of a head, which a configuration may set apart from the hidden size."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, heads, T, E]` by the factors `[B, 1, T, E]`."""
    # Llama pairs dimension i with i + E / 2: (x, y) -> (x cos - y sin, y cos + x sin).
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
    keys = slots[..., None, None, :]
    visible = (keys <= queries) & (keys >= 0)
    return visible if window is None else visible & (keys > queries - window)


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """Check that a model of some layers can be split after `exit_layer`.

    Raises:
        ValueError: unless 1 <= exit_layer < num_layers.
    """
    if not 1 <= exit_layer < num_layers:
        raise ValueError(
            f"exit_layer is {exit_layer}; this model of {num_layers} layers takes 1 to {num_layers - 1}"
        )


def unpadded_positions(attention_mask: Tensor) -> Tensor:
    """Positions `[B, T]` counted over the unpadded tokens, -1 at padding, from a mask that is 0 there."""
    return (attention_mask.cumsum(dim=1) - 1).masked_fill(attention_mask == 0, -1)


KeysValues = list[tuple[Tensor, Tensor]]
"""Rotated keys and values `[B, G, T, E]` of several passes."""


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers share in one pass without a cache.

    Attributes:
        cos, sin: rotary factors, `[B, 1, T, E]`.
        mask: boolean `[B, 1, T, T]`; None for plain causal attention.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None

    def on(self, device: torch.device) -> Self:
        """The same plan on a device, for layers that are spread over several."""
        if self.cos.device == device:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})


def plan_uncached(
    rotary: LlamaRotaryEmbedding,
    states: Tensor,
    position_ids: Tensor | None = None,
    window: int | None = None,
) -> AttentionPlan:
    """Plan a pass whose queries see only one another, as training does.

    Args:
        rotary: gives the factors.
        states: `[B, T, …]`, for length, dtype and device.
        position_ids: `[B, T]`, negative at padding; None for 0…T-1, where padding on the right needs no mask.
        window: as in `_prepare_decoder_attention_mask`.
    """
    length = states.shape[1]
    mask = None
    if position_ids is None:
        highest = length - 1
        positions = torch.arange(length, device=states.device)[None]
    else:
        highest = int(position_ids.max())
        positions = position_ids
    if position_ids is not None or (window is not None and length > window):
        itself = torch.eye(length, dtype=torch.bool, device=states.device)
        # A padding row sees itself: seeing nothing would make it not a number.
        mask = _prepare_decoder_attention_mask(positions, positions, window) | itself
    cos, sin = rotary(positions.clamp(min=0), highest, states.dtype, [highest + 1])
    return AttentionPlan(cos, sin, mask)


def plan_unrolled(
    rotary: LlamaRotaryEmbedding, states: Tensor, depth: int, later: Tensor, window: int | None = None
) -> AttentionPlan:
    """Plan the pass of drafts that stand at one depth of their blocks, at many positions of a text at once.

    The draft at position t and depth j belongs to the block whose first draft stands at t - j + 1: up to there it sees
    keys of depth 1, which are those of all positions, and after it those of its own block.

    Args:
        rotary: gives the factors.
        states: `[B, T, …]` of depth 1, for length, dtype and device.
        depth: j, from 1.
        later: `[B, R]` or `[1, R]`, the positions of the drafts of depth 2, 3, …, one after another.
        window: as in `_prepare_decoder_attention_mask`.
    """
    if depth == 1:
        return plan_uncached(rotary, states, window=window)
    length = states.shape[1]
    places = torch.arange(length, device=states.device)
    back = later[..., None] - places  # positions from the key to the query
    place = torch.arange(later.shape[1], device=states.device)
    apart = place[:, None] - place
    nearby = math.inf if window is None else window
    seen = [(back >= depth - 1) & (back < nearby)]
    for step in range(2, depth + 1):
        mask = (apart == depth - step) & (apart < nearby)
        seen.append(mask.expand(len(later), -1, -1))
    cos, sin = rotary(later, length - 1, states.dtype, [length])
    return AttentionPlan(cos, sin, torch.cat(seen, dim=-1)[:, None])


def for_masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, G, S, E]`, one a head of `queries [B, H, T, E]` where that is the faster way to attend.

    With a mask no fused attention of torch on CUDA takes groups, and the one that does computes in float32.
    """
    shared = queries.shape[1] // keys.shape[1]
    if mask is None or shared == 1 or not keys.is_cuda:
        return keys, values
    return keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)


class LlamaAttention(nn.Module):
    """Multi-head attention with grouped queries and rotary positions, Llama's parameter names."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.head_dim = head_dim(config)
        bias = getattr(config, "attention_bias", False)
        size = config.hidden_size
        query_size = self.num_heads * self.head_dim
        key_size = self.num_groups * self.head_dim
        self.q_proj = nn.Linear(size, query_size, bias=bias)
        self.k_proj = nn.Linear(size, key_size, bias=bias)
        self.v_proj = nn.Linear(size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, size, bias=bias)

    def forward(self, hidden: Tensor, plan: AttentionPlan, earlier: KeysValues | None = None) -> Tensor:
        """Attend among the positions of `hidden [B, T, D]`; the same shape comes back.

        Args:
            hidden: the states.
            plan: its mask says which keys a query sees.
            earlier: keys and values of earlier passes over the same positions, which stand before the own ones; these
                are appended.
        """

        def by_head(projected: Tensor) -> Tensor:
            """`[B, T, heads E]` to `[B, heads, T, E]`."""
            return torch.unflatten(projected, -1, (-1, self.head_dim)).transpose(1, 2)

        # Positions enter by rotating queries and keys; values carry none.
        queries = apply_rotary(by_head(self.q_proj(hidden)), plan.cos, plan.sin)
        keys = apply_rotary(by_head(self.k_proj(hidden)), plan.cos, plan.sin)
        values = by_head(self.v_proj(hidden))
        if earlier is not None:
            earlier.append((keys, values))
            keys = torch.cat([keys for keys, _ in earlier], dim=2)
            values = torch.cat([values for _, values in earlier], dim=2)
        keys, values = for_masked_attention(queries, keys, values, plan.mask)
        grouped = keys.shape[1] != self.num_heads
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, plan.mask, is_causal=plan.mask is None, enable_gqa=grouped
        )
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return projected


class LlamaMLP(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.hidden_act = config.hidden_act
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        projected: Tensor = self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))
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

    def forward(self, hidden: Tensor, plan: AttentionPlan, earlier: KeysValues | None = None) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`, on the layer's own device; arguments as in `LlamaAttention`."""
        device = self.input_layernorm.weight.device
        hidden = hidden.to(device)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), plan.on(device), earlier)
        if self.feed_forward:
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden


def before(states: Tensor) -> Tensor:
    """The states `[B, T, D]` of the positions before; zeros before the first."""
    return F.pad(states, (0, 0, 1, -1))


def at_positions(states: Tensor, positions: Tensor) -> Tensor:
    """Of states `[B, T, D]` those at some positions `[B, R]` of each text: `[B, R, D]`."""
    batch, length, size = states.shape
    starts = length * torch.arange(batch, device=states.device)
    index = (starts[:, None] + positions).flatten()
    return states.flatten(0, 1).index_select(0, index).view(batch, -1, size)


class AdapterModel(nn.Module):
    """The drafter between the exit state and the exit head, its last norm (`exit_norm`) included.

    Kangaroo's adapter (arXiv 2404.18911, Sec. 3.1) is one attention layer and two norms. The same class is the
    identity drafter (no layer) and the full-layer drafter (with feed-forward), so that all three are called alike.

    Args:
        config: the model's.
        kind: "none", "adapter" or "layer".
        window: positions back that the drafter's attention sees, its own included; None for all.
        num_layers: layers of that kind; "none" has no layer in any case.
        feedback: it also reads, through `fuse`, the verifier's last state of the position before; within a block, where
            the verifier has not been yet, its own stands in (EAGLE, arXiv 2401.15077).
        recurrent: later drafts of a block read, through `fuse_later`, the token's embedding in place of its exit state,
            so that the shallow layers run once a block; only with feedback.
        middle_layer: layer of the verifier whose state is fed back, too, through `fuse_middle` (EAGLE-3, arXiv
            2503.01840); 0 for none; only with feedback. A fresh map adds nothing.

    Attributes:
        embed_tokens: what it reads in place of exit states, where it is a whole model; else None.
    """

    def __init__(
        self,
        config: LlamaConfig,
        kind: str = "adapter",
        window: int | None = 64,
        num_layers: int = 1,
        feedback: bool = False,
        recurrent: bool = False,
        middle_layer: int = 0,
    ) -> None:
        super().__init__()
        if kind not in DRAFTERS:
            raise ValueError(f"drafter is {kind!r}; expected one of {', '.join(DRAFTERS)}")
        if (window is not None and window < 1) or num_layers < 1:
            raise ValueError(
                f"adapter window is {window} and num_layers {num_layers}; expected at least 1 each"
            )
        if middle_layer and not feedback:
            raise ValueError(f"middle_layer is {middle_layer}; expected feedback with it")
        if recurrent and not feedback:
            raise ValueError(
                "recurrent is true; expected feedback with it: later drafts read the earlier ones' states"
            )
        self.config = config
        self.kind = kind
        self.window = window
        count = 0 if kind == "none" else num_layers
        self.layers = nn.ModuleList(DecoderLayer(config, feed_forward=kind == "layer") for _ in range(count))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = rotary_for(config)
        self.embed_tokens: nn.Embedding | None = None
        self.fuse = self._new_map() if feedback else None
        self.fuse_later = self._new_map() if recurrent else None
        self.middle_layer = middle_layer
        self.fuse_middle: nn.Linear | None = None
        if middle_layer:
            self.fuse_middle = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.fuse_middle.weight.data.zero_()

    def _new_map(self) -> nn.Linear:
        """From two states, side by side, to one; a fresh one gives the first of them."""
        size = self.config.hidden_size
        new = nn.Linear(2 * size, size, bias=False)
        nn.init.eye_(new.weight)
        return new

    def forward_unrolled(
        self,
        exit_states: Tensor,
        feedback: Tensor,
        depths: int,
        embeddings: Tensor | None = None,
        later: Tensor | None = None,
    ) -> list[Tensor]:
        """What the exit head reads for the first, second, … draft of a block, at every position of a verified text.

        The first draft at a position reads `feedback`, a later one the drafter's own state of the draft before.
        Training unrolls the steps of decoding like this (arXiv 2408.15766; EAGLE-3, arXiv 2503.01840).

        Args:
            exit_states: `[B, T, D]`.
            feedback: `[B, T, D]`, the verifier's states of the positions before.
            depths: drafts of a block.
            embeddings: `[B, T, D]`, of the tokens; needed by a recurrent drafter, which reads them in later drafts.
            later: `[B, R]`, consecutive positions at which later drafts are made; None for all. Those of depth j at the
                first j - 2 mean nothing, since the drafts before them are missing.

        Returns:
            `[B, T, D]` for the first draft, `[B, R, D]` for each later one, normed.
        """
        found: list[Tensor] = []
        earlier: list[KeysValues] = [[] for _ in self.layers]
        recurrent = self.fuse_later is not None
        inputs = exit_states
        places = (
            torch.arange(exit_states.shape[1], device=exit_states.device)[None] if later is None else later
        )
        for depth in range(1, depths + 1):
            hidden = self.fused(inputs, feedback, later=recurrent and depth > 1)
            plan = plan_unrolled(self.rotary, exit_states, depth, places, self.window)
            for layer, kept in zip(self.layers, earlier, strict=True):
                hidden = layer(hidden, plan, kept)
            found.append(self.norm(hidden))
            feedback = before(found[-1])
            if depth == 1:
                if recurrent:
                    assert embeddings is not None
                    inputs = embeddings
                if later is not None:
                    inputs, feedback = at_positions(inputs, later), at_positions(feedback, later)
        return found

    def fed_back(self, verifier_hidden: Tensor) -> Tensor:
        """What the first draft reads of the verifier, `[…, D]`.

        Args:
            verifier_hidden: its last states `[…, D]`; with a middle layer those after it beside them, `[…, 2 D]`.
        """
        if self.fuse_middle is None:
            return verifier_hidden
        last, middle = verifier_hidden.chunk(2, dim=-1)
        both: Tensor = last + self.fuse_middle(middle)
        return both

    def fused(self, inputs: Tensor, feedback: Tensor, later: bool = False) -> Tensor:
        """What the first layer reads, `[…, D]`.

        Args:
            inputs: exit states; for later drafts of a recurrent drafter the tokens' embeddings.
            feedback: states of the positions before.
            later: for later drafts of a recurrent drafter.
        """
        fuse = self.fuse_later if later else self.fuse
        assert fuse is not None
        fused: Tensor = fuse(torch.cat([inputs, feedback], dim=-1))
        return fused

    def forward_early_stop(self, inputs_embeds: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """What the exit head reads, without a cache; decoding runs the same layers as a stage.

        Args:
            inputs_embeds: `[B, T, D]`, exit states; with feedback what `fused` makes of them.
            position_ids: `[B, T]`, as in `plan_uncached`.

        Returns:
            `[B, T, D]`, normed.
        """
        hidden = inputs_embeds
        plan = plan_uncached(self.rotary, hidden, position_ids, self.window)
        for layer in self.layers:
            hidden = layer(hidden, plan)
        normed: Tensor = self.norm(hidden)
        return normed


def inject_adapter_hooks(
    model: LlamaForCausalLM, adapter: AdapterModel, exit_layer: int
) -> list[RemovableHandle]:
    """Let a plain Hugging Face Llama draft in `forward`: its output gains `exit_logits`.

    One hook takes the exit state; another passes it through the adapter and the model's own head. Any code that knows
    Hugging Face's Llama can so study drafts or train an adapter. There is no cache: `past_key_values` are refused.

    Args:
        model: changed in place; the adapter becomes its `adapter_model`.
        adapter: reads exit states.
        exit_layer: k, the number of layers that draft.

    Returns:
        The hooks' handles; removing them undoes it.

    Raises:
        ValueError: for an exit layer that the model does not have.
    """
    layers = model.model.layers
    check_exit_layer(exit_layer, len(layers))
    model.adapter_model = adapter
    exit_states: list[Tensor] = []

    def take_exit_state(layer: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        exit_states[:] = [outputs[0]]

    def add_exit_logits(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        if named.get("past_key_values") is not None:
            raise ValueError("exit_logits need the whole text at once; expected no past_key_values")
        mask = named.get("attention_mask")
        position_ids = None if mask is None else unpadded_positions(mask)
        exit_state = exit_states.pop()
        normed = adapter.forward_early_stop(exit_state, position_ids)
        output["exit_logits"] = model.lm_head(normed.to(exit_state.dtype))
        return output

    return [
        layers[exit_layer - 1].register_forward_hook(take_exit_state),
        model.register_forward_hook(add_exit_logits, with_kwargs=True),
    ]


class LlamaForCausalLMWithAdapters(LlamaForCausalLM):  # type: ignore[misc]  # transformers is untyped here
    """Hugging Face's Llama with a Kangaroo adapter on its exit state, by `inject_adapter_hooks`."""

    def set_adapter(self, adapter: AdapterModel, exit_layer: int) -> LlamaForCausalLMWithAdapters:
        """Put an adapter after the first `exit_layer` layers in place of an earlier one; arguments and errors as there.

        Returns:
            The model itself, whose `forward` now also gives `exit_logits [B, T, V]`.
        """
        for handle in getattr(self, "_adapter_hooks", []):
            handle.remove()
        self._adapter_hooks = inject_adapter_hooks(self, adapter, exit_layer)
        return self
