"""What a study says of a run: the draft on answers, the verifier on human replies, the run's curve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dvirl.data.sources import chatterbot_prompts
from dvirl.evaluation.agreement import measure_agreement
from dvirl.evaluation.measure import judge_replies
from dvirl.metrics import STEP_COLUMNS, Served
from dvirl.rollout import Rollout, judge
from dvirl.runs.log import read_metrics, to_plain
from dvirl.trainer import DVITrainer
from kangaroo.kangaroo_model import KangarooModel

CURVE_POINTS = 40
"""Points that a recorded curve is thinned to, each the mean of the steps around it."""
REPLIES = 64
"""Human replies on which the verifier's perplexity is measured."""


def draft_cost(model: KangarooModel) -> float:
    """Weights that one drafted token reads, as a share of those of one token of the whole model."""
    base = model.base_model

    def count(*modules: torch.nn.Module) -> int:
        named = torch.nn.ModuleList(modules).named_parameters()
        # LoRA is merged for serving, and costs nothing then.
        return sum(parameter.numel() for name, parameter in named if "lora_" not in name)

    draft = count(*base.model.layers[: base.exit_layer], model.adapter_model) + model.exit_proj.weight.numel()
    whole = count(*base.model.layers, base.model.norm) + base.lm_head.weight.numel()
    return draft / whole


def judge_answers(trainer: DVITrainer, rollout: Rollout) -> dict[str, float]:
    """The draft as it is now, on the verifier's answers."""
    served = Served()
    served.add(rollout, judge(trainer.model, rollout, trainer.config.decode))
    agreement = measure_agreement(trainer.model, rollout.stored())
    return {
        "accept_rate": served.accept_rate,
        "mat": served.mat,
        "agreement": agreement.rate,
        "confidence": agreement.confidence,
        "ece": agreement.ece,
        "covered": agreement.covered,
    }


def judge_verifier(trainer: DVITrainer, batch: int = 16, replies: int = REPLIES) -> dict[str, float]:
    """Perplexity of human replies under the verifier, and its drift from the untouched model on them.

    Returns:
        `metrics.verifier_figures` of the first `replies` conversations of chatterbot-corpus, in the chat format.
    """
    return judge_replies(trainer.loaded, chatterbot_prompts()[:replies], trainer.config.target, batch)


TRAINED_EXITS = {"none": "trained head (H200)", "layer": "trained head and layer (H200)"}
"""How the drafters of the study of exit layers are named in figures."""


def trained_exits(study: Mapping[str, Any], figure: str) -> pd.DataFrame:
    """A figure of the recorded study of exit layers over the exit layer, for `plots.curves`.

    Args:
        study: `study-exit-layers`, as `report.read_recorded` gives it.
        figure: "agreement" or "accept_rate".

    Returns:
        `name`, `x`, `y`, and `low` and `high`, a standard deviation over seeds away.
    """
    rows = []
    for variant, figures in study["summary"].items():
        layer, drafter = variant.removeprefix("untrained/").split(", ")
        if drafter in TRAINED_EXITS:
            mean, std = figures[figure]["mean"], figures[figure]["std"]
            rows.append((TRAINED_EXITS[drafter], int(layer), mean, mean - std, mean + std))
    return pd.DataFrame(rows, columns=["name", "x", "y", "low", "high"])


def thinned_curve(run_dir: Path) -> dict[str, list[float | None]]:
    """A run's curve: acceptance rate, reward, KL and drift over response tokens, in a few dozen means."""
    metrics = read_metrics(run_dir / "metrics.jsonl", STEP_COLUMNS)
    bins = metrics.index * CURVE_POINTS // max(1, len(metrics))
    shown = metrics[["tokens", "accept_rate", "reward", "loss_kl", "drift_kl"]].astype(float)
    means = shown.groupby(bins).mean().round(5)
    return dict(to_plain(means.to_dict("list")))
