"""lora_S on the shallow layers and lora_D on the deep ones: two PEFT adapters on one model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from kangaroo.adapter import check_exit_layer
from kangaroo.decoding.layers import LARGE, MadeFromWeights

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _Site:
    """One linear layer that carries LoRA: where it hangs in the model, and the PEFT layer around it."""

    parent: nn.Module
    attribute: str
    layer: LoraLinear

    def put(self, module: nn.Module | None) -> None:
        self.parent._modules[self.attribute] = module


class AdapterSwitch:
    """Turns adapters off for a while, or merges them into plain weights, without touching `requires_grad`.

    PEFT's own `set_adapter` and `disable_adapter()` make every active adapter trainable again when they return,
    which would let an update step weights that it must not. This switch only changes what a layer computes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sites = [
            _Site(parent, attribute, child)
            for parent in model.modules()
            for attribute, child in parent.named_children()
            if isinstance(child, LoraLinear)
        ]
        self._is_merged = False
        self._plain: MadeFromWeights[nn.Linear] = MadeFromWeights()

    @property
    def modules(self) -> list[nn.Module | None]:
        """What stands now where adapters can be: they, or plain layers that they were merged into."""
        return [site.parent._modules[site.attribute] for site in self._sites]

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Leave the named adapters out inside this context."""
        # Only layers that carry one of the names are touched; what they compute is remembered and put back.
        touched = [site for site in self._sites if set(names) & set(site.layer.lora_A)]
        before = [(site.layer._active_adapter, site.parent._modules[site.attribute]) for site in touched]
        for site in touched:
            site.layer._active_adapter = [name for name in site.layer.active_adapters if name not in names]
            if self._is_merged:  # the merged weight has the named adapters in it: merge again without them
                site.put(self._merged(site))
        try:
            yield
        finally:
            for site, (active, module) in zip(touched, before, strict=True):
                site.layer._active_adapter = active
                site.put(module)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Compute with plain weights, the active adapters added in: for inference, which it makes faster.

        The trained weights are untouched; what is added in is a copy. Inside another such context nothing happens.
        """
        if self._is_merged:
            yield
            return
        self._is_merged = True
        try:
            for site in self._sites:
                site.put(self._merged(site))
            yield
        finally:
            self._is_merged = False
            for site in self._sites:
                site.put(site.layer)

    def _merged(self, site: _Site) -> nn.Linear:
        """A plain layer that computes what the site's layer does with its active adapters.

        It is kept while the weights are the same, so that what decoding makes of it lasts, too; unless it is large.
        """
        layer = site.layer
        base: nn.Linear = layer.get_base_layer()
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if not active or layer.disable_adapters:  # as by PEFT's `disable_adapter()`
            return base

        def merge() -> nn.Linear:
            return _merged(base, [layer.get_delta_weight(name) for name in active])

        if base.weight.numel() > LARGE:
            return merge()
        factors = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in active]
        scales = [layer.scaling[name] for name in active]
        name = f"{id(layer)} {' '.join(active)}"
        return self._plain.get(name, [base.weight, *factors], merge, scales)


@torch.no_grad()
def _merged(base: nn.Linear, changes: Sequence[Tensor]) -> nn.Linear:
    """A plain linear layer with the weight of `base` and some changes of it."""
    weight = base.weight.float() + sum(change.float() for change in changes)
    # On "meta" no memory is spent on a weight that is replaced at once.
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    if base.bias is not None:
        plain.bias = base.bias
    return plain


def inject_lora(
    base_model: nn.Module,
    exit_layer: int,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] = LORA_TARGETS,
    deep: bool = False,
) -> PeftModel:
    """Put lora_S on layers[:exit_layer], freeze everything else, and give the base model its `adapter_switch`.

    Args:
        base_model: a Llama model with `model.layers`; it is changed in place.
        exit_layer: k.
        rank, alpha: LoRA's (Hu et al. 2021); the update is scaled by alpha / rank.
        targets: linear layers that get it.
        deep: also put lora_D on layers[exit_layer:].

    Returns:
        The PEFT model around `base_model`; its adapters are active, trainable and in float32.

    Raises:
        ValueError: for an exit layer or rank out of range, or a model that carries adapters already.
    """
    layers = int(base_model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    check_exit_layer(exit_layer, layers)
    if any(isinstance(module, LoraLinear) for module in base_model.modules()):
        raise ValueError("the model carries adapters already; load it again")
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}; expected at least 1")
    shared = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), "layers_pattern": "layers"}
    # With a task type a saved adapter names no class of ours, which only our own code could import.
    shared["task_type"] = "CAUSAL_LM"
    shallow_config = LoraConfig(layers_to_transform=list(range(exit_layer)), **shared)
    peft_model = get_peft_model(base_model, shallow_config, adapter_name="lora_S")
    if deep:
        deep_config = LoraConfig(layers_to_transform=list(range(exit_layer, layers)), **shared)
        peft_model.add_adapter("lora_D", deep_config)
        peft_model.base_model.set_adapter(["lora_S", "lora_D"])
    # Base weights may be bfloat16; adapters and their optimizer state are float32.
    for parameter in lora_parameters(peft_model, ["lora_S", "lora_D"]):
        parameter.data = parameter.data.float()
    base_model.adapter_switch = AdapterSwitch(base_model)  # type: ignore[assignment]
    return peft_model


inject_dual_lora = partial(inject_lora, deep=True)
"""lora_S and lora_D at once."""


def lora_parameters(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of the named adapters, in a fixed order."""
    return [
        p
        for key, p in model.named_parameters()
        if any(f".{name}." in key for name in names) and "lora_" in key
    ]


def get_peft_model_state_dict(peft_model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """One adapter's weights under PEFT's names; unlike PEFT's own, it never asks the hub about the base model."""
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        peft_model, adapter_name=adapter_name, save_embedding_layers=False
    )
    return state
