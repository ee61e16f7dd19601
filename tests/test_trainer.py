"""The loop as a whole, on a tiny model: it learns, logs, and can be put down and taken up."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import yaml
from conftest import tiny_loaded, tiny_split

from dvirl.config import SCHEDULES, DVIConfig
from dvirl.metrics import DRIFT_WINDOW, Baseline, StepMetrics, drift_suspected
from dvirl.rollout import generate, judge
from dvirl.runs import trackers
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_metrics
from dvirl.trainer import DVITrainer


def tiny_settings(**changes) -> DVIConfig:
    settings = dict(
        exit_layer=2,
        num_prompts=24,
        held_out=8,
        rollout_batch=8,
        judge_batch=2,
        max_new_tokens=16,
        fast_batch=3,
        slow_every=3,
        lora_rank=4,
        lora_alpha=8.0,
        draft_vocab=120,
        warmup_steps=2,
        threads=1,
        checkpoint_every=4,
        dtype="float32",
        device="cpu",
        tracker="none",
    )
    return DVIConfig(**{**settings, **changes})


def run(tmp_path, name="run", **changes):
    trainer = DVITrainer(tiny_settings(run_dir=str(tmp_path / name), **changes), tiny_loaded(), tiny_split())
    trainer.train(show_progress=False)
    return trainer, read_metrics(tmp_path / name / "metrics.jsonl")


@pytest.mark.parametrize("changes", [dict(slow_every=1), dict(slow_every=0, target="adapted")])
def test_responses_without_records_do_not_end_a_run(tmp_path, monkeypatch, changes):
    """Of the last ones nothing was accepted, and slow updates and measures of drift ask for the last one alone."""
    monkeypatch.setattr("dvirl.trainer.DRIFT_EVERY", 1)
    trainer, metrics = run(tmp_path, records="accepted", slow_batch=1, fast_batch=1, **changes)
    assert len(metrics) > 2 and trainer.finished


@pytest.mark.no_cover
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_runs_and_logs_every_step(tmp_path, schedule):
    trainer, metrics = run(tmp_path, schedule=schedule)
    assert list(metrics.columns) == [spec.name for spec in dataclasses.fields(StepMetrics)]
    assert metrics.step.tolist() == list(range(1, trainer.counters.step + 1))
    assert set(metrics.phase) <= ({"kl", "ramp"} if schedule == "kl_to_rl" else {schedule})
    assert metrics.accept_rate.between(0, 1).all() and (metrics.mat >= 1).all()
    assert metrics.tokens.is_monotonic_increasing and trainer.counters.prompts == 24
    slow = metrics.step[
        metrics.loss_slow.notna()
    ]  # left out where no draft of the latest responses was accepted
    assert len(slow) and not (slow % 3).any()
    shares = metrics.iloc[-1][["rollout_s", "fast_s", "slow_s"]].sum()
    assert 0 < shares <= metrics.iloc[-1].wall_s + 1e-6


@pytest.mark.parametrize(
    ("changes", "takes_time"),
    [({"slow_every": 3}, True), ({"slow_every": 0}, False), ({"slow_every": 0, "target": "adapted"}, True)],
)
def test_what_was_not_run_took_no_time(tmp_path, monkeypatch, changes, takes_time):
    monkeypatch.setattr("dvirl.trainer.DRIFT_EVERY", 3)
    trainer, _ = run(tmp_path, num_prompts=16, fast_batch=1, **changes)
    assert (trainer.counters.slow_s > 0) == takes_time and trainer.counters.step >= 3


@pytest.mark.no_cover
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_replay_unless_they_need_fresh_drafts(tmp_path, schedule):
    ends = [
        run(tmp_path, str(n), schedule=schedule, replay=n, num_prompts=8, fast_batch=1)[0] for n in (0, 1)
    ]
    same = [
        torch.equal(one, other) for one, other in zip(*(trainer.shallow for trainer in ends), strict=True)
    ]
    assert all(same) if schedule in ("reinforce", "masked_ce") else not any(same)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("changes", "most", "least"),
    [
        (dict(schedule="kl"), 0.3, 0.9),
        (dict(schedule="kl_to_rl"), 0.3, 0.9),
        (dict(schedule="kl", drafter="layer"), 0.6, 0.9),
        (dict(schedule="kl_to_rl", drafter="layer", feedback=True), 0.6, 0.9),
        (dict(schedule="kl", drafter="layer", feedback=True, recurrent=True), 0.6, 0.8),
        (dict(schedule="kl", kl_kind="reverse", kl_top_k=8), 0.3, 0.85),
        (dict(schedule="kl", kl_kind="js"), 0.3, 0.85),
        (dict(schedule="reinforce"), 0.3, 0.4),
        (dict(schedule="reinforce", kl_weight=0.2), 0.3, 0.7),
        (dict(schedule="exact_pg"), 0.3, 0.85),
        (dict(schedule="exact_pg", kl_weight=0.2, entropy_weight=0.05), 0.3, 0.9),
        (dict(schedule="ce"), 0.3, 0.9),
        (dict(schedule="masked_ce"), 0.3, 0.35),
        (dict(schedule="tv"), 0.3, 0.85),
    ],
)
def test_every_schedule_learns_prompts_that_come_again(tmp_path, changes, most, least):
    """Eight prompts, twenty times; a random model has no pattern that carries over to other prompts."""
    how = dict(num_prompts=160, lr_shallow=1e-2, slow_every=0, checkpoint_every=1000, **changes)
    config = tiny_settings(run_dir=str(tmp_path), **how)
    trainer = DVITrainer(config, tiny_loaded(), tiny_split(8))
    rollout = generate(trainer.loaded.model, trainer.split.stream.peek(8), 16, trainer.loaded.eos_ids)
    before = judge(trainer.model, rollout, config.decode).records.reward.mean()
    trainer.train(show_progress=False)
    after = judge(trainer.model, rollout, config.decode).records.reward.mean()
    assert before < most and after > least


def test_logged_acceptance_is_the_served_decoders(tmp_path):
    """On-policy: the first step's figure equals what the step-by-step decoder does with the untrained draft."""
    trainer = DVITrainer(
        tiny_settings(run_dir=str(tmp_path), fast_batch=1, judge_batch=8), tiny_loaded(), tiny_split()
    )
    prompts = trainer.split.stream.peek(8)
    blocks = [
        b for p in prompts for b in trainer.model.generate(p, 16, trainer.config.decode, (2,)).blocks[1:]
    ]
    trainer.judge(trainer.collect()[0])
    metrics = trainer.step()
    assert metrics.accept_rate == sum(b.num_accepted for b in blocks) / sum(b.num_drafted for b in blocks)
    assert metrics.mat == sum(b.block_len for b in blocks) / len(blocks)


