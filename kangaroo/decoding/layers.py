"""Decoder layers as decoding runs them: by kernels of our own, or projections that read the same input fused.

Nothing here is trained: layers are made from the weights as they are, and made again when these have changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._triton import has_triton
from transformers.activations import ACT2FN

from kangaroo.adapter import DecoderLayer, apply_rotary
from kangaroo.decoding.cache import CachedPass, KVCache, attend_cached

if TYPE_CHECKING:
    from kangaroo.decoding.cpu_kernels import PanelLayer
    from kangaroo.decoding.kernels import FusedLayer

Product = Callable[[Tensor], Tensor]
Made = TypeVar("Made")

OWN_PROMPT_ON_CPU = 64
"""Tokens of a prompt that our own layers on a CPU read, at most: a library is faster at the attention of more. All
later passes are theirs, so that drafts and other texts do not change a bit."""
LARGE = 2**22
"""Weights of more numbers than this are left apart on an accelerator: there reading them takes the time, not starting
products, and a second copy of them would take the memory."""


def product(weight: Tensor, bias: Tensor | None = None, int8: bool = False) -> Product:
    """`x -> x @ weight.T + bias`, on a CPU by our own kernels if they run there.

    Args:
        weight: `[N, D]`.
        bias: `[N]`.
        int8: in our own kernels on a CPU, with weights of 8 bits: for a head, whose logits no layer reads.
    """
    if on_own_cpu_kernels(weight.device, weight.dtype):
        from kangaroo.decoding.cpu_kernels import PanelProduct

        return PanelProduct(weight, bias, int8)
    return partial(F.linear, weight=weight, bias=bias)


def on_own_cpu_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `kangaroo.decoding.cpu_kernels` multiplies by weights of this dtype there."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _cpu_kernels_work()


def states_dtype(device: torch.device, dtype: torch.dtype, few_rows: bool = True) -> torch.dtype:
    """The dtype of states, keys and values in decoding: the weights', but float32 in our own kernels on a CPU.

    Args:
        device, dtype: of the model's weights.
        few_rows: as in `CachedLayer`.
    """
    return torch.float32 if few_rows and on_own_cpu_kernels(device, dtype) else dtype


@cache
def _cpu_kernels_work() -> bool:
    """Whether Numba is there and compiles them, and this processor runs them."""
    try:
        from kangaroo.decoding.cpu_kernels import works

        return works()
    except ImportError:
        return False
    # Nowhere to keep what was compiled, no space left, no such threads.
    except (RuntimeError, OSError, ValueError) as error:
        warnings.warn(f"decoding is slower than it could be: {error}", stacklevel=1)
        return False


class CachedLayer:
    """One decoder layer over a cache, without gradients. Attention is computed here for all of decoding.

    Args:
        layer: the layer, its adapters merged or left out.
        dtype: of the weights to compute with.
        few_rows: whether our own kernels run, which make few rows fast. False leaves the products to the
            library, as batches of many rows do; on a CPU to the layer's own modules.
    """

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype, few_rows: bool = True) -> None:
        attention = layer.self_attn
        self.device = attention.q_proj.weight.device
        on_cuda = self.device.type == "cuda"
        of_states = states_dtype(self.device, dtype, few_rows)
        self.kernels = _kernels_for(layer, dtype) if few_rows and on_cuda else None
        # Where our kernels run, the library's only read prompts, which is not worth a compilation.
        is_compiled = on_cuda and self.kernels is None
        self._rotate: Callable[..., Tensor] = compiled(apply_rotary) if is_compiled else apply_rotary
        self._heads = attention.num_heads
        self._groups = attention.num_groups
        self._head_dim = attention.head_dim
        self._input_norm = rms_norm(layer.input_layernorm, of_states)

        def join(*projections: nn.Linear) -> Product:
            """Products of the same input as one, of copied weights, unless the modules are to run."""
            if few_rows or on_cuda:
                return _fused(dtype, *projections)
            return _side_by_side(projections)

        self._qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = join(attention.o_proj)
        self._gate_up: Product | None = None
        self._down: Product | None = None
        if layer.feed_forward:
            self._mlp_norm = rms_norm(layer.post_attention_layernorm, of_states)
            self._gate_up = join(layer.mlp.gate_proj, layer.mlp.up_proj)
            self._down = join(layer.mlp.down_proj)
            gated = _gated_by(layer.mlp.hidden_act)
            self._gate: Callable[..., Tensor] = compiled(gated) if is_compiled else gated
        self._own: PanelLayer | None = None
        if few_rows and on_own_cpu_kernels(self.device, dtype):
            from kangaroo.decoding.cpu_kernels import own_layer

            self._own = own_layer(layer, [self._qkv, self._out, self._gate_up, self._down])

    def __call__(self, hidden: Tensor, plan: CachedPass, cache: KVCache, layer: int) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`; keys and values go into layer `layer` of the cache."""
        batch, length, _ = hidden.shape
        if self._own and (length <= OWN_PROMPT_ON_CPU or not plan.causal):
            return self._own(hidden, plan, cache, layer)
        # Attention: hidden + out(attend(rotate(q), rotate(k), v)).
        qkv = self._qkv(self._input_norm(hidden))
        heads = qkv.view(batch, length, -1, self._head_dim).transpose(1, 2)  # [B, H + 2 G, T, E]
        num_rotated = self._heads + self._groups
        unrotated, values = torch.split(heads, [num_rotated, self._groups], dim=1)
        rotated = self._rotate(unrotated, plan.cos, plan.sin)
        queries, keys = torch.split(rotated, [self._heads, self._groups], dim=1)
        keys, values = cache.store(layer, keys, values, plan)
        mixed = attend_cached(queries, keys, values, plan)  # [B, H, T, E]
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
        hidden = hidden + self._out(mixed)
        # Feed-forward, which Kangaroo's adapter does not have: hidden + down(activation(gate) * up).
        if self._gate_up is None or self._down is None:
            return hidden
        gated = self._gate(self._gate_up(self._mlp_norm(hidden)))
        return hidden + self._down(gated)


