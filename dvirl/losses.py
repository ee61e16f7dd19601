"""Losses: tensors in, one 0-d tensor out. N is the number of records."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dvirl.config import DVIConfig


def reinforce_loss(log_probs: Tensor, rewards: Tensor, baseline: float) -> Tensor:
    """REINFORCE with a baseline (Williams 1992): `-mean((reward - baseline) * log pi(token | h))`.

    Args:
        log_probs: `[N]`, of the drafted tokens, with gradient.
        rewards: `[N]`, 1 accepted, 0 rejected.
        baseline: subtracted from the rewards; without bias as long as it does not depend on these tokens.
    """
    return -((rewards - baseline) * log_probs).mean()


def exact_pg_loss(log_probs: Tensor, covered: Tensor) -> Tensor:
    """Minus the expected reward, `-mean(pi(verifier's token | h))`: its gradient is REINFORCE's expected one.

    One action alone is rewarded, so the sum over all actions (arXiv 1709.00503) has one term, and needs no baseline.

    Args:
        log_probs: `[N]`, of the verifier's tokens, with gradient.
        covered: `[N]`, 1 where the exit head has the verifier's token, 0 where its probability is 0.
    """
    return -(covered * log_probs.exp()).mean()


def masked_ce_loss(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy to some of the tokens, in nats: `-sum(mask * log pi) / max(1, sum(mask))`.

    Args:
        log_probs: `[N]`, of the tokens, with gradient.
        mask: `[N]`. Of drafted tokens, their rewards (reward-masked, arXiv 2510.05421); of the verifier's tokens, 1
            where the exit head has them (plain; elsewhere it is infinite).
    """
    return -(mask * log_probs).sum() / mask.sum().clamp(min=1.0)


