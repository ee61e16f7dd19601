"""Losses: tensors in, values for each of N records out. `Decisions.mean` alone averages them.

A loss returns `[N]`, or `[N, K]` if a record's value is the sum of a row. It never averages by itself. The objectives
combine means: `Decisions.mean` divides by the number of records of all processes, so that the results of the processes
add up to the result of one process with all records.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dvirl.config import DVIConfig
from kangaroo.decoding.layers import compiled
from kangaroo.decoding.sampling import inverse_cdf


def reinforce_loss(log_probs: Tensor, rewards: Tensor, baseline: float) -> Tensor:
    """REINFORCE with a baseline (Williams 1992): `-(reward - baseline) * log pi(token | h)`.

    Args:
        log_probs: `[N]`, of the drafted tokens, with gradient.
        rewards: `[N]`, 1 accepted, 0 rejected.
        baseline: subtracted from the rewards; without bias as long as it does not depend on these tokens.

    Returns:
        `[N]`.
    """
    # Its gradient is the policy gradient: what was rewarded above the baseline becomes likelier.
    return -(rewards - baseline) * log_probs


def exact_pg_loss(log_probs: Tensor, covered: Tensor) -> Tensor:
    """Minus the expected reward, `-pi(verifier's token | h)`: its gradient is the expected gradient of REINFORCE.

    Only one action is rewarded, so the sum over all actions (arXiv 1709.00503) has one term, and needs no baseline.

    Args:
        log_probs: `[N]`, of the verifier's tokens, with gradient.
        covered: `[N]`, 1 where the exit head has the verifier's token, 0 where its probability is 0.

    Returns:
        `[N]`.
    """
    # A token that the exit head lacks is never drafted: its expected reward is 0.
    return -covered * log_probs.exp()


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p || q) = sum(p (log p - log q))`, in nats, before the sum.

    Args:
        p: `[N, K]`, log-probabilities.
        q: `[N, K]`, log-probabilities.

    Returns:
        `[N, K]`; the divergence of a record is the sum of its row.
    """
    # torch names the arguments the other way round: input is q, target is p.
    return F.kl_div(q, p, log_target=True, reduction="none")


def kl_losses(draft_logits: Tensor, verifier_logits: Tensor, kind: str = "forward", top_k: int = 0) -> Tensor:
    """Divergence of the draft q from the verifier p, in nats: online distillation (arXiv 2310.07177).

    Both are distributions over the draft's tokens. Kinds (arXiv 2310.08461): forward `KL(p || q)`, reverse
    `KL(q || p)`, js (Jensen-Shannon) `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`, at most ln 2.
    With 0 < `top_k` < V' there are K + 1 outcomes, K = top_k: the K tokens that are likeliest under p, and all other
    tokens together, with their summed probability. This never exceeds the divergence over all tokens.

    Args:
        draft_logits: `[N, V']`, with gradient.
        verifier_logits: `[N, V']`, over the same tokens; no gradient is taken to them.
        kind: forward, reverse or js.
        top_k: K, or 0 for all tokens.

    Returns:
        `[N, K]`, as in `kl_divergence`.
    """
    p = verifier_logits.detach().log_softmax(dim=-1)
    q = draft_logits.log_softmax(dim=-1)
    if 0 < top_k < p.shape[-1]:
        top = p.topk(top_k).indices
        p = _top_and_rest(p, top)
        q = _top_and_rest(q, top)
    if kind == "js":  # the mixture m in log space
        m = torch.logaddexp(p, q) - math.log(2)
        return (kl_divergence(p, m) + kl_divergence(q, m)) / 2
    return kl_divergence(q, p) if kind == "reverse" else kl_divergence(p, q)