def _kernels_for(layer: DecoderLayer, dtype: torch.dtype) -> FusedLayer | None:
    """The layer by our own kernels on CUDA, if they compute its shape."""
    if not has_triton():
        return None
    from kangaroo.decoding.kernels import FusedLayer, supports

    if not supports(layer, dtype, LARGE):
        return None
    return FusedLayer(layer, dtype)


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm.

    Attributes:
        weight: `[D]`.
        eps: its epsilon; None for the dtype's own.
    """

    weight: Tensor
    eps: float | None

    def __call__(self, states: Tensor) -> Tensor:
        """Of states `[…, D]`."""
        return F.rms_norm(states, self.weight.shape, self.weight, self.eps)


def rms_norm(norm: nn.RMSNorm, dtype: torch.dtype) -> Norm:
    """The norm with its weight as it is now, in a dtype."""
    return Norm(norm.weight.detach().to(dtype), norm.eps)


class Fuse:
    """Linear map of two concatenated states to the state that a drafter's layer reads.

    Args:
        weight: `[D, 2 D]`.
        embeddings: `[V, D]`; with them the first state is a token's embedding.

    Attributes:
        maps: `[2, D, D]`, its two halves, for our own kernels on CUDA; None on a CPU.
    """

    def __init__(self, weight: Tensor, embeddings: Tensor | None = None) -> None:
        self.embeddings = embeddings
        self.maps: Tensor | None = None
        if weight.is_cuda:
            halves = weight.view(len(weight), 2, -1)  # [D, 2, D]
            self.maps = halves.transpose(0, 1).contiguous()
        self._product = product(weight)

    def __call__(self, inputs: Tensor, feedback: Tensor) -> Tensor:
        """Of tokens `[B, T]` or states `[B, T, D]`, and of states `[B, T, D]`."""
        states = inputs if self.embeddings is None else F.embedding(inputs, self.embeddings)
        return self._product(torch.cat([states, feedback], dim=-1))


@dataclass(frozen=True)
class Middle:
    """A map of the verifier's states in the middle, which is added to its last ones (as EAGLE-3 reads several layers).

    Attributes:
        layer: after which the states are taken, counted from 1.
        product: the map.
        eps: of the norm before it, which has no weight; None for the dtype's own.
    """

    layer: int
    product: Product
    eps: float | None

    def __call__(self, hidden: Tensor, last: Tensor) -> Tensor:
        """Of states `[B, T, D]` in the middle and last ones; `[B, T, D]`."""
        return last + self.product(F.rms_norm(hidden, hidden.shape[-1:], eps=self.eps))


def _side_by_side(parts: Sequence[Product]) -> Product:
    """The outputs of some products next to one another."""
    if len(parts) == 1:
        return parts[0]
    return lambda states: torch.cat([part(states) for part in parts], dim=-1)


def _fused(dtype: torch.dtype, *projections: nn.Linear) -> Product:
    """The same by one product of the joined weights, unless they are large and on an accelerator."""
    weights = [linear.weight.detach().to(dtype) for linear in projections]
    if weights[0].is_cuda and weights[0].numel() > LARGE:
        products = []
        for weight, linear in zip(weights, projections, strict=True):
            products.append(product(weight, linear.bias))
        return _side_by_side(products)
    bias = None
    if any(linear.bias is not None for linear in projections):
        bias = torch.zeros(sum(map(len, weights)), dtype=dtype, device=weights[0].device)
        parts = torch.split(bias, [len(weight) for weight in weights])
        for part, linear in zip(parts, projections, strict=True):
            if linear.bias is not None:
                part.copy_(linear.bias.detach())
    return product(torch.cat(weights), bias)


@cache
def _gated_by(hidden_act: str) -> Callable[[Tensor], Tensor]:
    """The gate of feed-forward blocks with this activation; one for all layers, so that it is compiled once."""
    activate = ACT2FN[hidden_act]

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: Tensor = activate(gate)
        return activated * up

    return gated


@cache
def compiled(function: Callable[..., Made], dynamic: bool = True) -> Callable[..., Made]:
    """The function as few kernels where Triton can. In decoding only for what has no sums: their order could change.

    Args:
        function: of tensors alone.
        dynamic: one for all shapes; False is faster, and compiles for each shape.
    """
    if not has_triton():
        return function
    return torch.compile(function, dynamic=dynamic)


class Weights:
    """All parameters of some modules. To list them takes a millisecond, to see that they still are theirs a tenth.

    Args:
        modules: they and what is in them.
        others: modules that say what these compute, such as the adapters that are switched; not looked into.

    Attributes:
        weights: the parameters.
        names: of everything in the modules, in their order.
        norms: the norms among the modules.
    """

    def __init__(self, modules: Sequence[nn.Module], others: Sequence[nn.Module | None] = ()) -> None:
        self._modules: list[nn.Module | None] = [*modules, *others]
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        self.weights: list[Tensor] = []
        self.norms: list[nn.RMSNorm] = []
        for module in modules:
            self._list(module)
        self.names = [name for _, name, _ in self._held]

    def _list(self, module: nn.Module) -> None:
        if isinstance(module, nn.RMSNorm):
            self.norms.append(module)
        for name, weight in module._parameters.items():
            self._held.append((module._parameters, name, weight))
            if weight is not None:
                self.weights.append(weight)
        for name, child in module._modules.items():
            self._held.append((module._modules, name, child))
            if child is not None:
                self._list(child)

    def are_in(self, modules: Sequence[nn.Module], others: Sequence[nn.Module | None] = ()) -> bool:
        """Whether these are the modules, and nothing in them was put in another's place."""
        if self._modules != [*modules, *others]:
            return False
        return all(place.get(name) is thing for place, name, thing in self._held)


