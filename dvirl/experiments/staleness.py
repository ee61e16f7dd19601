"""Studies of kind `staleness`: how wrong is a gradient that old records give?"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dvirl.buffer import TrainingBatch
from dvirl.config import DVIConfig
from dvirl.experiments.study import Task, VariantRows
from dvirl.experiments.summary import Row
from dvirl.lora import train_only
from dvirl.losses import exact_pg_loss, reinforce_loss
from dvirl.rollout import draft_logits_at
from dvirl.train_dvi import make_trainer
from dvirl.trainer import DVITrainer


def staleness(task: Task, folder: Path) -> VariantRows:
    """How wrong a gradient is that old records give: by age, against the exact gradient at the same positions.

    One run keeps every record. At its end, records of each age give the REINFORCE gradient with the tokens that the
    old policy drew, the same with tokens drawn again (once, and many times), and the exact gradient of the expected
    reward. `extra`: `ages`, `records` of each, `draws` a position.
    """
    for name, variant in task.due():
        config = task.config(folder / name, variant)
        yield name, _rows_by_age(config, **task.study.extra)


def _rows_by_age(config: DVIConfig, ages: int, records: int, draws: int) -> list[Row]:
    """A row for each age: the records of that many equal parts of the run's responses, the newest first."""
    trainer = make_trainer(config)
    trainer.train(show_progress=False)
    ids = trainer.buffer.field("response_id")
    count = int(ids.max()) + 1
    rows = []
    for part in range(ages, 0, -1):
        first = count * (part - 1) // ages
        stop = count * part // ages
        is_of_age = (ids >= first) & (ids < stop)
        chosen = is_of_age.nonzero().squeeze(1)[:records]
        figures = stale_gradients(trainer, trainer.buffer.batch(chosen), draws)
        mean_id = float(ids[chosen].float().mean())
        rows.append({"figures": {**figures, "age_responses": count - 1 - mean_id}})
    return rows


def stale_gradients(trainer: DVITrainer, batch: TrainingBatch, draws: int) -> dict[str, float]:
    """The figures of `staleness` for one batch of records; `draws` fresh samples a position stand for many.

    `cos_…` is the cosine of a gradient to the exact one, and `along_…` how much of the exact one it holds: 1 for an
    unbiased estimate, in the mean.
    """
    train_only(trainer.model, trainer.shallow)
    decisions = trainer.decisions(batch)
    baseline = float(batch.reward.mean())
    policy = (decisions.logits.detach() / trainer.config.policy_temperature).softmax(dim=-1)
    # Drawn on the CPU, where the trainer's generator is: fresh is [records, draws].
    fresh = torch.multinomial(policy.cpu(), draws, replacement=True, generator=trainer.generator)
    fresh = fresh.to(policy.device)
    redrawn = []  # REINFORCE's loss with tokens that today's policy draws
    for drawn in fresh.T:
        # The reward is 1 where the drawn token is the verifier's, as in decoding.
        rewards = (drawn == decisions.verified).float()
        log_probs = replace(decisions, drafted=drawn).on_drafted()
        redrawn.append(reinforce_loss(log_probs, rewards, baseline).mean())
    stale = reinforce_loss(decisions.on_drafted(), batch.reward, baseline).mean()
    exact = _gradient(trainer, exact_pg_loss(*decisions.on_verified()).mean())
    gradients = {
        "stale": _gradient(trainer, stale),
        "redrawn": _gradient(trainer, redrawn[0]),
        "many": _gradient(trainer, torch.stack(redrawn).mean()),
    }
    with torch.no_grad():
        _, hidden = draft_logits_at(trainer.model, batch.tokens, batch.prompt_lens, batch.row, batch.position)
    figures: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        figures[f"cos_{name}"] = F.cosine_similarity(gradient, exact, dim=0)
    # <g, exact> / <exact, exact>: the length of g's projection, in units of the exact gradient.
    for name in ("stale", "redrawn"):
        figures[f"along_{name}"] = gradients[name] @ exact / exact.square().sum()
    figures["hidden_error"] = (batch.hidden - hidden).float().norm() / hidden.float().norm()
    figures["reward_stored"] = batch.reward.mean()
    figures["reward_now"] = (fresh == decisions.verified[:, None]).float().mean()
    return {name: float(figure) for name, figure in figures.items()}


def _gradient(trainer: DVITrainer, loss: Tensor) -> Tensor:
    """A loss's gradient by what the fast update steps, as one vector."""
    parts = torch.autograd.grad(loss, trainer.shallow, retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten().float() for part in parts if part is not None])
