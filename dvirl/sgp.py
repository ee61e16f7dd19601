"""SGP, shallow-gradient fine-tuning: the draft learns from supervised records, and nothing else is trained."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from dvirl import lora
from dvirl.config import SGPConfig
from dvirl.data.examples import collate, make_example
from dvirl.data.sources import Prompt
from dvirl.data.stream import PromptStream, encode_prompts
from dvirl.models.loading import LoadedModel
from dvirl.runs import checkpoint, optim
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import fingerprint
from dvirl.runs.loop import Counters, TrainingLoop
from kangaroo.kangaroo_model import KangarooModel


class HeadSums(NamedTuple):
    """Sums of both heads over response tokens, 0-d each; those of several batches add up.

    Attributes:
        main: negative log-likelihood under the deep layers' head, lora_S on, in nats.
        exit: negative log-likelihood of covered tokens, those in the draft vocabulary, under the exit head, in nats.
        tokens, covered: number of tokens.
        agreed: positions where both heads have the same argmax, so that greedy verification would accept the draft.
    """

    main: Tensor
    exit: Tensor
    tokens: Tensor
    covered: Tensor
    agreed: Tensor

    def loss(self, beta_exit: float) -> Tensor:
        """`loss_main + beta_exit * loss_exit`, each a mean; 0-d, with gradient."""
        return self.main / self.tokens + beta_exit * self.exit / self.covered.clamp(min=1)

    def figures(self) -> dict[str, float]:
        """Means: loss_main, loss_exit in nats, their exponentials, and the shares agreement and coverage."""
        main, early, tokens, covered, agreed = torch.stack(self).detach().double()
        loss_main = main / tokens
        loss_exit = early / covered
        means = {
            "loss_main": loss_main,
            "loss_exit": loss_exit,
            "ppl_main": loss_main.exp(),
            "ppl_exit": loss_exit.exp(),
            "agreement": agreed / tokens,
            "coverage": covered / tokens,
        }
        return {name: float(value) for name, value in means.items()}


def head_sums(model: KangarooModel, tokens: Tensor, targets: Tensor, detach_exit: bool = True) -> HeadSums:
    """Next-token cross-entropy of both heads, with gradients to what `train_only` lets learn.

    Args:
        model: drafts and verifies.
        tokens: `[B, T]`, padded on the right.
        targets: `[B, T]`, what to predict after each token, -1 for nothing.
        detach_exit: the deep layers read `exit_hidden.detach()`, so that `main` has no gradient to shallow layers.
    """
    logits = model(tokens, detach_exit=detach_exit)
    chosen = targets >= 0
    final = logits.final_logits[chosen].float()  # [N, V]
    early = logits.exit_logits[chosen].float()  # [N, V']
    index = model.draft_index(targets[chosen])
    return HeadSums(
        main=F.cross_entropy(final, targets[chosen], reduction="sum"),
        exit=F.cross_entropy(early, index, ignore_index=-1, reduction="sum"),
        tokens=chosen.sum().float(),
        covered=(index >= 0).sum().float(),
        agreed=(model.token_ids(early.argmax(dim=-1)) == final.argmax(dim=-1)).sum().float(),
    )


def gradient_norms(model: KangarooModel, loss: Tensor) -> list[tuple[float, float]]:
    """What a loss sends to each decoder layer: the norms of the gradients of its own weights and of its LoRA's.

    Only parameters that took gradients when the loss was computed count; where the loss does not reach, a norm is 0.
    """
    # The graph is kept: the same batch is asked about several losses.
    model.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    norms = []
    for layer in model.base_model.model.layers:
        weights: list[Tensor] = []
        lora_weights: list[Tensor] = []
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                kind = lora_weights if "lora_" in name else weights
                kind.append(parameter.grad.float())
        norms.append((float(get_total_norm(weights)), float(get_total_norm(lora_weights))))
    model.zero_grad()
    return norms


@dataclass(frozen=True)
class SGPResult:
    """Figures of the held-out records before and after training, steps taken, and the checkpoint folder."""

    before: dict[str, float]
    after: dict[str, float]
    steps: int
    checkpoint: str


class SGPTrainer(TrainingLoop):
    """Trains lora_S, drafter and exit head on supervised records.

    Args:
        config: all settings.
        loaded: a freshly loaded model, which is changed in place.
        records: prompts with responses.

    Attributes:
        train_set, held_out: encoded records, see `make_example`.
        num_steps: of the whole run; the last step is filled up from the next pass over the records.
        before: the figures of the held-out records before the first step.

    Raises:
        DvirlError: for settings that do not fit the model or the records.
    """

    config: SGPConfig

    def __init__(self, config: SGPConfig, loaded: LoadedModel, records: Sequence[Prompt]) -> None:
        super().__init__(config, loaded, config.checkpoint_every, config.keep_checkpoints)
        checkpoint.seed_all(config.seed)
        self.train_set, self.held_out = self._split(records)
        planned = math.ceil(config.epochs * len(self.train_set) / config.batch_size)
        self.num_steps = min(planned, config.max_steps or planned)
        self.length = self.num_steps
        tokens = torch.cat([example[example[:, 1] >= 0, 1] for example in self.train_set])
        self.peft_model, self.model = lora.attach_draft(loaded.model, config, tokens)
        self.parameters = lora.shallow_parameters(self.model, config.lora_shallow)
        self.optimizer = optim.make_optimizer(self.parameters, config.lr)
        self.optimizers = [self.optimizer]
        self.stream = PromptStream([[index] for index in range(len(self.train_set))], config.seed)
        self.counters = Counters()
        self.before: dict[str, float] = {}

    @property
    def inputs(self) -> dict[str, str]:
        """As in `TrainingLoop`."""
        return {"records": fingerprint([record.tolist() for record in (*self.train_set, *self.held_out)])}

    def _split(self, records: Sequence[Prompt]) -> tuple[list[Tensor], list[Tensor]]:
        """Records encoded, cut to `max_tokens`, shuffled; those for training and those held out."""
        config = self.config
        chat = self.loaded.chat
        examples = []
        too_long = 0
        for record, prompt in encode_prompts(records, self.loaded, config.on_bad_row):
            response = [*chat.encode_response(record.response), *self.loaded.response_end]
            if 0 < len(prompt) < config.max_tokens:
                examples.append(make_example(prompt, response[: config.max_tokens - len(prompt)]))
            else:
                too_long += 1
        if too_long:
            self.say(f"left out {too_long} records: their prompts fill {config.max_tokens} tokens")
        random.Random(config.seed).shuffle(examples)
        count = math.ceil(config.held_out_share * len(examples))
        if len(examples) <= count:
            raise DvirlError(
                f"{len(examples)} records fit max_tokens, {count} are held out; none is left for training"
            )
        return examples[count:], examples[:count]

    def train(self, show_progress: bool = True) -> SGPResult:
        """Evaluate, train, evaluate; see `TrainingLoop.train`."""
        super().train(show_progress)
        return SGPResult(self.before, self.evaluate(), self.num_steps, str(checkpoint.newest(self.run_dir)))

    def start(self) -> list[dict[str, Any]]:
        """Evaluate the draft before its first step."""
        self.before = self.before or self.evaluate()
        return []

    def advance(self) -> None:
        """One step on the next records."""
        step = self.counters.step + 1
        size = self.config.batch_size
        self.stream.position = self.counters.step * size
        examples = [self.train_set[index] for (index,) in self.stream.take(size)]
        figures = self.step(step, examples)
        self.counters.step = step
        self.clock()
        self.report({"step": step, **figures, "wall_s": self.counters.wall_s})

    def step(self, step: int, examples: Sequence[Tensor]) -> dict[str, float]:
        """Update number `step`, left out if its loss or gradient is not finite.

        Returns:
            loss and the other figures of these examples before the update, grad_norm before clipping, lr, and skipped,
            the updates left out so far.
        """
        config = self.config
        lora.train_only(self.model, self.parameters)
        sums = self._sums(examples)
        loss = sums.loss(config.beta_exit)
        lr = optim.cosine_rate(config.lr, step, config.warmup_steps, step / self.num_steps)
        norm = optim.clipped_step(self.optimizer, loss, lr, config.grad_clip)
        if not math.isfinite(norm):
            self.skip_update(step)
        return {
            "loss": float(loss.detach()),
            **sums.figures(),
            "grad_norm": norm,
            "lr": lr,
            "skipped": self.counters.skipped,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Figures of the held-out records, pooled; empty if there are none."""
        if not self.held_out:
            return {}
        size = self.config.batch_size
        parts = []
        for start in range(0, len(self.held_out), size):
            parts.append(torch.stack(self._sums(self.held_out[start : start + size])))
        return HeadSums(*torch.stack(parts).sum(dim=0)).figures()

    def _sums(self, examples: Sequence[Tensor]) -> HeadSums:
        device = self.model.head_model.weight.device
        tokens, targets = collate(examples)
        return head_sums(self.model, tokens.to(device), targets.to(device), self.config.detach_exit)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights; no step draws random numbers."""
        numbers = {
            "counters": asdict(self.counters),
            "before": self.before,
            "score": self.counters.step,  # the last is the best
        }
        return {"tensors": optim.optimizer_tensors(fast=self.optimizer), "numbers": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        optim.load_optimizers(state["tensors"], fast=self.optimizer)
        self.counters = Counters(**state["numbers"]["counters"])
        self.before = state["numbers"]["before"]
