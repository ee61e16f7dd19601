"""Figures of a run: counters, the baseline, what the served decoder did, and drift."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from dvirl.data.examples import collate
from dvirl.losses import kl_divergence
from dvirl.rollout import Judgement, Rollout, in_response, verifier_states
from dvirl.runs import loop
from kangaroo.decoding.blocks import Verification
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.sgp_lora import lora_parameters


def drift(log_probs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """How far a verifier is from a reference at N positions.

    Args:
        log_probs: `[N, V]`, the verifier's.
        reference: `[N, V]`, the reference's.

    Returns:
        `KL(verifier || reference)` summed over positions, in nats, and the number of positions at which the most likely
        token differs; 0-d each.
    """
    return kl_divergence(log_probs, reference).sum(), changed_tokens(log_probs, reference)


def changed_tokens(logits: Tensor, reference: Tensor) -> Tensor:
    """The number of positions at which the most likely token differs, 0-d; both are `[N, V]`."""
    return (logits.argmax(dim=-1) != reference.argmax(dim=-1)).float().sum()


@torch.no_grad()
def verifier_sums(
    base: EarlyExitLlamaForCausalLM, examples: Sequence[Tensor], target: str = "base"
) -> Tensor:
    """Sums over response tokens, `[5]`; those of several batches add up. `verifier_figures` says what they mean.

    Args:
        base: the model, with its adapters.
        examples: `data.examples.make_example` of prompts and responses.
        target: what the verifier's deep layers read, base or adapted.
    """
    tokens, targets = (padded.to(base.device) for padded in collate(examples))
    in_response = targets >= 0

    def log_probs(left_out: Sequence[str]) -> Tensor:
        logits: Tensor = base.lm_head(verifier_states(base, tokens, left_out)[in_response])
        return logits.float().log_softmax(dim=-1)

    adapters = [name for name in ("lora_S", "lora_D") if lora_parameters(base, [name])]
    left_out = [name for name in adapters if name == "lora_S" and target == "base"]
    verifier = log_probs(left_out)
    # With all adapters left out, the verifier is the untouched model: one pass does for both.
    untouched = verifier if left_out == adapters else log_probs(adapters)
    sums = [
        F.nll_loss(verifier, targets[in_response], reduction="sum"),
        F.nll_loss(untouched, targets[in_response], reduction="sum"),
        *drift(verifier, untouched),
        in_response.sum(),
    ]
    return torch.tensor([float(value) for value in sums], dtype=torch.float64)


def verifier_figures(sums: Tensor) -> dict[str, float]:
    """What the sums `[5]` of `verifier_sums` mean.

    Returns:
        `ppl` and `ppl_untouched`, the perplexity under the verifier and under the untouched model; `drift_kl`, the KL
        of the verifier to the untouched model in nats a token; `drift_tokens`, the share of greedy tokens that differ.
    """
    means = sums[:4] / sums[4]
    return {
        "ppl": float(means[0].exp()),
        "ppl_untouched": float(means[1].exp()),
        "drift_kl": float(means[2]),
        "drift_tokens": float(means[3]),
    }


@dataclass(kw_only=True)
class Counters(loop.Counters):
    """How far a run of DVI is, see `StepMetrics`; all of it is in every checkpoint."""

    prompts: int = 0
    tokens: int = 0
    drift_flag: bool = False
    rollout_s: float = 0.0
    fast_s: float = 0.0
    slow_s: float = 0.0


@dataclass(kw_only=True)
class SlowResult:
    """What a slow update, or a measurement in its place, shows of the verifier, see `StepMetrics`."""

    loss_slow: float | None = None
    drift_kl: float | None = None
    drift_tokens: float | None = None


@dataclass(kw_only=True)
class StepMetrics(Counters, SlowResult):
    """One fast step, and the slow update that followed it if one did. None where there is nothing to say.

    Attributes:
        step: fast updates so far.
        phase: objective in force: the schedule, or kl_to_rl's kl and ramp.
        loss: what the fast update minimised.
        loss_rl, loss_kl, loss_ce: REINFORCE, the KL by kl_kind and kl_top_k, and the cross-entropy on accepted tokens,
            measured whether or not they count.
        loss_slow: the slow update's loss.
        accept_rate, mat: of the served decoder (argmax drafts) on the responses of this step, before its update.
        reward: mean reward of the records learned from (sampled or argmax drafts).
        baseline: subtracted from the rewards in this step.
        ppl_sample: perplexity of the responses under the verifier that wrote them.
        drift_kl: KL of the verifier to the untouched model, nats a token, measured at slow updates. With target "base"
            on accepted tokens only, which are the easier ones, before the update; with "adapted" on all records.
        drift_tokens: share of its greedy tokens that differ from the untouched model's.
        drift_flag: from the first step on at which acceptance rose while the drift passed its bound.
        prompts: prompts seen so far.
        tokens: response tokens seen so far.
        tok_per_s: response tokens over wall seconds since the step before, generation and training together.
        grad_norm: before clipping.
        lr: of lora_S.
        buffer_size: records held.
        skipped: updates left out so far because a loss or gradient was not finite.
        rollout_s, fast_s, slow_s: seconds spent so far on generation, on drafting and fast updates, on slow updates.
        wall_s: seconds since the run began.
    """

    phase: str
    loss: float
    loss_rl: float
    loss_kl: float
    loss_ce: float
    accept_rate: float
    mat: float
    reward: float
    baseline: float
    ppl_sample: float
    tok_per_s: float
    grad_norm: float
    lr: float
    buffer_size: int


STEP_COLUMNS = tuple(spec.name for spec in fields(StepMetrics))
"""What a line of the log has."""
DRIFT_WINDOW = 8
"""Steps at either end of a run whose acceptance rates the drift guard compares."""


class Baseline:
    """What REINFORCE subtracts from the rewards. It knows only the past, so that it adds no bias.

    Args:
        kind: ema, the exponential moving average of the batches' means, the first of which is its own past; mean, of
            all rewards before, 0 before the first; or none, 0.
        momentum: of the ema, 0 to below 1; the weight of the past.
    """

    def __init__(self, kind: str = "ema", momentum: float = 0.9) -> None:
        self.kind = kind
        self.momentum = momentum
        self.value: float | None = None if kind == "ema" else 0.0
        self.count = 0

    def update(self, reward: float, count: int = 1) -> float:
        """Add the mean of `count` rewards; return the average of the past before it, which is what to subtract."""
        # What is subtracted knows the past alone: a baseline that saw these rewards would bias the gradient.
        before = reward if self.value is None else self.value
        self.count += count
        if self.kind == "ema":
            self.value = self.momentum * before + (1 - self.momentum) * reward
        elif self.kind == "mean":
            self.value = before + (reward - before) * count / self.count
        return before


@dataclass
class Tally:
    """Acceptance statistics, pooled over verifications; the prefill is none of them.

    Attributes:
        drafted: scored drafts, up to and including the first reject of each verification.
        accepted: accepted drafts.
        committed: committed tokens, the verifier's own included.
        blocks: verifications.
    """

    drafted: int = 0
    accepted: int = 0
    committed: int = 0
    blocks: int = 0

    def count(self, verifications: Iterable[Verification]) -> None:
        """Add some verifications."""
        for block in verifications:
            self.drafted += block.num_drafted
            self.accepted += block.num_accepted
            self.committed += block.block_len
            self.blocks += 1

    @property
    def accept_rate(self) -> float:
        """Accepted over scored drafts; NaN if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def mat(self) -> float:
        """Mean number of tokens that a verification commits (Spec-Bench); NaN without verifications."""
        return self.committed / self.blocks if self.blocks else math.nan


