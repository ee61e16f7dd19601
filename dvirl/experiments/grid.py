"""Studies of kind `grid`: every variant from every start, on the very same responses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from dvirl.config import DraftSettings, DVIConfig, SGPConfig
from dvirl.data.sources import chatterbot_prompts
from dvirl.data.stream import PromptSplit, PromptStream, load_prompts
from dvirl.experiments.figures import draft_cost, judge_answers, judge_verifier, thinned_curve
from dvirl.experiments.study import Prompts, Task, Values, VariantRows, free_memory, load_model
from dvirl.experiments.summary import Row
from dvirl.experiments.tape import Tape
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import from_mapping, narrowed
from dvirl.sgp import SGPTrainer
from dvirl.train_dvi import make_trainer

Start = tuple[Values, int]
"""The setting that names what variants start from, and the number of response tokens that it learned from."""


def grid(task: Task, folder: Path) -> VariantRows:
    """Every variant from a start, on the very same responses where the verifier does not change.

    Starts learn from prompts of their own, which come before those of the variants; nobody learns from the held-out
    ones.
    """
    early, late, held_out = _prompts(task)
    if not any(task.due()):
        return  # writing the prompts took the time that was left
    settings = task.study.starts[task.start]
    split = PromptSplit(PromptStream(early or late, task.seed), held_out)
    start, start_tokens = _begin(task.config(folder / "start", settings or {}), settings, split)
    tape = Tape()
    for name, variant in task.due():
        config = task.config(folder / "variants" / name, start, variant)
        split = PromptSplit(PromptStream(late, task.seed), held_out)
        row = learn(config, split, tape)
        row["figures"]["start_tokens"] = start_tokens
        yield name, [row]


def learn(config: DVIConfig, split: PromptSplit, tape: Tape) -> Row:
    """Train, and judge before and after; where the verifier does not change, on the responses that the tape holds.

    Returns:
        `figures` and `curve`. An empty tape is recorded.
    """
    trainer = make_trainer(config, split=split)
    # The slow update changes the deep layers, and with target "adapted" the verifier reads what lora_S makes.
    verifier_changes = config.slow_every > 0 or config.target == "adapted"
    answers = trainer.answer(split.held_out)
    before = judge_answers(trainer, answers)
    if not verifier_changes:
        trainer.answer = tape.playing() if tape.rollouts else tape.recording(trainer.answer)
    trainer.train(show_progress=False)
    if verifier_changes:
        answers = trainer.answer(split.held_out)
    figures: dict[str, Any] = {
        "accept_rate_before": before["accept_rate"],
        "agreement_before": before["agreement"],
        **judge_answers(trainer, answers),
    }
    if verifier_changes:
        figures |= judge_verifier(trainer)
    counters = trainer.counters
    figures |= {
        "draft_cost": draft_cost(trainer.model),
        "tokens": counters.tokens,
        "steps": counters.step,
        "wall_s": counters.wall_s,
        "drift_flag": counters.drift_flag,
        "skipped": counters.skipped,
    }
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
            config = task.config(kept)
            config = replace(config, num_prompts=config.num_prompts + reserved)
            split = load_prompts(config, load_model(config))
            kept.write_text(json.dumps([split.stream.prompts, split.held_out]))
    free_memory()
    prompts, held_out = json.loads(kept.read_text())
    if len(prompts) <= reserved:
        raise DvirlError(
            f"the source has {len(prompts)} prompts, and the starts take {reserved}; none is left"
        )
    return [prompts[:reserved], prompts[reserved:], held_out]


def _begin(config: DVIConfig, settings: Values | None, split: PromptSplit) -> Start:
    """Train what the variants start from."""
    if settings is None:
        return {}, 0
    if settings.get("sgp"):
        return _begin_by_sgp(config, settings["sgp"], split)
    trainer = make_trainer(config, split=split)
    trainer.train(show_progress=False)
    return {"start_from": str(newest(config.run_dir))}, trainer.counters.tokens


def _begin_by_sgp(config: DVIConfig, settings: Values, split: PromptSplit) -> Start:
    """The same by shallow-gradient fine-tuning on chatterbot-corpus' human replies, held-out openings left out."""
    shared = vars(narrowed(DraftSettings, config))
    loaded = load_model(config)
    records = [
        prompt
        for prompt in chatterbot_prompts()
        # Judged prompts are left out, as they are of every other start.
        if loaded.chat.encode(prompt.turns) not in split.held_out
    ]
    trainer = SGPTrainer(from_mapping(SGPConfig, {**shared, **settings}, "study"), loaded, records)
    passes = trainer.num_steps * trainer.config.batch_size / len(trainer.train_set)
    targets = sum(int((example[:, 1] >= 0).sum()) for example in trainer.train_set)
    result = trainer.train(show_progress=False)
    return {"start_from": result.checkpoint}, round(passes * targets)
