"""SGP, shallow-gradient fine-tuning: what drafts learns from supervised records, and nothing else moves."""

import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from dvirl import lora
from dvirl.config import SGPConfig
from dvirl.data.examples import collate, make_example
from dvirl.data.sources import Prompt, read_prompts
from dvirl.data.stream import PromptStream
from dvirl.models.loading import LoadedModel, load
from dvirl.runs import checkpoint, optim
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.runs.interrupt import stoppable
from dvirl.runs.log import cut_log, log_line
from kangaroo.kangaroo_model import KangarooModel


class HeadSums(NamedTuple):
    """Both heads on response tokens, summed, 0-d each; sums of batches add up.

    Attributes:
        main: negative log-likelihood under the deep layers' head, lora_S on, nats.
        exit: under the exit head, nats, of covered tokens: those in the draft vocabulary.
        tokens, covered: how many.
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
        main, exit_, tokens, covered, agreed = (one.detach().double() for one in self)
        means = {"loss_main": main / tokens, "loss_exit": exit_ / covered}
        means |= {"ppl_main": means["loss_main"].exp(), "ppl_exit": means["loss_exit"].exp()}
        means |= {"agreement": agreed / tokens, "coverage": covered / tokens}
        return {name: float(value) for name, value in means.items()}


def head_sums(model: KangarooModel, tokens: Tensor, targets: Tensor, detach_exit: bool = True) -> HeadSums:
    """Next-token cross-entropy of both heads, with gradients to what `train_only` lets learn.

    Args:
        model: drafts and verifies.
        tokens: `[B, T]`, padded on the right.
        targets: `[B, T]`, what to predict behind each token, -1 for nothing.
        detach_exit: the deep layers read `exit_hidden.detach()`, so that `main` has no gradient to shallow layers.
    """
    logits, chosen = model(tokens, detach_exit=detach_exit), targets >= 0
    final, early = logits.final_logits[chosen].float(), logits.exit_logits[chosen]
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

    Asked are the parameters that took gradients when the loss was computed; where it does not reach, a norm is 0.
    """
    model.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    norms = []
    for layer in model.base_model.model.layers:
        found = [("lora_" in name, p.grad.float()) for name, p in layer.named_parameters() if p.grad is not None]
        parts = ([gradient for is_lora, gradient in found if is_lora == wanted] for wanted in (False, True))
        own, lora = (float(get_total_norm(part)) for part in parts)
        norms.append((own, lora))
    model.zero_grad()
    return norms


@dataclass(frozen=True)
class SGPResult:
    """Figures of the held-out records before and after training, steps taken, and the checkpoint folder."""

    before: dict[str, float]
    after: dict[str, float]
    steps: int
    checkpoint: str