def _top_and_rest(log_probs: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities `[N, K + 1]`: of the tokens `top [N, K]`, and of all others together."""
    # With the top tokens at minus infinity, the sum of the exponentials is that of all others.
    rest = log_probs.scatter(1, top, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat((log_probs.gather(1, top), rest), dim=-1)


def overlap(draft_logits: Tensor, verifier_logits: Tensor) -> Tensor:
    """`sum(min(p, q))`: 1 minus the total variation distance of verifier p and draft q.

    It is the probability that speculative sampling accepts a draft from q (arXiv 2211.17192, theorem 3.5; as an
    objective, arXiv 2310.08461, 2602.23881). Both are over the draft's tokens: exact if there are no other tokens.

    Args:
        draft_logits: `[N, V']`, with gradient.
        verifier_logits: `[N, V']`, over the same tokens; no gradient is taken to them.

    Returns:
        `[N]`, 0 to 1.
    """
    p = verifier_logits.detach().softmax(dim=-1)
    q = draft_logits.softmax(dim=-1)
    return torch.minimum(p, q).sum(dim=-1)


@dataclass(frozen=True)
class Teacher:
    """The verifier's distributions, for drafts of several depths to learn from; no gradient goes to them.

    Attributes:
        probabilities: `[N, V']`, float32, over the draft's tokens alone.
        entropy: `[N]`, in nats.
        covered: `[N, 1]`, the verifier's probability of the draft's tokens together; 1 if there are no others.
    """

    probabilities: Tensor
    entropy: Tensor
    covered: Tensor | float = 1.0

    @classmethod
    def of(cls, logits: Tensor, normalizer: Tensor | None = None) -> "Teacher":
        """From the verifier's logits `[N, V']` over the draft's tokens, and log-sum-exp `[N]` over all tokens.

        Without the latter, the verifier is taken to have the draft's tokens alone.
        """
        logits = logits.detach()
        log_probs = logits.log_softmax(dim=-1)
        probabilities = log_probs.exp()
        return cls(
            probabilities,
            entropy=-(probabilities * log_probs).sum(dim=-1),
            covered=1.0 if normalizer is None else (logits.logsumexp(dim=-1) - normalizer).exp()[:, None],
        )


class _ForwardKL(torch.autograd.Function):
    """`KL(p || q)` of each row by the teacher p and the draft's log-probabilities, with the gradient `q - p`.

    Autograd's own way through `log_softmax` reads and writes the `[N, V']` numbers more often.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probabilities: Tensor, entropy: Tensor) -> Tensor:
        forward = compiled(_forward_kl, dynamic=False) if logits.is_cuda else _forward_kl
        losses, normalizer = forward(logits, probabilities, entropy)
        ctx.save_for_backward(logits, normalizer, probabilities)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = compiled(_kl_gradient, dynamic=False) if gradients[0].is_cuda else _kl_gradient
        return gradient(*ctx.saved_tensors, *gradients), None, None


def _forward_kl(logits: Tensor, probabilities: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and the logarithm of the sum of its exponentials, `[N]` each."""
    logits = logits.float()
    normalizer = logits.logsumexp(dim=-1)
    log_q = logits - normalizer[:, None]
    return -entropy - (probabilities * log_q).sum(dim=-1), normalizer


def _kl_gradient(logits: Tensor, normalizer: Tensor, probabilities: Tensor, gradient: Tensor) -> Tensor:
    """`q - p` of each row, times its gradient, in the dtype of the logits."""
    q = (logits.float() - normalizer[:, None]).exp()
    return ((q - probabilities) * gradient[:, None]).to(logits.dtype)


def distillation_loss(draft_logits: Tensor, teacher: Teacher, index: Tensor, ce_weight: float) -> Tensor:
    """`(1 - c) KL(verifier || draft) + c CE(draft, the verifier's token)`, in nats.

    Args:
        draft_logits: `[N, V']`, with gradient.
        teacher: the verifier, over the same tokens.
        index: `[N]`, the verifier's tokens as rows of the exit head; -1 for those it lacks, whose CE is 0.
        ce_weight: c.

    Returns:
        `[N]`.
    """
    loss: Tensor = _ForwardKL.apply(  # type: ignore[no-untyped-call]
        draft_logits, teacher.probabilities, teacher.entropy
    )
    if ce_weight:
        entropy = F.cross_entropy(draft_logits.float(), index, ignore_index=-1, reduction="none")
        loss = (1 - ce_weight) * loss + ce_weight * entropy
    return loss


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy `-sum(pi log pi)` of the policy, in nats (as a bonus: Williams and Peng 1991).

    Args:
        logits: `[N, V']`, with gradient.
        temperature: of the policy.

    Returns:
        `[N]`.
    """
    log_probs = (logits / temperature).log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def reward_weight(progress: float, ramp_start: float, ramp_end: float) -> float:
    """The weight of kl_to_rl's reward terms: 0 until `ramp_start`, then linear, 1 from `ramp_end` on."""
    if progress <= ramp_start:
        return 0.0
    if progress >= ramp_end:
        return 1.0
    return (progress - ramp_start) / (ramp_end - ramp_start)


def slow_loss(verifier_logits: Tensor, tokens: Tensor, frozen_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of the slow loss, `CE(verifier, token)` and `KL(verifier || frozen verifier)`, in nats.

    Args:
        verifier_logits: `[N, V]`, lora_D on, with gradient.
        tokens: `[N]`, accepted tokens.
        frozen_logits: `[N, V]`, lora_D off.

    Returns:
        The cross-entropy `[N]`, and the divergence `[N, V]` as in `kl_divergence`, which is also the drift.
    """
    verifier = verifier_logits.log_softmax(dim=-1)
    frozen = frozen_logits.detach().log_softmax(dim=-1)
    return F.nll_loss(verifier, tokens, reduction="none"), kl_divergence(verifier, frozen)


def log_prob_of(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """`[N]` log-probabilities of `index [N]` under `logits [N, V']` at a temperature."""
    return -F.cross_entropy(logits / temperature, index, reduction="none")


@dataclass(frozen=True)
class Decisions:
    """N records, as the fast objectives see them.

    The policy is the draft at the temperature of its actions; KL and total variation look at temperature 1.

    Attributes:
        config: schedule, kinds and weights.
        logits: `[N, V']`, the draft's, with gradient.
        verifier: gives the verifier's logits `[N, V']` over the same tokens, for the objectives that ask.
        drafted, verified: `[N]`, the exit head's row of the draft's and of the verifier's token; -1 if it has none.
        rewards: `[N]`.
        baseline: subtracted from the rewards.
        reward_share: weight of kl_to_rl's reward terms, see `reward_weight`.
        totals: number of records of each kind that all processes have together, see `count`; by default these records
            are all.
    """

    config: DVIConfig
    logits: Tensor
    verifier: Callable[[], Tensor]
    drafted: Tensor
    verified: Tensor
    rewards: Tensor
    baseline: float = 0.0
    reward_share: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)

    def on_drafted(self) -> Tensor:
        """The policy's log-probabilities `[N]` of the drafted tokens."""
        return log_prob_of(self.logits, self.drafted, self.config.policy_temperature)

    def on_verified(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probabilities `[N]` of the verifier's tokens, and which of them it covers."""
        log_probs = log_prob_of(self.logits, self.verified.clamp(min=0), self.config.policy_temperature)
        return log_probs, (self.verified >= 0).float()

    def mean(self, values: Tensor, over: str = "all") -> Tensor:
        """The mean of a loss over records of one kind; with several processes, the part of it that is from here.

        Args:
            values: `[N]`, or `[N, K]` whose rows are summed.
            over: all, accepted, or covered (the exit head has the verifier's token).

        Returns:
            0-d: the sum of these values over the number of records in all processes.
        """
        if over == "accepted":
            values = values * self.rewards
        elif over == "covered":
            values = values * (self.verified >= 0).float()
        totals = self.totals or count(self.rewards, self.verified)
        return values.sum() / totals[over]


def count(rewards: Tensor, verified: Tensor) -> dict[str, float]:
    """The number of records of each kind that `Decisions.mean` knows, at least 1, of `rewards` and `verified` `[N]`."""
    numbers = {"all": len(rewards), "accepted": float(rewards.sum()), "covered": float((verified >= 0).sum())}
    return {kind: max(1.0, number) for kind, number in numbers.items()}


def kl_to_rl(on: Decisions) -> Tensor:
    """`(1 - w (1 - floor)) KL + w (masked CE + REINFORCE)`, w the reward's weight (arXiv 2510.05421)."""
    weight = on.reward_share
    kl = OBJECTIVES["kl"](on)
    if not weight:
        return kl
    reward_terms = OBJECTIVES["masked_ce"](on) + OBJECTIVES["reinforce"](on)
    return (1 - weight * (1 - on.config.kl_floor)) * kl + weight * reward_terms


OBJECTIVES: dict[str, Callable[[Decisions], Tensor]] = {
    "reinforce": lambda on: on.mean(reinforce_loss(on.on_drafted(), on.rewards, on.baseline)),
    "exact_pg": lambda on: on.mean(exact_pg_loss(*on.on_verified())),
    "ce": lambda on: on.mean(-on.on_verified()[0], over="covered"),
    "masked_ce": lambda on: on.mean(-on.on_drafted(), over="accepted"),
    "kl": lambda on: on.mean(kl_losses(on.logits, on.verifier(), on.config.kl_kind, on.config.kl_top_k)),
    "tv": lambda on: on.mean(1 - overlap(on.logits, on.verifier())),
    "kl_to_rl": kl_to_rl,
}
"""What each schedule minimises, without regularisers. Cross-entropies are in nats: ce to the verifier's tokens that the
exit head has (others have none that is finite), masked_ce to accepted drafts (arXiv 2510.05421)."""
REPLAYING = ("exact_pg", "ce", "kl", "tv", "kl_to_rl")
"""Objectives that may learn from old records: with reward weight 0, they do not depend on who drew the token."""


def fast_loss(on: Decisions) -> Tensor:
    """The schedule's objective, plus `kl_weight * KL - entropy_weight * entropy`; 0-d."""
    config = on.config
    loss = OBJECTIVES[config.schedule](on)
    if config.kl_weight:
        loss = loss + config.kl_weight * OBJECTIVES["kl"](on)
    if config.entropy_weight:
        loss = loss - config.entropy_weight * on.mean(entropy(on.logits, config.policy_temperature))
    return loss


# Drafts of several depths


@dataclass(frozen=True)
class DraftsAtDepth:
    """The drafts of one depth, each after a verified text.

    Attributes:
        logits: `[N, V']`, with gradient.
        teacher: the verifier, after the same texts.
        index: `[N]`, the verifier's tokens as rows of the exit head; -1 for those it lacks.
        weight: `[N]`, 0 at padding.
        ce_weight: share of cross-entropy in `kl`, as in `distillation_loss`.
    """

    logits: Tensor
    teacher: Teacher
    index: Tensor
    weight: Tensor
    ce_weight: float = 0.0

    def mean(self, values: Tensor, scale: float = 1.0) -> Tensor:
        """The mean of values `[N]` by weight, times a scale; 0-d."""
        return scale * (values * self.weight).sum() / self.weight.sum()

    def chance(self) -> Tensor:
        """`q(y)` `[N]`, the probability of drafting the verifier's token; 0 for a token that the exit head lacks."""
        return log_prob_of(self.logits.float(), self.index.clamp(min=0)).exp() * (self.index >= 0)

    def acceptance(self) -> Tensor:
        """`alpha = sum(min(p, q))` `[N]`, as in `overlap`, but p is over all tokens: what the head lacks is lost."""
        q = self.logits.float().softmax(dim=-1)
        return torch.minimum(self.teacher.probabilities * self.teacher.covered, q).sum(dim=-1)

    def act(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw an action from each draft by uniform numbers `[N]`; its log-probability, and 1 where it is accepted."""
        logits = self.logits.float()
        actions = inverse_cdf(logits.detach().log_softmax(dim=-1).exp(), noise)
        return log_prob_of(logits, actions), (actions == self.index).float()

    def kl(self) -> Tensor:
        """`KL(p || q)` `[N]`, both over the draft's tokens."""
        return distillation_loss(self.logits, self.teacher, self.index, self.ce_weight)

    def lk(self) -> Tensor:
        """`w KL + (1 - w)(1 - alpha)` `[N]`, `w = exp(-3 mean alpha)` without gradient (arXiv 2602.23881)."""
        alpha = self.acceptance()
        # KL leads while little is accepted, total variation later.
        kl_share = (-3 * self.mean(alpha.detach())).exp()
        return kl_share * self.kl() + (1 - kl_share) * (1 - alpha)


LEAST = 1e-30
"""Smallest probability whose logarithm is taken."""
BY_DEPTH: dict[str, Callable[[DraftsAtDepth], Tensor]] = {
    "kl": DraftsAtDepth.kl,
    "js": lambda drafts: kl_losses(
        drafts.logits.float(), drafts.teacher.probabilities.clamp(min=LEAST).log(), "js"
    ).sum(dim=-1),
    "tv": lambda drafts: 1 - drafts.acceptance(),
    "alpha": lambda drafts: -drafts.acceptance().clamp(min=LEAST).log(),
    "lk": DraftsAtDepth.lk,
    "expected": lambda drafts: -drafts.chance(),
}
"""Objectives that judge each draft by itself, `[N]`: js as in `kl_losses`, over the draft's tokens, alpha and lk of
arXiv 2602.23881, expected as `exact_pg_loss`."""
FOR_BLOCKS = ("block", "block_alpha", "reinforce_block")
"""Objectives that judge all drafts of a block together."""
OVER_ALL_TOKENS = ("tv", "alpha", "lk", "block_alpha")
"""Objectives that ask for the verifier's probabilities over all tokens."""


def within_text(positions: Tensor, weight: Tensor, depths: int) -> Tensor:
    """Which drafts of blocks exist: 1 where the place `depth` after a block's first is of the same text, else 0.

    Args:
        positions: `[N]`, those of a text are consecutive, and no text begins where another ends.
        weight: `[N]`, 1, and 0 at padding.
        depths: drafts of a block, K.

    Returns:
        `[K, N]`, by the place of the block's first draft.
    """
    inside = [
        (positions.roll(-depth) == positions + depth) * weight * weight.roll(-depth)
        for depth in range(depths)
    ]
    return torch.stack(inside).float()


def along_blocks(values: Sequence[Tensor], inside: Tensor) -> Tensor:
    """Put what belongs to one block into one column: its draft of depth j stands j places after its first.

    Args:
        values: `[N]` for each of K depths, by the draft's place.
        inside: `[K, N]`, of `within_text`.

    Returns:
        `[K, N]`, by the place of the block's first draft; 0 for drafts after the end of a text.
    """
    return torch.stack([value.roll(-depth) for depth, value in enumerate(values)]) * inside


def expected_accepted(chances: Tensor) -> Tensor:
    """The expected number of accepted drafts of each block, `sum_k prod_{j <= k} c_j` `[N]`, exact and with gradient.

    A draft counts if all drafts up to it are accepted. Its chance is `q(y)` if drafts are sampled and the verifier is
    greedy. It is alpha if both sample at temperature 1; then the text that drafts follow stands for a sampled one.

    Args:
        chances: `[K, N]`, that a draft is accepted if all before it are; of `along_blocks`.
    """
    # torch's cumprod would look at the numbers in its backward pass, which no CUDA graph can.
    return sum(accumulate(chances, torch.mul), start=torch.zeros_like(chances[0]))


def reinforce_block_loss(
    log_probs: Tensor, accepted: Tensor, inside: Tensor, baselines: Tensor
) -> tuple[Tensor, Tensor]:
    """REINFORCE with the number of accepted drafts of a block as the return.

    The draft of depth j acts only if all drafts before it were accepted, and then its return to go `R_j` is the number
    of accepted drafts from it on: `-sum_j (R_j - b_j) log q_j(a_j)` over the drafts that act. Teacher forcing is exact
    here: where depth j acts, all drafts before were the verifier's tokens, and those are what the parallel pass reads.

    Args:
        log_probs: `[K, N]`, of one sampled action for each draft, of `along_blocks`, with gradient.
        accepted: `[K, N]`, 1 where the action is the verifier's token, of `along_blocks`.
        inside: `[K, N]`, of `within_text`.
        baselines: `[K]`, subtracted from the returns; without bias as long as they do not depend on these actions.

    Returns:
        The loss of each block `[N]`, and the mean return of each depth `[K]`, its baseline where nothing acted.
    """
    reached = accepted.cumprod(dim=0)
    returns = reached.flip(0).cumsum(dim=0).flip(0)
    # The first draft always acts, a later one if the one before was accepted.
    acting = inside * torch.cat([inside[:1], reached[:-1]])
    count = acting.sum(dim=1)
    means = torch.where(count > 0, (acting * returns).sum(dim=1) / count, baselines)
    losses = reinforce_loss(log_probs, returns - baselines[:, None], 0.0)
    return (acting * losses).sum(dim=0), means
