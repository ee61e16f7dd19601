"""Optimizers, learning rates and the clipped step."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer

from dvirl.runs.errors import DvirlError
from dvirl.runs.files import Tensors

Parameters = Sequence[nn.Parameter]


def make_optimizer(parameters: Parameters, lr: float) -> AdamW:
    """AdamW without weight decay: the weights start as those of a good model and must not shrink towards zero."""
    # A list of parameters may be empty in a group, and not by itself.
    return AdamW([{"params": list(parameters)}], lr=lr, weight_decay=0.0)


def optimizer_tensors(**optimizers: Optimizer) -> Tensors:
    """The optimizers' state as tensors, `NAME.PARAMETER.FIELD`, for safetensors."""
    tensors = {}
    for name, optimizer in optimizers.items():
        for parameter, state in optimizer.state_dict()["state"].items():
            for field, value in state.items():
                tensors[f"{name}.{parameter}.{field}"] = torch.as_tensor(value)
    return tensors


def load_optimizers(tensors: Tensors, **optimizers: Optimizer) -> None:
    """Restore what `optimizer_tensors` gave; other names are ignored.

    Raises:
        DvirlError: if it is of other parameters.
    """
    for name, optimizer in optimizers.items():
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        state: dict[int, Tensors] = defaultdict(dict)
        for key, value in tensors.items():
            if key.startswith(f"{name}."):
                _, parameter, field = key.split(".")
                own = parameters[int(parameter) :][:1]
                if not own or value.shape not in ((), own[0].shape):
                    raise DvirlError(
                        "the checkpoint's optimizer is of other parameters; expected the same lora_shallow and drafter"
                    )
                # A step count stays on the CPU, where AdamW began it: parameters may lie on several devices.
                state[int(parameter)][field] = value.cpu() if field == "step" else value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(state)})


def _new_muon(matrices: Sequence[Tensor]) -> Muon:
    return Muon(matrices, lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


class CapturedMuon:
    """Muon's step without the host: on CUDA its two hundred small kernels are one captured graph.

    It steps stand-ins of the matrices, which start at zero, at the rate 1. What they become is added to the matrices at
    the rate of the moment, so that no number of the graph depends on it.

    Args:
        matrices: what it steps.
    """

    def __init__(self, matrices: Parameters) -> None:
        self._matrices = matrices
        self._moved = [torch.zeros_like(matrix, requires_grad=False) for matrix in matrices]
        self._gradients = [torch.zeros_like(matrix, requires_grad=False) for matrix in matrices]
        for moved, gradient in zip(self._moved, self._gradients, strict=True):
            moved.grad = gradient
        self.muon = _new_muon(self._moved)
        self._kept = torch.ones((), dtype=torch.bool, device=matrices[0].device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, lr: float, kept: Tensor) -> None:
        """Step along the matrices' gradients, unless `kept` is False, 0-d."""
        if self._kept.is_cuda and self._graph is None:
            self._graph = self._capture()
        torch._foreach_zero_(self._gradients)
        for own, matrix in zip(self._gradients, self._matrices, strict=True):
            if matrix.grad is not None:
                own.copy_(matrix.grad)
        self._kept.copy_(kept)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        with torch.no_grad():
            torch._foreach_add_(list(self._matrices), self._moved, alpha=lr)

    def forget(self) -> None:
        """Capture anew: the moments have been replaced."""
        self._graph = None

    @torch.no_grad()
    def _run(self) -> None:
        for gradient in self._gradients:
            gradient.copy_(torch.where(self._kept, gradient, 0.0))
        moments = [state["momentum_buffer"] for state in self.muon.state.values()]
        before = [moment.clone() for moment in moments]
        torch._foreach_zero_(self._moved)
        self.muon.step()  # type: ignore[no-untyped-call]
        for moment, old in zip(moments, before, strict=True):
            moment.copy_(torch.where(self._kept, moment, old))
        for moved in self._moved:
            moved.mul_(self._kept)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Capture a step; the run before it, which allocates, is one that is left out."""
        self._kept.fill_(False)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph


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

    def __init__(self, parameters: Parameters, matrices: Parameters, muon: float) -> None:
        self.lr = 0.0
        self._parameters = parameters
        self._captured: CapturedMuon | None = None
        for_muon = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in parameters if id(parameter) not in for_muon]
        on_cuda = all(parameter.is_cuda for parameter in parameters)
        # A graph cannot span devices.
        self._on_device = on_cuda and len({matrix.device for matrix in matrices}) <= 1
        self._fast = AdamW(rest, weight_decay=0.0, fused=on_cuda)
        self._parts: dict[str, Optimizer] = {"fast": self._fast}
        self._muon = muon
        if matrices and self._on_device:
            self._captured = CapturedMuon(matrices)
            self._parts["muon"] = self._captured.muon
        elif matrices:
            self._parts["muon"] = _new_muon(matrices)

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self._parts.values())

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self, lr: float, kept: Tensor) -> None:
        """Step all parameters, AdamW's at the rate `lr`, unless `kept` is False, 0-d; on CUDA the host never looks."""
        self.lr = lr
        if self._on_device:  # as torch's GradScaler says it
            self._fast.found_inf = (~kept).float()  # type: ignore[attr-defined]
        elif not bool(kept):
            return
        self._fast.param_groups[0]["lr"] = lr
        self._fast.step()
        if self._captured:
            self._captured.step(lr * self._muon, kept)
        elif "muon" in self._parts:
            self._parts["muon"].param_groups[0]["lr"] = lr * self._muon
            self._parts["muon"].step()
        # Fused and captured steps leave the versions of weights as they were, by which decoding sees changes.
        increment_version(self._parameters)

    def tensors(self) -> Tensors:
        """All state, as `optimizer_tensors` names it."""
        return optimizer_tensors(**self._parts)

    def load(self, tensors: Tensors) -> None:
        """Restore what `tensors` gave."""
        load_optimizers(tensors, **self._parts)
        if self._captured:
            self._captured.forget()


def cosine_rate(peak: float, step: int, warmup_steps: int, progress: float, floor: float = 0.1) -> float:
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
    add_gradients: Callable[[Parameters], None] = lambda _: None,
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