class SGPTrainer:
    """Trains lora_S, drafter and exit head on supervised records.

    Args:
        config: all settings.
        loaded: a freshly loaded model, which is changed in place; loaded by `config` if not given.
        records: prompts with responses; read by `config` if not given.

    Attributes:
        model, peft_model: the model with its draft, and PEFT's view of the same weights.
        train_set, held_out: encoded records, see `make_example`.
        num_steps: of the whole run; the last step is filled up from the next pass over the records.
        done, wall_s, before: steps so far, seconds, and the figures of the held-out records before them.

    Raises:
        DvirlError: for settings that do not fit the model or the records.
    """

    def __init__(
        self, config: SGPConfig, loaded: LoadedModel | None = None, records: Sequence[Prompt] | None = None
    ) -> None:
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        if records is None and not config.records_path:
            raise DvirlError("records_path is empty; expected a JSON or JSONL file or a hub id of supervised records")
        chosen = read_prompts("supervised", config.records_path, config.on_bad_row) if records is None else records
        self.config = config
        self.loaded = loaded or load(config.model_name, config.dtype, config.device, config.chat_format)
        self.train_set, self.held_out = self._split(chosen)
        planned = math.ceil(config.epochs * len(self.train_set) / config.batch_size)
        self.num_steps = min(planned, config.max_steps or planned)
        tokens = torch.cat([one[one[:, 1] >= 0, 1] for one in self.train_set])
        self.peft_model, self.model = lora.attach_draft(self.loaded.model, config, tokens)
        self.parameters = lora.shallow_parameters(self.model, config.lora_shallow)
        self.optimizer = optim.make_optimizer(self.parameters, config.lr)
        self.done, self.wall_s, self.skipped, self.resumed = 0, 0.0, 0, False
        self.before: dict[str, float] = {}

    def _split(self, records: Sequence[Prompt]) -> tuple[list[Tensor], list[Tensor]]:
        """Records encoded, cut to `max_tokens`, shuffled; those for training and those held out."""
        config, chat, examples = self.config, self.loaded.chat, []
        for record in records:
            prompt = chat.encode(record.turns)
            response = [*chat.encode_response(record.response), *self.loaded.eos_ids[:1]]
            if 0 < len(prompt) < config.max_tokens:
                examples.append(make_example(prompt, response[: config.max_tokens - len(prompt)]))
        if left_out := len(records) - len(examples):
            tqdm.write(f"left out {left_out} records: their prompts fill {config.max_tokens} tokens", file=sys.stderr)
        random.Random(config.seed).shuffle(examples)
        count = math.ceil(config.held_out_share * len(examples))
        if len(examples) <= count:
            raise DvirlError(f"{len(examples)} records fit max_tokens, {count} are held out; none is left for training")
        return examples[count:], examples[:count]

    def train(self, show_progress: bool = True) -> SGPResult:
        """Evaluate, train, evaluate; log every step into `run_dir`, and write checkpoints into it.

        Ctrl-C and SIGTERM end it behind the step at hand, with a checkpoint; called again, it goes on.

        Raises:
            DvirlError: if `run_dir` holds another run already, another process is at it, or the disk is full.
        """
        config, run_dir, began = self.config, Path(self.config.run_dir), time.perf_counter() - self.wall_s
        stream = PromptStream([[index] for index in range(len(self.train_set))], config.seed)
        stream.position = self.done * config.batch_size
        with run_folder.run_lock(run_dir), stoppable() as stop:
            log = run_folder.start_log(run_dir, config, self.loaded, new=self.done == 0 and not self.resumed)
            cut_log(log, self.done)
            self.before = self.before or self.evaluate()
            for step in tqdm(range(self.done + 1, self.num_steps + 1), unit="step", disable=not show_progress):
                metrics = self.step(step, [self.train_set[index] for (index,) in stream.take(config.batch_size)])
                self.done, self.wall_s = step, time.perf_counter() - began
                log_line(log, {"step": step, **metrics, "wall_s": self.wall_s})
                if stop.signal or step % config.checkpoint_every == 0 or step == self.num_steps:
                    checkpoint.save(run_dir, step, self.peft_model, self.model, self.state_dict())
                    checkpoint.prune(run_dir, config.keep_checkpoints)
                if stop.signal:
                    break
        return SGPResult(self.before, self.evaluate(), self.num_steps, str(checkpoint.newest(run_dir)))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights: tensors under `tensors`, plain numbers under `numbers`; no step draws any."""
        counters = {"step": self.done, "wall_s": self.wall_s, "skipped": self.skipped}
        numbers = {"counters": counters, "before": self.before, "score": self.done}  # the last is the best
        return {"tensors": optim.optimizer_tensors(fast=self.optimizer), "numbers": numbers}

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from a checkpoint of a run with the same settings; errors as in `DVITrainer.load_checkpoint`."""
        state = checkpoint.load(folder, self.peft_model, self.model)
        optim.load_optimizers(state["tensors"], fast=self.optimizer)
        self.done, self.wall_s, self.skipped = state["numbers"]["counters"].values()
        self.before = state["numbers"]["before"]

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
            self.skipped += 1
            tqdm.write(f"step {step}: loss or gradient is not finite; the update is left out", file=sys.stderr)
        return {"loss": float(loss.detach()), **sums.figures(), "grad_norm": norm, "lr": lr, "skipped": self.skipped}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Figures of the held-out records, pooled; empty if there are none."""
        size = self.config.batch_size
        groups = [self.held_out[start : start + size] for start in range(0, len(self.held_out), size)]
        parts = [torch.stack(self._sums(group)) for group in groups]
        return HeadSums(*torch.stack(parts).sum(dim=0)).figures() if parts else {}

    def _sums(self, examples: Sequence[Tensor]) -> HeadSums:
        tokens, targets = (one.to(self.model.head_model.weight.device) for one in collate(examples))
        return head_sums(self.model, tokens, targets, self.config.detach_exit)