def test_the_same_seed_gives_the_same_run(tmp_path):
    first, second = (run(tmp_path, name)[1] for name in ("a", "b"))
    timeless = [name for name in first.columns if not name.endswith("_s") and name != "tok_per_s"]
    assert first[timeless].equals(second[timeless])


def test_checkpoints_come_at_intervals_and_load_again(tmp_path):
    trainer, _ = run(tmp_path)
    folders = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert len(folders) > 1 and folders[-1] == f"step-{trainer.counters.step:06d}"
    other = DVITrainer(tiny_settings(run_dir=str(tmp_path / "other")), tiny_loaded(), tiny_split())
    other.load_checkpoint(newest(tmp_path / "run"))
    mine, its = trainer.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    state, loaded = trainer.state_dict(), other.state_dict()
    assert state["numbers"] == loaded["numbers"]
    assert state["tensors"].keys() == loaded["tensors"].keys()
    assert all(torch.equal(value, loaded["tensors"][name]) for name, value in state["tensors"].items())


def test_a_loaded_run_goes_on_as_the_first_would_have(tmp_path):
    """Two rollouts in one go, or one, a checkpoint, and the other in a new process's trainer."""
    whole = DVITrainer(tiny_settings(run_dir=str(tmp_path / "whole")), tiny_loaded(), tiny_split())
    losses = {}
    for part in range(2):
        for group in whole.collect():
            whole.judge(group)
            if whole.buffer.due(3):
                metrics = whole.step()
                losses[metrics.step] = (metrics.loss, metrics.accept_rate, metrics.baseline)
        if part == 0:
            folder, reached = whole.save_checkpoint(), whole.counters.step
    again = DVITrainer(tiny_settings(run_dir=str(tmp_path / "again")), tiny_loaded(), tiny_split())
    again.load_checkpoint(folder)
    for group in again.collect():
        again.judge(group)
        if again.buffer.due(3):
            metrics = again.step()
            assert (metrics.loss, metrics.accept_rate, metrics.baseline) == losses[metrics.step]
    assert again.counters.step == whole.counters.step > reached


