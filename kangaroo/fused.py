"""Layers as decoding runs them: projections that read the same input fused into one, weights packed on a CPU.

oneDNN lays weights out anew at every call unless they are packed once, which saves a third to half of a product of few
rows; its float32 product of two or three rows even takes twice that of five. Nothing here is trained: a stack is made
from the weights as they are, and made anew when they have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._triton import has_triton

from kangaroo.adapter import AttentionPlan, DecoderLayer, KVCache, apply_rotary, attend, masked_softmax

Product = Callable[[Tensor], Tensor]

ROWS = 8
"""Rows for which the layout of packed weights is chosen; others work too."""
LARGE = 2**22
"""Weights of more numbers than this are left apart on an accelerator: reading them, not starting products, takes the
time, and a second copy of them would take the memory."""


def product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """`x -> x @ weight.T + bias`, the weight packed if this is a CPU whose torch can."""
    if not can_pack(weight):
        return lambda states: F.linear(states, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda states: run(states, packed, bias, "none", [], "")


@cache
def packed_dtypes() -> tuple[torch.dtype, ...]:
    """In which dtypes weights can be packed here; none without oneDNN, or where its operators have another form."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        try:
            weight = torch.ops.mkldnn._reorder_linear_weight(torch.eye(16, dtype=dtype), ROWS)
            ones = torch.ones(1, 2, 16, dtype=dtype)
            if torch.equal(torch.ops.mkldnn._linear_pointwise(ones, weight, None, "none", [], ""), ones):
                found.append(dtype)
        except (AttributeError, RuntimeError, TypeError):
            continue
    return tuple(found)


def can_pack(weight: Tensor) -> bool:
    """Whether weights like this one can be packed."""
    return weight.device.type == "cpu" and weight.dtype in packed_dtypes()


def can_stack(weight: Tensor) -> bool:
    """Whether a stack of weights like this one is worth its memory."""
    return weight.is_cuda or can_pack(weight)


