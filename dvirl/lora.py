"""LoRA and draft on a model, what an update may step of them, the guard between, optimizers, rates, steps."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer

from dvirl.config import DraftSettings
from dvirl.errors import DvirlError
from dvirl.rollout import draft_vocabulary
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.sgp_lora import inject_lora, lora_parameters

COSINE_FLOOR = 0.1
"""Share of the peak rate that the cosine schedule ends with."""


def attach_draft(
    base: EarlyExitLlamaForCausalLM, config: DraftSettings, tokens: Tensor | None = None, deep: bool = False
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
    lora = config.lora_rank, config.lora_alpha, config.lora_targets.split(",")
    counted = torch.empty(0) if tokens is None else tokens
    draft_vocab = draft_vocabulary(counted, base.config.vocab_size, config.draft_vocab)
    try:
        peft_model = inject_lora(base, config.exit_layer, *lora, deep)
        return peft_model, KangarooModel(base, None, config.drafter_args(draft_vocab), config.exit_layer)
    except ValueError as error:
        raise DvirlError(str(error)) from error


def shallow_parameters(model: KangarooModel, lora_shallow: bool = True) -> list[nn.Parameter]:
    """What the fast update steps: lora_S unless that is off, the drafter with its norm, the exit head if trained."""
    heads = {"full": list(model.exit_proj.parameters()), "frozen": []}
    head = [model.head_down, model.head_up] if model.head == "lora" else heads[model.head]
    return [*(lora_parameters(model, ["lora_S"]) if lora_shallow else []), *model.adapter_model.parameters(), *head]


def deep_parameters(model: KangarooModel) -> list[nn.Parameter]:
    """What the slow update steps: lora_D."""
    return lora_parameters(model, ["lora_D"])


def train_only(model: nn.Module, wanted: Iterable[nn.Parameter]) -> None:
    """Let exactly the wanted parameters take gradients.

    Called before each update, since PEFT's `set_adapter` and the end of its `disable_adapter()` make every active
    adapter trainable again, whoever calls them.
    """
    chosen = {id(parameter) for parameter in wanted}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def make_optimizer(parameters: Sequence[nn.Parameter], lr: float) -> AdamW:
    """AdamW without weight decay: the weights start as a good model and must not shrink towards zero."""
    return AdamW(parameters, lr=lr, weight_decay=0.0)


def optimizer_tensors(**optimizers: Optimizer) -> dict[str, Tensor]:
    """The optimizers' state as tensors, `NAME.PARAMETER.FIELD`, for safetensors."""
    states = {f"{name}.{at}": s for name, one in optimizers.items() for at, s in one.state_dict()["state"].items()}
    return {f"{at}.{key}": torch.as_tensor(value) for at, state in states.items() for key, value in state.items()}


def load_optimizers(tensors: Mapping[str, Tensor], **optimizers: Optimizer) -> None:
    """Restore what `optimizer_tensors` gave; other names are passed over."""
    for name, optimizer in optimizers.items():
        entries: dict[int, dict[str, Tensor]] = {}
        for key in tensors:
            if key.startswith(f"{name}."):
                _, index, field = key.split(".")
                entries.setdefault(int(index), {})[field] = tensors[key]
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


class Optimizers:
    """AdamW for `parameters`, and Muon (Jordan et al. 2024) for those of them that are among `matrices`.

    Muon's update is orthogonal and scaled to the size of AdamW's (arXiv 2502.16982), so both follow one rate.

    Args:
        parameters: all that are stepped.
        matrices: 2-D ones for Muon, or none.
        muon: Muon's rate as a multiple of AdamW's.

    Attributes:
        lr: AdamW's rate in the last step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], muon: float) -> None:
        self.lr = 0.0
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in parameters if id(parameter) not in chosen]
        adamw = AdamW(rest, weight_decay=0.0, fused=all(parameter.is_cuda for parameter in rest))
        self._parts: dict[str, Optimizer] = {"fast": adamw}
        self._muon = muon
        if matrices:
            self._parts["muon"] = Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self._parts.values():
            optimizer.zero_grad(set_to_none=True)

    def step(self, lr: float) -> None:
        """Step all parameters, AdamW's at the rate `lr`."""
        self.lr = lr
        for name, optimizer in self._parts.items():
            optimizer.param_groups[0]["lr"] = lr * self._muon if name == "muon" else lr
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """All state, as `optimizer_tensors` names it."""
        return optimizer_tensors(**self._parts)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        load_optimizers(tensors, **self._parts)


def cosine_rate(peak: float, step: int, warmup_steps: int, progress: float, floor: float = COSINE_FLOOR) -> float:
    """The rate of step 1, 2, …: linear warm-up to `peak`, and a cosine down to the share `floor` at `progress` 1."""
    rate = peak * min(1.0, step / max(1, warmup_steps))
    return rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def clipped_step(
    optimizer: Optimizer,
    loss: Tensor | None,
    lr: float,
    grad_clip: float,
    add_gradients: Callable[[Sequence[nn.Parameter]], None] = lambda _: None,
) -> float:
    """Step, unless loss or gradient is not finite, and return the gradient's norm before clipping, then not finite too.

    With several processes (`Processes.add_gradients`) it is that of all together, and one may have no loss of its own.
    """
    optimizer.zero_grad(set_to_none=True)
    (group,) = optimizer.param_groups
    if loss is not None:
        loss.backward(1 + 0 * loss.detach())  # type: ignore[no-untyped-call]  # 0 * inf is NaN, in all processes
    add_gradients(group["params"])
    grad_norm = float(clip_grad_norm_(group["params"], grad_clip))
    if math.isfinite(grad_norm):
        group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