def test_broken_checkpoints_are_named(tmp_path):
    trainer, _ = run(tmp_path)
    folder = newest(tmp_path / "run")
    (folder / "drafter.safetensors").write_bytes(b"garbage")
    with pytest.raises(DvirlError, match="drafter.safetensors is not what was written"):
        trainer.load_checkpoint(folder)
    (folder / "drafter.safetensors").unlink()
    with pytest.raises(DvirlError, match=r"not a complete checkpoint, drafter\.safetensors missing"):
        trainer.load_checkpoint(folder)
    with pytest.raises(DvirlError, match="no checkpoint there"):
        newest(tmp_path)
    other, _ = run(tmp_path, "rank", lora_rank=2)
    with pytest.raises(DvirlError, match="does not fit"):
        trainer.load_checkpoint(newest(tmp_path / "rank"))
    assert other.counters.step


def test_config_yaml_says_all(tmp_path):
    trainer, _ = run(tmp_path)
    content = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert content["config"] == dataclasses.asdict(trainer.config)
    assert (
        content["model"]["fingerprint"] == "sha256:tiny" and content["versions"]["torch"] == torch.__version__
    )


def test_a_run_folder_in_use_is_not_touched(tmp_path):
    run(tmp_path)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(DvirlError, match="already holds a run"):
        run(tmp_path)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_an_exit_layer_beyond_the_model_is_said():
    with pytest.raises(DvirlError, match="exit_layer is 9; this model of 4 layers takes 1 to 3"):
        DVITrainer(tiny_settings(exit_layer=9), tiny_loaded(), tiny_split())


def test_the_adapted_target_trains_and_its_drift_is_logged(tmp_path):
    _, metrics = run(tmp_path, target="adapted", slow_every=0, num_prompts=80, fast_batch=1)
    assert metrics.drift_kl.notna().any() and metrics.drift_kl.max() > 0
    assert metrics.loss_slow.isna().all()


def test_the_baseline_averages_the_past():
    baseline = Baseline("ema", 0.5)
    assert [baseline.update(r) for r in (0.2, 0.4, 0.0)] == pytest.approx([0.2, 0.2, 0.3])
    assert baseline.value == pytest.approx(0.15)
    baseline = Baseline("mean")
    assert [baseline.update(r, n) for r, n in ((0.5, 2), (1.0, 1), (0.0, 6), (0, 1))] == pytest.approx(
        [0, 1 / 2, 2 / 3, 2 / 9]
    )
    assert [Baseline("none").update(r) for r in (0.2, 0.4)] == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["mean", "none"])
def test_other_baselines_are_subtracted_and_come_back_with_a_checkpoint(tmp_path, kind):
    trainer, metrics = run(tmp_path, schedule="reinforce", baseline=kind)
    assert metrics.baseline.iloc[0] == 0.0
    if kind == "mean":
        assert trainer.baseline.value == pytest.approx(trainer.buffer.field("reward").mean().item())
        assert trainer.baseline.count == len(trainer.buffer)
    else:
        assert not metrics.baseline.any()
    other = DVITrainer(trainer.config, tiny_loaded(), tiny_split())
    other.load_checkpoint(newest(tmp_path / "run"))
    assert vars(other.baseline) == vars(trainer.baseline)


