"""Studies of kind `grid`: every variant from every start, on the very same responses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from dvirl.config import DraftSettings, DVIConfig, SGPConfig
from dvirl.data.sources import chatterbot_prompts
from dvirl.data.stream import PromptSplit, PromptStream, load_prompts
from dvirl.experiments.figures import draft_cost, judge_answers, judge_verifier, thinned_curve
from dvirl.experiments.study import Prompts, Row, Task, free_memory, load_model, new_trainer
from dvirl.experiments.tape import Tape
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import from_mapping
from dvirl.sgp import SGPTrainer


def grid(task: Task, folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """Every variant from a start, on the very same responses where the verifier does not change.

    Starts learn from prompts of their own, which come before those of the variants; nobody learns from the held-out
    ones.
    """
    study = task.study
    settings = study.starts[task.start]
    early, late, held_out = _prompts(task)
    tape = Tape()
    begun: tuple[dict[str, Any], int] | None = None
    for name, variant in task.due():
        if begun is None:
            split = PromptSplit(PromptStream(early or late, task.seed), held_out)
            begun = _begin(study.config(task.seed, folder / "start", settings or {}), settings, split)
        start_settings, start_tokens = begun
        config = study.config(task.seed, folder / "variants" / name, start_settings, variant)
        row = learn(config, PromptSplit(PromptStream(late, task.seed), held_out), tape)
        row["figures"]["start_tokens"] = start_tokens
        yield name, [row]


def learn(config: DVIConfig, split: PromptSplit, tape: Tape) -> Row:
    """Train, and judge before and after; where the verifier does not change, on the responses that the tape holds.

    Returns:
        `figures` and `curve`. An empty tape is recorded.
    """
    trainer = new_trainer(config, split)
    verifier_changes = config.slow_every > 0 or config.target == "adapted"
    answers = trainer.answer(split.held_out)
    before = judge_answers(trainer, answers)
    if not verifier_changes:
        trainer.answer = tape.playing() if tape.rollouts else tape.recording(trainer.answer)
    trainer.train(show_progress=False)
    if verifier_changes:
        answers = trainer.answer(split.held_out)
    figures: dict[str, Any] = {f"{name}_before": before[name] for name in ("accept_rate", "agreement")}
    figures |= judge_answers(trainer, answers)
    figures |= judge_verifier(trainer) if verifier_changes else {}
    counters = trainer.counters
    figures |= {"draft_cost": draft_cost(trainer.model), "tokens": counters.tokens, "steps": counters.step}
    figures |= {"wall_s": counters.wall_s, "drift_flag": counters.drift_flag, "skipped": counters.skipped}
    return {"figures": figures, "curve": thinned_curve(Path(config.run_dir))}


def _prompts(task: Task) -> list[Prompts]:
    """Prompts for the starts, for the variants, and held out. The first task of a seed reads or writes them for all."""
    study = task.study
    kept = task.shared / f"prompts-{task.seed}.json"
    reserved = 0
    for settings in study.starts.values():
        if settings and "sgp" not in settings:
            reserved = max(reserved, {**study.base, **settings}["num_prompts"])
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            config = study.config(task.seed, kept)
            split = load_prompts(
                replace(config, num_prompts=config.num_prompts + reserved), load_model(config)
            )
            kept.write_text(json.dumps([split.stream.prompts, split.held_out]))
    free_memory()
    prompts, held_out = json.loads(kept.read_text())
    if len(prompts) <= reserved:
        raise DvirlError(
            f"the source has {len(prompts)} prompts, and the starts take {reserved}; none is left"
        )
    return [prompts[:reserved], prompts[reserved:], held_out]


def _begin(
    config: DVIConfig, settings: Mapping[str, Any] | None, split: PromptSplit
) -> tuple[dict[str, Any], int]:
    """Train what the variants start from; the setting that names it, and the response tokens that it learned from."""
    if settings is None:
        return {}, 0
    if settings.get("sgp"):
        return _begin_by_sgp(config, settings["sgp"], split)
    trainer = new_trainer(config, split)
    trainer.train(show_progress=False)
    return {"start_from": str(newest(config.run_dir))}, trainer.counters.tokens


def _begin_by_sgp(
    config: DVIConfig, settings: Mapping[str, Any], split: PromptSplit
) -> tuple[dict[str, Any], int]:
    """The same by shallow-gradient fine-tuning on chatterbot-corpus' human replies, held-out openings left out."""
    shared = {spec.name: getattr(config, spec.name) for spec in fields(DraftSettings)}
    loaded = load_model(config)
    records = [
        prompt for prompt in chatterbot_prompts() if loaded.chat.encode(prompt.turns) not in split.held_out
    ]
    trainer = SGPTrainer(from_mapping(SGPConfig, {**shared, **settings}, "study"), loaded, records)
    passes = trainer.num_steps * trainer.config.batch_size / len(trainer.train_set)
    targets = sum(int((example[:, 1] >= 0).sum()) for example in trainer.train_set)
    return {"start_from": trainer.train(show_progress=False).checkpoint}, round(passes * targets)
