"""Studies of kind `distill`: objectives of `dvirl distill`, from one drafter, on the same self-written text."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from dvirl.evaluation.agreement import measure_agreement, measure_blocks
from dvirl.evaluation.questions import question_sets
from dvirl.experiments.study import Study, Task, VariantRows, free_memory, load_model
from dvirl.models.loading import LoadedModel
from dvirl.rollout import Responses
from dvirl.runs.log import read_metrics
from dvirl.runs.settings import from_mapping, number
from dvirl.scale.corpus import answer, read_shard, without_repeats, write_conversations, write_shard
from dvirl.scale.distill import DistillConfig, Distiller

Figures = dict[str, float]


@dataclass(frozen=True)
class Objectives(DistillConfig):
    """Settings of such a study's runs. `start_from` has to be given; `responses_from` and `exclude` are its own."""

    num_prompts: int = number(256, 1)
    """Conversations that are begun, for all runs to learn from."""
    held_out: int = number(64, 1)
    """Conversations that are begun, to judge on; nobody learns from them."""
    max_new_tokens: int = number(128, 2)
    """Length limit of an answer."""
    text_seed: int = number(4242, 0, 2**63 - 2)
    """Of the conversations to learn from; the others have the next one."""
    text: str = ""
    """Folder in which they are kept; without one they are gone when the command ends."""
    questions: str = ""
    """Question files in Spec-Bench's schema, by commas, to judge on, too; text that overlaps them is left out."""


def settings_of(study: Study, seed: int, run_dir: Path, *changes: Mapping[str, Any]) -> Objectives:
    """The settings of one run: `extra`, then those of `Study.values`."""
    values = study.extra | study.values(seed, run_dir, *changes)
    config = from_mapping(Objectives, values, "study")
    return replace(config, answer_tokens=config.max_new_tokens)


@dataclass(frozen=True)
class Workbench:
    """What all runs of a process share.

    Attributes:
        trainer: its model and responses serve every run in turn.
        sets: answers to judge on, by name.
        before: figures of the drafter that all runs start from.
    """

    trainer: Distiller
    sets: dict[str, Responses]
    before: Figures


def distill(task: Task, folder: Path) -> VariantRows:
    """Go on with a drafter by each objective, in the order of the seed, over the same text.

    A row has the figures of the drafter on answers that nobody learned from, at the end and, as `…_before`, at the
    start. Base and variants: settings of `Objectives`.
    """
    study = task.study
    bench = _workbench(task.shared, settings_of(study, study.seeds[0], task.shared / "bench"))
    for name, variant in task.due():
        with tempfile.TemporaryDirectory(dir=folder) as run_dir:
            bench.trainer.begin_again(settings_of(study, task.seed, Path(run_dir), variant))
            yield name, [_learn(bench)]


@lru_cache(maxsize=1)
def _workbench(shared: Path, config: Objectives) -> Workbench:
    """Model, text and answers; the first task of a process makes them for the others."""
    loaded = load_model(config)
    text = Path(config.text or shared / "text")
    learned = _written(loaded, config, text / "learned", config.num_prompts, config.text_seed)
    held_out = _written(loaded, config, text / "held-out", config.held_out, config.text_seed + 1)
    sets = {"held_out": _unseen(held_out, learned)}
    files = [path for path in config.questions.split(",") if path]
    prompts = question_sets(loaded, files, 0, config.seed) if files else {}
    for path, asked in prompts.items():
        sets[Path(path).stem] = answer(loaded, asked, config.max_new_tokens, config.write_batch)
    config = replace(config, responses_from=str(text / "learned"), exclude=config.questions)
    trainer = Distiller(config, loaded)
    free_memory()
    return Workbench(trainer, sets, _judged(trainer, sets))


def _written(loaded: LoadedModel, config: Objectives, folder: Path, count: int, seed: int) -> Responses:
    """Conversations that the model holds with itself, from their folder or, the first time, written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "shard-00000.safetensors"
    with FileLock(f"{folder}.lock"):
        if not path.exists():
            conversations = write_conversations(
                loaded,
                count,
                seed,
                config.max_new_tokens,
                config.follow_up,
                config.write_batch,
                config.about_text,
            )
            write_shard(path, conversations)
    return read_shard(path)


def _unseen(responses: Responses, learned: Responses) -> Responses:
    """Responses to prompts that nobody learned from, each once."""
    seen = {tuple(prompt) for prompt in _prompts(learned)}
    distinct = without_repeats(responses)
    rows = [row for row, prompt in enumerate(_prompts(distinct)) if tuple(prompt) not in seen]
    return distinct.take(torch.tensor(rows, dtype=torch.long))


def _prompts(responses: Responses) -> list[list[int]]:
    return [
        row[:length].tolist() for row, length in zip(responses.tokens, responses.prompt_lens, strict=True)
    ]


def _judged(trainer: Distiller, sets: Mapping[str, Responses]) -> Figures:
    """The drafter as it is now, on every set; figures of the questions bear their name."""
    figures: Figures = {}
    for name, responses in sets.items():
        agreement = measure_agreement(trainer.model, responses)
        blocks = measure_blocks(trainer.model, responses, trainer.config.depths)
        found = {
            "agreement": agreement.rate,
            "tokens_a_block": blocks.tokens_a_block,
            "expected_tokens": blocks.expected_tokens,
            "ece": agreement.ece,
            "confidence": agreement.confidence,
        }
        for depth, rate in enumerate(blocks.by_depth, start=1):
            found[f"depth_{depth}"] = rate
        prefix = "" if name == "held_out" else f"{name}_"
        figures |= {f"{prefix}{figure}": value for figure, value in found.items()}
    return figures


def _learn(bench: Workbench) -> dict[str, Any]:
    """Train, and judge; figures and curve of the row."""
    trainer = bench.trainer
    trainer.train(show_progress=False)
    counters = trainer.counters
    figures = _judged(trainer, bench.sets)
    figures |= {f"{name}_before": value for name, value in bench.before.items()}
    figures |= {
        "tokens": counters.tokens,
        "steps": counters.step,
        "wall_s": counters.wall_s,
        "skipped": counters.skipped,
    }
    log = read_metrics(trainer.log)
    lines = log[log.phase == "train"]
    return {"figures": figures, "curve": lines[["tokens", "loss", "agreement"]].to_dict("list")}
