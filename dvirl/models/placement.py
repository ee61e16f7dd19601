"""Where a model's parameters lie: on one device, or its layers spread over the cards of a host."""

from collections.abc import Callable, Mapping

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import PreTrainedModel

from dvirl.runs.errors import DvirlError

BALANCED = "balanced"
"""The device by which layers are spread over all cards."""
LAYER = "DecoderLayer"


def placement(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device, memory: Mapping[int, int] | None = None
) -> Callable[[str], torch.device]:
    """Spread decoder layers over several cards, by Accelerate's device map.

    Embedding, final norm and head stay on the first card, and a draft and its training state come to lie there too, so
    that passes begin and end on one device. It gets fewer layers for that.

    Args:
        model: on the meta device.
        dtype: of its weights to be.
        device: the first card.
        memory: bytes to use on each card; as Accelerate balances what is free if not given.

    Returns:
        The device of a parameter, by its name.

    Raises:
        DvirlError: if the cards together are too small.
    """
    if memory is None:
        memory = get_balanced_memory(model, dtype=dtype, no_split_module_classes=[LAYER])
    found = infer_auto_device_map(model, dict(memory), no_split_module_classes=[LAYER], dtype=dtype)
    elsewhere = sorted(name for name, where in found.items() if not isinstance(where, int))
    if elsewhere:
        raise DvirlError(
            f"the model does not fit on {len(memory)} cards; there is no room for {elsewhere[0]}"
        )

    def device_of(name: str) -> torch.device:
        module = name
        while module and module not in found:
            module = module.rpartition(".")[0]
        if ".layers." not in name:
            return device
        return torch.device(device.type, int(found[module]))

    return device_of