def test_drift_is_suspected_when_acceptance_rises_and_the_bound_is_passed():
    rising, falling = (
        [0.1] * DRIFT_WINDOW + [0.2] * DRIFT_WINDOW,
        [0.2] * DRIFT_WINDOW + [0.1] * DRIFT_WINDOW,
    )
    assert drift_suspected(rising, 0.06, 0.05)
    assert not drift_suspected(rising, 0.05, 0.05) and not drift_suspected(rising, 9.0, 0.0)
    assert not drift_suspected(falling, 0.06, 0.05) and not drift_suspected([0.1] * len(rising), 0.06, 0.05)
    assert not drift_suspected(rising[1:], 0.06, 0.05)


def drifting(tmp_path, name="run", **changes):
    """A draft that the verifier reads: it learns, and takes the verifier with it."""
    settings = dict(
        target="adapted", slow_every=0, num_prompts=160, lr_shallow=1e-2, schedule="ce", **changes
    )
    return run(tmp_path, name, **settings)


@pytest.mark.no_cover
def test_suspected_drift_is_flagged_from_then_on_and_said_once(tmp_path, capsys):
    trainer, metrics = drifting(tmp_path)
    flags = metrics.drift_flag.tolist()
    assert flags == sorted(flags) and flags[-1] and not any(flags[: 2 * DRIFT_WINDOW - 1])
    first = metrics[metrics.drift_flag].iloc[0]
    assert first.drift_kl > 0.05
    head, tail = metrics.accept_rate[:DRIFT_WINDOW], metrics.accept_rate[: first.step].tail(DRIFT_WINDOW)
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        f"step {first.step}: the acceptance rate rose from {head.mean():.3f} to {tail.mean():.3f} while the verifier "
        f"drifted {first.drift_kl:.3g} nats a token, past drift_bound 0.05; it may accept more because it got worse"
    ]
    other = DVITrainer(trainer.config, tiny_loaded(), tiny_split())
    other.load_checkpoint(newest(tmp_path / "run"))
    assert other.counters.drift_flag and other.rates == trainer.rates and len(other.rates) == 2 * DRIFT_WINDOW
    assert other.rates == [*head, *metrics.accept_rate.tail(DRIFT_WINDOW)]


@pytest.mark.no_cover
@pytest.mark.parametrize("changes", [dict(drift_bound=0.0), dict(target="base", slow_every=3)])
def test_the_guard_is_silent_when_off_or_when_the_verifier_stays(tmp_path, capsys, changes):
    _, metrics = run(
        tmp_path, **{**dict(target="adapted", slow_every=0, num_prompts=80, lr_shallow=1e-2), **changes}
    )
    assert not metrics.drift_flag.any() and metrics.drift_kl.notna().any() and not capsys.readouterr().err


def test_the_log_is_plain_json(tmp_path):
    run(tmp_path)
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        assert all(
            v is None or isinstance(v, str | int) or math.isfinite(v) for v in json.loads(line).values()
        )
    with pytest.raises(DvirlError, match="No such file"):
        read_metrics(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("{}\n{")
    with pytest.raises(DvirlError, match=r"bad\.jsonl:2"):
        read_metrics(tmp_path / "bad.jsonl")


# Trackers


def test_tensorboard_has_every_step_of_the_log(tmp_path):
    _, metrics = run(tmp_path, tracker="auto")
    (events,) = (tmp_path / "run/dvirl").glob("events.*")
    text = events.read_bytes()
    assert all(
        text.count(name.encode()) == len(metrics) for name in ("accept_rate", "drift_flag", "tok_per_s")
    )
    assert b"phase" not in text


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        DvirlError, match="tracker is 'wandb', which is not installed; installed are tensorboard"
    ):
        run(tmp_path, tracker="wandb")
    with pytest.raises(DvirlError, match="tracker is 'paper'; expected one of auto, none, all"):
        run(tmp_path, tracker="paper")
    assert not (tmp_path / "run").exists()
    assert trackers.installed_trackers("all") == trackers.installed_trackers("auto") == [
        "tensorboard"
    ] and not trackers.installed_trackers("none")
