"""DVI-RL: draft, verify, improve. The trainer of a draft that learns while it generates.

The method, which `TrainingLoop.train` repeats until all prompts are done::

    for group in trainer.collect():             # the verifier answers a batch of prompts
        trainer.judge(group)                    # the draft is scored on the answers: records with rewards
        if enough_accepted:
            trainer.fast_update(fresh_records)  # improve the draft: lora_S, drafter, exit head
            trainer.slow_update(recent_ones)    # now and then, the deep layers: lora_D

Each fast update gives a line of the log; a checkpoint follows when one is due.

Responses are decoded plainly, many at once; the drafts on them follow in one parallel pass and are scored by the block
rule, which gives the records of drafting step by step (see `dvirl.rollout`).
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dvirl import lora
from dvirl.buffer import ReplayBuffer, TrainingBatch
from dvirl.config import DVIConfig
from dvirl.data.stream import PromptSplit
from dvirl.losses import OBJECTIVES, REPLAYING, Decisions, count, fast_loss, reward_weight, slow_loss
from dvirl.metrics import (
    DRIFT_WINDOW,
    Baseline,
    Counters,
    Served,
    SlowResult,
    StepMetrics,
    changed_tokens,
    drift,
    drift_suspected,
)
from dvirl.models.drafters import LoadedDrafter, with_drafter
from dvirl.models.loading import LoadedModel
from dvirl.models.placement import fitting
from dvirl.rollout import (
    Answer,
    Judgement,
    Rollout,
    draft_logits_at,
    draft_rollout,
    generate,
    score_drafts,
)
from dvirl.runs import checkpoint, optim
from dvirl.runs.errors import bad_input
from dvirl.runs.folder import fingerprint
from dvirl.runs.loop import TrainingLoop

VOCAB_SAMPLE = 16
"""Responses on which the draft vocabulary is counted."""
LOGGED = {"loss_rl": "reinforce", "loss_kl": "kl", "loss_ce": "masked_ce"}
"""Objectives that the log has of every fast update, whether or not they count."""
DRIFT_EVERY = 16
"""Steps between drift measurements where no slow update makes them."""


class DVITrainer(TrainingLoop):
    """Trains the draft of one model on the decisions of verification.

    Args:
        config: all settings.
        loaded: a freshly loaded model, which is changed in place.
        split: prompts.
        draft: a trained draft on this model, to go on with; by default the one that the settings describe.

    Attributes:
        buffer, baseline: the changing state besides the model and the optimizers; `counters`, `served`, `rates` and
            `generator` say how far the run is.
        split: the prompt stream, and the held-out prompts.
        answer: responses for prompts, by default those of the verifier as it is then; a `Tape` can replace it.

    Raises:
        DvirlError: for settings that do not fit the model or the prompts.
    """

    config: DVIConfig
    counters: Counters
    unit = "prompt"
    shares_out = True

    def __init__(
        self,
        config: DVIConfig,
        loaded: LoadedModel,
        split: PromptSplit,
        draft: LoadedDrafter | None = None,
    ) -> None:
        super().__init__(config, loaded, config.checkpoint_every, config.keep_checkpoints, config.tracker)
        self.split = split
        self.length = config.num_prompts
        if draft is None:
            self._make_draft()
        else:
            self.peft_model = draft.peft_model
            self.model = draft.model
        self.shallow = lora.shallow_parameters(self.model, config.lora_shallow)
        self.deep = lora.deep_parameters(self.model)
        self.fast_optimizer = optim.make_optimizer(self.shallow, config.lr_shallow)
        self.slow_optimizer = optim.make_optimizer(self.deep, config.lr_deep)
        self.optimizers = [self.fast_optimizer, self.slow_optimizer]
        self._refuse_too_large()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.buffer = ReplayBuffer(config.buffer_size)
        self.baseline = Baseline(config.baseline, config.baseline_momentum)
        self.counters = Counters()
        self.served = Served()
        self.rates: list[float] = []
        self.answer: Answer = self._generate

    def _make_draft(self) -> None:
        """Put on the model what the settings describe: lora_S, lora_D and a draft, fresh or from a folder."""
        config = self.config
        base = self.loaded.model
        checkpoint.seed_all(config.seed)  # the draft's first weights are drawn next
        with bad_input():
            base.set_exit_layer(config.exit_layer)
        tokens: Tensor | None = None
        if config.draft_vocab:  # counted on what the untouched model answers
            sample = self.split.stream.peek(VOCAB_SAMPLE)
            tokens = self.processes.once(lambda: self._generate(sample).response_tokens().cpu())
        self.peft_model, self.model = lora.attach_draft(base, config, tokens, deep=True)
        folder = Path(config.start_from)
        # A run that goes on has all weights in its checkpoints.
        goes_on = any(self.run_dir.glob("checkpoints/step-*"))
        if config.start_from and (folder.exists() or not goes_on):
            checkpoint.load_weights(folder, self.peft_model, self.model, ["lora_S"], to_start=True)
            self.config = with_drafter(config, self.model)

    def _refuse_too_large(self) -> None:
        """Say now, and not after hours, if the updates' batches do not fit into the memory."""
        config = self.config
        base = self.loaded.model
        layers = base.model.layers
        longest = max(map(len, self.split.stream.prompts)) + config.max_new_tokens
        logits = config.max_new_tokens * base.config.vocab_size
        logits *= max(1, config.draft_len) if config.feedback else 1
        # The drafter's layers are as large as those of the model that they start from.
        drafting = layers[: config.exit_layer + config.drafter_layers]
        count = min(config.judge_batch, config.num_prompts)
        fitting("judge_batch", count, base, drafting, longest, logits, self.shallow)
        if config.slow_every:
            count = min(config.slow_batch, config.num_prompts)
            fitting("slow_batch", count, base, layers[config.exit_layer :], longest, logits, self.deep)

    # The method

    @property
    def position(self) -> int:
        """Prompts that are done."""
        return self.counters.prompts

    @property
    def inputs(self) -> dict[str, str]:
        """As in `TrainingLoop`."""
        return {"prompts": fingerprint([self.split.stream.prompts, self.split.held_out])}

    def advance(self) -> None:
        """One batch of prompts: collect, judge, and update whenever enough drafts have been accepted."""
        for group in self.collect():
            # Each group meets the draft that the group before has improved.
            self.judge(group)
            if self.processes.largest(self.buffer.due(self.config.fast_batch)):
                self.report(asdict(self.step()))

    def collect(self) -> list[Rollout]:
        """Let the verifier answer a batch of prompts; the responses, in groups to draft on."""
        config = self.config
        processes = self.processes
        with self._timed("rollout_s"):
            num_prompts = min(
                config.rollout_batch * processes.count, config.num_prompts - self.counters.prompts
            )
            prompts = self.split.stream.take(num_prompts)
            # A process without a prompt of its own answers the first, for the shapes of its tensors.
            share = self.answer(list(processes.share(prompts)) or prompts[:1])
            rollout = processes.gather_rows(share, len(prompts))
        return list(rollout.groups(config.judge_batch * processes.count))

    def judge(self, group: Rollout) -> None:
        """Draft on a group of responses: count what the served drafts do, and keep records of the learning drafts."""
        config = self.config
        with self._timed("fast_s"):
            drafts = draft_rollout(self.model, group, config.draft_len)
            served = score_drafts(self.model, group, drafts, config.decode)
            learned = served
            if config.actions == "sampled":
                noise = torch.rand(group.verifier_confidence.shape, generator=self.generator).to(
                    group.tokens.device
                )
                learned = score_drafts(self.model, group, drafts, config.learn, noise)
            self.count(group, served)
            # Trap 2: accepted drafts alone have reward 1 everywhere, so all scored ones are kept, the reject too.
            # Accepted ones only count towards the trigger of the next update.
            records = learned.records if config.records == "all" else learned.records.accepted()
            self.buffer.add(records, group, served.records.num_accepted)

    def count(self, group: Rollout, served: Judgement) -> None:
        """Count what was served on a group of responses."""
        self.served.add(group, served)
        self.counters.prompts += len(group)
        self.counters.tokens += group.num_tokens

    def step(self) -> StepMetrics:
        """A fast update on the fresh records, its replays, and a slow update when one is due; their line of the log."""
        config = self.config
        self.counters.step += 1
        with self._timed("fast_s"):
            fresh = self.buffer.take_fresh()
            fast = self.fast_update(fresh)
            if config.schedule in REPLAYING:
                for _ in range(config.replay):
                    self.replay_update(self.buffer.sample_responses(len(fresh.tokens), self.generator))
        return self._metrics(fast, self._slow_update_if_due())

    def _slow_update_if_due(self) -> SlowResult:
        """A slow update, or, where lora_S changes the verifier, a measurement of drift; empty if none is due."""
        config = self.config
        every = config.slow_every
        look = self.slow_update
        if not every and config.target == "adapted":
            every = DRIFT_EVERY
            look = self.measure_drift
        if not every or self.counters.step % every:
            return SlowResult()
        # Only a step that does something is timed, so a run without slow updates has spent exactly no time on them.
        with self._timed("slow_s"):
            return look(self.buffer.recent(config.slow_batch * self.processes.count))

    def _generate(self, prompts: list[list[int]]) -> Rollout:
        """The responses of the verifier as it is now."""
        config = self.config
        return generate(self.loaded.model, prompts, config.max_new_tokens, self.loaded.eos_ids, config.target)

    # Updates

    def fast_update(self, batch: TrainingBatch) -> dict[str, Any]:
        """One step of lora_S, drafter and exit head on a batch of records, and of nothing else.

        Returns:
            The part of `StepMetrics` that it knows; the update was left out if its gradient was not finite.
        """
        lora.train_only(self.model, self.shallow)
        reward = float(batch.reward.mean())
        baseline = self.baseline.update(reward, len(batch.reward))
        weight = reward_weight(self.progress, self.config.ramp_start, self.config.ramp_end)
        loss: Tensor | None = None
        figures: dict[str, Tensor] = {}
        share = batch.share(self.processes)
        if len(share):
            decisions = self.decisions(share, baseline, weight, batch)
            loss = fast_loss(decisions)
            figures = self._logged(loss, decisions)
        grad_norm = self._take_step(self.fast_optimizer, loss, self.lr)
        return self._fast_line(figures, reward, baseline, weight, grad_norm)

    @torch.no_grad()
    def _logged(self, loss: Tensor, decisions: Decisions) -> dict[str, Tensor]:
        """The loss, and the objectives that the log has of every fast update, before its step."""
        return {"loss": loss} | {name: OBJECTIVES[key](decisions) for name, key in LOGGED.items()}

    def _fast_line(
        self, figures: dict[str, Tensor], reward: float, baseline: float, weight: float, grad_norm: float
    ) -> dict[str, Any]:
        """The part of the log's line that a fast update knows."""
        phase = self.config.schedule
        if phase == "kl_to_rl":
            phase = "ramp" if weight else "kl"
        return {
            "phase": phase,
            **self._totals(figures, ("loss", *LOGGED)),
            "reward": reward,
            "baseline": baseline,
            "grad_norm": grad_norm,
            "lr": self.lr,
        }

    def decisions(
        self,
        share: TrainingBatch,
        baseline: float = 0.0,
        reward_share: float = 0.0,
        batch: TrainingBatch | None = None,
    ) -> Decisions:
        """Some records as the objectives see them; gradients reach what `train_only` lets learn.

        Args:
            share: the records.
            baseline, reward_share: see `Decisions`.
            batch: the records of all processes, of which these are this process's share; by default these.
        """
        everything = share if batch is None else batch
        index_of = self.model.draft_index
        return Decisions(
            config=self.config,
            logits=self.draft_logits(share),
            verifier=cache(lambda: self.model.verifier_logits(share.verifier_hidden)),
            drafted=index_of(share.token),
            verified=index_of(share.verifier_token),
            rewards=share.reward,
            baseline=baseline,
            reward_share=reward_share,
            totals=count(everything.reward, index_of(everything.verifier_token)),
        )

    def draft_logits(self, share: TrainingBatch) -> Tensor:
        """The draft's logits `[N, V']` for some records, with gradients."""
        # Trap 1: a stored exit state carries no gradient to lora_S, so the shallow pass is recomputed with gradients.
        if self.config.exit_states == "stored":
            return self.model.head_logits(self.model.drafter_states(share.hidden))
        at = (share.row, share.position, share.depth)
        return draft_logits_at(self.model, share.tokens, share.prompt_lens, *at)[0]

    def replay_update(self, batch: TrainingBatch) -> None:
        """One more step of lora_S, drafter and exit head, on older responses and without the reward of any draft.

        What the verifier said of an old position stays true, while the draft's old token was drawn from another
        policy; so a loss may look back if it asks only the verifier.
        """
        lora.train_only(self.model, self.shallow)
        share = batch.share(self.processes)
        loss = fast_loss(self.decisions(share, batch=batch)) if len(share) else None
        self._take_step(self.fast_optimizer, loss, self.lr)

    def slow_update(self, batch: TrainingBatch) -> SlowResult:
        """One step of lora_D on the accepted tokens of some responses, and of nothing else; empty if there are none.

        The loss is `CE(verifier, token) + beta_kl * KL(verifier || frozen verifier)`, a mean over accepted tokens.
        """
        num_accepted = batch.num_accepted
        if not num_accepted:
            return SlowResult()
        lora.train_only(self.model, self.deep)
        loss = None
        figures: dict[str, Tensor] = {}
        share = batch.share(self.processes)
        accepted = share.reward > 0
        if accepted.any():
            logits = self._verifier_logits(share, accepted)
            # The frozen verifier is the same weights with lora_D switched off.
            frozen = self._verifier_logits(share, accepted, without=("lora_D",))
            cross_entropy, divergence = slow_loss(logits, share.token[accepted], frozen)
            drift_kl = divergence.sum() / num_accepted
            loss = cross_entropy.sum() / num_accepted + self.config.beta_kl * drift_kl
            drift_tokens = changed_tokens(logits, frozen) / num_accepted
            figures = {"loss_slow": loss, "drift_kl": drift_kl, "drift_tokens": drift_tokens}
        result = SlowResult(**self._totals(figures, ("loss_slow", "drift_kl", "drift_tokens")))
        if self.config.target == "adapted":
            # Here lora_S moves the verifier too, so lora_D's divergence is not all of the drift.
            result = replace(self.measure_drift(batch), loss_slow=result.loss_slow)
        self._take_step(self.slow_optimizer, loss, self.config.lr_deep)
        return result

    @torch.no_grad()
    def measure_drift(self, batch: TrainingBatch) -> SlowResult:
        """How far the verifier, as it decodes now, is from the untouched model on some responses."""
        every = slice(None)
        verifier = self._verifier_logits(batch, every).log_softmax(dim=-1)
        untouched = self._verifier_logits(batch, every, without=("lora_S", "lora_D")).log_softmax(dim=-1)
        divergence, changed = drift(verifier, untouched)
        return SlowResult(drift_kl=float(divergence / len(batch)), drift_tokens=float(changed / len(batch)))

    def _verifier_logits(
        self, batch: TrainingBatch, chosen: Tensor | slice, without: tuple[str, ...] = ()
    ) -> Tensor:
        """The verifier's float32 logits `[N, V]` at the chosen records, some adapters left out.

        Gradients reach only lora_D, and only if nothing is left out.
        """
        base = self.loaded.model
        # Trap 3: lora_S changes what the deep layers read. With target "base" they read the state without it.
        shallow_without = {*without, "lora_S"} if self.config.target == "base" else {*without}
        with torch.no_grad(), base.without_adapters(*shallow_without):
            exit_hidden = base.forward_shallow(batch.tokens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not without), base.without_adapters(*without):
            hidden = base.forward_deep(exit_hidden)
            before = batch.prompt_lens[batch.row] + batch.position - 1
            logits: Tensor = base.lm_head(hidden[batch.row[chosen], before[chosen]]).float()
        return logits

    def _totals(self, figures: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, float]:
        """0-d figures of all processes together, each the sum of theirs; a process without records has none."""
        nothing = torch.zeros((), device=self.loaded.model.device)
        total = self.processes.sum(torch.stack([figures.get(name, nothing).detach() for name in names]))
        return dict(zip(names, total.tolist(), strict=True))

    def _take_step(self, optimizer: Optimizer, loss: Tensor | None, lr: float) -> float:
        """Clip and step; return the gradient's norm. If it is not finite, the weights stay as they are."""
        grad_norm = optim.clipped_step(
            optimizer, loss, lr, self.config.grad_clip, self.processes.add_gradients
        )
        if not math.isfinite(grad_norm):
            self.skip_update(self.counters.step)
        return grad_norm

    @property
    def progress(self) -> float:
        """Share of the run's prompts that are done."""
        return min(1.0, self.position / self.length)

    @property
    def lr(self) -> float:
        """`lr_shallow` after warm-up and schedule."""
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

    def describe(self, line: Mapping[str, Any]) -> str:
        """What the progress bar says of a step; one step's acceptance rate alone would jump."""
        recent = fmean(self.rates[-DRIFT_WINDOW:] or [line["accept_rate"]])
        return f"update {line['step']}, recent acceptance rate {recent:.2f}"

    def _metrics(self, fast: dict[str, Any], slow: SlowResult) -> StepMetrics:
        """One log line, and a fresh account of what is served until the next."""
        counters = self.counters
        served = self.served
        self.served = Served(wall_s=counters.wall_s)
        self._guard_drift(served.accept_rate, slow.drift_kl)
        return StepMetrics(
            **fast,
            **asdict(slow),
            accept_rate=served.accept_rate,
            mat=served.mat,
            ppl_sample=served.ppl,
            tok_per_s=served.tokens / max(1e-9, counters.wall_s - served.wall_s),
            buffer_size=len(self.buffer),
            **asdict(counters),
        )

    def _guard_drift(self, accept_rate: float, drift_kl: float | None) -> None:
        """Warn, once, if drift is suspected when it is measured."""
        counters = self.counters
        bound = self.config.drift_bound
        first = self.rates[:DRIFT_WINDOW]
        last = [*self.rates[DRIFT_WINDOW:][1 - DRIFT_WINDOW :], accept_rate]
        self.rates = [*first, *last]
        if drift_kl is None or counters.drift_flag or not drift_suspected(self.rates, drift_kl, bound):
            return
        counters.drift_flag = True
        self.say(
            f"step {counters.step}: the acceptance rate rose from {fmean(first):.3f} to {fmean(last):.3f} while the "
            f"verifier drifted {drift_kl:.3g} nats a token, past drift_bound {bound:g}; it may accept more because it "
            "got worse"
        )

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights: tensors under `tensors`, plain numbers under `numbers`."""
        buffer = self.buffer.state_dict()
        random = checkpoint.random_state()
        tensors = {
            **buffer["tensors"],
            **random["tensors"],
            "generator": self.generator.get_state(),
            **optim.optimizer_tensors(fast=self.fast_optimizer, slow=self.slow_optimizer),
        }
        if self.config.exit_states == "recomputed":  # the exit states of records are read by no update
            tensors.pop("buffer.field.hidden", None)
        numbers = {
            "counters": asdict(self.counters),
            "served": asdict(self.served),
            "rates": self.rates,
            "baseline": [self.baseline.value, self.baseline.count, self.baseline.kind],
            "stream": {"position": self.split.stream.position},
            "buffer": buffer["numbers"],
            "random": random["numbers"],
            "score": fmean(self.rates[-DRIFT_WINDOW:]) if self.rates else 0.0,
        }
        return {"tensors": tensors, "numbers": numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        tensors = state["tensors"]
        numbers = state["numbers"]
        self.counters = Counters(**numbers["counters"])
        self.served = Served(**numbers["served"])
        self.rates = numbers["rates"]
        value, count, *kind = numbers["baseline"]
        # Older checkpoints do not say the kind; the average of another one means something else.
        if kind in ([], [self.baseline.kind]):
            self.baseline.value = value
            self.baseline.count = count
        self.split.stream.position = numbers["stream"]["position"]
        self.buffer.load_state_dict({"tensors": tensors, "numbers": numbers["buffer"]})
        self.generator.set_state(tensors["generator"].cpu())
        optim.load_optimizers(tensors, fast=self.fast_optimizer, slow=self.slow_optimizer)
        checkpoint.set_random_state(tensors, numbers["random"])