def kl_loss(draft_logits: Tensor, verifier_logits: Tensor, kind: str = "forward", top_k: int = 0) -> Tensor:
    """Divergence of the draft q from the verifier p per record, in nats: online distillation (arXiv 2310.07177).

    Both are distributions over the draft's tokens. Kinds (arXiv 2310.08461): forward `KL(p || q)`, reverse
    `KL(q || p)`, js (Jensen-Shannon) `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`, at most ln 2.
    With 0 < `top_k` = K < V' they are over K + 1 outcomes: each of the K tokens likeliest under p, and all others as
    one, with their summed probability. This never exceeds the divergence over all tokens.

    Args:
        draft_logits: `[N, V']`, with gradient.
        verifier_logits: `[N, V']`, over the same tokens; no gradient is taken to them.
        kind: forward, reverse or js.
        top_k: K, or 0 for all tokens.
    """
    p, q = verifier_logits.detach().log_softmax(dim=-1), draft_logits.log_softmax(dim=-1)
    if 0 < top_k < p.shape[-1]:
        top = p.topk(top_k).indices
        p, q = (_top_and_rest(log_probs, top) for log_probs in (p, q))
    if kind == "js":
        m = torch.logaddexp(p, q) - math.log(2)
        return (_kl(p, m) + _kl(q, m)) / 2
    return _kl(q, p) if kind == "reverse" else _kl(p, q)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p || q)` per row of log-probabilities."""
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def _top_and_rest(log_probs: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities `[N, K + 1]`: of the tokens `top [N, K]`, and of all others together."""
    rest = log_probs.scatter(1, top, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat((log_probs.gather(1, top), rest), dim=-1)


def tv_loss(draft_logits: Tensor, verifier_logits: Tensor) -> Tensor:
    """Total variation distance `1 - sum(min(p, q))` per record, 0 to 1.

    The probability that speculative sampling rejects a draft from q for a verifier p (arXiv 2211.17192, theorem 3.5;
    as an objective, arXiv 2310.08461, 2602.23881), both over the draft's tokens: exact if these are all there are.

    Args:
        draft_logits: `[N, V']`, with gradient.
        verifier_logits: `[N, V']`, over the same tokens; no gradient is taken to them.
    """
    p, q = verifier_logits.detach().softmax(dim=-1), draft_logits.softmax(dim=-1)
    return 1 - torch.minimum(p, q).sum(dim=-1).mean()


def distillation_loss(
    draft_logits: Tensor, verifier_logits: Tensor, index: Tensor, weight: Tensor, ce_weight: float
) -> Tensor:
    """`(1 - c) KL(verifier || draft) + c CE(draft, the verifier's token)`, mean over weighted positions, in nats.

    Args:
        draft_logits: `[N, V']`, with gradient.
        verifier_logits: `[N, V']`, over the same tokens.
        index: `[N]`, the verifier's tokens as rows of the exit head; -1 for those it lacks, whose CE is 0.
        weight: `[N]`, 0 at padding, else 1.
        ce_weight: c.
    """
    own, target = draft_logits.log_softmax(dim=-1), verifier_logits.detach().log_softmax(dim=-1)
    loss = (1 - ce_weight) * F.kl_div(own, target, log_target=True, reduction="none").sum(dim=-1)
    if ce_weight:
        loss = loss + ce_weight * F.nll_loss(own, index, ignore_index=-1, reduction="none")
    return (loss * weight).sum() / weight.sum()


def mean_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy `-sum(pi log pi)` of the policy per record, in nats (as a bonus: Williams and Peng 1991).

    Args:
        logits: `[N, V']`, with gradient.
        temperature: of the policy.
    """
    log_probs = (logits / temperature).log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean()


def reward_weight(progress: float, ramp_start: float, ramp_end: float) -> float:
    """kl_to_rl's weight of the reward terms: 0 until `ramp_start`, linear, 1 from `ramp_end` on."""
    if progress <= ramp_start:
        return 0.0
    return 1.0 if progress >= ramp_end else (progress - ramp_start) / (ramp_end - ramp_start)


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


@dataclass(frozen=True)
class Shares:
    """Of what the objectives take the mean over, how much these records are: all, unless other processes have others.

    Attributes:
        records, accepted, covered: share of the records, of the accepted ones, of those whose verifier's token the
            exit head has.
    """

    records: float = 1.0
    accepted: float = 1.0
    covered: float = 1.0


@dataclass(frozen=True)
class Decisions:
    """N records, as the fast objectives see them.

    The policy is the draft at the temperature of its actions; KL and TV look at temperature 1.

    Attributes:
        config: schedule, kinds and weights.
        logits: `[N, V']`, the draft's, with gradient.
        verifier: gives the verifier's logits `[N, V']` over the same tokens, for the objectives that ask.
        drafted, verified: `[N]`, the exit head's row of the draft's and of the verifier's token; -1 if it has none.
        rewards: `[N]`.
        baseline: subtracted from the rewards.
        reward_share: weight of kl_to_rl's reward terms, see `reward_weight`.
        shares: by which the objectives of several processes add up to that of all records.
    """

    config: DVIConfig
    logits: Tensor
    verifier: Callable[[], Tensor]
    drafted: Tensor
    verified: Tensor
    rewards: Tensor
    baseline: float = 0.0
    reward_share: float = 0.0
    shares: Shares = Shares()

    def on_drafted(self) -> Tensor:
        """The policy's log-probabilities `[N]` of the drafted tokens."""
        return log_prob_of(self.logits, self.drafted, self.config.policy_temperature)

    def on_verified(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probabilities `[N]` of the verifier's tokens, and which of them it covers."""
        log_probs = log_prob_of(self.logits, self.verified.clamp(min=0), self.config.policy_temperature)
        return log_probs, (self.verified >= 0).float()


def _kl_to_rl(on: Decisions) -> Tensor:
    """`(1 - w (1 - floor)) KL + w (masked CE + REINFORCE)`, w the reward's share (arXiv 2510.05421)."""
    share, kl = on.reward_share, OBJECTIVES["kl"](on)
    if not share:
        return kl
    log_probs = on.on_drafted()
    reinforced = on.shares.records * reinforce_loss(log_probs, on.rewards, on.baseline)
    reward_terms = on.shares.accepted * masked_ce_loss(log_probs, on.rewards) + reinforced
    return (1 - share * (1 - on.config.kl_floor)) * kl + share * reward_terms


OBJECTIVES: dict[str, Callable[[Decisions], Tensor]] = {
    "reinforce": lambda on: on.shares.records * reinforce_loss(on.on_drafted(), on.rewards, on.baseline),
    "exact_pg": lambda on: on.shares.records * exact_pg_loss(*on.on_verified()),
    "ce": lambda on: on.shares.covered * masked_ce_loss(*on.on_verified()),
    "masked_ce": lambda on: on.shares.accepted * masked_ce_loss(on.on_drafted(), on.rewards),
    "kl": lambda on: on.shares.records * kl_loss(on.logits, on.verifier(), on.config.kl_kind, on.config.kl_top_k),
    "tv": lambda on: on.shares.records * tv_loss(on.logits, on.verifier()),
    "kl_to_rl": _kl_to_rl,
}
"""What each schedule minimises, regularisers left out."""
REPLAYING = ("exact_pg", "ce", "kl", "tv", "kl_to_rl")
"""Those that, the reward's share being 0, do not depend on who drew the token: old records may teach again."""


def fast_loss(on: Decisions) -> Tensor:
    """The schedule's objective, plus `kl_weight * KL - entropy_weight * entropy`."""
    config = on.config
    loss = OBJECTIVES[config.schedule](on)
    if config.kl_weight:
        loss = loss + config.kl_weight * OBJECTIVES["kl"](on)
    if config.entropy_weight:
        loss = loss - config.entropy_weight * on.shares.records * mean_entropy(on.logits, config.policy_temperature)
    return loss