@dataclass
class Served(Tally):
    """What the served decoder did on the responses since the last step, pooled; in every checkpoint too.

    Attributes:
        tokens, nll: response tokens, and their negative log-likelihood under the verifier, in nats.
        wall_s: the run's seconds when this account began.
    """

    tokens: int = 0
    nll: float = 0.0
    wall_s: float = 0.0

    def add(self, rollout: Rollout, judgement: Judgement) -> None:
        """Add a group of responses; a response's first token comes from the prefill and is in no block."""
        for row in judgement.blocks:
            self.count(row)
        inside = in_response(rollout.response_lens)
        self.nll -= float(rollout.verifier_confidence[inside].log().sum())
        self.tokens += rollout.num_tokens

    @property
    def ppl(self) -> float:
        """Perplexity of the responses under the verifier that wrote them."""
        return math.exp(self.nll / max(1, self.tokens))


def drift_suspected(rates: Sequence[float], drift_kl: float, bound: float) -> bool:
    """Whether acceptance may be rising because the verifier got worse: it rose, and the verifier drifted too far.

    Args:
        rates: acceptance rates of the first and of the last `DRIFT_WINDOW` steps; with fewer there is no suspicion.
        drift_kl: nats a token.
        bound: what `drift_kl` may be at most; 0 for anything.
    """
    first = rates[:DRIFT_WINDOW]
    last = rates[DRIFT_WINDOW:]
    return len(rates) == 2 * DRIFT_WINDOW and fmean(last) > fmean(first) and 0 < bound < drift_kl


FACETS = {"position": "position in block", "token_class": "token class", "category": "category"}
"""What rejections are counted by: columns of accept events, and their titles."""


def accept_rates(events: pd.DataFrame, by: str) -> pd.DataFrame:
    """Where the drafts of one method are rejected.

    Args:
        events: one row for each scored draft, with `question_id` and `accepted` (`rejections.read_trace`).
        by: the column to group by.

    Returns:
        A row for each group: `questions`, `drafted` (scored) and `accepted` drafts, `accept_rate`, its 95 % interval
        `low` to `high`, and `rejects`, the fraction of all rejects in this group (NaN if there are none). The interval
        comes from 1000 bootstrap samples of questions, since drafts of one answer resemble each other.
    """
    counts = events.groupby([by, "question_id"]).accepted.agg(["size", "sum"]).unstack(fill_value=0)
    drafted = counts["size"].to_numpy()  # [groups, questions]
    accepted = counts["sum"].to_numpy()
    num_questions = events.question_id.nunique()
    even = np.full(num_questions, 1 / num_questions)
    draws = np.random.default_rng(0).multinomial(num_questions, even, size=1000).T  # [questions, samples]
    rates = pd.DataFrame(accepted @ draws).div(drafted @ draws)
    table = pd.DataFrame(
        {"questions": (drafted > 0).sum(axis=1), "drafted": drafted.sum(axis=1)}, counts.index
    )
    table["accepted"] = accepted.sum(axis=1)
    table["accept_rate"] = table.accepted / table.drafted
    table[["low", "high"]] = rates.quantile([0.025, 0.975], axis=1).T.to_numpy()
    rejects = table.drafted - table.accepted
    table["rejects"] = rejects / rejects.sum()
    return table