class FusedLayer:
    """What one decoder layer computes behind a cache, without gradients.

    Args:
        layer: its weights are copied, but for large ones on CUDA.
        dtype: to compute in.
    """

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        self.heads, self.groups, self.size = attention.num_heads, attention.num_groups, attention.head_dim
        self.eps = layer.input_layernorm.eps
        self.norms = [layer.input_layernorm.weight.detach().to(dtype)]
        parts = [_parts(dtype, attention.q_proj, attention.k_proj, attention.v_proj), _parts(dtype, attention.o_proj)]
        if layer.feed_forward:
            self.norms.append(layer.post_attention_layernorm.weight.detach().to(dtype))
            parts += [_parts(dtype, layer.mlp.gate_proj, layer.mlp.up_proj), _parts(dtype, layer.mlp.down_proj)]
        self.parts = parts if attention.q_proj.weight.is_cuda else []
        self.products = [_product(one) for one in parts]

    def __call__(self, hidden: Tensor, plan: AttentionPlan, cache: KVCache, layer: int) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`, as `DecoderLayer.forward`."""
        if self.parts and cache.fixed is not None:
            assert plan.rows is not None and plan.mask is not None
            where = (plan.rows, plan.position_ids, plan.cos, plan.sin, plan.mask)
            kept, sizes = (cache.keys[layer], cache.values[layer]), (self.heads, self.groups, self.size)
            return compiled(fixed_layer)(hidden, self.norms, self.parts, kept, where, sizes, self.eps)
        batch, length, _ = hidden.shape
        qkv, out, *feed_forward = self.products
        heads = qkv(_normed(hidden, self.norms[0], self.eps)).view(batch, length, -1, self.size).transpose(1, 2)
        turned, values = torch.split(heads, [self.heads + self.groups, self.groups], dim=1)
        turned = apply_rotary(turned, plan.cos, plan.sin)
        queries, keys = torch.split(turned, [self.heads, self.groups], dim=1)
        mixed = attend(queries, *cache.update(layer, keys, values, plan), plan)
        hidden = hidden + out(mixed.transpose(1, 2).reshape(batch, length, -1))
        for gate_up, down in [feed_forward] if feed_forward else []:
            hidden = hidden + down(_gated(gate_up(_normed(hidden, self.norms[1], self.eps))))
        return hidden


Parts = list[tuple[Tensor, Tensor | None]]
"""Weights and biases of projections that read the same input; their results stand side by side."""


def _parts(dtype: torch.dtype, *projections: nn.Linear) -> Parts:
    apart: Parts = [(one.weight.detach().to(dtype), None if one.bias is None else one.bias.detach().to(dtype))
             for one in projections]  # fmt: skip
    if apart[0][0].is_cuda and apart[0][0].numel() > LARGE:
        return apart
    biases = [bias for _, bias in apart if bias is not None]
    return [(torch.cat([weight for weight, _ in apart]), torch.cat(biases) if biases else None)]


def _product(parts: Parts) -> Product:
    products = [product(*one) for one in parts]
    return products[0] if len(parts) == 1 else lambda states: torch.cat([one(states) for one in products], dim=-1)


def _linear(states: Tensor, parts: Parts) -> Tensor:
    results = [F.linear(states, *one) for one in parts]
    return results[0] if len(parts) == 1 else torch.cat(results, dim=-1)


def _normed(states: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    return F.rms_norm(states, weight.shape, weight, eps)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function in few kernels, where Triton is there to make them: for passes that are captured once."""
    return torch.compile(function, dynamic=True) if has_triton() else function


def fixed_layer(
    hidden: Tensor,
    norms: list[Tensor],
    parts: list[Parts],
    kept: tuple[Tensor, Tensor],
    where: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int],
    eps: float | None,
) -> Tensor:
    """What `FusedLayer` computes in a pass of fixed shape, as one function of tensors: compiled once for all layers.

    Args:
        hidden: `[B, T, D]`.
        norms, parts: the layer's weights.
        kept: keys and values of the cache, `[B, G, capacity, E]`; the pass's own are written into them.
        where: rows, position_ids, cos, sin and mask of the `AttentionPlan`.
        sizes: query heads, key heads, head size.
        eps: of the norms.
    """
    (keys, values), (rows, positions, cos, sin, mask), (heads, groups, size) = kept, where, sizes
    batch, length, _ = hidden.shape
    mixed = _linear(_normed(hidden, norms[0], eps), parts[0]).view(batch, length, -1, size).transpose(1, 2)
    turned, new_values = torch.split(mixed, [heads + groups, groups], dim=1)
    queries, new_keys = torch.split(apply_rotary(turned, cos, sin), [heads, groups], dim=1)
    keys[rows, :, positions] = new_keys.transpose(1, 2)
    values[rows, :, positions] = new_values.transpose(1, 2)
    slots = mask.shape[-1]
    scores = queries.reshape(batch, groups, -1, size) @ keys[:, :, :slots].transpose(-1, -2)
    weights = masked_softmax(scores, mask, size**-0.5)
    mixed = (weights @ values[:, :, :slots]).view(batch, heads, length, size)
    hidden = hidden + _linear(mixed.transpose(1, 2).reshape(batch, length, -1), parts[1])
    if len(parts) > 2:
        hidden = hidden + _linear(_gated(_linear(_normed(hidden, norms[1], eps), parts[2])), parts[3])
    return hidden


class Stack:
    """Some layers and what follows them, for decoding.

    Attributes:
        layers: one `FusedLayer` each.
        norm: the norm behind them.
        head: from normed states to logits, or None.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        dtype: torch.dtype,
        norm: nn.RMSNorm,
        head: Tensor | None = None,
    ) -> None:
        self.layers = [FusedLayer(cast(DecoderLayer, layer), dtype) for layer in layers]
        weight, eps = norm.weight.detach().to(dtype), norm.eps
        self.norm: Product = lambda states: _normed(states, weight, eps)
        self.head = None if head is None else product(head.to(dtype))


class Stacks:
    """Stacks by name, each made once for the weights that it was made from."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[list[Tensor], list[tuple[int, int]], Stack]] = {}

    def get(self, name: str, weights: Sequence[Tensor], make: Callable[[], Stack]) -> Stack:
        """The stack of this name: the one made last if these weights are those it was made from, else a new one.

        The weights are held, so that no other tensor can come to lie where they were.
        """
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if name not in self._made or self._made[name][1] != state:
            with torch.no_grad():
                self._made[name] = [weight.detach() for weight in weights], state, make()
        return self._made[name][2]
