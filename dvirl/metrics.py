"""Figures of a run: counters, the baseline, what was served, and drift."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from dvirl.data.examples import collate
from dvirl.rollout import verifier_states
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.sgp_lora import lora_parameters

if TYPE_CHECKING:
    pass
from statistics import fmean

from dvirl.rollout import Judgement, Rollout


@torch.no_grad()
def verifier_sums(base: EarlyExitLlamaForCausalLM, examples: Sequence[Tensor], target: str = "base") -> Tensor:
    """Sums over response tokens, `[5]`; those of several batches add up. What they mean says `verifier_figures`.

    Args:
        base: the model, with its adapters.
        examples: `sgp.make_example` of prompts and responses.
        target: what the verifier's deep layers read, base or adapted.
    """
    tokens, targets = (one.to(base.device) for one in collate(examples))
    said = targets >= 0

    def log_probs(off: Sequence[str]) -> Tensor:
        logits: Tensor = base.lm_head(verifier_states(base, tokens, off)[said])
        return logits.float().log_softmax(dim=-1)

    there = [name for name in ("lora_S", "lora_D") if lora_parameters(base, [name])]
    served = [name for name in there if name == "lora_S" and target == "base"]
    own = log_probs(served)
    untouched = own if served == there else log_probs(there)
    losses = [F.nll_loss(one, targets[said], reduction="sum") for one in (own, untouched)]
    divergence = F.kl_div(untouched, own, log_target=True, reduction="sum")
    changed = (own.argmax(dim=-1) != untouched.argmax(dim=-1)).sum()
    return torch.tensor([float(one) for one in (*losses, divergence, changed, said.sum())], dtype=torch.float64)


def verifier_figures(sums: Tensor) -> dict[str, float]:
    """What the sums `[5]` of `verifier_sums` mean.

    Returns:
        `ppl` and `ppl_untouched`, the perplexity under the verifier and under the untouched model; `drift_kl`, the KL
        of the verifier to the untouched model in nats a token; `drift_tokens`, the share of greedy tokens that differ.
    """
    means = sums[:4] / sums[4]
    figures = [*means[:2].exp().tolist(), *means[2:].tolist()]
    return dict(zip(("ppl", "ppl_untouched", "drift_kl", "drift_tokens"), figures, strict=True))


@dataclass(kw_only=True)
class Counters:
    """How far a run is, see `StepMetrics`; all of it is in every checkpoint."""

    step: int = 0
    prompts: int = 0
    tokens: int = 0
    skipped: int = 0
    drift_flag: bool = False
    rollout_s: float = 0.0
    fast_s: float = 0.0
    slow_s: float = 0.0
    wall_s: float = 0.0


@dataclass(kw_only=True)
class SlowResult:
    """What a slow update, or a measurement in its place, says of the verifier, see `StepMetrics`."""

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
        drift_tokens: share of its greedy tokens that differ from the untouched model's, measured likewise.
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


DRIFT_WINDOW = 8
"""Steps at either end of a run whose accept rates the drift guard compares."""


class Baseline:
    """What REINFORCE subtracts from the rewards. It knows the past alone, so that it adds no bias.

    Args:
        kind: ema, exponential moving average of the batches' means, the first (the exception) its own past; mean, of
            all rewards before, 0 before the first; or none, 0.
        momentum: of the ema, 0 to below 1; the weight of the past.
    """

    def __init__(self, kind: str = "ema", momentum: float = 0.9) -> None:
        self.kind, self.momentum = kind, momentum
        self.value: float | None = None if kind == "ema" else 0.0
        self.count = 0

    def update(self, reward: float, count: int = 1) -> float:
        """Take in the mean of `count` rewards; return the average of the past before it, which is what to subtract."""
        before = reward if self.value is None else self.value
        self.count += count
        if self.kind == "ema":
            self.value = reward if self.value is None else self.momentum * self.value + (1 - self.momentum) * reward
        elif self.kind == "mean":
            self.value = before + (reward - before) * count / self.count
        return before


@dataclass
class Served:
    """What the served decoder did on the responses since the last step, pooled; in every checkpoint too."""

    drafted: int = 0
    accepted: int = 0
    committed: int = 0
    blocks: int = 0
    tokens: int = 0
    nll: float = 0.0
    wall_s: float = 0.0

    def add(self, rollout: Rollout, judgement: Judgement) -> None:
        """Take in a group of responses, whose first tokens are the prefill's and no block's."""
        self.drafted += len(judgement.records)
        self.accepted += judgement.records.num_accepted
        self.committed += rollout.num_tokens - len(rollout)
        self.blocks += sum(map(len, judgement.blocks))
        reach = torch.arange(rollout.verifier_confidence.shape[1], device=rollout.response_lens.device)
        inside = reach < rollout.response_lens[:, None]
        self.nll -= float(rollout.verifier_confidence[inside].log().sum())
        self.tokens += rollout.num_tokens


def drift_suspected(rates: Sequence[float], drift_kl: float, bound: float) -> bool:
    """Whether acceptance may be rising because the verifier got worse: it rose, and the verifier drifted too far.

    `rates` are those of the first and of the last `DRIFT_WINDOW` steps, before which there is no suspicion. `drift_kl`
    may be up to `bound`, in nats a token; 0 for anything.
    """
    full = len(rates) == 2 * DRIFT_WINDOW
    return full and fmean(rates[DRIFT_WINDOW:]) > fmean(rates[:DRIFT_WINDOW]) and 0 < bound < drift_kl


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
    table = pd.DataFrame(index=counts.index)
    table["questions"] = (drafted > 0).sum(axis=1)
    table["drafted"] = drafted.sum(axis=1)
    table["accepted"] = accepted.sum(axis=1)
    table["accept_rate"] = table.accepted / table.drafted
    table["low"] = rates.quantile(0.025, axis=1).to_numpy()
    table["high"] = rates.quantile(0.975, axis=1).to_numpy()
    rejects = table.drafted - table.accepted
    table["rejects"] = rejects / rejects.sum()
    return table
