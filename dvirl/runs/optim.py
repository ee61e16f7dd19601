"""Optimizers, learning rates and the clipped step."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer

COSINE_FLOOR = 0.1
"""Share of the peak rate that the cosine schedule ends with."""


def make_optimizer(parameters: Sequence[nn.Parameter], lr: float) -> AdamW:
    """AdamW without weight decay: the weights start as those of a good model and must not shrink towards zero."""
    # A list of parameters may be empty in a group, and not by itself.
    return AdamW([{"params": list(parameters)}], lr=lr, weight_decay=0.0)


def optimizer_tensors(**optimizers: Optimizer) -> dict[str, Tensor]:
    """The optimizers' state as tensors, `NAME.PARAMETER.FIELD`, for safetensors."""
    tensors = {}
    for name, optimizer in optimizers.items():
        for parameter, state in optimizer.state_dict()["state"].items():
            for field, value in state.items():
                tensors[f"{name}.{parameter}.{field}"] = torch.as_tensor(value)
    return tensors


def load_optimizers(tensors: Mapping[str, Tensor], **optimizers: Optimizer) -> None:
    """Restore what `optimizer_tensors` gave; other names are ignored."""
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            if key.startswith(f"{name}."):
                _, parameter, field = key.split(".")
                # A step count stays on the CPU, where AdamW began it: parameters may lie on several devices.
                state[int(parameter)][field] = value.cpu() if field == "step" else value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(state), "param_groups": groups})


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

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        muon: float,
    ) -> None:
        self.lr = 0.0
        for_muon = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in parameters if id(parameter) not in for_muon]
        on_cuda = all(parameter.is_cuda for parameter in rest)
        self._parts: dict[str, Optimizer] = {"fast": AdamW(rest, weight_decay=0.0, fused=on_cuda)}
        self._muon = muon
        if matrices:
            self._parts["muon"] = Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self._parts.values())

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


def cosine_rate(
    peak: float,
    step: int,
    warmup_steps: int,
    progress: float,
    floor: float = COSINE_FLOOR,
) -> float:
    """The learning rate of a step.

    Args:
        peak: the highest rate.
        step: number of the step, from 1.
        warmup_steps: steps over which the rate grows linearly from 0.
        progress: share of the run that is done, 0 to 1.
        floor: share of the peak rate at `progress` 1.

    Returns:
        `peak * warm-up * (floor + (1 - floor) * (1 + cos(pi * progress)) / 2)`.
    """
    warmup = min(1.0, step / max(1, warmup_steps))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * warmup * (floor + (1 - floor) * cosine)


def clipped_step(
    optimizer: Optimizer,
    loss: Tensor | None,
    lr: float,
    grad_clip: float,
    add_gradients: Callable[[Sequence[nn.Parameter]], None] = lambda _: None,
) -> float:
    """Compute gradients, clip them and step; nothing is stepped if the loss or the gradient is not finite.

    Args:
        optimizer: of one parameter group.
        loss: a scalar; None in a process that has no share of the batch.
        lr: the learning rate of this step.
        grad_clip: norm to which the gradient is clipped.
        add_gradients: adds up the gradients of several processes (`Processes.add_gradients`).

    Returns:
        The norm of the gradient of all processes together, before clipping; not finite if nothing was stepped.
    """
    optimizer.zero_grad(set_to_none=True)
    (group,) = optimizer.param_groups
    if loss is not None:
        # The gradient is scaled by 1, or by 0 * inf = NaN: a loss that is not finite then stops all processes.
        loss.backward(1 + 0 * loss.detach())  # type: ignore[no-untyped-call]
    add_gradients(group["params"])
    grad_norm = float(clip_grad_norm_(group["params"], grad_clip))
    if math.isfinite(grad_norm):
        group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
