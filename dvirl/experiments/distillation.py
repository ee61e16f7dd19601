"""Studies of kind `distill`: objectives of `dvirl distill`, from one drafter, on the same self-written text."""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from dvirl.evaluation.agreement import measure_agreement, measure_blocks
from dvirl.evaluation.questions import MeasureSettings, question_sets
from dvirl.experiments.study import Study, Task, Values, VariantRows, load_model
from dvirl.models.drafters import drafter_folder
from dvirl.rollout import Responses, join
from dvirl.runs.settings import from_mapping, number
from dvirl.scale.corpus import answer, without_repeats
from dvirl.scale.distill import DistillConfig, Distiller, conversations

TEXT_SEED = 4242
"""Of the conversations to learn from; those to judge on have the next one."""
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
    text: str = ""
    """Folder in which they are kept; without one they are gone when the command ends."""
    questions: str = ""
    """Question files in Spec-Bench's schema, by commas, to judge on, too; text that overlaps them is left out."""


def settings_of(study: Study, seed: int, run_dir: Path, variant: Values) -> Objectives:
    """The settings of one run: `extra`, `base`, then the variant's."""
    values = {**study.extra, **study.base, **variant, "seed": seed, "run_dir": str(run_dir)}
    config = from_mapping(Objectives, values, "study")
    return replace(config, answer_tokens=config.max_new_tokens)


def distill(task: Task, folder: Path) -> VariantRows:
    """Go on with a drafter by each objective, in the order of the seed, over the same text.

    A row has the figures of the drafter on answers that nobody learned from, at the end and, as `…_before`, at the
    start. Base and variants: settings of `Objectives`.
    """
    study = task.study
    config = settings_of(study, study.seeds[0], task.shared / "bench", {})
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    for name, variant in task.due():
        trainer, sets, before = _workbench(task.shared, config, device)
        trainer.begin_again(settings_of(study, task.seed, folder / name, variant))
        trainer.train(show_progress=False)
        yield name, [{"figures": _judged(trainer, sets) | before | asdict(trainer.counters)}]


@lru_cache(maxsize=1)
def _workbench(
    shared: Path, config: Objectives, device: int
) -> tuple[Distiller, dict[str, Responses], Figures]:
    """What all tasks of a process on a device share.

    Returns:
        A trainer, whose model and responses serve every run in turn; answers to judge on, by the beginning of their
        figures' names; and the figures of the drafter that all runs start from.
    """
    drafter_folder(config.start_from)  # a missing one is said now, and not when the text is written
    loaded = load_model(config)
    files = [path for path in config.questions.split(",") if path]
    how = MeasureSettings(questions=files, max_new_tokens=config.max_new_tokens)
    asked = question_sets(loaded, how) if files else {}
    text = Path(config.text or shared / "text")
    learned = conversations(
        loaded, config, text / "learned/shard-00000.safetensors", config.num_prompts, TEXT_SEED
    )
    held_out = conversations(
        loaded, config, text / "held-out/shard-00000.safetensors", config.held_out, TEXT_SEED + 1
    )
    # Of prompts that are in both, the first counts.
    distinct = without_repeats(join([learned, held_out]))
    sets = {"": distinct.take(slice(len(without_repeats(learned)), None))}
    for path, prompts in asked.items():
        sets[f"{Path(path).stem}_"] = answer(loaded, prompts, config.max_new_tokens, config.write_batch)
    trainer = Distiller(replace(config, responses_from=f"{text}/learned", exclude=config.questions), loaded)
    before = {f"{name}_before": value for name, value in _judged(trainer, sets).items()}
    return trainer, sets, before


def _judged(trainer: Distiller, sets: dict[str, Responses]) -> Figures:
    """The drafter as it is now, on every set of answers."""
    figures: Figures = {}
    for name, responses in sets.items():
        agreement = measure_agreement(trainer.model, responses)
        blocks = measure_blocks(trainer.model, responses, trainer.config.depths)
        figures |= {
            f"{name}tokens_a_block": blocks.tokens_a_block,
            f"{name}expected_tokens": blocks.expected_tokens,
            f"{name}ece": agreement.ece,
            f"{name}confidence": agreement.confidence,
        }
        for depth, rate in enumerate(blocks.by_depth, start=1):
            figures[f"{name}depth_{depth}"] = rate
        figures[f"{name}agreement"] = agreement.rate
    return figures
