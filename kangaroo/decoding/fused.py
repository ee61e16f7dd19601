"""Layers as decoding runs them: projections that read the same input fused into one, weights packed on a CPU.

oneDNN lays weights out anew at every call unless they are packed once, which saves a third to half of a product of few
rows; its float32 product of two or three rows even takes twice that of five. Nothing here is trained: a stack is made
from the weights as they are, and made anew when they have changed.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._triton import has_triton

from kangaroo.adapter import AttentionPlan, DecoderLayer, KVCache, apply_rotary, attend

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
        on_cuda = attention.q_proj.weight.is_cuda
        self.turn: Callable[..., Tensor] = compiled(apply_rotary) if on_cuda else apply_rotary
        self.gate: Callable[..., Tensor] = compiled(_gated) if on_cuda else _gated
        self.heads, self.groups, self.size = attention.num_heads, attention.num_groups, attention.head_dim
        self.norms = [_norm(layer.input_layernorm, dtype)]
        self.qkv = _fused(dtype, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _fused(dtype, attention.o_proj)
        self.gate_up: Product | None = None
        if layer.feed_forward:
            self.norms.append(_norm(layer.post_attention_layernorm, dtype))
            self.gate_up = _fused(dtype, layer.mlp.gate_proj, layer.mlp.up_proj)
            self.down = _fused(dtype, layer.mlp.down_proj)

    def __call__(self, hidden: Tensor, plan: AttentionPlan, cache: KVCache, layer: int) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`, as `DecoderLayer.forward`."""
        batch, length, _ = hidden.shape
        heads = self.qkv(self.norms[0](hidden)).view(batch, length, -1, self.size).transpose(1, 2)
        turned, values = torch.split(heads, [self.heads + self.groups, self.groups], dim=1)
        turned = self.turn(turned, plan.cos, plan.sin)
        queries, keys = torch.split(turned, [self.heads, self.groups], dim=1)
        mixed = attend(queries, *cache.update(layer, keys, values, plan), plan)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        if self.gate_up is not None:
            hidden = hidden + self.down(self.gate(self.gate_up(self.norms[1](hidden))))
        return hidden


def _norm(norm: nn.RMSNorm, dtype: torch.dtype) -> Product:
    shape, weight, eps = norm.normalized_shape, norm.weight.detach().to(dtype), norm.eps
    return lambda states: F.rms_norm(states, shape, weight, eps)


def _fused(dtype: torch.dtype, *projections: nn.Linear) -> Product:
    if projections[0].weight.is_cuda and projections[0].weight.numel() > LARGE:
        parts = [product(one.weight.detach().to(dtype), one.bias) for one in projections]
        return parts[0] if len(parts) == 1 else lambda states: torch.cat([part(states) for part in parts], dim=-1)
    weight = torch.cat([one.weight.detach().to(dtype) for one in projections])
    biases = [one.bias.detach().to(dtype) for one in projections if one.bias is not None]
    return product(weight, torch.cat(biases) if biases else None)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as one kernel where Triton is there to make it. For what has no sums, whose order could change."""
    return torch.compile(function, dynamic=True) if has_triton() else function


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
        self.norm = _norm(norm, dtype)
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
