"""What fits where: a model's layers on the cards of a host, and texts into the memory that is left."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil
import torch
from accelerate import PartialState, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import Tensor
from transformers import PreTrainedModel

from dvirl.runs.errors import DvirlError
from kangaroo.adapter import head_dim
from kangaroo.decoding.layers import states_dtype
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM

BALANCED = "balanced"
"""The device by which layers are spread over all cards."""
LAYER = "DecoderLayer"
SHARE = 0.8
"""Share of a device's free memory that is given away. The rest of a card that takes weights is for the draft, caches,
logits and training; the rest of a device that takes texts, for what the estimate of their size leaves out."""
LOGIT_COPIES = 6
"""Float32 tensors as large as the logits that are held at once where tokens are chosen, or a loss is differentiated."""


def placement(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device
) -> Callable[[str], torch.device]:
    """Spread decoder layers over several cards, by Accelerate's device map.

    Embedding, final norm and head stay on the first card, and a draft and its training state come to lie there too, so
    that passes begin and end on one device. It gets fewer layers for that.

    Args:
        model: on the meta device.
        dtype: of its weights to be.
        device: the first card.

    Returns:
        The device of a parameter, by its name.

    Raises:
        DvirlError: if the cards together are too small, or several processes would share them.
    """
    if PartialState().num_processes > 1:
        raise DvirlError("device is 'balanced', which takes every card; expected one process")
    free = {}
    for card in range(torch.cuda.device_count()):
        free[card] = int(SHARE * free_memory(torch.device("cuda", card)))
    memory = get_balanced_memory(model, free, [LAYER], dtype)
    found = infer_auto_device_map(model, memory, no_split_module_classes=[LAYER], dtype=dtype)
    elsewhere = sorted(name for name, where in found.items() if not isinstance(where, int))
    if elsewhere:
        raise DvirlError(
            f"the model does not fit on {len(memory)} cards; there is no room for {elsewhere[0]}"
        )

    def device_of(name: str) -> torch.device:
        if ".layers." not in name:
            return device
        module = name
        while module and module not in found:
            module = module.rpartition(".")[0]
        return torch.device(device.type, int(found[module]))

    return device_of


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, with those that torch keeps in reserve there; of any other, the host's."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def fitting(
    name: str,
    wanted: int,
    model: EarlyExitLlamaForCausalLM,
    layers: Iterable[Any],
    positions: int,
    logits: int,
    trained: Sequence[Tensor] = (),
) -> int:
    """How many texts of a batch fit into the free memory at once, by an estimate; at most as many as are wanted.

    Args:
        name: of the setting that says how many are wanted.
        wanted: number of texts.
        model: says sizes and devices.
        layers: decoder layers that keep something of each text: keys and values, or what their gradients need.
        positions: tokens of the longest text.
        logits: numbers of logits that are computed at once for a text.
        trained: parameters that learn from the batch, which then cannot be split.

    Raises:
        DvirlError: if a batch that learns does not fit, or not even one text of another.
    """
    config = model.config
    size = positions * (model.dtype if trained else states_dtype(model.device, model.dtype)).itemsize
    # What a layer computes for a position: states around its norms and products, and attention's weights.
    computed = 10 * config.hidden_size + 4 * config.intermediate_size + config.num_attention_heads * positions
    # Keys and values, with room for the copy that is made of half of them when rows that have ended are dropped.
    cached = 3 * config.num_key_value_heads * head_dim(config)
    needed = Counter({model.device: LOGIT_COPIES * 4 * logits})
    for layer in layers:
        needed[layer.input_layernorm.weight.device] += size * (computed if trained else cached)
    # AdamW keeps two moments of every trained number, beside its gradient.
    state = 12 * sum(parameter.numel() for parameter in trained)
    least = wanted if trained else 1
    for device, kept in needed.items():
        free = free_memory(device)
        each = kept + size * computed
        fits = max(0, int((SHARE * free - state) // each))
        if fits < least:
            takes = f"each takes about {each / 1e9:.3g} GB on {device}, where {free / 1e9:.3g} GB are free"
            raise DvirlError(f"{name} puts {least} texts together; expected at most {fits}, since {takes}")
        wanted = min(wanted, fits)
    return wanted
