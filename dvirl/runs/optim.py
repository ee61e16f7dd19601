"""Optimizers, learning rates and the clipped step."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer

COSINE_FLOOR = 0.1
"""Share of the peak rate that the cosine schedule ends with."""


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
