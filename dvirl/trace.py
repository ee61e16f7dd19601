"""The log of a run: one JSON object a line, written at once, read as a table."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from dvirl.errors import DvirlError


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


def plain(values: Any) -> Any:
    """The same for JSON: numbers that it cannot spell become None."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def write_json(path: str | Path, values: Any) -> None:
    """Write a JSON file, its folder too if there is none; what is not a number is null."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(plain(values), indent=1) + "\n")


def log_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line to a JSONL file, complete on disk at once; numbers that JSON cannot spell become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(values)) + "\n")


def cut_log(path: Path, step: int) -> None:
    """Drop lines of later steps and a torn last one, which a run that goes on from that checkpoint writes anew."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= step), encoding="utf-8")


def parse_line(where: str, text: str) -> Any:
    """What a JSON text holds.

    Raises:
        DvirlError: if it is none; the message begins with `where`.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DvirlError(f"{where}: not valid JSON ({error})") from error


def read_metrics(path: str | Path) -> pd.DataFrame:
    """The table of a `metrics.jsonl`, one row a step.

    Raises:
        DvirlError: if there is no such file or a line is no JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DvirlError(f"{path}: {error.strerror}") from error
    rows = [parse_line(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]
    return pd.DataFrame(rows, columns=None if rows else [spec.name for spec in fields(StepMetrics)])
