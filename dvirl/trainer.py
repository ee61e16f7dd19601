"""DVI-RL: draft, verify, improve. The loop reads as the method: collect, fast update, slow update, log, checkpoint."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from dvirl import lora
from dvirl.buffer import ReplayBuffer, TrainingBatch
from dvirl.config import DVIConfig
from dvirl.data.stream import PromptSplit, load_prompts
from dvirl.losses import OBJECTIVES, REPLAYING, Decisions, Shares, fast_loss, reward_weight, slow_loss
from dvirl.metrics import DRIFT_WINDOW, Baseline, Counters, Served, SlowResult, StepMetrics, drift_suspected
from dvirl.models.loading import LoadedModel, load
from dvirl.rollout import Answer, Rollout, draft_logits_at, draft_rollout, generate, score_drafts
from dvirl.runs import checkpoint, optim
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.runs.interrupt import Stop, stoppable
from dvirl.runs.log import cut_log, log_line
from dvirl.runs.processes import Processes
from dvirl.runs.trackers import installed_trackers, tracking

VOCAB_SAMPLE = 16
"""Responses on which the draft vocabulary is counted."""


LOGGED = {"loss_rl": "reinforce", "loss_kl": "kl", "loss_ce": "masked_ce"}
"""Objectives that the log has of every fast update, whether or not they count."""


DRIFT_EVERY = 16
"""Steps between drift measurements where no slow update makes them."""


class DVITrainer:
    """Trains the draft of one model on what verification says of it.

    Args:
        config: all settings.
        loaded: a freshly loaded model, which is changed in place; loaded by `config` if not given.
        split: prompts; read by `config` if not given.

    Attributes:
        model: the model with its draft.
        peft_model: PEFT's view of the same weights, for saving the adapters.
        buffer, baseline: the changing state outside the model and the optimizers; `counters`, `served`, `rates` and
            `generator` say how far the run is.
        split: the prompt stream, and the held-out prompts.
        processes: those that train together, of which this is one.
        answer: responses for prompts, by default the verifier's as it is then; a `Tape` can stand in.

    Raises:
        DvirlError: for settings that do not fit the model or the prompts.
    """

    def __init__(self, config: DVIConfig, loaded: LoadedModel | None = None, split: PromptSplit | None = None) -> None:
        installed_trackers(config.tracker)
        torch.set_num_threads(config.threads)
        checkpoint.seed_all(config.seed)
        self.config, self.processes = config, Processes(config.device)
        self.loaded = loaded or load(config.model_name, config.dtype, config.device, config.chat_format)
        self.split = split or self.processes.once(lambda: load_prompts(config, self.loaded))
        base = self.loaded.model
        try:
            base.set_exit_layer(config.exit_layer)
        except ValueError as error:
            raise DvirlError(str(error)) from error
        counted = None
        if config.draft_vocab:
            sample = self.split.stream.peek(VOCAB_SAMPLE)
            counted = self.processes.once(lambda: self._generate(sample).response_tokens().cpu())
        self.peft_model, self.model = lora.attach_draft(base, config, counted, deep=True)
        self.shallow = lora.shallow_parameters(self.model, config.lora_shallow)
        self.deep = lora.deep_parameters(self.model)
        self.fast_optimizer = optim.make_optimizer(self.shallow, config.lr_shallow)
        self.slow_optimizer = optim.make_optimizer(self.deep, config.lr_deep)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.buffer = ReplayBuffer(config.buffer_size)
        self.baseline = Baseline(config.baseline, config.baseline_momentum)
        self.counters, self.served = Counters(), Served()
        self.rates: list[float] = []
        self.answer: Answer = self._generate
        self.resumed = False
        self._nothing = torch.zeros((), device=self.loaded.model.device)
        if config.start_from:
            checkpoint.load(Path(config.start_from), self.peft_model, self.model, draft_only=True)

    # The loop

    def train(self, show_progress: bool = True) -> None:
        """Run until `num_prompts` are done, logging every step and writing checkpoints into `run_dir`.

        Ctrl-C and SIGTERM end it behind the batch of prompts at hand, with a checkpoint; called again, it goes on.

        Raises:
            DvirlError: if `run_dir` holds another run already, another process is at it, or the disk is full.
        """
        run_dir, first = Path(self.config.run_dir), self.processes.first
        with run_folder.run_lock(run_dir) if first else nullcontext(), stoppable() as stop:
            log = self._start_log(run_dir) if first else None
            if not self.finished:
                self._run(log, stop, show_progress and first)

    def _start_log(self, run_dir: Path) -> Path:
        new = self.counters.step == 0 and not self.resumed
        log = run_folder.start_log(run_dir, self.config, self.loaded, new)
        cut_log(log, self.counters.step)
        return log

    @property
    def finished(self) -> bool:
        """Whether all prompts are done."""
        return self.counters.prompts >= self.config.num_prompts

    def _run(self, log: Path | None, stop: Stop, show_progress: bool) -> None:
        config, counters, last_saved, asked = self.config, self.counters, self.counters.step, 0
        tracker = config.tracker if log else "none"
        with (
            tracking(tracker, Path(config.run_dir), asdict(config)) as track,
            tqdm(total=config.num_prompts, initial=counters.prompts, unit="prompt", disable=not show_progress) as bar,
        ):
            while not self.finished and not (asked := self.processes.largest(stop.signal)):
                for metrics in self.advance():
                    if log:
                        log_line(log, asdict(metrics))
                        track(asdict(metrics))
                    bar.set_postfix_str(f"step {metrics.step}, accept rate {metrics.accept_rate:.3f}")
                    bar.update(metrics.prompts - bar.n)
                bar.update(counters.prompts - bar.n)
                if counters.step - last_saved >= config.checkpoint_every:
                    self.save_checkpoint()
                    last_saved = counters.step
        self.save_checkpoint()
        stop.signal = stop.signal or asked

    def advance(self) -> Iterator[StepMetrics]:
        """One batch of prompts: collect, and step whenever enough has been accepted."""
        for _ in self.collect():
            if self.processes.largest(self.buffer.due(self.config.fast_batch)):
                yield self.step()

    def collect(self) -> Iterator[Rollout]:
        """Let the verifier answer a batch of prompts, then draft on the answers group by group into the buffer.

        Yields:
            Each group of responses, its records in the buffer, so that the next group meets an improved draft.
        """
        config, processes = self.config, self.processes
        with self._timed("rollout_s"):
            together = config.rollout_batch * processes.count
            prompts = self.split.stream.take(min(together, config.num_prompts - self.counters.prompts))
            own = self.answer(list(processes.share(prompts)) or prompts[:1])  # one at least, for its tensors' shapes
            rollout = processes.gather_rows(own, len(prompts))
        for group in rollout.groups(config.judge_batch * processes.count):
            with self._timed("fast_s"):
                self._judge(group)
            yield group

    def _generate(self, prompts: list[list[int]]) -> Rollout:
        """The verifier's responses, as it is now."""
        config = self.config
        return generate(self.loaded.model, prompts, config.max_new_tokens, self.loaded.eos_ids, config.target)

    def step(self) -> StepMetrics:
        """A fast update on the fresh records, and a slow update when one is due."""
        self.counters.step += 1
        with self._timed("fast_s"):
            fresh = self.buffer.take_fresh()
            fast = self.fast_update(fresh)
            if self.config.schedule in REPLAYING:
                for _ in range(self.config.replay):
                    self.replay_update(self.buffer.sample_responses(len(fresh.tokens), self.generator))
        slow, every = None, self.config.slow_every or (DRIFT_EVERY if self.config.target == "adapted" else 0)
        if every and self.counters.step % every == 0:
            look = self.slow_update if self.config.slow_every else self.measure_drift
            with self._timed("slow_s"):
                slow = look(self.buffer.recent(self.config.slow_batch * self.processes.count))
        return self._metrics(fast, slow)

    def _judge(self, group: Rollout) -> None:
        """Draft on a group: serving drafts are counted, learning drafts become records."""
        config = self.config
        drafts = logits, _ = draft_rollout(self.model, group)
        serving = learning = score_drafts(self.model, group, drafts, config.decode)
        if config.actions == "sampled":
            noise = torch.rand(group.verifier_confidence.shape, generator=self.generator).to(logits.device)
            learning = score_drafts(self.model, group, drafts, config.learn, noise)
        self.served.add(group, serving)
        kept = learning.records if config.records == "all" else learning.records.accepted()
        self.buffer.add(kept, group, serving.records.num_accepted)
        self.counters.prompts += len(group)
        self.counters.tokens += group.num_tokens

    # Updates

    def fast_update(self, batch: TrainingBatch) -> dict[str, Any]:
        """One step of lora_S, drafter and exit head on a batch of records, and of nothing else.

        The shallow pass is recomputed with gradients, since a stored exit state carries none to lora_S.

        Returns:
            What `StepMetrics` has of it; the update was left out if its gradient was not finite.
        """
        config = self.config
        lora.train_only(self.model, self.shallow)
        reward = float(batch.reward.mean())
        baseline = self.baseline.update(reward, len(batch.reward))
        share = reward_weight(self.progress, config.ramp_start, config.ramp_end)
        own, loss, seen = batch.share(self.processes), None, dict.fromkeys(("loss", *LOGGED), self._nothing)
        if len(own):
            decisions = self.decisions(own, baseline, share, batch)
            loss = fast_loss(decisions)
            with torch.no_grad():
                seen = {"loss": loss, **{key: OBJECTIVES[name](decisions) for key, name in LOGGED.items()}}
        phase = config.schedule if config.schedule != "kl_to_rl" else ("ramp" if share else "kl")
        figures = {"phase": phase, **self._totals(seen), "reward": reward, "baseline": baseline}
        lr = self._fast_lr()
        return {**figures, "grad_norm": self._apply(self.fast_optimizer, loss, lr), "lr": lr}

    def decisions(
        self, own: TrainingBatch, baseline: float = 0.0, reward_share: float = 0.0, batch: TrainingBatch | None = None
    ) -> Decisions:
        """Some records as the objectives see them, this process's share of a `batch` if one is given.

        Gradients reach what `train_only` lets learn.
        """
        shares = (
            Shares() if batch is None or own is batch else Shares(*self._counts(own).div(self._counts(batch)).tolist())
        )
        if self.config.exit_states == "stored":
            logits = self.model.head_logits(self.model.drafter_states(own.hidden))
        else:
            logits, _ = draft_logits_at(self.model, own.tokens, own.prompt_lens, own.row, own.position)
        return Decisions(
            config=self.config,
            logits=logits,
            verifier=cache(lambda: self.model.verifier_logits(own.verifier_hidden)),
            drafted=self.model.draft_index(own.token),
            verified=self.model.draft_index(own.verifier_token),
            rewards=own.reward,
            baseline=baseline,
            reward_share=reward_share,
            shares=shares,
        )

    def _counts(self, batch: TrainingBatch) -> Tensor:
        """Records, accepted ones, and those whose verifier's token the exit head has; at least 1 each."""
        covered = self.model.draft_index(batch.verifier_token) >= 0
        counts = torch.ones_like(batch.reward).sum(), batch.reward.sum(), covered.sum()
        return torch.stack(counts).clamp(min=1)

    def replay_update(self, batch: TrainingBatch) -> None:
        """One more step of lora_S, drafter and exit head, on older responses and without the reward of any draft.

        What the verifier said of an old position stays true, while the draft's old token was drawn from another
        policy; so a loss may look back if it asks the verifier alone.
        """
        lora.train_only(self.model, self.shallow)
        own = batch.share(self.processes)
        loss = fast_loss(self.decisions(own, batch=batch)) if len(own) else None
        self._apply(self.fast_optimizer, loss, self._fast_lr())

    def slow_update(self, batch: TrainingBatch) -> SlowResult | None:
        """One step of lora_D on the accepted tokens of some responses, and of nothing else; None if there are none."""
        accepted = batch.reward > 0
        if not bool(accepted.any()):
            return None
        lora.train_only(self.model, self.deep)
        own = batch.share(self.processes)
        chosen = own.reward > 0
        loss, seen = None, dict.fromkeys(("loss_slow", "drift_kl", "drift_tokens"), self._nothing)
        if bool(chosen.any()):
            share = float(chosen.sum()) / float(accepted.sum())
            logits = self._verifier_logits(own, chosen)
            frozen = self._verifier_logits(own, chosen, without=("lora_D",))
            parts = slow_loss(logits, own.token[chosen], frozen, self.config.beta_kl)
            changed = (logits.argmax(dim=-1) != frozen.argmax(dim=-1)).float().mean()
            loss, divergence, moved = (share * part for part in (*parts, changed))
            seen = {"loss_slow": loss, "drift_kl": divergence, "drift_tokens": moved}
        found = SlowResult(**self._totals(seen))
        if self.config.target == "adapted":
            found = replace(self.measure_drift(batch), loss_slow=found.loss_slow)
        self._apply(self.slow_optimizer, loss, self.config.lr_deep)
        return found

    @torch.no_grad()
    def measure_drift(self, batch: TrainingBatch) -> SlowResult:
        """How far the verifier, as it decodes now, is from the untouched model on some responses."""
        everywhere = torch.ones_like(batch.reward, dtype=torch.bool)
        own = self._verifier_logits(batch, everywhere).log_softmax(dim=-1)
        untouched = self._verifier_logits(batch, everywhere, without=("lora_S", "lora_D")).log_softmax(dim=-1)
        divergence = F.kl_div(untouched, own, log_target=True, reduction="batchmean")
        changed = (own.argmax(dim=-1) != untouched.argmax(dim=-1)).float().mean()
        return SlowResult(drift_kl=float(divergence), drift_tokens=float(changed))

    def _verifier_logits(self, batch: TrainingBatch, chosen: Tensor, without: tuple[str, ...] = ()) -> Tensor:
        """The verifier's float32 logits `[N, V]` at the chosen records, some adapters left out.

        Gradients reach lora_D only, and only if nothing is left out.
        """
        base = self.loaded.model
        off = {*without, "lora_S"} if self.config.target == "base" else set(without)
        with torch.no_grad(), base.without_adapters(*off):
            exit_hidden = base.forward_shallow(batch.tokens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not without), base.without_adapters(*without):
            hidden = base.forward_deep(exit_hidden)
            before = batch.prompt_lens[batch.row] + batch.position - 1
            logits: Tensor = base.lm_head(hidden[batch.row[chosen], before[chosen]]).float()
        return logits

    def _totals(self, own: dict[str, Tensor]) -> dict[str, float]:
        """Figures of all processes together, each the sum of theirs."""
        total = self.processes.sum(torch.stack([value.detach() for value in own.values()]))
        return dict(zip(own, total.tolist(), strict=True))

    def _apply(self, optimizer: Optimizer, loss: Tensor | None, lr: float) -> float:
        """Clip and step; a gradient that is not finite leaves the weights as they are and is counted."""
        grad_norm = optim.clipped_step(optimizer, loss, lr, self.config.grad_clip, self.processes.add_gradients)
        if not math.isfinite(grad_norm):
            self.counters.skipped += 1
            self._say(f"step {self.counters.step}: the gradient is not finite; this update is left out")
        return grad_norm

    def _say(self, message: str) -> None:
        """A line above the progress bar, once and not by every process."""
        if self.processes.first:
            tqdm.write(message, file=sys.stderr)

    @property
    def progress(self) -> float:
        """Share of the run's prompts that are done."""
        return min(1.0, self.counters.prompts / self.config.num_prompts)

    def _fast_lr(self) -> float:
        """lr_shallow after warm-up and schedule."""
        config = self.config
        progress = 0.0 if config.lr_schedule == "constant" else self.progress
        return optim.cosine_rate(config.lr_shallow, self.counters.step, config.warmup_steps, progress)

    # Log

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to one of the counters, and to the wall time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            setattr(self.counters, phase, getattr(self.counters, phase) + seconds)
            self.counters.wall_s += seconds

    def _metrics(self, fast: dict[str, Any], slow: SlowResult | None) -> StepMetrics:
        """One log line, and a fresh account of what is served until the next."""
        served, counters = self.served, self.counters
        self.served = Served(wall_s=counters.wall_s)
        accept_rate = served.accepted / served.drafted if served.drafted else math.nan
        self._guard_drift(accept_rate, slow.drift_kl if slow else None)
        return StepMetrics(
            **fast,
            **(asdict(slow) if slow else {}),
            accept_rate=accept_rate,
            mat=served.committed / served.blocks if served.blocks else math.nan,
            ppl_sample=math.exp(served.nll / max(1, served.tokens)),
            tok_per_s=served.tokens / max(1e-9, counters.wall_s - served.wall_s),
            buffer_size=len(self.buffer),
            **asdict(counters),
        )

    def _guard_drift(self, accept_rate: float, drift_kl: float | None) -> None:
        """Warn, once, if drift is suspected when it is measured."""
        counters, bound = self.counters, self.config.drift_bound
        first, last = self.rates[:DRIFT_WINDOW], self.rates[DRIFT_WINDOW:]
        self.rates = [*first, *last[1 - DRIFT_WINDOW :], accept_rate]
        if drift_kl is not None and not counters.drift_flag and drift_suspected(self.rates, drift_kl, bound):
            counters.drift_flag = True
            self._say(
                f"step {counters.step}: the accept rate rose from {fmean(first):.3f} to "
                f"{fmean(self.rates[DRIFT_WINDOW:]):.3f} while the verifier drifted {drift_kl:.3g} nats a token, "
                f"past drift_bound {bound:g}; it may accept more because it got worse"
            )

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights: tensors under `tensors`, plain numbers under `numbers`."""
        buffer, drawn = self.buffer.state_dict(), checkpoint.random_state()
        tensors = {**buffer["tensors"], **drawn["tensors"], "generator": self.generator.get_state()}
        tensors |= optim.optimizer_tensors(fast=self.fast_optimizer, slow=self.slow_optimizer)
        numbers = {
            "counters": asdict(self.counters),
            "served": asdict(self.served),
            "rates": self.rates,
            "baseline": [self.baseline.value, self.baseline.count],
            "stream": {"position": self.split.stream.position},
            "buffer": buffer["numbers"],
            "random": drawn["numbers"],
            "score": fmean(self.rates[-DRIFT_WINDOW:]) if self.rates else 0.0,
        }
        return {"tensors": tensors, "numbers": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        tensors, numbers = state["tensors"], state["numbers"]
        self.counters, self.served = Counters(**numbers["counters"]), Served(**numbers["served"])
        self.rates = numbers["rates"]
        self.baseline.value, self.baseline.count = numbers["baseline"]
        self.split.stream.position = numbers["stream"]["position"]
        self.buffer.load_state_dict({"tensors": tensors, "numbers": numbers["buffer"]})
        self.generator.set_state(tensors["generator"].cpu())
        optim.load_optimizers(tensors, fast=self.fast_optimizer, slow=self.slow_optimizer)
        checkpoint.set_random_state(tensors, numbers["random"])

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the run as it stands, and remove old ones; return its folder."""
        run_dir, step = Path(self.config.run_dir), self.counters.step
        if self.processes.first:
            checkpoint.save(run_dir, step, self.peft_model, self.model, self.state_dict())
            checkpoint.prune(run_dir, self.config.keep_checkpoints)
        return checkpoint.step_folder(run_dir, step)

    def load_checkpoint(self, folder: str | Path) -> None:
        """Continue from a checkpoint of a run with the same settings.

        Raises:
            DvirlError: if it is incomplete or belongs to another model or settings.
        """
        self.load_state_dict(checkpoint.load(Path(folder), self.peft_model, self.model))


def resume(
    run_dir: str | Path,
    config: DVIConfig | None = None,
    loaded: LoadedModel | None = None,
    split: PromptSplit | None = None,
    accept_changes: bool = False,
) -> DVITrainer:
    """A trainer that goes on from the newest checkpoint of a run, or from its beginning if it has none yet.

    Args:
        run_dir: the run's folder, which may have been moved.
        config: the settings to go on with; the run's own if not given.
        loaded, split: as for `DVITrainer`.
        accept_changes: go on with other settings than the run's.

    Raises:
        DvirlError: if the folder holds no run, or one of other settings or another model, or a broken checkpoint.
    """
    make = partial(DVITrainer, loaded=loaded, split=split)
    trainer: DVITrainer = checkpoint.go_on(make, DVIConfig, run_dir, config, accept_changes)
    return trainer