def _notice_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """A fused step leaves the versions of weights as they were, by which `MadeFromWeights` sees changes."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version(group["params"])


register_optimizer_step_post_hook(_notice_fused_step)


def _version(weight: Tensor) -> object:
    """Which in-place change of a weight this is; one that was loaded in inference mode may always have changed."""
    return object() if weight.is_inference() else weight._version


class MadeFromWeights(Generic[Made]):
    """Things by name, each made once for the weights that it was made from."""

    def __init__(self) -> None:
        # By name: the weights, their versions when the thing was made, and the thing.
        self._made: dict[str, tuple[list[Tensor], list[object], Made]] = {}

    def get(
        self, name: str, weights: Sequence[Tensor], make: Callable[[], Made], beside: Sequence[object] = ()
    ) -> Made:
        """What was made last under this name if it was made from these weights and what else is named, or a new one.

        The weights are held, so that no other tensor can take their place in memory.
        """
        # An in-place change of a weight raises its version; a new tensor has another address.
        versions: list[object] = [(weight.data_ptr(), _version(weight)) for weight in weights]
        versions += beside
        if name in self._made:
            _, made_from, made = self._made[name]
            if made_from == versions:
                return made
        held = [weight.detach() for weight in weights]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        self._made[name] = (held, versions, made)
        return made
