"""LoRA and draft on a model, and which parameters each update may step."""

from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor, nn

from dvirl.config import DraftSettings
from dvirl.runs.errors import bad_input
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.sgp_lora import inject_lora, lora_parameters


def attach_draft(
    base: EarlyExitLlamaForCausalLM,
    config: DraftSettings,
    tokens: Tensor | None = None,
    deep: bool = False,
) -> tuple[PeftModel, KangarooModel]:
    """Put lora_S (with `deep` also lora_D) and a fresh draft on a freshly loaded model, which is changed in place.

    Args:
        base: the model.
        config: what drafts.
        tokens: `[M]`, response tokens whose most frequent ones the exit head covers; the first ids if not given.
        deep: also put lora_D on it.

    Raises:
        DvirlError: for settings that do not fit the model.
    """
    targets = config.lora_targets.split(",")
    if tokens is None:
        tokens = torch.empty(0)
    draft_vocab = draft_vocabulary(tokens, base.config.vocab_size, config.draft_vocab)
    # Adapters note this, in place of where this machine keeps the model.
    base.name_or_path = config.model_name
    with bad_input():
        peft_model = inject_lora(base, config.exit_layer, config.lora_rank, config.lora_alpha, targets, deep)
        model = KangarooModel(base, None, config.drafter_args(draft_vocab), config.exit_layer)
    return peft_model, model


def shallow_parameters(model: KangarooModel, lora_shallow: bool = True) -> list[nn.Parameter]:
    """What the fast update steps: lora_S unless that is off, the drafter with its norm, the exit head if trained."""
    # A frozen head has nothing to step, and a low-rank one only its two factors.
    parameters = lora_parameters(model, ["lora_S"]) if lora_shallow else []
    return [*parameters, *model.adapter_model.parameters(), *head_parameters(model)]


def head_parameters(model: KangarooModel) -> list[nn.Parameter]:
    """What learns of the exit head: all of it, the two factors of its change, or nothing."""
    if model.head == "full":
        return list(model.exit_proj.parameters())
    return [model.head_down, model.head_up] if model.head == "lora" else []


def deep_parameters(model: KangarooModel) -> list[nn.Parameter]:
    """What the slow update steps: lora_D."""
    return lora_parameters(model, ["lora_D"])


def train_only(model: nn.Module, wanted: Iterable[nn.Parameter]) -> None:
    """Let exactly the wanted parameters take gradients.

    Each update calls this first, because PEFT's `set_adapter` and the end of its `disable_adapter()` make every active
    adapter trainable again, whoever calls them.
    """
    model.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_()


def draft_vocabulary(tokens: Tensor, vocab_size: int, size: int) -> list[int] | None:
    """The token ids that an exit head of `size` rows covers, ascending; None for all.

    They are the most frequent of the response tokens `[M]`.
    """
    if size == 0 or size >= vocab_size:
        return None
    counts = torch.bincount(tokens.long().cpu(), minlength=vocab_size)
    # The sort is stable: tokens not seen follow in the vocabulary's order. For byte-level BPE this is the order of its
    # merges, and so roughly that of frequency.
    most_frequent = counts.argsort(descending=True, stable=True)[:size]
    ids: list[int] = most_frequent.sort().values.tolist()
    return ids
