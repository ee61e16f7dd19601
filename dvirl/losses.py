"""Losses: tensors in, one 0-d tensor out. N is the number of records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def reinforce_loss(log_probs: Tensor, rewards: Tensor, baseline: float) -> Tensor:
    """REINFORCE with a baseline (Williams 1992): `-mean((reward - baseline) * log pi(token | h))`.

    Args:
        log_probs: `[N]`, of the drafted tokens, with gradient.
        rewards: `[N]`, 1 accepted, 0 rejected.
        baseline: subtracted from the rewards; without bias as long as it does not depend on these tokens.
    """
    return -((rewards - baseline) * log_probs).mean()


def kl_loss(draft_logits: Tensor, verifier_logits: Tensor) -> Tensor:
    """`KL(verifier || draft)` per record, in nats: online distillation (arXiv 2310.07177).

    Args:
        draft_logits: `[N, V']`, with gradient.
        verifier_logits: `[N, V']`, over the same tokens; no gradient is taken to them.
    """
    target = verifier_logits.detach().log_softmax(dim=-1)
    return F.kl_div(draft_logits.log_softmax(dim=-1), target, log_target=True, reduction="batchmean")


def distillation_loss(draft_logits: Tensor, verifier_logits: Tensor, index: Tensor, ce_weight: float) -> Tensor:
    """`(1 - c) KL(verifier || draft) + c CE(draft, the verifier's token)`, in nats.

    Args:
        draft_logits: `[N, V']`, with gradient.
        verifier_logits: `[N, V']`, over the same tokens.
        index: `[N]`, the verifier's tokens as rows of the exit head; -1 for those it lacks, which the CE leaves out.
        ce_weight: c.
    """
    loss = kl_loss(draft_logits, verifier_logits)
    if ce_weight:
        loss = (1 - ce_weight) * loss + ce_weight * F.cross_entropy(draft_logits, index, ignore_index=-1)
    return loss


def masked_ce_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """Cross-entropy on accepted tokens alone (arXiv 2510.05421): `-sum(reward * log pi) / max(1, sum(reward))`.

    Args:
        log_probs: `[N]`, of the drafted tokens, with gradient.
        rewards: `[N]`.
    """
    return -(rewards * log_probs).sum() / rewards.sum().clamp(min=1.0)


def reward_weight(progress: float, ramp_start: float, ramp_end: float) -> float:
    """kl_to_rl's weight of the reward terms: 0 until `ramp_start`, linear, 1 from `ramp_end` on."""
    if progress <= ramp_start:
        return 0.0
    return 1.0 if progress >= ramp_end else (progress - ramp_start) / (ramp_end - ramp_start)


@dataclass(frozen=True)
class FastLosses:
    """The parts of every fast objective, 0-d each, with gradient."""

    rl: Tensor
    kl: Tensor
    ce: Tensor

    def combine(self, schedule: str, reward_share: float, kl_floor: float) -> Tensor:
        """The objective of a schedule.

        Args:
            schedule: reinforce, kl, ce, or kl_to_rl: `(1 - w (1 - floor)) KL + w (CE + REINFORCE)`, with w the
                reward's share, which starts as distillation and ends as reward with a KL floor (arXiv 2510.05421).
            reward_share: w, see `reward_weight`.
            kl_floor: weight that the KL keeps at w = 1.
        """
        if schedule == "kl_to_rl":
            return (1 - reward_share * (1 - kl_floor)) * self.kl + reward_share * (self.ce + self.rl)
        return {"reinforce": self.rl, "kl": self.kl, "ce": self.ce}[schedule]


def slow_loss(verifier_logits: Tensor, tokens: Tensor, frozen_logits: Tensor, beta_kl: float) -> tuple[Tensor, Tensor]:
    """`CE(verifier, token) + beta_kl * KL(verifier || frozen verifier)`, per record, in nats.

    Args:
        verifier_logits: `[N, V]`, lora_D on, with gradient.
        tokens: `[N]`, accepted tokens.
        frozen_logits: `[N, V]`, lora_D off.
        beta_kl: the leash.

    Returns:
        The loss, and its KL alone (detached), which is the drift.
    """
    own = verifier_logits.log_softmax(dim=-1)
    frozen = frozen_logits.detach().log_softmax(dim=-1)
    divergence = F.kl_div(frozen, own, log_target=True, reduction="batchmean")
    return F.nll_loss(own, tokens) + beta_kl * divergence, divergence.detach()


def log_prob_of(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """`[N]` log-probabilities of `index [N]` under `logits [N, V']` at a temperature."""
    log_probs = (logits / temperature).log_softmax(dim=-1)
    return torch.gather(log_probs, 1, index[:, None]).squeeze(1)
